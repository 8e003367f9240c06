"""The definition of a linear layer with an NF4 weight in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.quantize_blockwise.reference import dequantize_4bit

NF4 = 0


def weight_of(codes: Tensor, absmax: Tensor, rows: int, columns: int, block: int, dtype: torch.dtype) -> Tensor:
    """The weight that the codes stand for, (rows, columns), rounded once to the dtype."""
    flat = dequantize_4bit(codes, absmax, NF4, block, rows * columns, dtype)
    return flat.view(rows, columns)


def nf4_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    height: int,
    block: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> Tensor:
    """x W' + scale * (x down') up' + bias, (rows, height), rounded once to the dtype of x.

    Sums are taken in float32 (float64 for a float64 x). An implementation may round the weight, the factors, x down'
    and scale * up to the dtype of x.

    Args:
        x: (rows, in).
        bias: (height,).
        down: (r, in).
        up: (height, r).
    """
    wide = wide_dtype(x.dtype)
    weight = weight_of(codes, absmax, height, x.shape[1], block, wide)
    result = x.to(wide) @ weight.t()
    if down is not None and up is not None:
        result = result + scale * ((x.to(wide) @ down.to(wide).t()) @ up.to(wide).t())
    if bias is not None:
        result = result + bias.to(wide)
    return result.to(x.dtype)


def nf4_linear_grad(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    width: int,
    block: int,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> Tensor:
    """grad W + scale * (grad up) down, (rows, width): the gradient of x; rounded as `nf4_linear` is.

    Args:
        grad: (rows, out).
    """
    wide = wide_dtype(grad.dtype)
    weight = weight_of(codes, absmax, grad.shape[1], width, block, wide)
    result = grad.to(wide) @ weight
    if down is not None and up is not None:
        result = result + scale * ((grad.to(wide) @ up.to(wide)) @ down.to(wide))
    return result.to(grad.dtype)
