"""Inputs and laws of a linear layer with an 8-bit weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import EPSILON, SMALLEST, Case, assert_within
from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.int8_linear import OP, reference

SHAPES = ((24, 33, 40, 8), (1, 131, 50, 16), (3, 64, 129, 0), (1, 1, 1, 1), (0, 7, 5, 2))
"""Rows, in, out and rank; no update for rank 0."""
DTYPES = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
          (torch.float64, torch.float64))  # fmt: skip
"""Of x and of the factors."""
SCALE = 0.5

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def inputs(rows: int, width: int, out: int, rank: int, base: torch.dtype, factor: torch.dtype, dynamic: bool) -> Inputs:
    """What the forward function takes; codes of the weight reach both ends."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        weight = torch.randint(-128, 128, (out, width), generator=generator, dtype=torch.int8).to(device)
        x = normal(base, rows, width)
        if rows > 2:
            x[1] = 0.0
        return (
            x,
            weight,
            0.01 * normal(wide_dtype(base), out).abs(),
            normal(base, out) if rank % 2 == 0 else None,
            normal(factor, rank, width) if rank else None,
            normal(factor, out, rank) if rank else None,
            SCALE,
            dynamic,
        )

    return made


def check_forward(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """Exact integer sums, scaled, and the update, but for roundings.

    Base: to the float32 of a large sum, three for the scales and the shift, one a term where the weight alone is
    quantized, one to the dtype of each weight, and one to the result's. Update: five, as in `lora_linear`.
    """
    x, weight, weight_scale, bias, down, up, scale, dynamic = before
    one, unit = EPSILON[x.dtype], EPSILON[wide_dtype(x.dtype)]
    own = x.double()
    if dynamic:
        codes, row_scale = reference.quantize_rows(x, False)
        own = codes.double() * row_scale.double()[:, None]
    wide = weight.double() * weight_scale.double()[:, None]
    shift = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    wanted = own @ wide.t() + shift
    base = own.abs() @ wide.abs().t() + shift.abs()
    low = torch.zeros_like(wanted)
    if down is not None:
        wanted = wanted + scale * (x.double() @ down.double().t()) @ up.double().t()
        low = scale * (x.double().abs() @ down.double().abs().t()) @ up.double().abs().t()
    terms = x.shape[1] + (0 if down is None else down.shape[0])
    exact = wanted.abs() + low if dynamic else base
    bound = (5 + (0 if dynamic else terms)) * unit * base + 3 * one * exact
    bound = 1.01 * (bound + (5 * one + (terms + 4) * unit) * low) + 8 * SMALLEST[x.dtype] * (1 + terms)
    assert_within(result, wanted, bound, "output")


def check_backward(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """g W, the weight and the result rounded to the dtype once each, the sum to float32 a term."""
    grad, weight, weight_scale = before
    wide = weight.double() * weight_scale.double()[:, None]
    size = grad.double().abs() @ wide.abs()
    unit = EPSILON[wide_dtype(grad.dtype)]
    bound = 1.01 * (2 * EPSILON[grad.dtype] + (weight.shape[0] + 2) * unit) * size + 8 * SMALLEST[grad.dtype]
    assert_within(result, grad.double() @ wide, bound, "grad_x")


def check_codes(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The bits of the reference."""
    for name, found, wanted in zip(("codes", "scales"), result, reference.quantize_rows(*before), strict=True):
        assert found.dtype == wanted.dtype, f"{name}: {found.dtype}, expected {wanted.dtype}"
        assert torch.equal(found, wanted), f"{name} differ from the reference's"


def check_finish(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """Four roundings to float32, one to the dtype."""
    sums, row_scale, weight_scale, bias, like = before
    wanted = sums.double() * row_scale.double()[:, None] * weight_scale.double()
    size = wanted.abs()
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    bound = 1.01 * (4 * EPSILON[wide_dtype(like.dtype)] * size + EPSILON[like.dtype] * wanted.abs())
    assert result.dtype == like.dtype, result.dtype
    assert_within(result, wanted, bound + SMALLEST[like.dtype], "output")


def finish_inputs(make: Inputs, kind: torch.dtype) -> Inputs:
    """Sums of that dtype, scales, bias and x."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, weight, weight_scale, bias, *_ = make(generator, device)
        sums = torch.randint(-(2**26), 2**26, (x.shape[0], weight.shape[0]), generator=generator).to(kind).to(device)
        scale = torch.rand(x.shape[0], generator=generator, dtype=torch.float64) * 1e-5
        return sums, scale.to(weight_scale), weight_scale, bias, x

    return made


def cases() -> Iterator[Case]:
    """Every entry point on every shape and dtype, rows quantized or not."""
    forward, backward, quantize, finish = OP.functions
    for shape, (base, factor) in itertools.product(SHAPES, DTYPES):
        name = f"{'x'.join(map(str, shape))}-{str(base)[6:]}-{str(factor)[6:]}"
        for dynamic in (True, False):
            make = inputs(*shape, base, factor, dynamic)
            label = f"{name}-{'dynamic' if dynamic else 'weight-only'}"
            yield Case(function=forward, label=label, inputs=make, check=check_forward)
            yield Case(
                function=quantize,
                label=label,
                inputs=lambda g, d, m=make, s=dynamic: (m(g, d)[0], s),  # type: ignore[misc]  # bound now
                check=check_codes,
            )
        yield Case(
            function=backward,
            label=name,
            inputs=lambda g, d, m=make: (  # type: ignore[misc]  # bound now
                lambda a: (torch.randn(a[0].shape[0], a[1].shape[0], generator=g).to(a[0]), a[1], a[2])
            )(m(g, d)),
            check=check_backward,
        )
        if base is not torch.float64:
            for kind in (torch.int32, torch.float32):
                label = f"{name}-{str(kind)[6:]}"
                yield Case(function=finish, label=label, inputs=finish_inputs(make, kind), check=check_finish)
