"""The scale of DoRA's rows: magnitude over the norm of the adapted weight's rows, without forming that weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.dora_scale import reference


def _fake_squares(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))


def _fake_norms(weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))


OP = declare(
    Op(
        name="dora_scale",
        summary="Norms of the rows of weight + scale * up @ down from factored terms.",
        functions=(
            Function(
                schema="row_squares(Tensor weight) -> Tensor",
                reference=reference.row_squares,
                fake=_fake_squares,
            ),
            Function(
                schema="dora_norms(Tensor weight, Tensor squared, Tensor down, Tensor up, float scale) -> Tensor",
                reference=reference.dora_norms,
                fake=_fake_norms,
            ),
        ),
        sources={"cpu": "dora_scale.cpp", "cuda": "dora_scale.cu"},
    )
)
_squares, _norms = OP.functions
_WIDTHS = (torch.float32, torch.bfloat16, torch.float16)


def _checked(weight: Tensor, down: Tensor, up: Tensor, vectors: dict[str, Tensor]) -> None:
    """Raises ValueError or TypeError unless they fit together."""
    if weight.dim() != 2 or down.dim() != 2 or up.dim() != 2:
        raise ValueError(
            f"dora_scale: expected matrices, found weight {tuple(weight.shape)}, down {tuple(down.shape)}, "
            f"up {tuple(up.shape)}"
        )
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"dora_scale: expected down (r, in) and up (out, r) for a weight (out, in) = {tuple(weight.shape)}, "
            f"found down {tuple(down.shape)} and up {tuple(up.shape)}"
        )
    for name, vector in vectors.items():
        if vector.shape != weight.shape[:1]:
            raise ValueError(f"dora_scale: expected {name} ({weight.shape[0]},), found {tuple(vector.shape)}")
    tensors = {"weight": weight, "down": down, "up": up, **vectors}
    for name, tensor in tensors.items():
        if tensor.dtype not in (*_WIDTHS, torch.float64):
            raise TypeError(f"dora_scale: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16")
        if tensor.device != weight.device:
            raise ValueError(
                f"dora_scale: weight is on {weight.device} and {name} on {tensor.device}; move them together"
            )
    if "squared" in vectors and vectors["squared"].dtype != wide_dtype(weight.dtype):
        raise TypeError(
            f"dora_scale: squared is {vectors['squared'].dtype}; expected {wide_dtype(weight.dtype)}, "
            "as row_squares gives it"
        )
    if (weight.dtype is torch.float64) != (down.dtype is torch.float64) or down.dtype != up.dtype:
        raise TypeError(
            f"dora_scale: expected down and up of one dtype, float64 with a float64 weight only; found weight "
            f"{weight.dtype}, down {down.dtype}, up {up.dtype}"
        )


@torch.no_grad()
def row_squares(weight: Tensor) -> Tensor:
    """Squared Euclidean norms of a weight's rows, (out,), float32 (float64 for float64); to be kept.

    Args:
        weight: (out, in), float64, float32, bfloat16 or float16.

    Raises:
        ValueError: the weight is no matrix.
        TypeError: another dtype.
    """
    if weight.dim() != 2:
        raise ValueError(f"row_squares: expected a matrix (out, in), found {tuple(weight.shape)}")
    if weight.dtype not in (*_WIDTHS, torch.float64):
        raise TypeError(f"row_squares: weight is {weight.dtype}; expected float64, float32, bfloat16 or float16")
    found: Tensor = _squares(weight.contiguous())
    return found


@torch.no_grad()
def dora_norms(weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """Euclidean norms of the rows of weight + scale * up @ down, (out,), float32 (float64 for float64).

        ‖w + s b D‖² = ‖w‖² + 2 s b·(D w) + s² b (D Dᵀ) bᵀ

    No temporary as large as the weight is made. The relative error is below 1e-5, also where the update takes most of
    the weight away: rows for which the three terms cancel are computed directly in float64. No gradient passes.

    Args:
        weight: (out, in), float64, float32, bfloat16 or float16.
        squared: (out,), `row_squares(weight)`.
        down: (r, in); float64 with a float64 weight, else any of the others.
        up: (out, r), the dtype of `down`.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.
    """
    _checked(weight, down, up, {"squared": squared})
    found: Tensor = _norms(weight.contiguous(), squared.contiguous(), down.contiguous(), up.contiguous(), float(scale))
    return found


def dora_scale(
    weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, scale: float = 1.0
) -> Tensor:
    """magnitude / ‖rows of weight + scale * up @ down‖, (out,): what DoRA multiplies the adapted output with.

    The gradient goes to the magnitude alone; the norm is held fixed, as in section 4.3 of the paper.

    Args:
        weight: (out, in), float64, float32, bfloat16 or float16.
        squared: (out,), `row_squares(weight)`.
        down: (r, in); float64 with a float64 weight, else any of the others.
        up: (out, r), the dtype of `down`.
        magnitude: (out,), any of these dtypes.

    Returns:
        (out,), in the wider dtype of magnitude and norms; infinite or NaN for a row of zeros.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.

    Paper: Liu et al. 2024, arXiv:2402.09353, sections 4.1 and 4.3.
    """
    _checked(weight, down, up, {"squared": squared, "magnitude": magnitude})
    return magnitude / dora_norms(weight, squared, down, up, scale)
