"""Attention over a shared prefix: against concatenation in float64, gradients, masks, compilers, layouts, errors."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels._case import EPSILON, assert_within

# The package gives the function this name, which hides the module.
pa = sys.modules["peftkit_kernels.prefix_attention"]

NAMES = ("query", "prefix_key", "prefix_value", "key", "value")


def problem(batch, heads_kv, group, queries, prefix, tokens, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads_kv * group, queries, width),
        (heads_kv, prefix, width),
        (heads_kv, prefix, width),
        (batch, heads_kv, tokens, width),
        (batch, heads_kv, tokens, width),
    )
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def concatenated(query, prefix_key, prefix_value, key, value, mask=None, causal=False, scale=None):
    """Softmax over the keys as one, in float64, and the weighted sum of the absolute values."""
    batch, heads, queries, width = query.shape
    keys, values = (
        torch.cat((shared.double()[None].expand(batch, -1, -1, -1), own.double()), dim=2).repeat_interleave(
            heads // key.shape[1], dim=1
        )
        for shared, own in ((prefix_key, key), (prefix_value, value))
    )
    scores = query.double() @ keys.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    own = torch.zeros(1, 1, queries, key.shape[2], dtype=torch.float64)
    if causal:
        own = own.masked_fill(torch.ones(queries, key.shape[2], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask.double()
    weights = (scores + torch.nn.functional.pad(own, (prefix_key.shape[1], 0))).softmax(-1)
    return weights @ values, weights @ values.abs()


def assert_right(found, *arguments, **options):
    """Four roundings to the dtype (weights, two parts, output) and float32's share of scores up to some ten."""
    exact, size = concatenated(*arguments, **options)
    dtype = arguments[0].dtype
    room = (4 * EPSILON[dtype] + 2.0**-15) * size + 2.0**-24
    assert found.dtype == dtype
    assert_within(found, exact, room, "prefix_attention")


def masks(generator, kind, batch, heads, queries, tokens, prefix):
    if kind == "none":
        return None
    shape = (batch, 1, queries, tokens) if "row" not in kind else (batch, 1, 1, tokens)
    if "head" in kind:
        shape = (1, heads, queries, tokens)
    seen = torch.rand(*shape, generator=generator) < 0.7
    if prefix and seen.numel():
        seen[0, 0, 0] = False
    elif tokens:
        seen[..., 0] = True
    if "bool" in kind:
        return seen
    return torch.randn(*shape, generator=generator).masked_fill(~seen, -torch.inf)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.sampled_from([1, 1, 2, 7, 40]),
    prefix=st.integers(0, 40),
    tokens=st.integers(0, 70),
    width=st.sampled_from([1, 5, 8, 33, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["none", "causal", "bool", "additive", "bool row", "additive head", "bool head"]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_shape_dtype_and_mask(
    batch, heads_kv, group, queries, prefix, tokens, width, dtype, kind, transposed, seed
):
    causal = kind == "causal"
    tokens = queries if causal else tokens if prefix else max(tokens, 1)
    tensors = problem(batch, heads_kv, group, queries, prefix, tokens, width, dtype, seed)
    if transposed:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        tensors[1] = tensors[1].transpose(-1, -2).contiguous().transpose(-1, -2)
    generator = torch.Generator().manual_seed(seed)
    mask = masks(generator, "none" if causal else kind, batch, heads_kv * group, queries, tokens, prefix)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    found = pa.prefix_attention(*tensors, mask, causal=causal)
    assert found.shape == tensors[0].shape
    assert_right(found, *tensors, mask=mask, causal=causal)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive head"])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5, 4, 8), (3, 2, 2, 1, 4, 6, 5), (2, 1, 1, 3, 0, 3, 4)])
def test_gradients_are_those_of_finite_differences(kind, shape):
    batch, heads_kv, group, queries, prefix, tokens, _ = shape
    tokens = queries if kind == "causal" else tokens
    tensors = problem(*shape[:5], tokens, shape[6], torch.float64)
    generator = torch.Generator().manual_seed(0)
    mask = masks(generator, kind if kind != "causal" else "none", batch, heads_kv * group, queries, tokens, prefix)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: pa.prefix_attention(*t, mask, causal=kind == "causal"), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_gradients_are_those_of_concatenation(dtype, queries, kind):
    tokens = queries if kind == "causal" else 21
    tensors = [t.requires_grad_() for t in problem(3, 2, 4, queries, 11, tokens, 16, dtype)]
    mask = masks(torch.Generator().manual_seed(0), "none" if kind == "causal" else kind, 3, 8, queries, tokens, 11)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(pa.prefix_attention(*tensors, mask, causal=kind == "causal"), tensors, weight)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, _ = concatenated(*exact, mask=mask, causal=kind == "causal")
    for name, mine, other in zip(NAMES, found, torch.autograd.grad(out, exact, weight.double()), strict=True):
        error = (mine.double() - other).norm() / other.norm()
        assert mine.dtype == dtype
        assert error < 4 * EPSILON[dtype] + 1e-5, (name, float(error))


def test_rows_that_see_no_token_attend_to_the_prefix_alone():
    tensors = problem(3, 2, 2, 4, 6, 5, 8)
    wanted = pa.prefix_attention(*tensors[:3], tensors[3][:, :, :0], tensors[4][:, :, :0])
    for mask in (torch.zeros(1, 1, 1, 1, dtype=torch.bool), torch.full((3, 1, 4, 5), -torch.inf)):
        torch.testing.assert_close(pa.prefix_attention(*tensors, mask), wanted)


def test_lowest_finite_mask_counts_as_masked():
    tensors = problem(2, 2, 2, 3, 6, 5, 8)
    seen = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(pa.prefix_attention(*tensors, additive), pa.prefix_attention(*tensors, seen))


def test_scale_is_that_of_the_scores():
    tensors = problem(2, 2, 2, 3, 6, 5, 8)
    assert_right(pa.prefix_attention(*tensors, scale=0.05), *tensors, scale=0.05)


def test_scores_of_hundreds_do_not_overflow():
    tensors = problem(2, 2, 2, 3, 6, 5, 8)
    tensors[0] *= 300
    found = pa.prefix_attention(*tensors)
    exact, size = concatenated(*tensors)
    assert_within(found, exact, 1e-3 * size + 1e-6, "prefix_attention")


def test_nothing_in_gives_nothing_out():
    for batch, queries in ((0, 3), (2, 0)):
        tensors = problem(batch, 2, 2, queries, 4, 5, 8)
        assert pa.prefix_attention(*tensors).shape == (batch, 4, queries, 8)


def test_prefix_in_float32_is_cast_and_gets_its_gradient_in_float32():
    tensors = problem(2, 2, 2, 3, 6, 5, 8, torch.bfloat16)
    tensors[1], tensors[2] = (t.float().requires_grad_() for t in tensors[1:3])
    pa.prefix_attention(*tensors).float().sum().backward()
    assert tensors[1].grad.dtype == tensors[2].grad.dtype == torch.float32


def test_result_transposed_is_contiguous():
    for queries in (1, 3):
        assert pa.prefix_attention(*problem(2, 2, 3, queries, 4, 5, 8)).transpose(1, 2).is_contiguous()


def test_reference_is_concatenation():
    tensors = problem(2, 2, 3, 4, 5, 6, 8, torch.float64)
    bias = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pa.reference.prefix_attention(*tensors, bias, False, 0.3)
    exact, _ = concatenated(*tensors, mask=bias, scale=0.3)
    torch.testing.assert_close(found, exact)


# torch's tracer makes the object that torch's own warning is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("queries", [1, 5])
def test_whole_graph_is_compiled_with_its_gradients(queries):
    tensors = [t.requires_grad_() for t in problem(2, 2, 2, queries, 4, 5, 8)]

    def call(*tensors):
        return pa.prefix_attention(*tensors, causal=queries > 1).square().sum()

    wanted = torch.autograd.grad(call(*tensors), tensors)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, exact in zip(torch.autograd.grad(compiled(*tensors), tensors), wanted, strict=True):
        torch.testing.assert_close(found, exact)


def test_meta_tensors_give_shapes():
    tensors = [t.to("meta") for t in problem(2, 2, 2, 3, 4, 5, 8, torch.bfloat16)]
    found = pa.prefix_attention(*tensors)
    assert (found.shape, found.dtype, found.device.type) == ((2, 4, 3, 8), torch.bfloat16, "meta")


def test_autocast_takes_a_prefix_in_float32():
    tensors = problem(2, 2, 2, 3, 6, 5, 8, torch.bfloat16)
    wide = [tensors[0], tensors[1].float(), tensors[2].float(), *tensors[3:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pa.prefix_attention(*wide), pa.prefix_attention(*tensors))


def test_threads_at_once_give_what_one_gives():
    problems = [problem(4, 2, 4, 1 + seed, 90, 500, 64, torch.bfloat16, seed) for seed in range(4)]
    alone = [pa.prefix_attention(*p) for p in problems]
    gate = threading.Barrier(4)

    def work(place):
        gate.wait()
        return all(torch.equal(pa.prefix_attention(*problems[place]), alone[place]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def changed(place, tensor):
    tensors = problem(2, 2, 2, 3, 4, 5, 8)
    tensors[place] = tensor
    return tensors


MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (changed(0, torch.ones(4, 3, 8)), {}, ValueError, r"expected query \(batch, heads, queries, head_dim\)"),
        (changed(4, torch.ones(2, 2, 6, 8)), {}, ValueError, r"value \(2, 2, 6, 8\) beside key \(2, 2, 5, 8\)"),
        (
            changed(0, torch.ones(2, 4, 3, 7)),
            {},
            ValueError,
            r"one batch, heads_kv and head_dim, found query \(2, 4, 3, 7",
        ),
        (changed(0, torch.ones(2, 3, 3, 8)), {}, ValueError, "multiple of heads_kv .* found 3 heads, 2 heads_kv"),
        (changed(0, torch.ones(2, 4, 3, 8).int()), {}, TypeError, "query is torch.int32"),
        (changed(0, torch.ones(2, 4, 3, 8).half()), {}, TypeError, "query is torch.float16, key torch.float32"),
        (changed(1, torch.ones(2, 4, 8, device="meta")), {}, ValueError, "query is on cpu and prefix_key on meta"),
        (problem(2, 2, 2, 3, 0, 0, 8), {}, ValueError, "there is no key"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"mask": MASK[0]}, ValueError, r"expected a mask .* found \(1, 3, 5\)"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"mask": torch.ones(2, 1, 3, 9)}, ValueError, r"leaves the prefix out.*3, 9\)"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"mask": MASK.int()}, TypeError, "mask is torch.int32; expected bool"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"causal": True}, ValueError, "found 5 tokens and 3 queries"),
        (problem(2, 2, 2, 5, 4, 5, 8), {"mask": torch.ones(1, 1, 1, 5), "causal": True}, ValueError, "found both"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"mask": torch.ones(1, 1, 3, 5, requires_grad=True)}, ValueError, "detach it"),
        (problem(2, 2, 2, 3, 4, 5, 8), {"scale": float("inf")}, ValueError, "a finite scale, found inf"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, options, error, message):
    with pytest.raises(error, match=message):
        pa.prefix_attention(*tensors, **options)
