"""Inputs and laws of the linear layer with an NF4 weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import EPSILON, SMALLEST, Case, assert_within, rounding
from peftkit_kernels.nf4_linear import OP, reference

SHAPES = ((0, 5, 64, 2, 64), (1, 1, 1, 1, 64), (1, 70, 384, 16, 64), (2, 9, 53, 4, 64), (3, 33, 128, 8, 128),
          (7, 40, 256, 5, 256), (13, 64, 160, 3, 32), (16, 35, 256, 16, 64), (17, 50, 192, 5, 64), (20, 9, 53, 4, 64),
          (40, 130, 96, 8, 32), (9, 70, 64, 40, 64))  # fmt: skip
"""Rows, out, in, rank and block: none, one element, rows that do and do not start with a block, few rows and many."""
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
          (torch.float32, torch.float32), (torch.float64, torch.float64))  # fmt: skip
"""Of x and of factors and bias."""
SCALE = 1.5

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def inputs(
    rows: int, out: int, width: int, rank: int, block: int, own: torch.dtype, factor: torch.dtype, *, extra: bool,
    forward: bool,
) -> Inputs:  # fmt: skip
    """What one entry point takes; with bias, down and up if `extra`, for the gradient without the bias."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        count = out * width
        x = normal(rows, width if forward else out).to(own)
        codes = torch.randint(0, 256, ((count + 1) // 2,), generator=generator).to(torch.uint8)
        sizes = (0.05 * normal(-(-count // block)).abs() + 0.01).float()
        bias, down, up = (
            t.to(factor) if extra else None for t in (normal(out), normal(rank, width), normal(out, rank))
        )
        held = [None if t is None else t.to(device) for t in (x, codes, sizes, bias, down, up)]
        if forward:
            return (*held[:3], out, block, *held[3:], SCALE)
        return (*held[:3], width, block, *held[4:], SCALE)

    return made


def bound_of(x: Tensor, weight: Tensor, left: Tensor | None, right: Tensor | None, bias: Tensor | None) -> Tensor:
    """How far x weight' + SCALE * (x left') right' + bias may be off before the result is rounded.

    With u the rounding of the dtype of x and v that of the sums: a weight is rounded to float32 and to the dtype
    (u + v); left, x left' and SCALE * right are rounded to the dtype (3u, and u for second-order terms), the bias too
    (u); every term takes part in at most in + rank + 2 additions (v each), those of x left' in as many. A number below
    the normal ones is off by its dtype's smallest one.
    """
    size, dtype = x.double().abs(), x.dtype
    u = EPSILON[dtype]
    v = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
    terms = (weight.shape[1] + (0 if left is None else left.shape[0]) + 2) * v
    bound = size @ weight.abs().t() * (u + v + terms) + SMALLEST[dtype] * size.sum(1, keepdim=True)
    if left is not None and right is not None:
        inner = size @ left.double().abs().t()
        bound = bound + SCALE * (inner @ right.double().abs().t()) * (4 * u + 2 * terms)
        tiny = inner.sum(1, keepdim=True) + (1 + size.sum(1, keepdim=True)) * right.double().abs().sum(1)
        bound = bound + SMALLEST[dtype] * 2 * tiny
    return bound if bias is None else bound + bias.double().abs() * (u + terms)


def check_linear(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The float64 reference, within `bound_of` and one rounding."""
    x, codes, sizes, out, block, bias, down, up, scale = before
    b, d, u = (None if t is None else t.double() for t in (bias, down, up))
    wanted = reference.nf4_linear(x.double(), codes, sizes, out, block, b, d, u, scale)
    weight = reference.weight_of(codes, sizes, out, x.shape[1], block, torch.float64)
    bound = bound_of(x, weight, down, up, bias)
    assert result.dtype == x.dtype, f"{result.dtype}, expected {x.dtype}"
    assert_within(result, wanted, bound + rounding(x.dtype, wanted.abs() + bound), "nf4_linear")


def check_grad(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The float64 reference, within `bound_of` and one rounding."""
    grad, codes, sizes, width, block, down, up, scale = before
    d, u = (None if t is None else t.double() for t in (down, up))
    wanted = reference.nf4_linear_grad(grad.double(), codes, sizes, width, block, d, u, scale)
    weight = reference.weight_of(codes, sizes, grad.shape[1], width, block, torch.float64).t()
    left, right = (None, None) if up is None or down is None else (up.t(), down.t())
    bound = bound_of(grad, weight, left, right, None)
    assert result.dtype == grad.dtype, f"{result.dtype}, expected {grad.dtype}"
    assert_within(result, wanted, bound + rounding(grad.dtype, wanted.abs() + bound), "nf4_linear_grad")


def cases() -> Iterator[Case]:
    """Every shape and dtype, alone and with bias and update."""
    linear, gradient = OP.functions
    for shape, (own, factor) in itertools.product(SHAPES, DTYPES):
        label = f"{'x'.join(map(str, shape))}-{str(own)[6:]}-{str(factor)[6:]}"
        for extra in (False, True):
            if not extra and own != factor:
                continue
            name = f"{label}{'-lora' if extra else ''}"
            made = inputs(*shape, own, factor, extra=extra, forward=True)
            yield Case(function=linear, label=name, inputs=made, check=check_linear)
        if own == factor:
            made = inputs(*shape, own, factor, extra=shape[0] != 20, forward=False)
            yield Case(function=gradient, label=label, inputs=made, check=check_grad)
