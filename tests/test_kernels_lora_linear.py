"""A frozen linear layer with LoRA beyond its cases: gradients, what is kept, dropping, compilers, strides, errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels._case import EPSILON, assert_within, rounding
from peftkit_kernels.lora_linear import frozen_linear, lora_linear, reference


def problem(rows, width, out, rank, dtype=torch.float64, factor=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(kind, *shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    factor = factor or dtype
    return (
        normal(dtype, rows, width),
        normal(dtype, out, width),
        normal(dtype, out),
        normal(factor, rank, width),
        normal(factor, out, rank),
    )


def trained(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients(rows, dropout):
    x, weight, bias, down, up = problem(rows, 4, 3, 2)
    seed = torch.tensor([17])

    def call(x, bias, down, up):
        return lora_linear(x, weight, bias, down, up, 1.5, dropout=dropout, seed=seed)

    assert torch.autograd.gradcheck(call, tuple(trained(x, bias, down, up)), fast_mode=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    rank=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    factor=st.sampled_from([torch.float32, torch.bfloat16]),
    turned=st.booleans(),
    every=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_output_and_gradients_are_those_of_double(rows, width, out, rank, dtype, factor, turned, every, seed):
    x, weight, bias, down, up = problem(rows * every, width, out, rank, dtype, factor, seed)
    if turned:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    x = x[::every]
    mine, theirs = trained(x, bias, down, up), trained(*(t.double() for t in (x, bias, down, up)))
    grad = torch.randn(rows, out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    found = lora_linear(mine[0], weight, mine[1], mine[2], mine[3], 0.5)
    wanted = theirs[0] @ weight.double().t() + theirs[1] + 0.5 * theirs[0] @ theirs[2].t() @ theirs[3].t()
    found.backward(grad)
    wanted.backward(grad.double())
    # Five roundings at most to the dtype, of numbers whose root mean square is this; the exact bounds are in cases.py.
    for name, a, b in (("output", found, wanted), *zip(("x", "bias", "down", "up"), mine, theirs, strict=True)):
        a, b = (a, b) if name == "output" else (a.grad, b.grad)
        scale = b.detach().norm() / max(b.numel(), 1) ** 0.5 + 1
        coarse = max(torch.finfo(dtype).eps, torch.finfo(factor).eps if name in ("down", "up") else 0.0)
        assert ((a.double() - b).abs() <= 60 * coarse * scale).all(), name


def test_nothing_but_the_input_is_kept():
    x, weight, bias, down, up = problem(64, 32, 48, 4, torch.bfloat16, torch.float32)
    x.requires_grad_()
    down.requires_grad_()
    up.requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    for dropout in (0.0, 0.5):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lora_linear(x, weight, bias, down, up, dropout=dropout)
        besides = sum(kept.values()) - sum(t.nbytes for t in (weight, down, up))
        assert besides == x.nbytes + (8 if dropout else 0), "bytes of the input and of the seed"


def test_dropping_is_a_function_of_the_seed_and_keeps_the_mean():
    x = torch.ones(400, 250)
    weight, down, up = torch.zeros(1, 250), torch.full((1, 250), 1 / 250), torch.ones(1, 1)
    seeds = [torch.tensor([s]) for s in (3, 3, 4)]
    first, again, other = (lora_linear(x, weight, None, down, up, dropout=0.3, seed=s) for s in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 100,000 draws: six standard errors of the mean.
    assert abs(float(first.mean()) - 1) < 6 * (0.3 / 0.7 / 1e5) ** 0.5
    mask = reference.kept(x.shape, 0.3, seeds[0]).double()
    assert abs(float(mask.mean()) - 0.7) < 6 * (0.3 * 0.7 / 1e5) ** 0.5
    for step in (1, 2, 3, 4, 250):
        flat = mask.reshape(-1) - 0.7
        assert abs(float((flat[step:] * flat[:-step]).mean())) < 6 * 0.21 / 1e5**0.5, f"neighbours {step} apart"


def test_torchs_seed_decides_what_is_dropped():
    x, weight, bias, down, up = problem(9, 30, 4, 2, torch.float32)

    def call():
        torch.manual_seed(5)
        return lora_linear(x, weight, bias, down, up, dropout=0.5)

    assert torch.equal(call(), call())


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_ends_of_dropping(dropout):
    x, weight, bias, down, up = problem(9, 30, 4, 2, torch.float32)
    found = lora_linear(x, weight, bias, down, up, dropout=dropout)
    wanted = x @ weight.t() + bias + (1 - dropout) * x @ down.t() @ up.t()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_to_one_graph(dropout):
    x, weight, bias, down, up = problem(12, 16, 24, 4, torch.bfloat16, torch.float32)
    seed = torch.tensor([9])

    def step(x, down, up):
        return lora_linear(x, weight, bias, down, up, 2.0, dropout=dropout, seed=seed)

    mine, theirs = trained(x, down, up), trained(x, down, up)
    wanted, found = step(*theirs), torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    assert torch.equal(wanted, found)
    wanted.sum().backward()
    found.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


def test_autocast_casts_as_linear_does():
    x, weight, bias, down, up = problem(12, 16, 24, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lora_linear(x, weight, bias, down, up)
    narrow = [t.bfloat16() for t in (x, weight, bias)]
    assert inside.dtype is torch.bfloat16
    assert torch.equal(inside, lora_linear(*narrow, down, up))


def test_meta_and_leading_dimensions():
    x, weight, bias, down, up = problem(12, 16, 24, 4, torch.bfloat16, torch.float32)
    assert lora_linear(*(t.to("meta") for t in (x, weight, bias, down, up))).shape == (12, 24)
    deep = lora_linear(x.view(2, 3, 2, 16), weight, bias, down, up)
    assert torch.equal(deep.view(12, 24), lora_linear(x, weight, bias, down, up))
    assert lora_linear(x[8], weight, bias, down, up).shape == (24,)


def test_several_threads_get_the_same():
    x, weight, bias, down, up = problem(20, 64, 48, 8, torch.bfloat16, torch.float32)
    seed = torch.tensor([1])
    wanted = lora_linear(x, weight, bias, down, up, dropout=0.2, seed=seed)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: lora_linear(x, weight, bias, down, up, dropout=0.2, seed=seed), range(8)))
    assert all(torch.equal(f, wanted) for f in found)


X, W, B, D, U = torch.ones(5, 4), torch.ones(3, 4), torch.ones(3), torch.ones(2, 4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, B, B, D, U), {}, ValueError, "and matrices"),
        ((X.t(), W, B, D, U), {}, ValueError, r"\(out, in\) = \(3, 4\)"),
        ((X, W, B[:2], D, U), {}, ValueError, r"expected bias \(3,\), found \(2,\)"),
        ((X, W.bfloat16(), B, D, U), {}, TypeError, "weight torch.bfloat16; cast the smaller"),
        ((X, W, B, D.int(), U), {}, TypeError, "down is torch.int32"),
        ((X, W, B, D.double(), U.double()), {}, TypeError, "float64 with float64 only"),
        ((X, W, B, D, U.bfloat16()), {}, TypeError, "of one dtype"),
        ((X, W, B, D.to("meta"), U), {}, ValueError, "down on meta"),
        ((X, W.clone().requires_grad_(), B, D, U), {}, ValueError, "the weight is frozen here"),
        ((X, W, B, D, U), {"dropout": 1.5}, ValueError, "0 <= dropout <= 1, found 1.5"),
        ((X, W, B, D, U), {"dropout": 0.5, "seed": torch.ones(1)}, ValueError, "of int64"),
    ],
)
def test_refuses_what_does_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=message):
        lora_linear(*arguments, **options)


def bound_of(x, weight, bias, down, up, scale, terms):
    """How far the result may be off: one rounding of x downᵀ to the dtype of x, and those of sums in float32."""
    size = x.double().abs()
    of_base = size @ weight.double().abs().t() + bias.double().abs()
    of_update = abs(scale) * (size @ down.double().abs().t()) @ up.double().abs().t()
    return terms * EPSILON[torch.float32] * (of_base + of_update) + 4 * EPSILON[x.dtype] * of_update


# Groups of rows, tiles of the weight and parts of its columns that are and are not whole.
@pytest.mark.parametrize("rows", [1, 5, 7, 13, 19, 25, 32, 33])
@pytest.mark.parametrize(("out", "width"), [(37, 2112), (3, 32), (64, 4096)])
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16])
def test_few_bfloat16_rows_are_those_of_double(rows, out, width, factor):
    x, weight, bias, down, up = problem(rows, width, out, 5, torch.bfloat16, factor, rows)
    wide = [t.double() for t in (x, weight, bias, down, up)]
    wanted = torch.nn.functional.linear(*wide[:3]) + 1.5 * (wide[0] @ wide[3].t()) @ wide[4].t()
    bound = bound_of(x, weight, bias, down, up, 1.5, width + 16)
    slack = bound + 2 * rounding(torch.bfloat16, wanted.abs() + bound)
    assert_within(lora_linear(x, weight, bias, down, up, 1.5), wanted, slack, "lora_linear")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 64), (0, 64), (2, 3, 64), (64,)])
def test_frozen_linear_is_the_layer(shape, bias):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weight, offset, *_ = problem(1, 64, 37, 1, torch.bfloat16)
    wanted = torch.nn.functional.linear(x.double(), weight.double(), offset.double() if bias else None)
    found = frozen_linear(x, weight, offset if bias else None)
    size = x.double().abs() @ weight.double().abs().t() + offset.double().abs()
    bound = 80 * EPSILON[torch.float32] * size
    assert found.dtype == torch.bfloat16
    assert_within(found, wanted, bound + rounding(torch.bfloat16, wanted.abs() + bound), "frozen_linear")


def test_frozen_linear_wants_a_matrix():
    with pytest.raises(ValueError, match=r"frozen_linear: expected a matrix \(out, in\), found \(4,\)"):
        frozen_linear(torch.zeros(4), torch.zeros(4))
