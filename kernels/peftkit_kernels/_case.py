"""Cases: inputs, what must come out, and what an operation costs; the tests and the benchmarks read the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._op import Function

EPSILON = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Dtype -> the largest relative error of one rounding."""
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
"""Dtype -> the smallest positive number: half of it is the largest error of rounding a tiny one."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One entry point on inputs of one kind."""

    function: Function
    label: str
    """Sizes and dtypes, for the test's name."""
    inputs: Callable[[torch.Generator, torch.device], tuple[Any, ...]]
    """Fresh random arguments."""
    check: Callable[[tuple[Any, ...], tuple[Any, ...], Any], None]
    """(arguments before, the same after the call, result): raises AssertionError where the result is wrong."""
    flops: int = 0
    """Multiplications and additions of the arithmetic."""
    bytes: int = 0
    """Bytes that have to be read or written once at the least."""
    timed: bool = False
    """Whether the benchmark takes it."""


def rounding(dtype: torch.dtype, size: Tensor) -> Tensor:
    """The largest error of rounding numbers of this size once to the dtype, with a ten thousandth to spare."""
    return size.abs().double() * EPSILON[dtype] * 1.0001 + SMALLEST[dtype]


def assert_within(found: Tensor, wanted: Tensor, bound: Tensor, what: str) -> None:
    """Raises AssertionError unless |found - wanted| <= bound everywhere.

    Args:
        found: any floating dtype.
        wanted: float64, the same shape.
        bound: float64, the same shape or one that broadcasts.
    """
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    if not found.numel():
        return
    error = (found.double() - wanted).abs()
    excess = (error - bound).nan_to_num(nan=float("inf"))
    worst = int(excess.argmax())
    assert float(excess.reshape(-1)[worst]) <= 0, (
        f"{what}: {float(found.reshape(-1)[worst])} where {float(wanted.reshape(-1)[worst])} was expected; "
        f"off by {float(error.reshape(-1)[worst]):.3g}, allowed {float(bound.expand_as(error).reshape(-1)[worst]):.3g}"
    )
