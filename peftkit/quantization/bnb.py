"""bitsandbytes' Linear4bit and Linear8bitLt, loaded through transformers or put into a model by hand."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import MergeError
from peftkit.quantization.base import CodedWeights
from peftkit.quantization.layer import QuantizedLinear


def weights(module: nn.Module) -> CodedWeights | None:
    """Access to a layer of bitsandbytes; None for any other module."""
    package: Any = sys.modules.get("bitsandbytes")
    if package is None:
        return None
    if isinstance(module, package.nn.Linear4bit):
        return FourBit(module)
    return EightBit(module) if isinstance(module, package.nn.Linear8bitLt) else None


def _shift(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach().clone()


class FourBit(CodedWeights):
    """NF4 or FP4 codes, nested scales or not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        parameter: Any = module._parameters["weight"]
        if getattr(parameter, "quant_state", None) is None:
            raise MergeError(
                f"{type(module).__name__} is not quantized yet: bitsandbytes quantizes when a module moves to its "
                "device; call model.to(device) first"
            )
        data, state = parameter.data, parameter.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # In evaluation on a CPU, bitsandbytes lays the codes out anew and keeps the scales in bfloat16.
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            sizes, state = state.absmax.t().reshape(-1).to(torch.float32), copy.copy(state)
            dtype, state.original_nested = state.original_dtype, False
            data, state = unpacked(data, state)
            state.absmax, state.nested, state.dtype = sizes, False, dtype
        self._data, self._state = data.reshape(-1).view(torch.uint8), state
        self.storage = str(state.quant_type)

    @property
    def dtype(self) -> torch.dtype:
        """What the weight was quantized from."""
        found: torch.dtype = self._state.dtype
        return found

    def weight(self) -> Tensor:
        """(out, in), float32."""
        return self.layer().dequantized(torch.float32)

    def layer(self) -> QuantizedLinear:
        """The same codes and scales in peftkit's layer."""
        state = self._state
        sizes = state.absmax.reshape(-1)
        scales = {"absmax": sizes if state.nested else sizes.to(torch.float32)}
        if state.nested:
            scales |= {"nested_absmax": state.state2.absmax.reshape(-1), "nested_offset": state.offset}
        return QuantizedLinear.holding(
            self._data.reshape(-1),
            scales,
            kind="nf4" if self.storage == "nf4" else "fp4",
            shape=tuple(state.shape),
            block=state.blocksize,
            bias=_shift(self.module),
            dtype=state.dtype,
            conv1d=self.conv1d,
        )

    def holding(self, layer: QuantizedLinear) -> nn.Module:
        """A Linear4bit with the codes of the layer; the layer itself when it holds what Linear4bit cannot."""
        if layer.kind not in ("nf4", "fp4") or layer.residual_down is not None:
            return layer
        import bitsandbytes
        from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

        own: Any = self.module
        device = layer.weight.device
        inner = None
        if layer.nested:
            inner = QuantState(
                absmax=layer.nested_absmax, code=create_dynamic_map().to(device), blocksize=256, dtype=torch.float32
            )
        state = QuantState(
            absmax=layer.absmax,
            shape=torch.Size((layer.out_features, layer.in_features)),
            code=get_4bit_type(layer.kind, device=device),
            blocksize=layer.block,
            quant_type=layer.kind,
            dtype=layer.dtype,
            offset=layer.nested_offset if layer.nested else None,
            state2=inner,
        )
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=own.compute_dtype,
            compress_statistics=layer.nested, quant_type=layer.kind, device="meta",
        )  # fmt: skip
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.reshape(-1, 1), requires_grad=False, quant_state=state, blocksize=layer.block,
            compress_statistics=layer.nested, quant_type=layer.kind, bnb_quantized=True, module=made,
        )  # fmt: skip
        made.quant_state = state
        made.bias = layer.bias
        return made  # type: ignore[no-any-return]  # bitsandbytes is untyped


class EightBit(CodedWeights):
    """int8 codes with a scale a row."""

    storage = "int8"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        own: Any = module
        codes, sizes = own.weight.data, own.weight.SCB
        if sizes is None:
            # The first call moves them from the parameter to the layer's state.
            codes, sizes = own.state.CB if own.state.CB is not None else own.weight.data, own.state.SCB
        if sizes is None or codes.dtype != torch.int8:
            raise MergeError(
                f"{type(module).__name__} is not quantized yet: bitsandbytes quantizes when a module moves to its "
                "device; call model.to(device) first (has_fp16_weights=False)"
            )
        self._codes, self._sizes = codes, sizes

    def weight(self) -> Tensor:
        """(out, in), float32."""
        return self.layer().dequantized(torch.float32)

    def layer(self) -> QuantizedLinear:
        """The same codes in peftkit's layer, which rounds no inputs to 8 bits."""
        return QuantizedLinear.holding(
            self._codes, {"scale": self._sizes.float() / 127}, kind="int8", shape=tuple(self._codes.shape),
            bias=_shift(self.module), dtype=self.dtype, conv1d=self.conv1d,
        )  # fmt: skip

    def holding(self, layer: QuantizedLinear) -> nn.Module:
        """A Linear8bitLt with the codes of the layer; the layer itself when it holds what Linear8bitLt cannot."""
        if layer.kind != "int8" or layer.residual_down is not None:
            return layer
        import bitsandbytes

        own: Any = self.module
        made = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False,
            threshold=own.state.threshold, device="meta",
        )  # fmt: skip
        codes = layer.weight.data
        made.weight = bitsandbytes.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=layer.scale * 127
        )
        made.bias = layer.bias
        return made  # type: ignore[no-any-return]  # bitsandbytes is untyped
