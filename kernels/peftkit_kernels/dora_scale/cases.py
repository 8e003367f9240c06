"""Inputs and laws of the norms of an adapted weight's rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import Case, assert_within, rounding
from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.dora_scale import OP, reference

SHAPES = ((64, 96, 8), (37, 1053, 5), (1, 1, 1), (9, 700, 33), (11, 300, 70), (0, 7, 2), (5, 3, 0))
"""Out, in and rank: round ones, odd ones, one element, large ranks, no rows, no ranks."""
DTYPES = ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
          (torch.float32, torch.float32), (torch.float64, torch.float64))  # fmt: skip
"""Of the weight and of the factors."""
KINDS = ("usual", "large", "cancelling")
"""An update of 5 percent, one of ten times the weight, one that takes all but a millionth of it away."""
SCALE = 0.5


def inputs(
    out: int, width: int, rank: int, weight: torch.dtype, factor: torch.dtype, kind: str
) -> Callable[[torch.Generator, torch.device], tuple[Any, ...]]:
    """Weight, squared, down, up and scale."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        down, up, own = normal(rank, width).to(factor), normal(out, rank).to(factor), normal(out, width)
        update = SCALE * (up.double() @ down.double())
        if kind == "cancelling":
            own = -update + 1e-6 * own
        else:
            up = ((0.05 if kind == "usual" else 10.0) * up.double()).to(factor)
        narrow = own.to(weight)
        tensors = (narrow, reference.row_squares(narrow), down, up)
        return (*(t.to(device) for t in tensors), SCALE)

    return made


def check_norms(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """‖w + s b D‖ within TOLERANCE and the roundings to float32 of the result and, half of it, of `squared`.

    In double itself the terms of a row make a rounding a rank and element, which counts where all cancels.
    """
    weight, _, down, up, scale = before
    assert result.dtype == wide_dtype(weight.dtype), result.dtype
    wide = weight.double() + scale * (up.double() @ down.double())
    wanted = wide.square().sum(1).sqrt()
    size = (weight.double().abs() + abs(scale) * (up.double().abs() @ down.double().abs())).square().sum(1).sqrt()
    exact = (down.shape[0] + 2) * 2.0**-53 * 2 * size + wanted * weight.shape[1] * 2.0**-53
    slack = reference.TOLERANCE * wanted + exact
    assert_within(result, wanted, slack + rounding(result.dtype, wanted), "norms")


def check_squares(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """‖w‖² rounded once to float32; squares of float32 are rounded once where they are not taken in float64."""
    wanted = before[0].double().square().sum(1)
    exact = wanted * (before[0].shape[1] + 1) * 2.0**-53
    assert_within(result, wanted, 2 * rounding(result.dtype, wanted) + exact, "squares")


def cases() -> Iterator[Case]:
    """Every entry point on every shape, dtype and kind of update."""
    squares, norms = OP.functions
    for shape, (weight, factor), kind in itertools.product(SHAPES, DTYPES, KINDS):
        label = f"{'x'.join(map(str, shape))}-{str(weight)[6:]}-{str(factor)[6:]}-{kind}"
        make = inputs(*shape, weight, factor, kind)
        yield Case(function=norms, label=label, inputs=make, check=check_norms)
        if kind == "usual":
            yield Case(function=squares, label=label, inputs=lambda g, d, m=make: m(g, d)[:1], check=check_squares)  # type: ignore[misc]  # bound now
