"""Inputs and laws of merging and unmerging."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import Case, assert_within, rounding
from peftkit_kernels.merge_lora import OP, reference

SHAPES = ((64, 96, 8), (37, 53, 5), (1, 1, 1), (3, 700, 16), (9, 16, 4), (19, 40, 35), (0, 7, 2), (5, 0, 2))
"""Out, in and rank: round ones, odd ones, one element, rows with gaps over 255, a large rank, none."""
DTYPES = ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
          (torch.float32, torch.float32), (torch.float64, torch.float64))  # fmt: skip
"""Of the weight and of the factors."""
SIZES = (0.0, 0.02, 3.0)
"""Size of the update over that of the weight: none, a usual one, one that leaves nothing of the weight."""
SCALE = 1.5

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def inputs(out: int, width: int, rank: int, weight: torch.dtype, factor: torch.dtype, size: float) -> Inputs:
    """Weight, down, up and scale."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        up = normal(out, rank) * (size / (SCALE * max(rank, 1) ** 0.5))
        tensors = (normal(out, width).to(weight), normal(rank, width).to(factor), up.to(factor))
        return (*(t.to(device) for t in tensors), SCALE)

    return made


def check_merged(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """W' = W + s B A but for roundings: one a rank, of scale and product, of the sum, and to the stored dtype."""
    weight, down, up, scale = before
    change = scale * (up.double() @ down.double())
    wanted = weight.double() + change
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # What is rounded each time is at most the sum of the sizes of the terms.
    terms = scale * up.double().abs() @ down.double().abs()
    bound = (down.shape[0] + 3) * rounding(wide, terms) + rounding(wide, wanted)
    assert_within(after[0], wanted, bound + rounding(weight.dtype, wanted.abs() + bound), "merged weight")


def check_same(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The law, and the bits of the reference."""
    check_merged(before, after, result)
    weight = before[0].clone()
    reference.merge_lora_(weight, *before[1:])
    assert torch.equal(weight, after[0]), "the merged weight has other bits than the reference's"


def check_bits(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The weight and what undoes the merge are those of the reference, bit for bit."""
    check_same(before, after, result)
    wanted = reference.merge_lora_reversibly_(before[0].clone(), *before[1:])
    for name, found, part in zip(("gaps", "codes", "escapes", "starts", "checksum"), result, wanted, strict=True):
        assert found.dtype == part.dtype, f"{name}: {found.dtype}, expected {part.dtype}"
        assert torch.equal(found, part), f"{name} differ from the reference's"


def merged_inputs(make: Inputs) -> Inputs:
    """What `unmerge_lora_` takes."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        weight, down, up, scale = make(generator, device)
        kept = reference.merge_lora_reversibly_(weight, down, up, scale)
        return (weight, down, up, scale, *kept[:4])

    return made


def check_restored(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """Every bit of the weight is that of the reference, and the checksum is that of the weight."""
    wanted = before[0].clone()
    reference.unmerge_lora_(wanted, *before[1:])
    assert torch.equal(reference.bits_of(after[0]), reference.bits_of(wanted)), "other bits than the reference's"
    assert torch.equal(result, reference.checksum(after[0])), "the checksum is not that of the weight"


def check_sum(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The sum of the reference."""
    assert torch.equal(result, reference.checksum(before[0]))


def cases() -> Iterator[Case]:
    """Every entry point on every shape, dtype and size of update."""
    merge, reversibly, unmerge, total = OP.functions
    for shape, (weight, factor), size in itertools.product(SHAPES, DTYPES, SIZES):
        label = f"{'x'.join(map(str, shape))}-{str(weight)[6:]}-{str(factor)[6:]}-{size}"
        make = inputs(*shape, weight, factor, size)
        yield Case(function=merge, label=label, inputs=make, check=check_same)
        yield Case(function=reversibly, label=label, inputs=make, check=check_bits)
        yield Case(function=unmerge, label=label, inputs=merged_inputs(make), check=check_restored)
        yield Case(function=total, label=label, inputs=lambda g, d, m=make: m(g, d)[:1], check=check_sum)  # type: ignore[misc]  # bound now
