"""What the engine asks of a task, what a task asks of rows, and what the cells of a suite share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from peftkit.errors import PeftkitError

GENERAL = "general"
"""The split on which forgetting is measured."""
Batch = dict[str, Tensor]
"""Arguments of the model's forward by name, and `labels`."""


class RowError(PeftkitError, ValueError):
    """A row that a task cannot use; says what was expected of which column and what was found."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a task's rows."""

    name: str
    what: str
    """What stands in it, as a person would say it: "text", "class", "list of tokens"."""
    required: bool = True
    also: tuple[str, ...] = ()
    """Other names under which data sets carry it; tried in this order where `name` is absent."""
    answer: bool = False
    """Whether it is what a model has to find: left out where texts are compared with each other."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one split, as read and as encoded."""

    rows: tuple[Mapping[str, Any], ...]
    """As `Task.read` gives them."""
    encoded: tuple[Mapping[str, Any], ...]
    """As `Task.encode` gives them: `input_ids`, and what else the task needs, plain lists and numbers."""
    groups: tuple[int, ...]
    """Rows of one group, such as one source file, are not independent."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that the cells of a suite share, ready to be sent to another process."""

    folder: str
    """Where the backbone and its tokenizer are loaded from: a folder, or a name on a hub."""
    backbone: dict[str, Any]
    """What records keep of it: name, hash, class, type, parameters."""
    data: dict[str, Any]
    """What records keep of the data: name, hash, sizes of the splits, and what the task learnt (`facts`)."""
    facts: Mapping[str, Any]
    """What the task learnt from the rows, such as the classes."""
    splits: Mapping[str, Split]
    """train, tune, stop, test; and general, the text on which forgetting is measured, where the suite names one."""
    padding: int
    """Token id."""


class Task(Protocol):
    """Turns rows into batches and a model, and says what the loss, the predictions and their counts are.

    A task is a frozen dataclass; its fields are the options that a suite may set.
    """

    name: ClassVar[str]
    """Name in suites and records."""
    columns: ClassVar[tuple[Column, ...]]
    metrics: ClassVar[tuple[str, ...]]
    """What `metric` may be."""
    architecture: ClassVar[str]
    """The class of transformers that loads its models, such as "AutoModelForSequenceClassification"."""

    @property
    def max_tokens(self) -> int:
        """Inputs are cut to this many tokens."""

    @property
    def metric(self) -> str:
        """The score that decides; a name in `peftkit_bench.metrics.METRICS`."""

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its columns checked and in the form that the other functions expect.

        Args:
            row: by this task's column names; columns that are not required may be absent.

        Raises:
            RowError: a column is missing or holds something else than it should.
        """

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """What must be known of all rows before one can be encoded, as JSON values, such as {"classes": [...]}.

        Raises:
            RowError: rows of the other splits hold what the training rows never show, or there is nothing to learn.
        """

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """The row as plain lists and numbers, `input_ids` among them."""

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """The backbone with its head on the meta device, for counting."""

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """The pretrained backbone in float32, with a fresh head where the task has one."""

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """One batch of rows, padded to the longest."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar with gradient."""

    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """The prediction for each row of a split, in its order, as JSON values; the model is in evaluation mode."""

    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """Mean negative log-likelihood of a token of a split's text, in nats; None: the model predicts no tokens."""

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """What `metric` counts of each prediction, in the order of its `counts`."""
