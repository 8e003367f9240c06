"""Low-rank updates of a batch whose rows use different adapters, of different ranks, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.lora_linear import frozen_linear
from peftkit_kernels.multi_lora import reference

_ROWS = "Tensor starts, Tensor scales, Tensor adapter"


def _fake_shrink(x: Tensor, factor: Tensor, starts: Tensor, adapter: Tensor, max_rank: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], max_rank), dtype=wide)


def _fake_expand(out: Tensor, hidden: Tensor, factor: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor) -> None:
    return None


def _fake_outer(hidden: Tensor, y: Tensor, like: Tensor, starts: Tensor, scales: Tensor, adapter: Tensor) -> Tensor:
    return torch.empty_like(like)


OP = declare(
    Op(
        name="multi_lora",
        summary="base + scale · x downᵀ up, each row with its own adapter.",
        functions=(
            Function(
                schema="multi_lora_shrink(Tensor x, Tensor factor, Tensor starts, Tensor adapter, SymInt max_rank) "
                "-> Tensor",
                reference=reference.shrink,
                fake=_fake_shrink,
            ),
            Function(
                schema=f"multi_lora_expand_(Tensor(a!) out, Tensor hidden, Tensor factor, {_ROWS}) -> ()",
                reference=reference.expand_,
                fake=_fake_expand,
            ),
            Function(
                schema=f"multi_lora_outer(Tensor hidden, Tensor y, Tensor like, {_ROWS}) -> Tensor",
                reference=reference.outer,
                fake=_fake_outer,
            ),
        ),
        sources={"cpu": "multi_lora.cpp", "cuda": "multi_lora.cu"},
    )
)
_shrink, _expand, _outer = OP.functions


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Adapters of one linear layer, their factors one behind the other."""

    down: Tensor
    """(total rank, in)."""
    up: Tensor
    """(total rank, out): the transposed factors, so that both are read row by row."""
    starts: Tensor
    """(adapters + 1,), int64; adapter a has the rows from starts[a] to starts[a + 1] of both."""
    scales: Tensor
    """(adapters,), float32, or float64 beside float64 factors."""
    max_rank: int
    """The largest rank."""


def stacked(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Stack:
    """The adapters in the layout that `multi_lora` takes; gradients go back to the factors.

    Args:
        adapters: of each the factors down (r, in) and up (out, r), of one dtype and device, and the scale.

    Raises:
        ValueError: no adapter, or factors that do not fit together.
    """
    if not adapters:
        raise ValueError("stacked: expected at least one adapter, found none")
    width, out = adapters[0][0].shape[-1], adapters[0][1].shape[0]
    for place, (down, up, _) in enumerate(adapters):
        rank = down.shape[0]
        if tuple(down.shape) != (rank, width) or tuple(up.shape) != (out, rank):
            raise ValueError(
                f"stacked: expected down (r, {width}) and up ({out}, r) of every adapter, found down "
                f"{tuple(down.shape)} and up {tuple(up.shape)} of adapter {place}"
            )
    ranks = [down.shape[0] for down, _, _ in adapters]
    down = torch.cat([down for down, _, _ in adapters])
    exact = torch.float64 if down.dtype == torch.float64 else torch.float32
    return Stack(
        down=down,
        up=torch.cat([up.t() for _, up, _ in adapters]),
        starts=torch.tensor([0, *ranks], device=down.device).cumsum(0),
        scales=torch.tensor([scale for _, _, scale in adapters], dtype=exact, device=down.device),
        max_rank=max(ranks),
    )


def _checked(base: Tensor | None, x: Tensor, stack: Stack, adapter: Tensor) -> Tensor:
    """The adapter of each row of x laid out as a matrix.

    Raises:
        ValueError or TypeError: something does not fit.
    """
    down, up, starts, scales = stack.down, stack.up, stack.starts, stack.scales
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[0] or x.dim() < 1 or x.shape[-1] != down.shape[1]:
        raise ValueError(
            "multi_lora: expected x (..., in), down (total rank, in) and up (total rank, out), found "
            f"x {tuple(x.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}; `stacked` makes the layout"
        )
    if base is not None and tuple(base.shape) != (*x.shape[:-1], up.shape[1]):
        raise ValueError(
            f"multi_lora: expected base {(*x.shape[:-1], up.shape[1])} beside x {tuple(x.shape)} and up "
            f"{tuple(up.shape)}, found {tuple(base.shape)}"
        )
    if starts.dim() != 1 or scales.dim() != 1 or starts.shape[0] != scales.shape[0] + 1:
        raise ValueError(
            f"multi_lora: expected starts (adapters + 1,) and scales (adapters,), found {tuple(starts.shape)} and "
            f"{tuple(scales.shape)}"
        )
    if adapter.dim() > x.dim() - 1 or tuple(adapter.shape) != tuple(x.shape[: adapter.dim()]):
        raise ValueError(
            f"multi_lora: expected an adapter for each row of x {tuple(x.shape)}, or for each of its leading "
            f"dimensions, found {tuple(adapter.shape)}"
        )
    tensors = {"x": x, "down": down, "up": up} | ({} if base is None else {"base": base})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"multi_lora: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16")
    exact = {t.dtype for t in (*tensors.values(), scales)}
    if torch.float64 in exact and exact != {torch.float64}:
        raise TypeError("multi_lora: float64 does not mix with other dtypes; give all tensors and the scales in it")
    if down.dtype != up.dtype:
        raise TypeError(f"multi_lora: down is {down.dtype} and up {up.dtype}; give both in one dtype")
    if torch.float64 not in exact and scales.dtype != torch.float32:
        raise TypeError(f"multi_lora: scales are {scales.dtype}; expected float32")
    for name, tensor in (("adapter", adapter), ("starts", starts)):
        if tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"multi_lora: {name} is {tensor.dtype}; expected int64 or int32")
    for name, tensor in {**tensors, "adapter": adapter, "starts": starts, "scales": scales}.items():
        if tensor.device != x.device:
            raise ValueError(f"multi_lora: x is on {x.device} and {name} on {tensor.device}; move them together")
    if adapter.device.type == "cpu" and adapter.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in adapter.aminmax())
        if low < -1 or high >= scales.shape[0]:
            raise ValueError(
                f"multi_lora: adapter names {low if low < -1 else high}; there are {scales.shape[0]}, counted from 0, "
                "and -1 is none"
            )
    whole = adapter.reshape(*adapter.shape, *(1,) * (x.dim() - 1 - adapter.dim())).expand(x.shape[:-1])
    return whole.reshape(-1).to(torch.int64).contiguous()


def _matrix(tensor: Tensor) -> Tensor:
    return (
        tensor.reshape(-1, tensor.shape[-1]).contiguous()
        if tensor.shape[-1]
        else tensor.reshape(tensor.shape[:-1].numel(), 0)
    )


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        starts: Tensor,
        scales: Tensor,
        adapter: Tensor,
        max_rank: int,
    ) -> Tensor:
        hidden = _shrink(x, down, starts, adapter, max_rank)
        out = base.clone()
        _expand(out, hidden, up, starts, scales, adapter)
        # The intermediate costs max_rank / in of what x does.
        ctx.save_for_backward(x, down, up, starts, scales, adapter, hidden)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, starts, scales, adapter, hidden = ctx.saved_tensors
        of_base, of_x, of_down, of_up = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        found: list[Tensor | None] = [grad if of_base else None, None, None, None]
        if of_x or of_down:
            back = _shrink(grad, up, starts, adapter, hidden.shape[1])
            if of_x:
                found[1] = torch.zeros_like(x)
                _expand(found[1], back, down, starts, scales, adapter)
            if of_down:
                found[2] = _outer(back, x, down, starts, scales, adapter)
        if of_up:
            found[3] = _outer(hidden, grad, up, starts, scales, adapter)
        return (*found, None, None, None, None)


def multi_lora(base: Tensor | None, x: Tensor, stack: Stack, adapter: Tensor) -> Tensor:
    """base + scale · x downᵀ up, each row with its own adapter; differentiable in base, x, down and up.

        out_i = base_i + scale_a (x_i down_aᵀ) up_a,   a = adapter_i,   and out_i = base_i where that is -1

    The intermediate is float32 (float64 for float64), and the sum is rounded once to the dtype of base. The cost
    depends on the adapters that the batch uses, not on those in the stack.

    Args:
        base: (..., out), the frozen layer's output; None: zero, of the dtype of x.
        x: (..., in), any floating dtype of 2 bytes or more.
        stack: the adapters; their dtype is free, but float64 does not mix.
        adapter: int64 or int32, -1 for none; one for each row of x, or for each of its leading dimensions: (batch,)
            beside x (batch, tokens, in).

    Returns:
        (..., out), of the dtype of base.

    Raises:
        ValueError: shapes or devices do not fit together; on a CPU also an adapter that there is not. On a GPU, where
            looking would mean waiting, rows with one are left as they are.
        TypeError: a dtype that does not fit.

    Paper: Chen et al. 2023 (Punica), arXiv:2310.18547, section 4: rows gathered into segments, two products a segment.
    """
    rows = _checked(base, x, stack, adapter)
    if base is None:
        base = x.new_zeros((*x.shape[:-1], stack.up.shape[1]))
    out: Tensor = _MultiLora.apply(  # type: ignore[no-untyped-call]  # torch does not type it
        _matrix(base),
        _matrix(x),
        stack.down.contiguous(),
        stack.up.contiguous(),
        stack.starts.to(torch.int64),
        stack.scales,
        rows,
        stack.max_rank,
    )
    return out.reshape(base.shape)


@torch.no_grad()
def multi_lora_(base: Tensor, x: Tensor, stack: Stack, adapter: Tensor) -> None:
    """Adds the low-rank updates to base in place, without gradients; arguments and errors of `multi_lora`."""
    rows = _checked(base, x, stack, adapter)
    starts = stack.starts.to(torch.int64)
    hidden = _shrink(_matrix(x), stack.down.contiguous(), starts, rows, stack.max_rank)
    whole = _matrix(base)
    _expand(whole, hidden, stack.up.contiguous(), starts, stack.scales, rows)
    if whole.data_ptr() != base.data_ptr():
        base.copy_(whole.reshape(base.shape))


@torch.no_grad()
def multi_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack, adapter: Tensor) -> Tensor:
    """x @ weightᵀ + bias and the low-rank updates, without gradients: a layer and its adapters for one batch.

    Args:
        x: (..., in), the dtype of the weight.
        weight: (out, in), frozen.
        bias: (out,), or None.
        stack: the adapters.
        adapter: as for `multi_lora`.

    Returns:
        (..., out), of the dtype of x; rounded after the layer and after the updates.

    Raises:
        ValueError: shapes or devices do not fit together, or an adapter that there is not.
        TypeError: a dtype that does not fit.
    """
    out = frozen_linear(x, weight, bias)
    multi_lora_(out, x, stack, adapter)
    return out
