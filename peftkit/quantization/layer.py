"""peftkit's own quantized projections: NF4, FP4 and int8 weights that torch alone can compute with, on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import ConfigError

if TYPE_CHECKING:
    from peftkit_kernels import Quantized

Kind = Literal["nf4", "fp4", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)
SCALES = ("absmax", "nested_absmax", "nested_offset", "scale")
"""Buffers whose precision is part of the weight: a change of the model's dtype passes them over."""


class QuantizedLinear(nn.Linear):
    """x Wᵀ + b with a frozen W in 4 or 8 bits, and a low-rank part of W beside it where one was left there.

    What is stored: `weight`, codes as bitsandbytes stores them (4-bit: (ceil(out * in / 2),), uint8; int8: (out, in));
    `absmax`, the scale of each block, or `scale`, that of each row of int8; with nested scales `nested_absmax` and
    `nested_offset` too; `residual_down` (r, in) and `residual_up` (out, r), where W has a low-rank part.

    The input's dtype is that of the computation. The gradient reaches the input; W has none.
    """

    weight: nn.Parameter
    absmax: Tensor
    scale: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    residual_down: Tensor | None
    residual_up: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: Kind = "nf4",
        block: int = 64,
        nested: bool = False,
        dynamic: bool = False,
        bias: bool = False,
        residual_rank: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        conv1d: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty storage of the right sizes.

        Args:
            block: elements that share a scale, a power of two from 32 to 4096; int8 has one scale a row instead.
            nested: 4-bit scales are stored in 8 bits.
            dynamic: int8 quantizes the rows of its input too, which is faster for many rows and less exact.
            residual_rank: rank of the part of W beside the codes.
            dtype: what W was quantized from; of the bias, and of W dequantized.
            conv1d: W was in a Conv1D of transformers, and goes back into one.
        """
        nn.Module.__init__(self)
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; expected {', '.join(KINDS)}")
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.block, self.dynamic, self.dtype = kind, block, dynamic, dtype
        self.nested, self.conv1d = nested and kind != "int8", conv1d
        count = in_features * out_features

        def held(name: str, *shape: int, of: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=of, device=device))

        if kind == "int8":
            codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
            held("scale", out_features)
        else:
            codes = torch.zeros((count + 1) // 2, dtype=torch.uint8, device=device)
            blocks = -(-count // block)
            held("absmax", blocks, of=torch.uint8 if self.nested else torch.float32)
            if self.nested:
                held("nested_absmax", -(-blocks // 256))
                held("nested_offset")
        self.weight = nn.Parameter(codes, requires_grad=False)
        shift = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if shift is None else nn.Parameter(shift))
        for name, shape in (
            ("residual_down", (residual_rank, in_features)),
            ("residual_up", (out_features, residual_rank)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if residual_rank else None)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, *, kind: Kind = "nf4", **settings: Any) -> QuantizedLinear:
        """A layer that holds a weight quantized, each element rounded to the nearest code.

        Args:
            weight: (out, in), floating point.
            bias: (out,).
            settings: as for the class.
        """
        if weight.is_meta:
            out, inside = weight.shape
            settings = {"dtype": weight.dtype, "device": "meta", **settings}
            return cls(inside, out, kind=kind, bias=bias is not None, **settings)
        return cls.holding(
            *encoded(weight, kind, settings.pop("block", 64), settings.pop("nested", False)),
            bias=bias,
            kind=kind,
            shape=weight.shape,
            **{"dtype": weight.dtype, **settings},
        )

    @classmethod
    def holding(
        cls,
        codes: Tensor,
        scales: dict[str, Tensor],
        *,
        kind: Kind,
        shape: tuple[int, ...] | torch.Size,
        block: int = 64,
        bias: Tensor | None = None,
        residual: tuple[Tensor, Tensor] | None = None,
        dynamic: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        conv1d: bool = False,
    ) -> QuantizedLinear:
        """A layer with these codes and scales, not copied.

        Args:
            codes: as `weight` of the class.
            scales: buffers by name, as `encoded` gives them.
            shape: (out, in).
            residual: (r, in) and (out, r), a part of the weight beside the codes.
        """
        out, inside = shape
        rank = residual[0].shape[0] if residual is not None else 0
        made = cls(
            inside, out, kind=kind, block=block, nested="nested_absmax" in scales, dynamic=dynamic, device="meta",
            bias=bias is not None, residual_rank=rank, dtype=dtype, conv1d=conv1d,
        )  # fmt: skip
        made.weight = nn.Parameter(codes, requires_grad=False)
        for name, value in scales.items():
            made._buffers[name] = value
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if residual is not None:
            made._buffers["residual_down"], made._buffers["residual_up"] = (f.contiguous() for f in residual)
        return made

    # Reading --------------------------------------------------------------------------------------------------------

    def codes(self) -> Quantized:
        """The 4-bit codes with what they stand for."""
        from peftkit_kernels import Nested, Quantized

        nested = Nested(absmax=self.nested_absmax, offset=self.nested_offset) if self.nested else None
        return Quantized(
            codes=self.weight.data,
            absmax=self.absmax,
            kind=self.kind,
            block=self.block,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            nested=nested,
        )

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """W without its low-rank part, (out, in), rounded once.

        Args:
            dtype: None: what W was quantized from.
        """
        from peftkit_kernels import dequantize_blockwise

        wanted = self.dtype if dtype is None else dtype
        if self.kind == "int8":
            return (self.weight.data.to(torch.float32) * self.scale[:, None]).to(wanted)
        return dequantize_blockwise(self.codes(), wanted)

    # Computing ------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Args: input (..., in). Returns: (..., out), in the input's dtype."""
        return self.with_low_rank(input)

    def with_low_rank(
        self, x: Tensor, down: Tensor | None = None, up: Tensor | None = None, factor: float = 1.0
    ) -> Tensor:
        """x Wᵀ + b + factor * (x downᵀ) upᵀ in one operation, where there is one for this kind of codes.

        Args:
            x: (..., in).
            down: (r, in), any floating dtype; gradients reach it and `up`.
            up: (out, r).

        Returns:
            (..., out), in the dtype of x; under autocast in that of autocast.
        """
        down, up, factor = self._joined(down, up, factor)
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _PRODUCTS[self.kind](self, x, bias, down, up, factor)

    def _joined(
        self, down: Tensor | None, up: Tensor | None, factor: float
    ) -> tuple[Tensor | None, Tensor | None, float]:
        """The low-rank part of W and an update as one pair of factors."""
        own_down, own_up = self.residual_down, self.residual_up
        if own_down is None or own_up is None:
            return down, up, factor
        if down is None or up is None:
            return own_down, own_up, 1.0
        wide = torch.promote_types(down.dtype, own_down.dtype)
        joined = torch.cat((own_down.to(wide), down.to(wide)))
        return joined, torch.cat((own_up.to(wide), factor * up.to(wide)), dim=1), 1.0

    # Storage --------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {n: b for n in SCALES if (b := self._buffers.get(n)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def reset_parameters(self) -> None:
        """Nothing: codes are given, not drawn."""

    def extra_repr(self) -> str:
        """Sizes and kind of codes."""
        parts = [f"{self.in_features}, {self.out_features}", f"bias={self.bias is not None}", self.kind]
        if self.residual_down is not None:
            parts.append(f"residual rank {self.residual_down.shape[0]}")
        return ", ".join(parts)


def encoded(weight: Tensor, kind: Kind, block: int = 64, nested: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes of a weight (out, in), each element rounded to the nearest, and the buffers of scales that belong to them.

    4-bit codes and scales are those of bitsandbytes, bit for bit; int8 has a scale a row.
    """
    from peftkit_kernels import quantize_blockwise, quantize_rows

    weight = weight.detach()
    if kind == "int8":
        codes, scale = quantize_rows(weight)
        return codes, {"scale": scale.to(torch.float32)}
    return parts_of(quantize_blockwise(weight, kind, block, nested=nested))


def parts_of(found: Quantized) -> tuple[Tensor, dict[str, Tensor]]:
    """4-bit codes and the buffers of scales, as a layer holds them."""
    scales = {"absmax": found.absmax}
    if found.nested is not None:
        scales |= {"nested_absmax": found.nested.absmax, "nested_offset": found.nested.offset}
    return found.codes, scales


# One product a kind of codes ----------------------------------------------------------------------------------------


def _nf4(
    layer: QuantizedLinear, x: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, factor: float
) -> Tensor:
    from peftkit_kernels import nf4_linear, nf4_lora_linear

    sizes = layer.codes().sizes() if layer.nested else layer.absmax
    shape = (layer.out_features, layer.in_features)
    if down is None or up is None:
        return nf4_linear(x, layer.weight.data, sizes, shape, layer.block, bias)
    wide = torch.float64 if x.dtype == torch.float64 else down.dtype
    return nf4_lora_linear(x, layer.weight.data, sizes, shape, down.to(wide), up.to(wide), factor, layer.block, bias)


def _int8(
    layer: QuantizedLinear, x: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, factor: float
) -> Tensor:
    from peftkit_kernels import int8_linear

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if down is not None and up is not None and x.dtype == torch.float64:
        down, up = down.to(wide), up.to(wide)
    return int8_linear(x, layer.weight.data, layer.scale.to(wide), bias, down, up, factor, dynamic=layer.dynamic)


class _Dequantizing(torch.autograd.Function):
    """x Wᵀ + b that keeps codes for the backward pass, and not the weight they stand for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.bias = bias is not None
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_x = grad @ ctx.layer.dequantized(grad.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def _fp4(
    layer: QuantizedLinear, x: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, factor: float
) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = _Dequantizing.apply(x, layer, bias)  # type: ignore[no-untyped-call]  # torch
    else:
        out = F.linear(x, layer.dequantized(x.dtype), bias)
    if down is None or up is None:
        return out
    return out + factor * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


_PRODUCTS = {"nf4": _nf4, "fp4": _fp4, "int8": _int8}
