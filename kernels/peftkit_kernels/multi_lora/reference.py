"""The definition of low-rank updates whose adapter differs from row to row, in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def _exactly(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, whose products autocast leaves in the dtype that they have here."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        kind = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return called


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _segments(adapter: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor, slice]]:
    """Each adapter that the batch uses: its index, its rows, and its place in the stacked factors."""
    bounds = starts.tolist()
    for index in adapter.unique().tolist():
        if index >= 0:
            yield index, (adapter == index).nonzero()[:, 0], slice(bounds[index], bounds[index + 1])


@_exactly
def shrink(x: Tensor, factor: Tensor, starts: Tensor, adapter: Tensor, max_rank: int) -> Tensor:
    """h[i, k] = sum_j factor[starts[a_i] + k, j] x[i, j], 0 beyond the rank of a_i and where a_i is -1.

    Args:
        x: (rows, width).
        factor: (total rank, width), the adapters' factors one behind the other.
        starts: (adapters + 1,), int64; adapter a has the rows from starts[a] to starts[a + 1] of the factor.
        adapter: (rows,), int64; -1 for none.

    Returns:
        (rows, max_rank), float32, or float64 where x is.
    """
    wide = _wide(x)
    hidden = x.new_zeros((x.shape[0], max_rank), dtype=wide)
    for _, rows, ranks in _segments(adapter, starts):
        hidden[rows, : ranks.stop - ranks.start] = x[rows].to(wide) @ factor[ranks].to(wide).t()
    return hidden


@_exactly
def expand_(out: Tensor, hidden: Tensor, factor: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor) -> None:
    """out[i, j] ← out[i, j] + scales[a_i] sum_k h[i, k] factor[starts[a_i] + k, j], rounded once to the dtype of out.

    Args:
        out: (rows, width).
        hidden: (rows, max_rank), float32 or float64.
        factor: (total rank, width).
        scales: (adapters,), float32 or float64.
    """
    wide = hidden.dtype
    for index, rows, ranks in _segments(adapter, starts):
        scaled = hidden[rows, : ranks.stop - ranks.start] * scales[index].to(wide)
        out[rows] = (out[rows].to(wide) + scaled @ factor[ranks].to(wide)).to(out.dtype)


@_exactly
def outer(hidden: Tensor, y: Tensor, like: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor) -> Tensor:
    """g[starts[a] + k, j] = scales[a] sum over the rows i of a of h[i, k] y[i, j], of the shape and dtype of `like`."""
    wide = hidden.dtype
    found = torch.zeros_like(like)
    for index, rows, ranks in _segments(adapter, starts):
        scaled = hidden[rows, : ranks.stop - ranks.start] * scales[index].to(wide)
        found[ranks] = (scaled.t() @ y[rows].to(wide)).to(like.dtype)
    return found


def multi_lora(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor, max_rank: int
) -> Tensor:
    """base + scale · x downᵀ up, each row with its own adapter."""
    out = base.clone()
    expand_(out, shrink(x, down, starts, adapter, max_rank), up, starts, scales, adapter)
    return out
