"""The vocabulary of a comparison: a contender, what it comes to, and the protocol of who implements it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from peftkit.errors import ConfigError


class SuiteError(ConfigError):
    """A suite that cannot be meant; names the place, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the comparison."""

    method: str
    """Name in `peftkit.METHODS`."""
    subject: str = "peftkit"
    """Who implements it."""
    learning_rate: float | None = None
    """Of everything but the head; None only where a suite searches it, or where there is nothing but the head."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""
    budget: bool = True
    """False: the size stands in `config` and is not solved for the budget."""
    baseline: bool = False
    """True: a mark to compare with rather than a candidate, such as full fine-tuning."""


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
