"""The definition of the norms of an adapted weight's rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels._precision import wide_dtype

CHUNK_BYTES = 1 << 22
"""Rows are taken in chunks whose wide copies are about this large."""
LANE_TERMS = 64
"""Rounded additions that a compiled sum may make in float32 before it goes on in float64."""
TOLERANCE = 4e-6
"""Relative error of a norm above which a row is computed anew without cancellation, in float64."""


def _chunks(weight: Tensor, element: int) -> tuple[Tensor, ...]:
    rows = max(1, CHUNK_BYTES // max(1, element * weight.shape[1]))
    return weight.split(rows) if weight.shape[0] else ()


def row_squares(weight: Tensor) -> Tensor:
    """Squared Euclidean norms of the rows, (out,), added in float64 and rounded once."""
    found = [chunk.double().square().sum(1) for chunk in _chunks(weight, 8)]
    return (torch.cat(found) if found else weight.new_empty(0)).to(wide_dtype(weight.dtype))


def dora_norms(weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Euclidean norms of the rows of weight + scale * up @ down, (out,), from

        ‖w + s b D‖² = ‖w‖² + 2 s b·(D w) + s² b (D Dᵀ) bᵀ

    The products D w are sums in float32, the rest is float64. Where rounding could move a norm by more than TOLERANCE,
    because the three terms cancel, the row is formed in float64 and its norm taken directly.
    """
    # Autocast would make the products coarser than what is promised.
    with torch.autocast(weight.device.type, enabled=False):
        return _norms(weight, squared, down, up, scale)


def _norms(weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    out, width = weight.shape
    own, wide_down, wide_up = squared.double(), down.double(), scale * up.double()
    gram = ((wide_up @ (wide_down @ wide_down.t())) * wide_up).sum(1)
    kind = wide_dtype(weight.dtype)
    narrow_down = down.to(kind).t()
    found = [(chunk.to(kind) @ narrow_down).double() for chunk in _chunks(weight, 4)]
    inner = torch.cat(found) if found else own.new_empty(out, down.shape[0])
    total = own + 2 * (inner * wide_up).sum(1) + gram
    reach = wide_up.abs() @ wide_down.square().sum(1).sqrt()
    # Whatever the order in which a library adds: one rounding a term of each product, and those of `squared`.
    unit = torch.finfo(kind).eps / 2
    error = unit * (own + 2 * min(width + 1, 4 * LANE_TERMS) * reach * own.sqrt())
    again = (error > 2 * TOLERANCE * total).nonzero().squeeze(1)
    for rows in again.split(max(1, CHUNK_BYTES // max(1, 8 * width))) if len(again) else ():
        total[rows] = (weight[rows].double() + wide_up[rows] @ wide_down).square().sum(1)
    return total.clamp_min_(0).sqrt_().to(kind)
