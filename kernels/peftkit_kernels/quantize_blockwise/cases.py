"""Inputs and laws of quantizing in blocks and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import Case, assert_within, rounding
from peftkit_kernels.quantize_blockwise import OP, reference

COUNTS = (0, 1, 63, 64, 1000, 4133)
"""Elements: none, one, one short of a block, a block, short last blocks of even and of odd sizes."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BLOCKS = (32, 128)


def numbers(generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, and blocks of special ones: zeros, alike ones, tiny, subnormal and huge ones, infinite, NaN."""
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    scales = (1.0, 0.0, 1e-3, 1e-41, 1e-38, 1e4)
    for place, scale in enumerate(scales):
        x[place * 128 : (place + 1) * 128] *= scale
    x[768:896] = -0.37
    if count > 1024:
        x[1024], x[1200], x[1300] = float("inf"), float("nan"), -float("inf")
    return x.to(dtype)


def check_codes(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[tuple[Any, ...], tuple[Any, ...], Any], None]:
    """Codes and sizes are those of the reference, bit for bit."""

    def check(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
        for name, found, wanted in zip(("codes", "sizes"), result, run(*before), strict=True):
            assert found.dtype == wanted.dtype, f"{name}: {found.dtype}, expected {wanted.dtype}"
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{name} differ")

    return check


def check_values(exact: Callable[..., Tensor]) -> Callable[[tuple[Any, ...], tuple[Any, ...], Any], None]:
    """Value times size but for three roundings: of the size over 127, of the product and of the result."""

    def check(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
        dtype = before[-1]
        assert result.dtype == dtype, f"{result.dtype}, expected {dtype}"
        wanted = exact(*before[:-1], torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bound = 2 * rounding(wide, wanted)
        large = wanted.abs() > torch.finfo(dtype).max
        assert torch.equal(result[large].double().abs(), torch.full_like(wanted[large], float("inf")))
        assert_within(
            result[~large], wanted[~large], (bound + rounding(dtype, wanted.abs() + bound))[~large], "dequantized"
        )

    return check


def to_codes(generator: torch.Generator, device: torch.device, *, count: int, dtype: torch.dtype, rest: Any) -> Any:
    """What quantizing takes."""
    return (numbers(generator, count, dtype).to(device), *rest)


def from_codes(generator: torch.Generator, device: torch.device, *, count: int, block: int, rest: Any) -> Any:
    """What dequantizing takes: 4-bit codes where the kind stands in `rest`, else int8."""
    sizes = torch.randn(-(-count // block), generator=generator).abs()
    if len(rest) == 4:
        codes = torch.randint(0, 256, ((count + 1) // 2,), generator=generator).to(torch.uint8)
    else:
        codes = torch.randint(-127, 128, (count,), generator=generator).to(torch.int8)
    return (codes.to(device), sizes.to(device), *rest)


def cases() -> Iterator[Case]:
    """Every kind, size and dtype."""
    to_4bit, from_4bit, to_int8, from_int8 = OP.functions
    for count, dtype, block in itertools.product(COUNTS, DTYPES, BLOCKS):
        if block == 32 and count != 1000:
            continue
        label = f"{count}-{str(dtype)[6:]}-{block}"
        narrow, wide = partial(to_codes, count=count, dtype=dtype), partial(from_codes, count=count, block=block)
        for kind, name in enumerate(reference.KINDS):
            found = partial(narrow, rest=(kind, block))
            yield Case(
                function=to_4bit, label=f"{name}-{label}", inputs=found, check=check_codes(reference.quantize_4bit)
            )
        yield Case(
            function=to_int8,
            label=label,
            inputs=partial(narrow, rest=(block,)),
            check=check_codes(reference.quantize_int8),
        )
        # The dtype to dequantize to is no tensor's own, so that the reference is not chosen by itself.
        if dtype == torch.float64:
            continue
        for kind, name in enumerate(reference.KINDS):
            found = partial(wide, rest=(kind, block, count, dtype))
            yield Case(
                function=from_4bit, label=f"{name}-{label}", inputs=found, check=check_values(reference.dequantize_4bit)
            )
        yield Case(
            function=from_int8,
            label=label,
            inputs=partial(wide, rest=(block, dtype)),
            check=check_values(reference.dequantize_int8),
        )
