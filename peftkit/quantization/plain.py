"""Parameters stored as ordinary floating-point tensors: Linear, transposed Linear (Conv1D), Embedding, norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peftkit_kernels import Stored

    from peftkit.quantization.layer import QuantizedLinear


class PlainWeights:
    """Reads and writes ordinary floating-point parameters."""

    quantized = False

    def __init__(self, module: nn.Module) -> None:
        self._parameters: dict[str, Tensor] = {n: p for n, p in module._parameters.items() if p is not None}
        self.conv1d = type(module).__name__ == "Conv1D"
        self._transposed = isinstance(module, nn.Embedding) or self.conv1d

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight, or of the first parameter."""
        first = self._parameters.get("weight", next(iter(self._parameters.values()), None))
        return torch.float32 if first is None else first.dtype

    @property
    def storage(self) -> str:
        """The dtype."""
        return str(self.dtype).removeprefix("torch.")

    def turn(self, name: str, value: Tensor) -> Tensor:
        """Between (out, in) and the orientation in which the parameter is stored; its own inverse."""
        return value.T if self._transposed and name == "weight" else value

    def read(self) -> dict[str, Tensor]:
        """Parameters by name in float32 (float64 stays), weights as (out, in). Copies."""
        found = {}
        for name, parameter in self._parameters.items():
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            found[name] = self.turn(name, parameter.detach().to(wide, copy=True))
        return found

    def store(self, name: str, value: Tensor) -> Stored:
        """Writes a parameter, rounded once to its stored dtype, in place; gives what of the change is stored."""
        from peftkit_kernels import store_rounded_

        return store_rounded_(self._parameters[name].data, self.turn(name, value))

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are stored. Not copies."""
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def layer(self) -> None:
        """None: there are no codes."""

    def holding(self, layer: QuantizedLinear) -> nn.Module:
        """peftkit's own layer."""
        return layer
