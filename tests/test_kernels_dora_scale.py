"""The scale of DoRA's rows beyond its cases: gradients, compilers, cancellation, strides, errors, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels.dora_scale import dora_norms, dora_scale, row_squares


def problem(out, width, rank, dtype=torch.float32, size=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, down, up = (torch.randn(*s, generator=generator) for s in ((out, width), (rank, width), (out, rank)))
    if dtype is torch.float64:
        weight, down, up = weight.double(), down.double(), up.double()
    return weight.to(dtype), down, size * up


def exact(weight, down, up, scale):
    return (weight.double() + scale * (up.double() @ down.double())).norm(dim=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 23),
    width=st.integers(1, 1100),
    rank=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    size=st.sampled_from([0.0, 0.05, 1.0, 300.0]),
    transposed=st.booleans(),
    every=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_norms_are_within_a_hundred_thousandth(out, width, rank, dtype, size, transposed, every, seed):
    weight, down, up = problem(out * every, width, rank, dtype, size, seed)
    if transposed:
        weight, up = weight.t().contiguous().t(), up.t().contiguous().t()
    weight, up = weight[::every], up[::every]
    wanted = exact(weight, down, up, 0.7)
    found = dora_norms(weight, row_squares(weight), down, up, 0.7)
    assert ((found.double() - wanted).abs() <= 1e-5 * wanted).all()


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-6])
def test_norms_are_within_a_hundred_thousandth_where_the_update_cancels_the_weight(left):
    weight, down, up = problem(9, 700, 6, size=1.0)
    weight = (left * weight.double() - up.double() @ down.double()).float()
    wanted = exact(weight, down, up, 1.0)
    found = dora_norms(weight, row_squares(weight), down, up)
    assert ((found.double() - wanted).abs() <= 1e-5 * wanted).all()


def test_gradient_of_the_magnitude():
    weight, down, up = problem(5, 7, 2, torch.float64)
    squared, magnitude = row_squares(weight), torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: dora_scale(weight, squared, down, up, m, 0.5), magnitude)


def test_no_gradient_reaches_the_factors():
    weight, down, up = problem(5, 7, 2)
    down.requires_grad_()
    magnitude = torch.ones(5, requires_grad=True)
    dora_scale(weight, row_squares(weight), down, up, magnitude).sum().backward()
    assert down.grad is None
    assert torch.allclose(magnitude.grad, 1 / dora_norms(weight, row_squares(weight), down, up))


def test_compiles_to_one_graph():
    weight, down, up = problem(6, 40, 3, torch.bfloat16)
    squared, magnitude = row_squares(weight), torch.ones(6, requires_grad=True)

    def step(magnitude):
        return dora_scale(weight, squared, down, up, magnitude, 2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted, found = step(magnitude), compiled(magnitude)
    assert torch.equal(wanted, found)
    found.sum().backward()
    assert torch.isfinite(magnitude.grad).all()


def test_meta_and_autocast():
    tensors = [t.to("meta") for t in problem(6, 40, 3, torch.bfloat16)]
    assert dora_norms(tensors[0], row_squares(tensors[0]), *tensors[1:]).shape == (6,)
    weight, down, up = problem(6, 40, 3)
    squared = row_squares(weight)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dora_norms(weight, squared, down, up)
    assert torch.equal(inside, dora_norms(weight, squared, down, up)), "autocast must not touch the norms"


def test_several_threads_get_the_same():
    weight, down, up = problem(33, 900, 5, torch.bfloat16)
    squared = row_squares(weight)
    wanted = dora_norms(weight, squared, down, up)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: dora_norms(weight, squared, down, up), range(8)))
    assert all(torch.equal(f, wanted) for f in found)


W, S, D, U = torch.ones(3, 4), torch.ones(3), torch.ones(2, 4), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((S, S, D, U), ValueError, "expected matrices"),
        ((W, S, D.t(), U), ValueError, r"\(out, in\) = \(3, 4\)"),
        ((W, S[:2], D, U), ValueError, r"expected squared \(3,\), found \(2,\)"),
        ((W.int(), S, D, U), TypeError, "weight is torch.int32"),
        ((W, S.double(), D, U), TypeError, "as row_squares gives it"),
        ((W, S, D.double(), U.double()), TypeError, "float64 with a float64 weight only"),
        ((W, S, D, U.bfloat16()), TypeError, "of one dtype"),
        ((W, S, D.to("meta"), U), ValueError, "down on meta"),
    ],
)
def test_refuses_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        dora_norms(*arguments)


def test_scale_refuses_a_magnitude_of_another_size():
    with pytest.raises(ValueError, match=r"expected magnitude \(3,\)"):
        dora_scale(W, S, D, U, torch.ones(4))


def test_row_squares_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="expected a matrix"):
        row_squares(S)
    with pytest.raises(TypeError, match=r"torch\.int32"):
        row_squares(W.int())
