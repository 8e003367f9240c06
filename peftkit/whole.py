"""An adapter that trains copies of a module's own parameters: heads, biases, norms, or all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.spec import Adapter


class WholeModule(Adapter):
    """Trained copies of some of a module's parameters, read by the module in place of its own while active.

    The module's own parameters stay frozen and unchanged, so that disabling restores them exactly.
    """

    advises = False
    raw = True

    def __init__(self, parameters: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
        super().__init__()
        self.replaces = tuple(name for name, _ in parameters)  # type: ignore[misc]  # one set of names per instance
        for name, shape in parameters:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def copy_from(self, module: nn.Module) -> None:
        """Starts from the module's own values."""
        with torch.no_grad():
            for name in self.replaces:
                own = module._parameters[name]
                copy = self._parameters[name]
                assert own is not None
                assert copy is not None
                # Beside a quantized base copies are wider than what they are copies of.
                copy.data = own.detach().to(torch.promote_types(own.dtype, copy.dtype), copy=True)

    def replacement(self, name: str, value: Any) -> Any:
        """The trained copy, in the dtype of the module's own parameter."""
        copy = self._parameters[name]
        return copy if copy is None or copy.dtype == value.dtype else copy.to(value.dtype)

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Rows of the copied weight as it is stored; of the other copies too where the rows are outputs."""
        cut = {n: p for n, p in self._parameters.items() if p is not None and (n == "weight" or side == 0)}
        return self._with(**{n: p[start:stop] for n, p in cut.items()})

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained copies themselves."""
        return {name: self._parameters[name].detach().to(base[name].dtype) for name in self.replaces}  # type: ignore[union-attr]  # registered above
