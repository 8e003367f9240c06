"""Inputs and laws of storing and measuring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import Case
from peftkit_kernels.store_rounded import OP, reference

SHAPES = ((64, 96), (37, 53), (1, 1), (3, 5000), (0, 7), (9,))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (0.0, 0.001, 0.05, 3.0)
"""Size of the change over that of the weight."""


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, size: float
) -> Callable[[torch.Generator, torch.device], tuple[Any, ...]]:
    """The stored values, and those that are meant."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        stored = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        change = size * torch.randn(*shape, generator=generator, dtype=wide)
        return stored.to(device), (stored.to(wide) + change).to(device)

    return made


def hostile(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
    """Values that are not finite before, meant, or only after rounding to float16."""
    stored = torch.randn(40, generator=generator).half()
    meant = stored.float() + 1
    stored[3], stored[4] = float("inf"), float("nan")
    meant[7], meant[8], meant[9] = float("nan"), float("-inf"), 1e6
    return stored.to(device), meant.to(device)


def check(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], result: Tensor) -> None:
    """The stored bits are those of one rounding, and the sums are right to float64's rounding of as many additions."""
    stored, meant = before
    assert after[0].equal(meant.to(stored.dtype)) or not meant.isfinite().all(), "stored otherwise than rounded once"
    wanted = reference.store_rounded_(stored.clone(), meant)
    # Counts are exact; sums of n terms that are rounded in any order differ by n roundings of the sum of sizes.
    assert torch.equal(result[4:], wanted[4:]), f"counts {result[4:].tolist()}, expected {wanted[4:].tolist()}"
    if bool(wanted[5:].any()):
        return
    weight, target, kept = stored.double(), meant.double(), meant.to(stored.dtype).double()
    product = ((kept - weight) * (target - weight)).abs().sum()
    sizes = torch.stack((*wanted[:3], product))
    bound = 2 * (stored.numel() + 8) * 2.0**-53 * sizes
    assert bool(((result[:4] - wanted[:4]).abs() <= bound).all()), f"{result[:4].tolist()}, {wanted[:4].tolist()}"


def cases() -> Iterator[Case]:
    """Every shape, dtype and size of change, and values that are not finite."""
    (store,) = OP.functions
    for shape, dtype, size in itertools.product(SHAPES, DTYPES, SIZES):
        label = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}-{size}"
        yield Case(function=store, label=label, inputs=inputs(shape, dtype, size), check=check)
    yield Case(function=store, label="hostile-float16", inputs=hostile, check=check)
