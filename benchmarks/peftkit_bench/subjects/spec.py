"""What the engine asks of whoever implements the methods: the protocol Subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from peftkit_bench.suite import Contender


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A contender with its size solved and counted."""

    fields: Mapping[str, Any]
    """The method's whole config as plain values."""
    knob: str | None
    """The field that was solved for the budget."""
    adapter_parameters: int
    head_parameters: int
    total_parameters: int


class Subject(Protocol):
    """Attaches, counts, saves and merges methods."""

    @property
    def name(self) -> str:
        """Name in the records."""

    def resolve(self, model: nn.Module, contender: Contender, budget: int | None) -> Resolved:
        """The contender's config for this model, its size solved for the budget; works on the meta device."""

    def attach(self, model: nn.Module, method: str, fields: Mapping[str, Any]) -> nn.Module:
        """The model, frozen and adapted."""

    def parameters(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: of the method, and of the head."""

    def save(self, model: nn.Module, folder: Path) -> int:
        """Writes the adapter and the head; returns the number of parameters written."""

    def merge(self, model: nn.Module) -> bool:
        """Folds the adapter into the weights; False, and nothing done, where the method cannot."""

    def detach(self, model: nn.Module) -> nn.Module:
        """The bare backbone again."""
