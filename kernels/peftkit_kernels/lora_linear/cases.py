"""Inputs and laws of a frozen linear layer with a low-rank update."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._case import EPSILON, SMALLEST, Case, assert_within
from peftkit_kernels.lora_linear import OP, reference

SHAPES = ((24, 33, 40, 8), (1, 70, 50, 16), (3, 17, 129, 5), (1, 1, 1, 1), (0, 7, 5, 2), (6, 5, 3, 0), (64, 8, 9, 7))
"""Rows, in, out and rank: many rows, one, a few, one element, none, no rank, and so many that the sum is formed."""
DTYPES = ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
          (torch.float32, torch.float32), (torch.float64, torch.float64))  # fmt: skip
"""Of x and weight, and of the factors."""
PROBABILITIES = (0.0, 0.3)
SCALE = 1.5

Inputs = Callable[[torch.Generator, torch.device], tuple[Any, ...]]


def inputs(
    rows: int, width: int, out: int, rank: int, base: torch.dtype, factor: torch.dtype, probability: float, bias: bool
) -> Inputs:
    """What the forward function takes."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        seed = torch.randint(-(2**62), 2**62, (1,), generator=generator).to(device) if probability else None
        return (
            normal(base, rows, width),
            normal(base, out, width),
            normal(base, out) if bias else None,
            normal(factor, rank, width),
            normal(factor, out, rank),
            SCALE,
            probability,
            seed,
        )

    return made


def backward_inputs(make: Inputs, needed: tuple[bool, bool, bool]) -> Inputs:
    """What the backward function takes."""

    def made(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, weight, _, *rest = make(generator, device)
        grad = torch.randn(x.shape[0], weight.shape[0], generator=generator, dtype=torch.float64)
        return (grad.to(x.dtype).to(device), x, weight, *rest, *needed)

    return made


def _masked(x: Tensor, probability: float, seed: Tensor | None) -> Tensor:
    return x if seed is None else torch.where(reference.kept(x.shape, probability, seed), x, 0.0)


def _bound(base: Tensor, low: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Of a base and an update whose sizes, all signs made positive, are given.

    The base is rounded once, each factor of the update and its inner product once, the update once where it is not
    added at once, and the sum once: 2 roundings of the base and 5 of the update. Sums make a rounding to float32 a
    term at most.
    """
    one = EPSILON[dtype]
    inside = (terms + 4) * EPSILON[torch.float64 if dtype is torch.float64 else torch.float32]
    return 1.01 * ((2 * one + inside) * base + (5 * one + inside) * low) + 8 * SMALLEST[dtype] * (1 + terms)


def check_forward(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """x Wᵀ + b + gain * drop(x) Dᵀ Uᵀ, see `_bound`."""
    x, weight, bias, down, up, scale, probability, seed = before
    own, gain = x.double(), reference.gain(scale, probability)
    masked = _masked(own, probability, seed)
    shift = torch.zeros(()) if bias is None else bias.double()
    wanted = own @ weight.double().t() + shift + gain * (masked @ down.double().t()) @ up.double().t()
    base = own.abs() @ weight.double().abs().t() + shift.abs()
    low = gain * (masked.abs() @ down.double().abs().t()) @ up.double().abs().t()
    assert result.dtype == x.dtype, result.dtype
    assert_within(result, wanted, _bound(base, low, x.shape[1] + down.shape[0], x.dtype), "output")


def check_backward(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The three gradients, see `_bound`; those of the factors are rounded to their dtypes besides."""
    grad, x, weight, down, up, scale, probability, seed, *needed = before
    gain = reference.gain(scale, probability)
    g, own, w, d, u = (t.double() for t in (grad, x, weight, down, up))
    masked = _masked(own, probability, seed)

    def mask(t: Tensor) -> Tensor:
        return _masked(t, probability, seed)

    nothing = torch.zeros((), dtype=torch.float64, device=x.device)
    terms = weight.shape[0] + weight.shape[1] + x.shape[0] + down.shape[0]
    wanted = (g @ w + mask(gain * (g @ u) @ d), gain * (g @ u).t() @ masked, gain * g.t() @ (masked @ d.t()))
    g, w, d, u, masked = g.abs(), w.abs(), d.abs(), u.abs(), masked.abs()
    bounds = (
        _bound(g @ w, mask(gain * (g @ u) @ d), terms, x.dtype),
        _bound(nothing, gain * (g @ u).t() @ masked, terms, x.dtype),
        _bound(nothing, gain * g.t() @ (masked @ d.t()), terms, x.dtype),
    )
    for name, found, like, want, bound, need in zip(
        ("grad_x", "grad_down", "grad_up"), result, (x, down, up), wanted, bounds, needed, strict=True
    ):
        assert found.dtype == like.dtype, f"{name}: {found.dtype}"
        if need:
            # The last rounding is to the factor's dtype.
            assert_within(found, want, bound + 1.01 * EPSILON[like.dtype] * want.abs(), name)
        else:
            assert found.shape == (0,), f"{name}: {tuple(found.shape)} where nothing was asked for"


def check_dropped(before: tuple[Any, ...], after: tuple[Any, ...], result: Any) -> None:
    """The elements of the reference, bit for bit."""
    assert torch.equal(result, reference.dropped(*before)), "other elements are dropped than in the reference"


def cases() -> Iterator[Case]:
    """Every entry point on every shape and dtype, with and without dropping."""
    forward, backward, dropped = OP.functions
    for number, (shape, (base, factor), probability) in enumerate(itertools.product(SHAPES, DTYPES, PROBABILITIES)):
        label = f"{'x'.join(map(str, shape))}-{str(base)[6:]}-{str(factor)[6:]}-{probability}"
        make = inputs(*shape, base, factor, probability, bias=number % 3 > 0)
        yield Case(function=forward, label=label, inputs=make, check=check_forward)
        needed = ((True, True, True), (True, False, True), (False, True, False), (True, True, True))[number % 4]
        yield Case(function=backward, label=label, inputs=backward_inputs(make, needed), check=check_backward)
        if probability and base == factor:
            yield Case(
                function=dropped,
                label=label,
                inputs=lambda g, d, m=make: (lambda a: (a[0], a[6], a[7]))(m(g, d)),  # type: ignore[misc]  # bound now
                check=check_dropped,
            )
