"""GPTQ and AWQ layers, whose packages pack codes in many ways: read through what the layer computes, never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.quantization.base import CodedWeights

PACKAGES = ("gptqmodel", "auto_gptq", "awq", "optimum")
"""Top-level packages that such layers come from."""


def weights(module: nn.Module) -> CodedWeights | None:
    """Access to a GPTQ or AWQ layer; None for any other module."""
    packed = module._buffers.get("qweight") is not None and module._buffers.get("scales") is not None
    return PackedWeights(module) if packed else None


class PackedWeights(CodedWeights):
    """A layer with `qweight` and `scales`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.storage = f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales."""
        scales: Any = self.module._buffers["scales"]
        found: torch.dtype = scales.dtype
        return found

    @torch.no_grad()
    def weight(self) -> Tensor:
        """(out, in), float32: the rows that the layer gives for the unit vectors, less its bias."""
        own: Any = self.module
        scales = own.scales
        size = int(own.in_features)
        rows = own(torch.eye(size, dtype=scales.dtype, device=scales.device))
        zero = own(torch.zeros(1, size, dtype=scales.dtype, device=scales.device))
        found: Tensor = (rows.to(torch.float32) - zero.to(torch.float32)).t().contiguous()
        return found
