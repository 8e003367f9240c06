"""The backend of peftkit's own quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkit.quantization.base import CodedWeights
from peftkit.quantization.layer import QuantizedLinear


class NativeWeights(CodedWeights):
    """peftkit's own layers."""

    def __init__(self, module: QuantizedLinear) -> None:
        super().__init__(module)
        self._own = module
        self.storage = module.kind

    @property
    def dtype(self) -> torch.dtype:
        """What the weight was quantized from."""
        return self._own.dtype

    @property
    def conv1d(self) -> bool:
        """Whether the weight was in a Conv1D."""
        return self._own.conv1d

    def weight(self) -> Tensor:
        """(out, in), float32, the low-rank part included."""
        found = self._own.dequantized(torch.float32)
        down, up = self._own.residual_down, self._own.residual_up
        if down is None or up is None:
            return found
        return torch.addmm(found, up.to(torch.float32), down.to(torch.float32))

    def layer(self) -> QuantizedLinear:
        """A layer that shares the module's tensors."""
        own = self._own
        scales = {
            n: b
            for n in ("absmax", "nested_absmax", "nested_offset", "scale")
            if (b := own._buffers.get(n)) is not None
        }
        residual = (
            None if own.residual_down is None or own.residual_up is None else (own.residual_down, own.residual_up)
        )
        return QuantizedLinear.holding(
            own.weight.data, scales, kind=own.kind, shape=(own.out_features, own.in_features), block=own.block,
            bias=own.bias, residual=residual, dynamic=own.dynamic, dtype=own.dtype, conv1d=own.conv1d,
        )  # fmt: skip


def weights(module: nn.Module) -> CodedWeights | None:
    """Access to a layer of peftkit's own; None for any other module."""
    return NativeWeights(module) if isinstance(module, QuantizedLinear) else None
