"""Inputs and laws of low-rank updates whose adapter differs from row to row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import EPSILON, Case, assert_within, rounding
from peftkit_kernels.multi_lora import OP

SHAPES = ((32, 64, (4, 8, 16, 2)), (7, 53, (5, 3, 1)), (1, 1, (1,)), (70, 33, (3, 0, 17)), (9, 2100, (9, 2)),
          (60, 24, (6,)), (11, 16, (4, 70, 100)), (0, 7, (2,)), (5, 0, (2, 1)))  # fmt: skip
"""Rows, width and the adapters' ranks: round ones, odd ones, one element, a rank of none, many columns, one adapter for
all rows, large ranks, no rows, no columns."""
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float16),
          (torch.float32, torch.float32), (torch.float64, torch.float64))  # fmt: skip
"""Of the rows and of the factors."""

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def _bound(terms: int, wide: torch.dtype, size: Tensor) -> Tensor:
    """The largest error of `terms` roundings of sums whose absolute terms add up to `size`, whatever their order."""
    return (terms + 1) * EPSILON[wide] * 1.01 * size.double() + 2.0**-140


def _batch(
    generator: torch.Generator, rows: int, ranks: tuple[int, ...], scale: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, scales, and an adapter for each row, some none."""
    starts = torch.tensor([0, *ranks]).cumsum(0)
    scales = torch.randn(len(ranks), generator=generator, dtype=torch.float64).to(scale)
    low = 0 if len(ranks) == 1 else -1
    return starts, scales, torch.randint(low, len(ranks), (rows,), generator=generator)


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(hidden: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor, total: int) -> Tensor:
    """The scaled intermediate at its adapter's place among all ranks, (rows, total), float64."""
    found = torch.zeros(hidden.shape[0], total, dtype=torch.float64)
    for row, own in enumerate(adapter.tolist()):
        if own >= 0:
            first, last = int(starts[own]), int(starts[own + 1])
            found[row, first:last] = scales[own].double() * hidden[row, : last - first].double()
    return found


def check_shrink(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """`width` products and additions in float32 at the least; exactly zero beyond the rank and without an adapter."""
    x, factor, starts, adapter = (t.cpu() for t in before[:4])
    every, size = x.double() @ factor.double().t(), x.double().abs() @ factor.double().abs().t()
    wanted, room = (torch.zeros(x.shape[0], int(before[4]), dtype=torch.float64) for _ in range(2))
    for row, own in enumerate(adapter.tolist()):
        if own >= 0:
            first, last = int(starts[own]), int(starts[own + 1])
            wanted[row, : last - first] = every[row, first:last]
            room[row, : last - first] = _bound(x.shape[1], result.dtype, size[row, first:last])
    assert result.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32), result.dtype
    assert_within(result.cpu(), wanted, room, "intermediate")


def check_expand(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """One rounding for the scale, one a rank, one for the sum, and one to the dtype of out; other rows untouched."""
    out, hidden, factor, starts, scales, adapter = (t.cpu() for t in before)
    found = after[0].cpu()
    by = dense(hidden, starts, scales, adapter, factor.shape[0])
    wanted = out.double() + by @ factor.double()
    room = _bound(hidden.shape[1] + 2, hidden.dtype, out.double().abs() + by.abs() @ factor.double().abs())
    assert_within(found, wanted, room + rounding(out.dtype, wanted.abs() + room), "sum")
    assert torch.equal(found[adapter < 0], out[adapter < 0]), "a row without an adapter has changed"


def check_outer(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """One rounding for the scale, one a row and one to the factor's dtype; zero for adapters that no row uses."""
    hidden, y, like, starts, scales, adapter = (t.cpu() for t in before)
    by = dense(hidden, starts, scales, adapter, like.shape[0])
    wanted = by.t() @ y.double()
    room = _bound(y.shape[0] + 1, hidden.dtype, by.abs().t() @ y.double().abs())
    assert result.dtype == like.dtype, result.dtype
    assert_within(result.cpu(), wanted, room + rounding(like.dtype, wanted.abs() + room), "gradient")


def inputs(rows: int, width: int, ranks: tuple[int, ...], row: torch.dtype, factor: torch.dtype) -> tuple[Inputs, ...]:
    """Arguments of shrink, expand and outer."""
    wide = torch.float64 if row == torch.float64 else torch.float32

    def of_shrink(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        starts, _, adapter = _batch(generator, rows, ranks, wide)
        x, down = _normal(generator, row, rows, width), _normal(generator, factor, sum(ranks), width)
        return (*(t.to(device) for t in (x, down, starts, adapter)), max(ranks))

    def of_expand(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        starts, scales, adapter = _batch(generator, rows, ranks, wide)
        out, hidden = _normal(generator, row, rows, width), _normal(generator, wide, rows, max(ranks))
        up = _normal(generator, factor, sum(ranks), width)
        return tuple(t.to(device) for t in (out, hidden, up, starts, scales, adapter))

    def of_outer(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        y, hidden, *rest = of_expand(generator, device)
        return (hidden, y, *rest)

    return of_shrink, of_expand, of_outer


def cases() -> Iterator[Case]:
    """Every entry point on every shape and pair of dtypes."""
    for (rows, width, ranks), (row, factor) in itertools.product(SHAPES, DTYPES):
        label = f"{rows}x{width}-r{'+'.join(map(str, ranks))}-{str(row)[6:]}-{str(factor)[6:]}"
        made = inputs(rows, width, ranks, row, factor)
        for function, make, check in zip(OP.functions, made, (check_shrink, check_expand, check_outer), strict=True):
            yield Case(function=function, label=label, inputs=make, check=check)
