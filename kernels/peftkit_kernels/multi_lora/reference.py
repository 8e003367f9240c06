"""The definition of low-rank updates whose adapter differs from row to row, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkit_kernels._precision import exactly, wide_dtype


def _segments(adapter: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor, slice]]:
    """Each adapter that the batch uses: its index, its rows, and its place in the stacked factors."""
    bounds = starts.tolist()
    for index in adapter.unique().tolist():
        if index >= 0:
            yield index, (adapter == index).nonzero()[:, 0], slice(bounds[index], bounds[index + 1])


@exactly
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
    wide = wide_dtype(x.dtype)
    hidden = x.new_zeros((x.shape[0], max_rank), dtype=wide)
    for _, rows, ranks in _segments(adapter, starts):
        hidden[rows, : ranks.stop - ranks.start] = x[rows].to(wide) @ factor[ranks].to(wide).t()
    return hidden


@exactly
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


@exactly
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
