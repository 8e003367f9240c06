"""An 8-bit linear layer beyond its cases: gradients, packing, bitsandbytes, compilers, strides, errors, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.int8_linear import int8_linear, pack_int8, quantize_rows, reference


def problem(rows, width, out, rank=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = wide_dtype(dtype)
    codes, scales = quantize_rows(normal(out, width).to(wide))
    return (
        normal(rows, width).to(dtype),
        codes,
        scales,
        normal(out).to(dtype),
        normal(rank, width).to(wide),
        normal(out, rank).to(wide),
    )


def exact(x, codes, scales, bias, down, up, scale, dynamic=True):
    own = x.double()
    if dynamic:
        rows, row_scale = reference.quantize_rows(x, False)
        own = rows.double() * row_scale.double()[:, None]
    base = own @ (codes.double() * scales.double()[:, None]).t() + bias.double()
    return base + scale * x.double() @ down.double().t() @ up.double().t()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 200),
    out=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dynamic=st.booleans(),
    packed=st.booleans(),
    turned=st.booleans(),
    every=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_output_is_that_of_exact_sums(rows, width, out, dtype, dynamic, packed, turned, every, seed):
    x, codes, scales, bias, down, up = problem(rows * every, width, out, 3, dtype, seed)
    x = (x.t().contiguous().t() if turned else x)[::every]
    pack = pack_int8(codes) if packed else None
    found = int8_linear(x, codes, scales, bias, down, up, 0.5, dynamic=dynamic, packed=pack)
    wanted = exact(x, codes, scales, bias, down, up, 0.5, dynamic)
    # The exact bounds are in cases.py; here many roundings of numbers of about this size.
    size = wanted.norm() / max(wanted.numel(), 1) ** 0.5 + (3 * width) ** 0.5 + 1
    assert ((found.double() - wanted).abs() <= 30 * torch.finfo(dtype).eps * size).all()


def test_packed_gives_what_plain_gives():
    x, codes, scales, bias, _, _ = problem(40, 130, 50, dtype=torch.bfloat16)
    pack = pack_int8(codes)
    if pack is None:
        pytest.skip("torch has no quantized product on this processor")
    assert torch.equal(int8_linear(x, codes, scales, bias, packed=pack), int8_linear(x, codes, scales, bias))


def test_codes_are_rounded_to_even_and_a_row_of_zeros_stays():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5, [1e-45, -1e-45, 0.0, 0.0, 0.0]])
    codes, scales = quantize_rows(x)
    assert codes[0].tolist() == [127, 0, 2, -2, -127]
    assert codes[1].tolist() == [0] * 5
    assert scales.tolist()[:2] == [1.0, 0.0]
    assert int8_linear(x, codes[:1], scales[:1])[1:].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("rows", [1, 6])
def test_gradients_are_those_of_the_unrounded_layer(rows):
    x, codes, scales, bias, down, up = problem(rows, 5, 4, 2, torch.float64)
    mine = [t.clone().requires_grad_() for t in (x, bias, down, up)]
    theirs = [t.clone().requires_grad_() for t in (x, bias, down, up)]
    grad = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    int8_linear(mine[0], codes, scales, *mine[1:], 0.5).backward(grad)
    exact(theirs[0], codes, scales, *theirs[1:], 0.5, dynamic=False).backward(grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.autograd.gradcheck(
        lambda x, bias, down, up: int8_linear(x, codes, scales, bias, down, up, 0.5, dynamic=False), tuple(mine)
    )


@pytest.mark.filterwarnings("ignore")
def test_takes_bitsandbytes_codes_and_gives_its_output():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.eval()  # in training it multiplies with the dequantized weight
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = layer(x)
    codes, absmax = layer.state.CB, layer.state.SCB
    ours = int8_linear(x, codes, absmax.float() / 127)
    # Its codes of x are those of x in float16, so that some differ by one, which is about 0.7 percent of a row.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    exactly = x @ weight.t()
    assert (ours - exactly).norm() <= 1.05 * (theirs - exactly).norm(), "less exact than theirs"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_to_one_graph(dynamic):
    x, codes, scales, bias, down, up = problem(12, 16, 24, dtype=torch.bfloat16)
    pack = pack_int8(codes)

    def step(x, down, up):
        return int8_linear(x, codes, scales, bias, down, up, 2.0, dynamic=dynamic, packed=pack)

    mine, theirs = ([t.clone().requires_grad_() for t in (x, down, up)] for _ in range(2))
    wanted, found = step(*theirs), torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    assert torch.equal(wanted, found)
    wanted.sum().backward()
    found.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


def test_autocast_meta_and_leading_dimensions():
    x, codes, scales, bias, down, up = problem(12, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        inside = int8_linear(x, codes, scales, bias, down, up)
    assert torch.equal(inside, int8_linear(x.bfloat16(), codes, scales, bias.bfloat16(), down, up))
    assert int8_linear(*(t.to("meta") for t in (x, codes, scales, bias, down, up))).shape == (12, 24)
    deep = int8_linear(x.view(3, 4, 16), codes, scales, bias)
    assert torch.equal(deep.view(12, 24), int8_linear(x, codes, scales, bias))


def test_several_threads_get_the_same():
    x, codes, scales, bias, down, up = problem(20, 70, 48, dtype=torch.bfloat16)
    wanted = int8_linear(x, codes, scales, bias, down, up)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: int8_linear(x, codes, scales, bias, down, up), range(8)))
    assert all(torch.equal(f, wanted) for f in found)


X, W, S, D, U = torch.ones(5, 4), torch.ones(3, 4).char(), torch.ones(3), torch.ones(2, 4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.t(), W, S), ValueError, r"expected x \(\.\.\., in\) and weight \(out, in\)"),
        ((X, W, S[:2]), ValueError, r"expected weight_scale \(3,\)"),
        ((X, W, S, S[:1]), ValueError, r"expected bias \(3,\)"),
        ((X, W, S, None, D), ValueError, "expected down and up, or neither"),
        ((X, W, S, None, D.t(), U), ValueError, r"\(out, in\) = \(3, 4\)"),
        ((X, W.float(), S), TypeError, "weight is torch.float32; expected int8"),
        ((X.int(), W, S), TypeError, "x is torch.int32"),
        ((X, W, S.double()), TypeError, "weight_scale is torch.float64"),
        ((X, W, S, S.half()), TypeError, "bias torch.float16"),
        ((X, W, S, None, D.double(), U.double()), TypeError, "float64 goes with float64 only"),
        ((X, W, S, None, D, U.half()), TypeError, "of one dtype"),
        ((X, W, S.to("meta")), ValueError, "weight_scale on meta"),
    ],
)
def test_refuses_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        int8_linear(*arguments)
