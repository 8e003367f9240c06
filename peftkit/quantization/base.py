"""What every backend gives: the parameters of one module, readable whatever their storage, and perhaps writable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from peftkit.errors import MergeError

if TYPE_CHECKING:
    from peftkit_kernels import Stored

    from peftkit.quantization.layer import QuantizedLinear


class BaseWeights(Protocol):
    """The parameters of one module."""

    quantized: bool
    """Whether the weight is in codes, so that another weight takes another module's storage."""

    @property
    def storage(self) -> str:
        """How the weight is stored: a dtype such as "bfloat16", or the kind of its codes, such as "nf4"."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the weight stands for: its dtype, or that from which it was quantized."""
        ...

    @property
    def conv1d(self) -> bool:
        """Whether the module is a Conv1D of transformers, or took the place of one."""
        ...

    def read(self) -> dict[str, Tensor]:
        """Parameters by name in float32 (float64 stays), weights of projections as (out, in). Copies."""
        ...

    def turn(self, name: str, value: Tensor) -> Tensor:
        """Between (out, in) and the orientation in which the parameter is stored; its own inverse."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are stored, for a backup. Not copies."""
        ...

    def store(self, name: str, value: Tensor) -> Stored:
        """Writes a parameter, given as `read` gives it, rounded once to its stored dtype, in place.

        Returns:
            What of the change is stored.

        Raises:
            MergeError: the parameter is stored in codes.
        """
        ...

    def layer(self) -> QuantizedLinear | None:
        """The same weight, code by code, as peftkit's own layer; None where it has no such codes."""
        ...

    def holding(self, layer: QuantizedLinear) -> nn.Module:
        """A module of the backend that holds the codes of peftkit's layer; that layer itself where there is none."""
        ...


class CodedWeights:
    """What backends with codes have in common."""

    quantized = True
    storage = "quantized"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def dtype(self) -> torch.dtype:
        """What the weight was quantized from, as far as the module knows."""
        bias = self.module._parameters.get("bias")
        return bias.dtype if bias is not None else torch.bfloat16

    @property
    def conv1d(self) -> bool:
        """Whether the module took the place of a Conv1D; transformers notes that on bitsandbytes' layers."""
        return getattr(getattr(self.module, "source_cls", None), "__name__", "") == "Conv1D"

    def weight(self) -> Tensor:
        """The weight that the codes stand for, (out, in), float32."""
        raise NotImplementedError

    def read(self) -> dict[str, Tensor]:
        """Parameters by name in float32. Copies."""
        found = {"weight": self.weight()}
        bias = self.module._parameters.get("bias")
        if bias is not None:
            found["bias"] = bias.detach().to(torch.float32, copy=True)
        return found

    def turn(self, name: str, value: Tensor) -> Tensor:
        """The value: codes stand for (out, in)."""
        return value

    def stored(self) -> dict[str, Tensor]:
        """The module's parameters, codes where it has codes."""
        return {n: p.data for n, p in self.module._parameters.items() if p is not None}

    def store(self, name: str, value: Tensor) -> Stored:
        """Always an error: codes are chosen, not written."""
        raise MergeError(f"{type(self.module).__name__} stores {name} in codes; it cannot be written in place")

    def layer(self) -> QuantizedLinear | None:
        """None: no such codes."""
        return None

    def holding(self, layer: QuantizedLinear) -> nn.Module:
        """peftkit's own layer."""
        return layer
