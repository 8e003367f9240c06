"""Inputs and laws of attention over a prefix and a row's own keys, and of merging two parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import EPSILON, Case, assert_within, rounding
from peftkit_kernels.prefix_attention import OP

SHAPES = ((2, 3, 4, 5, 64), (3, 2, 1, 7, 33), (1, 1, 1, 1, 1), (1, 8, 4, 1, 128), (0, 2, 2, 3, 8), (2, 2, 2, 0, 8),
          (5, 1, 3, 2, 200))  # fmt: skip
"""Batch, heads_kv, group, queries and head_dim: round ones, odd ones, one element, one query, none, wide heads."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SPREADS = (1.0, 60.0)
"""Of the logarithms: parts that weigh alike, and one that is all or nothing."""

FEW_SHAPES = ((2, 3, 4, 20, 70, 64), (3, 2, 1, 7, 65, 33), (1, 1, 1, 1, 1, 1), (2, 2, 16, 130, 3, 24),
              (1, 2, 7, 0, 9, 8), (2, 1, 3, 5, 0, 100), (0, 2, 2, 3, 4, 8), (1, 2, 0, 3, 4, 8))  # fmt: skip
"""Batch, heads_kv, rows, prefix, tokens and head_dim: round ones, odd ones, one element, many rows, no prefix, no
tokens, nothing."""

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, spread: float, strided: bool) -> Inputs:
    """Two parts and the logarithms of their denominators; in the second, one query in seven sees no key."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64)

        batch, heads, group, queries, width = shape
        if strided:
            parts = [normal(queries, heads, batch, group, width).permute(2, 1, 3, 0, 4) for _ in range(2)]
        else:
            parts = [normal(*shape) for _ in range(2)]
        sums = [spread * normal(*shape[:-1]) for _ in range(2)]
        sums[1].view(-1)[::7] = -torch.inf
        first, second = (p.to(dtype).to(device) for p in parts)
        return first, sums[0].to(wide).to(device), second, sums[1].to(wide).to(device)

    return made


def check(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The weights with eight roundings each, and one to the dtype of the parts.

    A weight is a difference, an exponential, a sum and a quotient. The difference's rounding reaches the weight times
    its own size, but a weight falls faster than that grows; exponential and logarithm are good to two units.
    """
    first, first_sums, second, second_sums = (t.cpu().double() for t in before)
    dtype, wide = before[0].dtype, before[1].dtype
    wanted_sums = torch.logaddexp(first_sums, second_sums)
    # From the difference alone: the logarithms themselves may be large, and their sum is rounded even in float64.
    weights = [d.sigmoid()[..., None] for d in (first_sums - second_sums, second_sums - first_sums)]
    wanted = (weights[0] * first + weights[1] * second).permute(0, 3, 1, 2, 4)
    size = (weights[0] * first.abs() + weights[1] * second.abs()).permute(0, 3, 1, 2, 4)
    room = 12 * EPSILON[wide] * size + 2.0**-140
    out, sums = (t.cpu() for t in result)
    assert out.is_contiguous(), "the output is not contiguous"
    assert (out.dtype, sums.dtype) == (dtype, wide), (out.dtype, sums.dtype)
    assert_within(out, wanted, room + rounding(dtype, wanted.abs() + room), "output")
    assert_within(sums, wanted_sums, 4 * EPSILON[wide] * (wanted_sums.abs() + 1), "logarithm of the denominator")


def few_inputs(shape: tuple[int, ...], dtype: torch.dtype, bias: tuple[bool, ...] | None, strided: bool) -> Inputs:
    """Queries, prefix, tokens and a bias, whose dimensions are whole or 1."""
    batch, heads, rows, prefix, tokens, width = shape

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*sizes: int) -> Tensor:
            found = torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)
            return found.transpose(-2, -3).contiguous().transpose(-2, -3) if strided else found

        shared = [normal(heads, prefix, width) for _ in range(2)]
        own = [normal(batch, heads, tokens, width) for _ in range(2)]
        added = None
        if bias is not None:
            sizes = (n if whole else 1 for n, whole in zip((batch, heads, rows, tokens), bias, strict=True))
            added = normal(*sizes)
            if prefix:
                hidden = torch.rand(added.shape, generator=generator) < 0.3
                added = added.masked_fill(hidden, torch.finfo(dtype).min)
        tensors = [t.to(device) for t in (3 * normal(batch, heads, rows, width), *shared, *own)]
        return (*tensors, None if added is None else added.to(device), width**-0.5)

    return made


def check_few(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The roundings of a softmax in float32, and one to the dtype.

    A score has one rounding a column and three more, and its error is a relative one of its weight. An exponential is
    good to four units, a sum of weights or weighted values has one rounding a key, and each of them comes twice, in
    the numerator and in the denominator; keys come in blocks, at whose ends what there is may be rescaled.
    """
    query, prefix_key, prefix_value, key, value = (t.cpu().double() for t in before[:5])
    bias, scale = before[5], before[6]
    batch, width = query.shape[0], query.shape[3]
    keys, values = (
        torch.cat((shared[None].expand(batch, -1, -1, -1), own), dim=2)
        for shared, own in ((prefix_key, key), (prefix_value, value))
    )
    scores = query @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores[..., prefix_key.shape[1] :] += bias.cpu().double()
    weights, wanted_sums = scores.softmax(-1), scores.logsumexp(-1)
    wanted, size = weights @ values, weights @ values.abs()
    out, sums = (t.cpu() for t in result)
    wide = torch.float64 if before[0].dtype == torch.float64 else torch.float32
    epsilon = EPSILON[wide]
    count = keys.shape[2]
    products = query.abs() @ keys.abs().transpose(-1, -2) * scale
    # A masked key's score is far from exact, and its weight is exactly zero.
    of_score = (width + 3) * epsilon * (products + 3 * (bias is not None))
    worst = of_score.masked_fill(weights == 0, 0.0).amax(-1)
    room = (2 * worst[..., None] + (2 * count + count // 16 + 16) * epsilon) * size + 2.0**-120
    assert out.is_contiguous(), "the output is not contiguous"
    assert (out.dtype, sums.dtype) == (before[0].dtype, wide), (out.dtype, sums.dtype)
    assert_within(out, wanted, room + rounding(out.dtype, wanted.abs() + room), "output")
    of_sums = worst + (count + 8) * epsilon + 4 * epsilon * wanted_sums.abs()
    assert_within(sums, wanted_sums, of_sums, "logarithm of the denominator")


def cases() -> Iterator[Case]:
    """Every shape, dtype, spread and kind of bias, with strides in turn."""
    merge, few = OP.functions
    for place, (shape, dtype, spread) in enumerate(itertools.product(SHAPES, DTYPES, SPREADS)):
        strided = bool((place + place // len(SPREADS)) % 2)
        label = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}-{spread:g}{'-strided' if strided else ''}"
        yield Case(function=merge, label=label, inputs=inputs(shape, dtype, spread, strided), check=check)
    biases = (None, (True, True, True, True), (True, False, False, True))
    for place, (sizes, dtype, bias) in enumerate(itertools.product(FEW_SHAPES, DTYPES, biases)):
        strided = bool(place % 2)
        kind = "none" if bias is None else "whole" if all(bias) else "row"
        label = f"{'x'.join(map(str, sizes))}-{str(dtype)[6:]}-{kind}{'-strided' if strided else ''}"
        yield Case(function=few, label=label, inputs=few_inputs(sizes, dtype, bias, strided), check=check_few)
