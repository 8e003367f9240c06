"""Storing computed weights rounded once, and measuring in the same pass what of the change is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.store_rounded import reference

OP = declare(
    Op(
        name="store_rounded",
        summary="stored ← meant, rounded once, and the sums that tell how much of the change is kept.",
        functions=(
            Function(
                schema="store_rounded_(Tensor(a!) stored, Tensor meant) -> Tensor",
                reference=reference.store_rounded_,
                fake=lambda stored, meant: stored.new_empty(8, dtype=torch.float64),
            ),
        ),
        sources={"cpu": "store_rounded.cpp", "cuda": "store_rounded.cu"},
    )
)
(_store,) = OP.functions


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What was stored against what was meant: w before, d the meant change, r the stored one."""

    weight_square: float
    """Σ w²."""
    delta_square: float
    """Σ d²."""
    error_square: float
    """Σ (r - d)²."""
    product: float
    """Σ r d."""
    changed: int
    """Elements that changed."""
    elements: int
    not_finite_before: int
    not_finite_meant: int
    not_finite_after: int


@torch.no_grad()
def store_rounded_(stored: Tensor, meant: Tensor) -> Stored:
    """Writes `meant` into `stored`, rounded once to its dtype, and measures it in the same pass.

    Args:
        stored: any shape, a floating dtype of 2 bytes or more.
        meant: the same shape; float32, or float64 for a float64 `stored`.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: `meant` is not as wide as it has to be.
    """
    if stored.shape != meant.shape or stored.device != meant.device:
        raise ValueError(
            f"store_rounded_: stored is {tuple(stored.shape)} on {stored.device}, meant {tuple(meant.shape)} on "
            f"{meant.device}; expected the same shape and device"
        )
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    if not stored.is_floating_point() or meant.dtype != wide:
        raise TypeError(
            f"store_rounded_: meant is {meant.dtype} and stored {stored.dtype}; expected {wide} values for a "
            "floating-point tensor"
        )
    whole = stored.contiguous()
    sums = _store(whole, meant.contiguous()).tolist()
    if whole is not stored:
        stored.copy_(whole)
    return Stored(
        weight_square=sums[0],
        delta_square=sums[1],
        error_square=sums[2],
        product=sums[3],
        changed=int(sums[4]),
        elements=stored.numel(),
        not_finite_before=int(sums[5]),
        not_finite_meant=int(sums[6]),
        not_finite_after=int(sums[7]),
    )
