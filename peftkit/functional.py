"""Arithmetic that several methods share, with hand-written backward passes where they save memory or time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.quantization import QuantizedLinear


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """up @ down @ x for row vectors, in x's dtype: the factors are cast, never the input.

    Args:
        x: (..., in).
        down: (r, in).
        up: (out, r).
    """
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def plain_gradients(x: Tensor) -> bool:
    """Whether a hand-written backward may be used: gradients wanted, and neither autocast nor a compiler at work."""
    return (
        torch.is_grad_enabled()
        and x.is_floating_point()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._functorch.peek_interpreter_stack()
    )


def plain_linear(module: nn.Module, call: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a frozen nn.Linear in the input's dtype that `call` computes directly; None for any other."""
    if type(call) is not functools.partial or call.func is not nn.Linear.forward:
        return None
    # As attributes, so that a trained bias or weight of another active adapter is seen.
    weight: Any = module.weight
    bias: Any = module.bias
    if (
        # A subclass of Tensor, as torchao's weights are, may have no product that the backward pass needs.
        type(weight) not in (nn.Parameter, Tensor)
        or weight.dtype != x.dtype
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None
    return weight, bias


def quantized_layer(module: nn.Module, call: Callable[..., Any]) -> QuantizedLinear | None:
    """The module when it is a quantized layer of peftkit's that `call` computes directly; None for any other."""
    if isinstance(module, QuantizedLinear) and type(call) is functools.partial and call.func is QuantizedLinear.forward:
        return module
    return None


FEW_ROWS = 32
"""Rows up to which compiled code multiplies bfloat16 weights and their update in one pass over the weight."""


def _compiled_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether compiled code multiplies x with a frozen weight in a fraction of torch's time, at any number of rows."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return False
    from peftkit_kernels.lora_linear import faster_than_library

    return weight.is_contiguous() and faster_than_library(x.dtype)


def one_pass(module: nn.Module, call: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a plain layer that compiled code takes with its update, without gradients; None for others."""
    if (
        x.dtype not in (torch.bfloat16, torch.float16)
        or x.device.type != "cpu"
        or x.numel() == 0
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    plain = plain_linear(module, call, x)
    if plain is None or not plain[0].is_contiguous() or (plain[1] is not None and plain[1].dtype != x.dtype):
        return None
    if _compiled_is_faster(x, plain[0]):
        return plain
    if x.dtype is not torch.bfloat16 or x.numel() > FEW_ROWS * x.shape[-1]:
        return None
    import peftkit_kernels  # when it is needed: loading compiled code takes time that `import peftkit` has not

    return plain if peftkit_kernels.OPS["lora_linear"].compiled_for("cpu") else None


def in_one_pass(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight @ x + bias + scale * up @ down @ x for what `one_pass` gave, rounded once.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        down: (r, in).
        up: (out, r).
    """
    from peftkit_kernels import lora_linear as compiled

    return compiled(x, weight, bias, down, up, scale)


def add_low_rank(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """out + scale * up @ down @ x, computed in place where nothing else can see `out`.

    Args:
        out: (..., out), fresh: nobody else holds it.
        x: (..., in).
        down: (r, in).
        up: (out, r).

    Returns:
        (..., out), in out's dtype.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return out + (scale * low_rank(x, down, up)).to(out.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or down.requires_grad or up.requires_grad or out.requires_grad):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return out + (scale * low_rank(x, down, up)).to(out.dtype)
        added: Tensor = _AddLowRank.apply(out, x, down, up, scale)  # type: ignore[no-untyped-call]  # torch
        return added
    return _add_low_rank_(out, x, down, up, scale)


def _add_low_rank_(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    if x.dtype != out.dtype:
        return out + (scale * low_rank(x, down, up)).to(out.dtype)
    if down.dtype != x.dtype:
        down, up = down.to(x.dtype), up.to(x.dtype)
    inner = F.linear(x, down)
    if out.is_contiguous():
        out.view(-1, out.shape[-1]).addmm_(_rows(inner), up.t(), alpha=scale)
        return out
    return out.add_(F.linear(inner, up), alpha=scale)


class _AddLowRank(torch.autograd.Function):
    """Keeps the input only; the inner product is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, down, up)
        ctx.scale = scale
        cast_down, cast_up = down.to(x.dtype), up.to(x.dtype)
        inner = _rows(F.linear(x, cast_down))
        if x.dtype != out.dtype:
            return out + (scale * F.linear(inner, cast_up)).to(out.dtype).view(out.shape)
        return torch.addmm(_rows(out), inner, cast_up.t(), alpha=scale).view(out.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, down, up = ctx.saved_tensors
        grad_x, grad_down, grad_up = low_rank_gradients(
            _rows(grad), _rows(x), down, up, ctx.scale, ctx.needs_input_grad[1:4]
        )
        return grad, None if grad_x is None else grad_x.view(x.shape), grad_down, grad_up, None


def low_rank_gradients(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    needed: tuple[bool, ...],
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of scale * up @ down @ x for x, down and up.

    Args:
        grad: (rows, out).
        x: (rows, in).
        needed: which of the three are wanted.
        onto: (rows, in), what the gradient for x is added to, in place.
    """
    grad = grad.to(x.dtype)
    cast_down, cast_up = down.to(x.dtype), up.to(x.dtype)
    grad_x = grad_down = grad_up = None
    if needed[0] or needed[1]:
        back = grad @ cast_up
        if needed[0]:
            grad_x = scale * (back @ cast_down) if onto is None else onto.addmm_(back, cast_down, alpha=scale)
        if needed[1]:
            grad_down = (back.t() @ x).mul_(scale).to(down.dtype)
    if needed[2]:
        # (r, out) and turned: the product with the long side last is the faster one.
        grad_up = (F.linear(x, cast_down).t() @ grad).mul_(scale).t().to(up.dtype)
    return grad_x, grad_down, grad_up


def _adapted(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """(weight + scale * up @ down) @ x + bias inside of a function of its own."""
    if _compiled_is_faster(x, weight) and (bias is None or bias.dtype == x.dtype):
        return in_one_pass(x, weight, bias, down, up, scale)
    return _add_low_rank_(F.linear(x, weight, bias), x, down, up, scale)


def _adapted_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (weight + scale * up @ down) @ x for x, down and up; inputs 0, 3 and 4 of the function of `ctx`."""
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
    # Compiled code has no gradient of its gradients.
    if not torch.is_grad_enabled() and grad.dtype == x.dtype and _compiled_is_faster(x, weight):
        from peftkit_kernels.lora_linear import lora_gradients

        found = lora_gradients(grad, _rows(x), weight, down, up, ctx.scale, needed)
        return None if found[0] is None else found[0].view(x.shape), found[1], found[2]
    onto = grad @ weight if needed[0] else None
    grad_x, grad_down, grad_up = low_rank_gradients(grad, _rows(x), down, up, ctx.scale, needed, onto)
    return None if grad_x is None else grad_x.view(x.shape), grad_down, grad_up


class _LoraLinear(torch.autograd.Function):
    """A frozen linear layer and its low-rank update as one step of the graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return _adapted(x, weight, bias, down, up, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, down, up = ctx.saved_tensors
        grad_x, grad_down, grad_up = _adapted_gradients(ctx, _rows(grads[0]), x, weight, down, up)
        return grad_x, None, None, grad_down, grad_up, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight @ x + bias + scale * up @ down @ x with a frozen weight, keeping nothing but x for the backward pass.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        down: (r, in).
        up: (out, r).
    """
    out: Tensor = _LoraLinear.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]  # torch
    return out


class _DoraLinear(torch.autograd.Function):
    """A frozen linear layer, its low-rank update and the scale of its rows as one step of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        factors: Tensor,
        scale: float,
    ) -> Tensor:
        out = _adapted(x, weight, None, down, up, scale).mul_(factors.to(x.dtype))
        if bias is not None:
            out.add_(bias)
        ctx.save_for_backward(x, weight, bias, down, up, magnitude, factors, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, bias, down, up, magnitude, factors, out = ctx.saved_tensors
        grad = _rows(grads[0])
        grad_magnitude = None
        if ctx.needs_input_grad[5]:
            # The output is magnitude * direction, so direction comes from it and needs no copy of its own.
            turned = _rows(out) if bias is None else _rows(out) - bias
            total = (grad * turned).sum(0, dtype=magnitude.dtype)
            grad_magnitude = torch.where(magnitude == 0, 0, total / magnitude)
        grad = grad * factors.to(grad.dtype)
        grad_x, grad_down, grad_up = _adapted_gradients(ctx, grad, x, weight, down, up)
        return grad_x, None, None, grad_down, grad_up, grad_magnitude, None, None


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor,
    factors: Tensor,
    scale: float,
) -> Tensor:
    """factors * (weight @ x + scale * up @ down @ x) + bias, keeping x and the output for the backward pass.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        down: (r, in).
        up: (out, r).
        magnitude: (out,); its gradient is that of factors = magnitude / norm with the norm held fixed, and 0 where
            the magnitude is exactly 0.
        factors: (out,), magnitude / norm.
    """
    out: Tensor = _DoraLinear.apply(x, weight, bias, down, up, magnitude, factors, scale)  # type: ignore[no-untyped-call]  # torch
    return out


def row_norms(weight: Tensor, squared: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Euclidean norms of the rows of weight + scale * up @ down, without forming that matrix.

    ‖w + s b D‖² = ‖w‖² + 2 s b·(D w) + s² b (D Dᵀ) bᵀ

    Args:
        weight: (out, in).
        squared: (out,), squared norms of the rows of `weight`.
        down: (r, in).
        up: (out, r).

    Returns:
        (out,), in the dtype of `squared`.
    """
    if weight.is_contiguous() and not torch.compiler.is_compiling():
        import peftkit_kernels  # when it is needed: loading compiled code takes time that `import peftkit` has not

        if peftkit_kernels.OPS["dora_scale"].compiled_for(weight.device.type):
            return peftkit_kernels.dora_norms(weight, squared, down, up, scale)
    wide = squared.dtype
    return norms_from(squared, weight @ down.to(weight.dtype).t(), down.to(wide), up.to(wide), scale)


def norms_from(squared: Tensor, product: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """As `row_norms`, with weight @ downᵀ in place of the weight.

    Args:
        squared: (out,), squared norms of the rows of the weight.
        product: (out, r).
        down: (r, in), in the dtype of `squared`.
        up: (out, r), in the dtype of `squared`.
    """
    cross = (product.to(squared.dtype) * up).sum(1)
    gram = ((up @ (down @ down.t())) * up).sum(1)
    return (squared + 2 * scale * cross + scale * scale * gram).clamp_min_(0).sqrt_()


class Derived:
    """A value computed from a few tensors, remembered in evaluation as long as none of them changes.

    Copies and pickles start empty, so that what is remembered never leaves the process or outlives its sources.
    """

    __slots__ = ("key", "value")

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.value: Any = None

    def get(self, training: bool, dtype: torch.dtype, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """What `make` returns; computed afresh in training, with gradients and under a compiler.

        Args:
            training: whether the owner is in training mode.
            dtype: the dtype that `make` produces.
            sources: the tensors that `make` reads.
        """
        if torch.compiler.is_compiling():
            return make()
        if training or torch.is_grad_enabled():
            # What trains may write through `.data`, which no version counter sees.
            self.key = self.value = None
            return make()
        key = (dtype, *[(t.data_ptr(), t._version, t.dtype) for t in sources])
        if key != self.key:
            with torch.autocast(sources[0].device.type, enabled=False):
                self.value = make()
            self.key = key
        return self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, ()


def kept_rows(rows: int, like: Tensor, rank_dropout: float, module_dropout: float, rescale: bool) -> Tensor:
    """Factors that drop rows of an update, and at times all of it, (rows,); tensors only, so that it compiles.

    Args:
        like: gives device and dtype.
        rank_dropout: probability of dropping a row.
        module_dropout: probability of dropping every row.
        rescale: divide by the share of rows that were kept.
    """
    kept = (torch.rand(rows, device=like.device) >= rank_dropout).to(like.dtype)
    if rescale:
        kept = kept / kept.mean().clamp_min(1 / rows)
    return kept * (torch.rand((), device=like.device) >= module_dropout).to(like.dtype)
