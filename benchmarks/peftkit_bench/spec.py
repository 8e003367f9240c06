"""The vocabulary of a comparison: a contender, what it comes to, and the protocol of who implements it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from peftkit.errors import ConfigError


class SuiteError(ConfigError):
    """A suite that cannot be meant; names the place, what was expected and what was found."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the comparison."""

    method: str
    """Name in `peftkit.METHODS`; for another subject the name that it gives the method."""
    subject: str = "peftkit"
    """Who implements it: a name in `peftkit_bench.subjects.NAMES`. `method: peft:boft` says both at once."""
    learning_rate: float | None = None
    """Of everything but the head; None only where a suite searches it, or where there is nothing but the head."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""
    quantization: str | None = None
    """How the frozen weights are stored: a name in the subject's `quantizations`; None: as the backbone has them."""
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
    """The field that was solved for the budget; None: the method has none, or the size stands in the config."""
    adapter_parameters: int
    """As trained, the head left out."""
    head_parameters: int
    total_parameters: int


class Subject(Protocol):
    """Attaches, counts, saves and merges methods."""

    @property
    def name(self) -> str:
        """Name in the records."""

    @property
    def quantizations(self) -> tuple[str, ...]:
        """Names of the ways in which it can store a frozen backbone."""

    def resolve(self, model: nn.Module, contender: Contender, budget: int | None) -> Resolved:
        """The contender's config for this model, its size solved for the budget; works on the meta device.

        Where a method has a size to set, its largest that is not above the budget; where the smallest is above it,
        the smallest. A method without a size has its own.
        """

    def quantize(self, model: nn.Module, quantization: str) -> nn.Module:
        """The model with its frozen weights stored another way, heads left as they are."""

    def attach(self, model: nn.Module, method: str, fields: Mapping[str, Any]) -> nn.Module:
        """The model, frozen and adapted."""

    def parameters(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: of the method, and of the head."""

    def begin(self, model: nn.Module, steps: int) -> None:
        """Tells methods with a schedule how many optimizer steps are to come."""

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What the method adds to the task's loss; None where it adds nothing, or does so by itself."""

    def stepped(self, model: nn.Module, step: int) -> None:
        """Called after each optimizer step, counted from 0, with the gradients still there."""

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of everything that training changes, by name: what brings back the best model of a run."""

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Brings back what `state` gave."""

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block the backbone computes as if nothing were attached to it."""

    def save(self, model: nn.Module, folder: Path) -> int:
        """Writes the adapter and the head; returns the number of parameters written."""

    def merge(self, model: nn.Module) -> bool:
        """Folds the adapter into the weights; False, and nothing done, where the method cannot."""

    def detach(self, model: nn.Module) -> nn.Module:
        """The bare backbone again."""
