"""torchao's weight-only int8 and int4: an ordinary Linear whose weight is a tensor that knows how to dequantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.quantization.base import CodedWeights


def weights(module: nn.Module) -> CodedWeights | None:
    """Access to a weight that torchao quantized; None for any other module."""
    weight: Any = module._parameters.get("weight")
    kind = type(weight.data) if weight is not None else Tensor
    if not kind.__module__.startswith("torchao."):
        return None
    return TorchaoWeights(module)


class TorchaoWeights(CodedWeights):
    """A weight of torchao."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.storage = f"torchao {type(module._parameters['weight'].data).__name__}"  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """What the weight presents itself as."""
        parameter: Any = self.module._parameters["weight"]
        found: torch.dtype = parameter.dtype
        return found

    def weight(self) -> Tensor:
        """(out, in), float32."""
        parameter: Any = self.module._parameters["weight"]
        found: Tensor = parameter.data.dequantize()
        return found.to(torch.float32, copy=True)
