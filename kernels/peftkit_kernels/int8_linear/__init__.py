"""A frozen linear layer with an 8-bit weight, the rows of its input quantized or not, and a low-rank update."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels._precision import wide_dtype
from peftkit_kernels.int8_linear import reference

FEW = 4
"""Rows up to which compiled code multiplies itself, rather than the library that a packed weight is for."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fake_quantize(x: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8 if shifted else torch.int8)
    return codes, x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype))


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dynamic: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_finish(sums: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(sums.shape)


OP = declare(
    Op(
        name="int8_linear",
        summary="A linear layer with an 8-bit weight and a low-rank update.",
        functions=(
            Function(
                schema="int8_forward(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? down, "
                "Tensor? up, float scale, bool dynamic) -> Tensor",
                reference=reference.int8_forward,
                fake=_fake_forward,
            ),
            Function(
                schema="int8_backward(Tensor grad, Tensor weight, Tensor weight_scale) -> Tensor",
                reference=reference.int8_backward,
                fake=lambda grad, weight, weight_scale: grad.new_empty(grad.shape[0], weight.shape[1]),
                devices=("cpu",),
            ),
            Function(
                schema="int8_quantize_rows(Tensor x, bool shifted) -> (Tensor, Tensor)",
                reference=reference.quantize_rows,
                fake=_fake_quantize,
            ),
            Function(
                schema="int8_finish(Tensor sums, Tensor row_scale, Tensor weight_scale, Tensor? bias, Tensor like) "
                "-> Tensor",
                reference=reference.finish,
                fake=_fake_finish,
            ),
        ),
        sources={"cpu": "int8_linear.cpp", "cuda": "int8_linear.cu"},
    )
)
_forward, _backward, _quantize_rows, _finish = OP.functions


@functools.cache
def _library_multiplies() -> bool:
    """Whether the library's quantized product is there and right; its operators promise no stability."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX512_VNNI"):
        return False
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (5, 67), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (9, 67), generator=generator, dtype=torch.int8)
    try:
        found = _library_product((codes.int() + 128).to(torch.uint8), _packed(weight), 9)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.equal(found, (codes.double() @ weight.double().t()).float())


def _packed(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return found


def _library_product(shifted: Tensor, packed: Tensor, out: int) -> Tensor:
    """(codes - 128) @ weightᵀ in float32; signed codes take a path that is slow on processors without AMX."""
    ones, zeros = torch.ones(out), torch.zeros(out, dtype=torch.int32)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


def pack_int8(weight: Tensor) -> Tensor | None:
    """The weight once more as the processor's library wants it, which makes products with many rows faster; else None.

    It takes as many bytes as the weight. None on other devices than the CPU, and where the library cannot.

    Args:
        weight: (out, in), int8.
    """
    if weight.device.type != "cpu" or not weight.numel() or not _library_multiplies():
        return None
    return _packed(weight.contiguous())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of a matrix and the scale of each row: round(x * (127 / a)), ties to even, and a / 127.

    a is the row's largest magnitude; the steps are rounded to float32 one by one, so that every implementation gives
    the same bits. Quantizes a weight too: `int8_linear` takes both as they are.

    Args:
        x: (rows, in), float64, float32, bfloat16 or float16, finite.

    Returns:
        codes (rows, in), int8, and scales (rows,), float32 (float64 for float64).

    Raises:
        ValueError: x is no matrix.
        TypeError: another dtype.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize_rows: expected a matrix, found {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"quantize_rows: x is {x.dtype}; expected float64, float32, bfloat16 or float16")
    with torch.no_grad():
        codes, scales = _quantize_rows(x.contiguous(), False)
    return codes, scales


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
    dynamic: bool,
    packed: Tensor | None,
) -> Tensor:
    rows = _rows(x)
    if packed is None or not dynamic or rows.shape[0] <= FEW or x.dtype is torch.float64:
        found: Tensor = _forward(rows, weight, weight_scale, bias, down, up, scale, dynamic)
    else:
        codes, row_scale = _quantize_rows(rows, True)
        sums = _library_product(codes, packed, weight.shape[0])
        found = _finish(sums, row_scale, weight_scale, bias, rows)
        if down is not None and up is not None:
            found = reference.updated(found, rows, down, up, scale)
    return found.view(*x.shape[:-1], weight.shape[0])


class _Int8Linear(torch.autograd.Function):
    """Keeps x; what is quantized of it is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        down, up, scale, dynamic, packed = rest
        ctx.save_for_backward(x, weight, weight_scale, down, up)
        ctx.scale = scale
        return _product(x, weight, weight_scale, bias, down, up, scale, dynamic, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_scale, down, up = ctx.saved_tensors
        need_x, _, _, need_bias, need_down, need_up = ctx.needs_input_grad[:6]
        grad = _rows(grad)
        grad_x = _backward(grad, weight, weight_scale) if need_x else None
        grad_down = grad_up = None
        if down is not None:
            rows, by = _rows(x), (up.to(wide_dtype(x.dtype)) * ctx.scale).to(x.dtype)
            cast_down = down.to(x.dtype)
            back = grad @ by if need_x or need_down else None
            if grad_x is not None and back is not None:
                grad_x = grad_x.addmm_(back, cast_down)
            if need_down and back is not None:
                grad_down = (back.t() @ rows).to(down.dtype)
            if need_up:
                turned = (rows @ cast_down.t()).t() @ grad
                grad_up = (turned.to(wide_dtype(x.dtype)) * ctx.scale).t().to(up.dtype).contiguous()
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None,
            None,
            grad.sum(0) if need_bias else None,
            grad_down,
            grad_up,
            None,
            None,
            None,
        )


def _checked(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None
) -> None:
    """Raises ValueError or TypeError unless the arguments fit together."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"int8_linear: expected x (..., in) and weight (out, in), found x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)}"
        )
    out, width = weight.shape
    vectors = {"weight_scale": weight_scale, **({} if bias is None else {"bias": bias})}
    for name, vector in vectors.items():
        if vector.shape != (out,):
            raise ValueError(f"int8_linear: expected {name} ({out},), found {tuple(vector.shape)}")
    if (down is None) != (up is None):
        raise ValueError("int8_linear: expected down and up, or neither")
    factors: dict[str, Tensor] = {}
    if down is not None and up is not None:
        factors = {"down": down, "up": up}
        if down.dim() != 2 or up.dim() != 2 or (up.shape[0], down.shape[1]) != (out, width) or up.shape[1] != len(down):
            raise ValueError(
                f"int8_linear: expected down (r, in) and up (out, r) for a weight (out, in) = {(out, width)}, found "
                f"down {tuple(down.shape)} and up {tuple(up.shape)}"
            )
    if weight.dtype is not torch.int8:
        raise TypeError(f"int8_linear: weight is {weight.dtype}; expected int8, as quantize_rows gives it")
    if x.dtype not in _DTYPES:
        raise TypeError(f"int8_linear: x is {x.dtype}; expected float64, float32, bfloat16 or float16")
    if weight_scale.dtype != wide_dtype(x.dtype):
        raise TypeError(f"int8_linear: weight_scale is {weight_scale.dtype}; expected {wide_dtype(x.dtype)}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"int8_linear: x is {x.dtype} and bias {bias.dtype}; cast one of them")
    for name, tensor in factors.items():
        if tensor.dtype not in _DTYPES or (tensor.dtype is torch.float64) != (x.dtype is torch.float64):
            raise TypeError(f"int8_linear: x is {x.dtype} and {name} {tensor.dtype}; float64 goes with float64 only")
    if down is not None and up is not None and down.dtype != up.dtype:
        raise TypeError(f"int8_linear: expected down and up of one dtype, found {down.dtype} and {up.dtype}")
    for name, tensor in {"weight": weight, **vectors, **factors}.items():
        if tensor.device != x.device:
            raise ValueError(f"int8_linear: x is on {x.device} and {name} on {tensor.device}; move them together")


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    *,
    dynamic: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """x @ (weight * weight_scale)ᵀ + bias + scale * x @ downᵀ @ upᵀ with a frozen 8-bit weight.

    Where `dynamic`, each row of x is quantized as by `quantize_rows` and multiplied in integers, exactly; else the
    weight is dequantized, a panel at a time. Gradients go to x, bias, down and up, as if nothing had been rounded; not
    twice. Under autocast x and bias are cast as for torch's linear.

    Args:
        x: (..., in), float64, float32, bfloat16 or float16; any strides.
        weight: (out, in), int8.
        weight_scale: (out,), float32 (float64 for a float64 x); bitsandbytes' SCB over 127.
        bias: (out,), the dtype of x, or None.
        down: (r, in), or None for no update.
        up: (out, r), the dtype of `down`.
        dynamic: quantize the rows of x.
        packed: `pack_int8(weight)`, used for many rows; not while compiling.

    Returns:
        (..., out), in the dtype of x.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.

    Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.1, without outlier columns.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
        bias = None if bias is None else bias.to(x.dtype)
    _checked(x, weight, weight_scale, bias, down, up)
    if torch.compiler.is_compiling():
        packed = None
    tensors = [None if t is None else t.contiguous() for t in (weight, weight_scale, bias, down, up)]
    wanted = any(t is not None and t.requires_grad for t in (x, bias, down, up))
    if torch.is_grad_enabled() and wanted:
        found: Tensor = _Int8Linear.apply(x, *tensors, float(scale), dynamic, packed)  # type: ignore[no-untyped-call]  # torch
        return found
    own, scales, shift, lower, upper = tensors
    assert own is not None
    assert scales is not None
    return _product(x, own, scales, shift, lower, upper, float(scale), dynamic, packed)
