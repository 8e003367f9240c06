"""A frozen linear layer with a low-rank update, keeping nothing but its input for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.lora_linear import reference

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REST = "Tensor down, Tensor up, float scale, float probability, Tensor? seed"


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    probability: float,
    seed: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(
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
    def like(wanted: bool, tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape) if wanted else tensor.new_empty(0)

    return like(need_x, x), like(need_down, down), like(need_up, up)


OP = declare(
    Op(
        name="lora_linear",
        summary="A frozen linear layer and its low-rank update, forward and backward.",
        functions=(
            Function(
                schema=f"lora_forward(Tensor x, Tensor weight, Tensor? bias, {_REST}) -> Tensor",
                reference=reference.lora_forward,
                fake=_fake_forward,
            ),
            Function(
                schema=f"lora_backward(Tensor grad, Tensor x, Tensor weight, {_REST}, "
                "bool need_x, bool need_down, bool need_up) -> (Tensor, Tensor, Tensor)",
                reference=reference.lora_backward,
                fake=_fake_backward,
                devices=("cpu",),
            ),
            Function(
                schema="lora_dropped(Tensor x, float probability, Tensor? seed) -> Tensor",
                reference=reference.dropped,
                fake=lambda x, probability, seed: x.new_empty(x.shape),
            ),
        ),
        sources={"cpu": "lora_linear.cpp", "cuda": "lora_linear.cu"},
    )
)
_forward, _backward, _dropped = OP.functions


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _LoraLinear(torch.autograd.Function):
    """Keeps x as it was given; the inner product and the dropped elements are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        probability: float,
        seed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up, seed)
        ctx.factors = (scale, probability)
        found: Tensor = _forward(_rows(x), weight, bias, down, up, scale, probability, seed)
        return found.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, seed = ctx.saved_tensors
        need_x, _, need_bias, need_down, need_up = ctx.needs_input_grad[:5]
        rows = _rows(grad)
        grad_x, grad_down, grad_up = _backward(
            rows, _rows(x), weight, down, up, *ctx.factors, seed, need_x, need_down, need_up
        )
        return (
            grad_x.view(x.shape) if need_x else None,
            None,
            rows.sum(0) if need_bias else None,
            grad_down if need_down else None,
            grad_up if need_up else None,
            None,
            None,
            None,
        )


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, dropout: float, seed: Tensor | None
) -> None:
    """Raises ValueError or TypeError unless the arguments fit together."""
    if x.dim() < 1 or weight.dim() != 2 or down.dim() != 2 or up.dim() != 2:
        raise ValueError(
            f"lora_linear: expected x (..., in) and matrices, found x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"down {tuple(down.shape)}, up {tuple(up.shape)}"
        )
    out, width = weight.shape
    if x.shape[-1] != width or (up.shape[0], down.shape[1]) != (out, width) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"lora_linear: expected x (..., in), down (r, in) and up (out, r) for a weight (out, in) = {(out, width)}, "
            f"found x {tuple(x.shape)}, down {tuple(down.shape)} and up {tuple(up.shape)}"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"lora_linear: expected bias ({out},), found {tuple(bias.shape)}")
    tensors = {"x": x, "weight": weight, "down": down, "up": up, **({} if bias is None else {"bias": bias})}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"lora_linear: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16")
        if tensor.device != x.device:
            raise ValueError(f"lora_linear: x is on {x.device} and {name} on {tensor.device}; move them together")
        if name in ("weight", "bias") and tensor.dtype != x.dtype:
            raise TypeError(f"lora_linear: x is {x.dtype} and {name} {tensor.dtype}; cast the smaller of them")
    if down.dtype != up.dtype or (x.dtype is torch.float64) != (down.dtype is torch.float64):
        raise TypeError(
            f"lora_linear: expected down and up of one dtype, float64 with float64 only; found x {x.dtype}, down "
            f"{down.dtype}, up {up.dtype}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("lora_linear: the weight is frozen here; call weight.requires_grad_(False) first")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"lora_linear: expected 0 <= dropout <= 1, found {dropout}")
    if seed is not None and (seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ValueError(
            f"lora_linear: expected seed (1,) of int64 on {x.device}, found {tuple(seed.shape)} of {seed.dtype} on "
            f"{seed.device}"
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x @ weightᵀ + bias + scale * drop(x) @ downᵀ @ upᵀ with a frozen weight.

    Nothing but x is kept for the backward pass. The factors are cast to the dtype of x, never x to theirs. What is
    dropped is a function of the seed, so that the backward pass draws it again: nothing is kept for it, and a
    recomputed forward pass drops the same elements. Under autocast x, weight and bias are cast as for torch's linear.
    Gradients go to x, bias, down and up; not twice.

    Args:
        x: (..., in), float64, float32, bfloat16 or float16; any strides.
        weight: (out, in), the dtype of x.
        bias: (out,), the dtype of x, or None.
        down: (r, in), any of these dtypes, float64 with a float64 x only.
        up: (out, r), the dtype of `down`.
        dropout: probability of dropping an element of the adapter's input, rounded to a multiple of 2^-16.
        seed: (1,), int64, on the device of x; None draws one from torch's generator of that device.

    Returns:
        (..., out), in the dtype of x.

    Raises:
        ValueError: shapes or devices do not fit together, the weight wants a gradient, or a probability is none.
        TypeError: dtypes do not fit together.

    Paper: Hu et al. 2021, arXiv:2106.09685, section 4.1; the order of products by cost: Cherniuk et al. 2023,
    arXiv:2312.03415.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        cast = torch.get_autocast_dtype(kind)
        x, weight = x.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    _checked(x, weight, bias, down, up, dropout, seed)
    if dropout == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    weight, down, up = weight.contiguous(), down.contiguous(), up.contiguous()
    bias = None if bias is None else bias.contiguous()
    wanted = any(t is not None and t.requires_grad for t in (x, bias, down, up))
    if torch.is_grad_enabled() and wanted:
        found: Tensor = _LoraLinear.apply(x, weight, bias, down, up, float(scale), float(dropout), seed)  # type: ignore[no-untyped-call]  # torch
        return found
    plain: Tensor = _forward(_rows(x), weight, bias, down, up, float(scale), float(dropout), seed)
    return plain.view(*x.shape[:-1], weight.shape[0])


def faster_than_library(dtype: torch.dtype) -> bool:
    """Whether `lora_linear` takes a fraction of the time of torch's own linear layer on this CPU, with many rows too.

    So it is for 16-bit numbers where code is compiled and the processor has AVX2 and not AVX-512: torch multiplies
    these one by one there, compiled code as float32.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and OP.compiled_for("cpu")
    )


@torch.no_grad()
def lora_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `lora_linear` for x (rows, in), down and up, for functions that make it part of a larger step.

    Args:
        grad: (rows, out), the dtype of x.
        x: (rows, in).
        weight: (out, in), the dtype of x.
        down: (r, in).
        up: (out, r), the dtype of `down`.
        needed: which of the three; None for the others.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.
    """
    _checked(x, weight, None, down, up, 0.0, None)
    if grad.dtype != x.dtype or grad.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(
            f"lora_gradients: expected grad {(x.shape[0], weight.shape[0])} in {x.dtype}, found {tuple(grad.shape)} in "
            f"{grad.dtype}"
        )
    tensors = (t.contiguous() for t in (grad, x, weight, down, up))
    found = _backward(*tensors, float(scale), 0.0, None, *needed)
    grad_x, grad_down, grad_up = (part if want else None for part, want in zip(found, needed, strict=True))
    return grad_x, grad_down, grad_up


@torch.no_grad()
def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias without gradients: `lora_linear` of rank 0, which multiplies a few bfloat16 rows itself.

    Args:
        x: (..., in), float64, float32, bfloat16 or float16.
        weight: (out, in), the dtype of x.
        bias: (out,), the dtype of x, or None.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: dtypes do not.
    """
    if weight.dim() != 2:
        raise ValueError(f"frozen_linear: expected a matrix (out, in), found {tuple(weight.shape)}")
    none_down, none_up = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    return lora_linear(x, weight, bias, none_down, none_up)
