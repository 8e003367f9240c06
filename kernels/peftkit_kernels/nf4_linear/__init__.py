"""A linear layer whose frozen weight is in NF4, alone and with a trainable low-rank update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.nf4_linear import reference
from peftkit_kernels.quantize_blockwise import check_blocks

_WEIGHT = "Tensor codes, Tensor absmax"
_FACTORS = "Tensor? down, Tensor? up, float scale"


def _fake_linear(
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
    return x.new_empty(x.shape[0], height)


def _fake_grad(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    width: int,
    block: int,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> Tensor:
    return grad.new_empty(grad.shape[0], width)


OP = declare(
    Op(
        name="nf4_linear",
        summary="x @ W.T for a W in NF4, with a low-rank update in the same call.",
        functions=(
            Function(
                schema=f"nf4_linear(Tensor x, {_WEIGHT}, int height, int block, Tensor? bias, {_FACTORS}) -> Tensor",
                reference=reference.nf4_linear,
                fake=_fake_linear,
            ),
            Function(
                schema=f"nf4_linear_grad(Tensor grad, {_WEIGHT}, int width, int block, {_FACTORS}) -> Tensor",
                reference=reference.nf4_linear_grad,
                fake=_fake_grad,
            ),
        ),
        sources={"cpu": "nf4_linear.cpp", "cuda": "nf4_linear.cu"},
    )
)
_linear, _grad = OP.functions


class _Linear(torch.autograd.Function):
    """Keeps the input only; the weight is dequantized again and x down' computed again where they are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        shape: tuple[int, int],
        block: int,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scale: float,
    ) -> Tensor:
        # The gradients of the bias and of x alone do not read x.
        trained = down is not None and (down.requires_grad or (up is not None and up.requires_grad))
        ctx.save_for_backward(x if trained else None, codes, absmax, down, up)
        ctx.settings = (shape, block, scale, None if bias is None else bias.dtype)
        result: Tensor = _linear(x, codes, absmax, shape[0], block, bias, down, up, scale)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, absmax, down, up = ctx.saved_tensors
        shape, block, scale, bias_dtype = ctx.settings
        grad = grads[0].contiguous()
        of_x = of_bias = of_down = of_up = None
        needs = ctx.needs_input_grad
        if needs[0]:
            of_x = _grad(grad, codes, absmax, shape[1], block, down, up, scale)
        if needs[5]:
            of_bias = grad.sum(0, dtype=torch.float32 if grad.dtype != torch.float64 else None).to(bias_dtype)
        if needs[6]:
            inner = scale * (grad @ up.to(grad.dtype))
            of_down = (inner.t() @ x).to(down.dtype)
        if needs[7]:
            inner = scale * (x @ down.to(x.dtype).t())
            of_up = (grad.t() @ inner).to(up.dtype)
        return of_x, None, None, None, None, of_bias, of_down, of_up, None


def _checked(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    block: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    """Raises ValueError or TypeError unless all fit together."""
    check_blocks("nf4_linear", "nf4", block)
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"nf4_linear: shape is {tuple(shape)}; expected (out, in)")
    height, width = shape
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"nf4_linear: x is {tuple(x.shape)}; expected (..., {width}) for a weight (out, in) = {shape}")
    count = height * width
    expected = ((count + 1) // 2, (count + block - 1) // block)
    if (codes.numel(), absmax.numel()) != expected:
        raise ValueError(
            f"nf4_linear: expected {expected[0]} codes and {expected[1]} scales for a weight (out, in) = {shape} in "
            f"blocks of {block}, found {codes.numel()} and {absmax.numel()}"
        )
    if codes.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise TypeError(
            f"nf4_linear: codes are {codes.dtype} and absmax {absmax.dtype}; expected uint8 and float32 "
            "(`Quantized.sizes()` undoes nested scales)"
        )
    if bias is not None and tuple(bias.shape) != (height,):
        raise ValueError(f"nf4_linear: bias is {tuple(bias.shape)}; expected ({height},)")
    if down is not None and up is not None and (
        down.dim() != 2 or up.dim() != 2 or (up.shape[0], down.shape[1]) != (height, width)
        or up.shape[1] != down.shape[0]
    ):  # fmt: skip
        raise ValueError(
            f"nf4_linear: expected down (r, {width}) and up ({height}, r), "
            f"found {tuple(down.shape)} and {tuple(up.shape)}"
        )
    named = {"codes": codes, "absmax": absmax, "x": x, "bias": bias, "down": down, "up": up}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"nf4_linear: x is on {x.device} and {name} on {tensor.device}; move them together")
        if name in ("codes", "absmax"):
            continue
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"nf4_linear: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16")
        if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(
                f"nf4_linear: x is {x.dtype} and {name} {tensor.dtype}; float64 does not mix with other dtypes"
            )


def _run(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    block: int,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    scale: float,
) -> Tensor:
    _checked(x, codes, absmax, shape, block, bias, down, up)
    shape = (shape[0], shape[1])
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        # Off inside: the products of the reference in float32 are to stay so.
        with torch.autocast(kind, enabled=False):
            return _run(x.to(torch.get_autocast_dtype(kind)), codes, absmax, shape, block, bias, down, up, scale)
    matrix = x.reshape(-1, shape[1]) if shape[1] else x.reshape(x.shape[:-1].numel(), 0)
    parts = (None if t is None else t.contiguous() for t in (bias, down, up))
    arguments = (matrix.contiguous(), codes.contiguous(), absmax.contiguous())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, down, up)):
        result = _Linear.apply(*arguments, shape, block, *parts, scale)  # type: ignore[no-untyped-call]  # torch's
    else:
        result = _linear(*arguments, shape[0], block, *parts, scale)
    final: Tensor = result.view(*x.shape[:-1], shape[0])
    return final


def nf4_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, shape: tuple[int, int], block: int = 64, bias: Tensor | None = None
) -> Tensor:
    """x @ W.T + bias for a frozen weight in NF4; sums in float32 and rounded once to the dtype of x.

    The gradient of x dequantizes the weight again; nothing of its size is kept. Under autocast x is cast.

    Args:
        x: (..., in), bfloat16, float16, float32 or float64.
        codes: the weight's codes row after row, two a byte, as `quantize_blockwise` and bitsandbytes store them;
            uint8, ceil(out * in / 2) of them in any shape.
        absmax: scale of each block, float32; `Quantized.sizes()` gives it where scales are nested.
        shape: (out, in) of the weight.
        block: elements that share a scale, a power of two from 32 to 4096; blocks need not end where rows do.
        bias: (out,).

    Returns:
        (..., out), the dtype of x.

    Raises:
        ValueError: shapes, numbers of codes or devices that do not fit together, or no such size of blocks.
        TypeError: a dtype that is not taken.
    """
    return _run(x, codes, absmax, shape, block, bias, None, None, 1.0)


def nf4_lora_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    block: int = 64,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ W.T + scale * (x @ down.T) @ up.T + bias in one call, rounded once to the dtype of x.

    Arguments, results and errors of `nf4_linear`. Only x is kept for the gradients of x, down, up and bias.

    Args:
        down: (r, in), any floating dtype; float64 only where x is.
        up: (out, r).
    """
    return _run(x, codes, absmax, shape, block, bias, down, up, scale)
