"""The definition of a linear layer with an 8-bit weight in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels._precision import wide_dtype

LARGEST = 127
"""Codes go from minus this to this."""


def quantize_rows(x: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows: code = round(x * (127 / a)), ties to even, scale = a / 127, a the row's largest |x|.

    Every step is rounded once to float32. A row of zeros has zeros for both. Rows are finite.

    Args:
        x: (rows, in).
        shifted: codes plus 128 as uint8, rather than int8.

    Returns:
        codes (rows, in) and scales (rows,), float32 (float64 for float64).
    """
    own = x.to(wide_dtype(x.dtype))
    largest = own.abs().amax(1) if x.shape[1] else own.new_zeros(x.shape[0])
    # Between tensors: with a number, torch multiplies with a rounded inverse in places.
    most = torch.full_like(largest, LARGEST)
    inverse = torch.where(largest > 0, most / largest, 0.0)
    # A row of the smallest numbers has an infinite inverse.
    inverse = inverse.clamp_max(torch.finfo(own.dtype).max)
    codes = (own * inverse[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return (codes + 128).to(torch.uint8) if shifted else codes.to(torch.int8), largest / most


EXACT = 1024
"""Products of codes that float32 sums exactly: 127 * 128 * 1024 is below 2^24."""


def dequantized(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * weight_scale, (out, in), computed in float32 and rounded once to a dtype."""
    return (weight.to(weight_scale.dtype) * weight_scale[:, None]).to(dtype)


def finish(sums: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """sums * (row_scale * weight_scale) + bias, in float32, rounded once to the dtype of `like`.

    Args:
        sums: (rows, out), int32 or float32.
        row_scale: (rows,).
        weight_scale: (out,).
        bias: (out,) or None.
    """
    out = sums.to(row_scale.dtype) * (row_scale[:, None] * weight_scale)
    return (out if bias is None else out + bias.to(out.dtype)).to(like.dtype)


def _products(codes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """codes @ weightᵀ, exactly."""
    if dtype is torch.float64 or codes.device.type != "cpu" or not codes.numel() or not weight.numel():
        return (codes.double() @ weight.double().t()).to(dtype)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        # The library's integer product takes tens of times as long as one in float32 there.
        sums = codes.new_zeros((codes.shape[0], weight.shape[0]), dtype=torch.int32)
        for part, own in zip(codes.split(EXACT, 1), weight.split(EXACT, 1), strict=True):
            sums += (part.float() @ own.float().t()).to(torch.int32)
        return sums.to(dtype)
    return torch._int_mm(codes, weight.t()).to(dtype)


def int8_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dynamic: bool,
) -> Tensor:
    """x @ (weight * weight_scale)ᵀ + bias + scale * x @ downᵀ @ upᵀ, (rows, out).

    Where `dynamic`, the rows of x are quantized for the product with the weight, never for the update. The base is
    rounded to the dtype of x before the update is added, and the update is computed as in `lora_linear`.
    """
    if dynamic:
        codes, row_scale = quantize_rows(x, False)
        out = finish(_products(codes, weight, row_scale.dtype), row_scale, weight_scale, bias, x)
    else:
        out = F.linear(x, dequantized(weight, weight_scale, x.dtype), bias)
    return out if down is None or up is None else updated(out, x, down, up, scale)


def updated(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """out + scale * x @ downᵀ @ upᵀ, the factors rounded to the dtype of x."""
    inner = F.linear(x, down.to(x.dtype))
    return torch.addmm(out, inner, (up.to(wide_dtype(x.dtype)) * scale).to(x.dtype).t())


def int8_backward(grad: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """grad @ (weight * weight_scale), (rows, in): rounding the rows of x is taken for the identity."""
    return grad @ dequantized(weight, weight_scale, grad.dtype)
