"""Examples in four splits, and what a source of them has to offer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from peftkit.errors import PeftkitError
from peftkit_bench.placing import place
from peftkit_bench.record import digest
from peftkit_bench.tasks.contract import Task

SPLITS = ("train", "tune", "stop", "test")
"""Trained on; chooses learning rates; stops training; touched once, by the runs that count."""


class DataError(PeftkitError, ValueError):
    """Data that cannot be built or read as asked."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, and where it comes from."""

    fields: Mapping[str, Any]
    """As `Task.read` gives them."""
    group: int
    """Examples of one group, such as one source file, are not independent and stay in one split."""
    source: str
    """Such as "train.jsonl:17"."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Examples in splits that share no row and no group."""

    name: str
    splits: Mapping[str, tuple[Example, ...]]
    """By the names in SPLITS."""
    versions: Mapping[str, str]
    """Version of whatever the rows were taken from; empty for files, whose hash says it."""
    notes: tuple[str, ...] = ()
    """What was done to the rows that a reader of the report should know: rows left out, splits cut from one file."""

    @property
    def hash(self) -> str:
        """Hash of all fields and groups in their order."""
        return digest([[(e.fields, e.group) for e in self.splits[name]] for name in SPLITS])

    def describe(self) -> dict[str, Any]:
        """What a record keeps of the data set."""
        sizes = {name: len(self.splits[name]) for name in SPLITS}
        return {"name": self.name, "hash": self.hash, **sizes, "versions": dict(self.versions),
                "notes": list(self.notes)}  # fmt: skip


class Source(Protocol):
    """Where examples come from: a frozen dataclass whose fields are what a suite sets under `data`."""

    name: ClassVar[str]
    """Value of `data, source` in a suite."""
    tasks: ClassVar[tuple[str, ...]]
    """Names of the tasks whose columns it has; empty: of any."""

    def dataset(self, task: Task) -> Dataset:
        """The examples in their splits; the same for the same source.

        Raises:
            DataError: it cannot be built or read; names the file and the line.
        """


def kept(path: Path, build: Callable[[], Dataset]) -> Dataset:
    """The data set in a file; built, and kept there, where there is none yet."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: tuple(Example(**row) for row in rows) for name, rows in found["splits"].items()}
        return Dataset(name=found["name"], splits=splits, versions=found["versions"], notes=tuple(found["notes"]))
    made = build()
    place(path, json.dumps(asdict(made)))
    return made


def default_cache() -> Path:
    """$PEFTKIT_CACHE, or peftkit below the user's cache folder."""
    explicit = os.environ.get("PEFTKIT_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftkit"
