"""The definition of a frozen linear layer with a low-rank update in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels._precision import wide_dtype

LEVELS = 1 << 16
"""Probabilities of dropping are multiples of one over this."""
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio, as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Bits moved to the right, zeros coming in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def kept(shape: torch.Size | tuple[int, ...], probability: float, seed: Tensor) -> Tensor:
    """Which elements are kept, bool: a function of the seed and the element's place alone.

    Four neighbours share a draw of 64 bits, the finalizer of splitmix64 at seed + (place // 4 + 1) * step; an element
    is kept where its 16 bits, the lowest for the first of the four, are at least `probability * 65536`, rounded.
    """
    count = shape.numel() if isinstance(shape, torch.Size) else int(torch.Size(shape).numel())
    group = torch.arange((count + 3) // 4, device=seed.device, dtype=torch.int64)
    bits = seed + (group + 1) * _STEP
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    bits = bits ^ _shifted(bits, 31)
    parts = torch.stack([(bits >> (16 * lane)) & (LEVELS - 1) for lane in range(4)], dim=1)
    return (parts.reshape(-1)[:count] >= threshold(probability)).reshape(shape)


def threshold(probability: float) -> int:
    """The least 16 bits that are kept."""
    return int(probability * LEVELS + 0.5)


def gain(scale: float, probability: float) -> float:
    """What the update is multiplied with, so that dropping does not change its mean."""
    share = 1.0 - threshold(probability) / LEVELS
    return scale / share if share > 0.0 else 0.0


def dropped(x: Tensor, probability: float, seed: Tensor | None) -> Tensor:
    """x with zeros where elements are dropped; what is kept stays as it is."""
    if seed is None or threshold(probability) == 0:
        return x.clone()
    return torch.where(kept(x.shape, probability, seed), x, 0.0)


def merges(rows: int, out: int, width: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether multiplying with weight + scale * up @ down is less work than with the factors one after the other.

    Forming the sum takes out * width * (rank + 2), counting the memory it passes through; the factors take
    rows * rank * (out + width). Only where the sum is not rounded to 16 bits, which would round the update away.
    """
    return dtype in (torch.float32, torch.float64) and out * width * (rank + 2) < rows * rank * (out + width)


def _factors(x: Tensor, down: Tensor, up: Tensor, by: float) -> tuple[Tensor, Tensor]:
    return down.to(x.dtype), (up.to(wide_dtype(x.dtype)) * by).to(x.dtype)


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    """x @ weightᵀ + bias + (drop(x) @ downᵀ) @ (gain * up)ᵀ, (rows, out).

    Factors are rounded to the dtype of x, never x to theirs; the base, the inner product and the result are rounded to
    it too. Sums run in float32 at the least.
    """
    cast_down, cast_up = _factors(x, down, up, gain(scale, probability))
    if seed is None and merges(x.shape[0], weight.shape[0], weight.shape[1], down.shape[0], x.dtype):
        return F.linear(x, torch.addmm(weight, cast_up, cast_down), bias)
    inner = F.linear(x if seed is None else dropped(x, probability, seed), cast_down)
    return torch.addmm(F.linear(x, weight, bias), inner, cast_up.t())


def lora_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    probability: float,
    seed: Tensor | None,
    need_x: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x (rows, in), down (r, in) and up (out, r); (0,) for each that is not needed.

        grad_x = grad W + drop(back D),  grad_down = backᵀ drop(x),  grad_up = gain gradᵀ (drop(x) Dᵀ),
        back = grad (gain U)

    The products are rounded to the dtype of x before they become the factors' dtypes.
    """
    by = gain(scale, probability)
    cast_down, cast_up = _factors(x, down, up, by)
    grad_x, grad_down, grad_up = (t.new_empty(0) for t in (x, down, up))  # each its own: results must not alias
    merged = seed is None and merges(x.shape[0], weight.shape[0], weight.shape[1], down.shape[0], x.dtype)
    back = grad @ cast_up if need_down or (need_x and not merged) else grad_x
    masked = x if seed is None else dropped(x, probability, seed)
    if need_x and merged:
        grad_x = grad @ torch.addmm(weight, cast_up, cast_down)
    elif need_x and seed is None:
        grad_x = torch.addmm(grad @ weight, back, cast_down)
    elif need_x:
        grad_x = grad @ weight + dropped(back @ cast_down, probability, seed)
    if need_down:
        grad_down = (back.t() @ masked).to(down.dtype)
    if need_up:
        # (r, out) and turned: the product with the long side last is the faster one.
        turned = F.linear(masked, cast_down).t() @ grad
        grad_up = (turned.to(wide_dtype(x.dtype)) * by).t().to(up.dtype).contiguous()
    return grad_x, grad_down, grad_up
