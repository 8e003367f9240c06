"""Record: everything that is known of one finished cell, one JSON line each, append-only; and the machine's stamp."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no file locks of this kind
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

SCHEMA = 1
FILE = "records.jsonl"
STAMPED = (
    "peftkit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "bitsandbytes",
    "numpy",
    "scipy",
)
"""Packages whose versions go into every record."""


class RecordError(ValueError):
    """A file of records that cannot be read, or that another run is writing."""


class _Line:
    """A dataclass that is one line of a file of records."""

    def to_line(self) -> str:
        """The record as one line of JSON with sorted keys."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """The record that a line holds.

        Raises:
            RecordError: the line is not JSON, or its fields are not those of this version.
        """
        return _filled(cls, _loaded(line))


@dataclass(frozen=True, kw_only=True)
class Record(_Line):
    """One finished cell: what was run, on what, where, and what came out."""

    key: str
    """Hash of everything that determines the result; a finished key is not run again."""
    variant: str
    """The same without the seed: records that differ in nothing else."""
    suite: str
    title: str
    """What the suite calls itself."""
    contender: str
    """Name of the row in the suite."""
    subject: str
    """Who implements the method, such as "peftkit"."""
    method: str
    baseline: bool
    """Whether it is a mark to compare with rather than a candidate."""
    seed: int
    split: str
    """The split that was predicted: "test", or "validation" when learning rates are searched."""
    config: Mapping[str, Any]
    """The method's fields as they were used, the solved size included."""
    learning_rate: float
    training: Mapping[str, Any]
    """Steps, batch size and the rest of the training settings."""
    task: str
    data: Mapping[str, Any]
    """Name, hash, classes and split sizes of the data set."""
    backbone: Mapping[str, Any]
    """Name, hash of the weights and parameter count of the frozen model."""
    budget: int | None
    """Trainable parameters that the size was solved for, the head left out; None: no budget."""
    knob: str | None
    """The field that was solved for the budget; None: the method has none."""
    adapter_parameters: int
    """Trainable parameters of the method, the head left out, as trained."""
    final_parameters: int
    """How many of them remain to be kept: fewer where the method prunes, or folds away what only training needs."""
    head_parameters: int
    total_parameters: int
    accuracy: float
    predictions: Sequence[int]
    """Class predicted for each example of the split, in the data set's order."""
    labels: Sequence[int]
    groups: Sequence[int]
    """Number of the source file of each example; examples of one file are not independent."""
    losses: Sequence[float]
    """Training loss of each step."""
    train_seconds: float
    """Training without loading, tokenising and evaluation."""
    evaluate_seconds: float
    peak_bytes: int
    """Peak memory of training over what the process held before the backbone was loaded."""
    memory_method: str
    """How it was taken."""
    adapter_bytes: int
    """Size of the saved adapter folder, head included."""
    base_latency_seconds: float
    """Median time of one forward pass of the bare backbone, timed in the same process."""
    latency_seconds: float
    """Median time of one forward pass with the adapter beside the weights."""
    merged_latency_seconds: float | None
    """The same after merging; None: the method cannot be merged."""
    merged_logit_difference: float | None
    """Largest difference of a logit between merged and unmerged over the timed rows."""
    latency_rows: int
    latency_tokens: int
    threads: int
    jobs: int
    """Cells that ran at the same time."""
    environment: Mapping[str, Any]
    """Machine, versions and commit."""
    started: str
    """UTC, ISO 8601."""
    cell_seconds: float
    """The whole cell: loading, training, predicting, measuring."""
    schema: int = field(default=SCHEMA)


@dataclass(frozen=True, kw_only=True)
class MergeRecord(_Line):
    """One merge of one adapter: who merged it into what, and what is left of its effect.

    Pairs are (effect kept, error): ⟨y' - y, y* - y⟩ / ‖y* - y‖² and ‖y' - y*‖ / ‖y* - y‖, with y of the base, y* of the
    base with the adapter unmerged, and y' of the merged weights.
    """

    key: str
    """Hash of everything that determines the result; a finished key is not run again."""
    suite: str
    title: str
    adapter: str
    """Name of the adapter in the suite."""
    method: str
    config: Mapping[str, Any]
    learning_rate: float
    seed: int
    scaled: str | None
    """The parameter that was scaled to reach the size; None: as trained."""
    asked_size: float | None
    """‖ΔW‖ / ‖W‖ that the change was scaled to; None: as trained."""
    size: float
    """‖ΔW‖ / ‖W‖ over all sites, on the base that is merged into."""
    contender: str
    """Name of the route in the suite."""
    tool: str
    base: str
    """How the weights were stored before."""
    into: str
    """How they were to be stored."""
    calibrated: bool
    residual_rank: int
    calibration_rows: int
    judged_rows: int
    minimum_effect: float
    """What peftkit was asked to keep."""
    refused: str | None
    """Why the tool did not merge; with numbers beside it: why peftkit did not until it was asked to keep nothing."""
    kept: Mapping[str, Mapping[str, Sequence[float]]]
    """Pairs by base ("nf4": that of the training, "bf16": the original, "int8") and by what they are of: "weights",
    "activations" (X Wᵀ of each site for unseen inputs X), "logits"; `base` names that of the merge itself."""
    as_run: Sequence[float] | None
    """The pair of the logits that the merged model's own layers compute, on its own base."""
    sites: Mapping[str, Sequence[float]]
    """By site, on the merge's own base: ‖ΔW‖ / ‖W‖, and the pairs of weights and of activations."""
    bytes_per_weight: float | None
    """At the sites, biases left out."""
    certificate: Mapping[str, float] | None
    """peftkit's own totals, and the largest difference of its certificate from these numbers at any site."""
    merge_seconds: float
    training: Mapping[str, Any]
    data: Mapping[str, Any]
    backbone: Mapping[str, Any]
    threads: int
    environment: Mapping[str, Any]
    started: str
    """UTC, ISO 8601."""
    kind: str = field(default="merge")
    schema: int = field(default=SCHEMA)


AnyRecord = Record | MergeRecord


def _loaded(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"expected one JSON object, found {line[:60]!r}: {error.msg}") from None
    if not isinstance(found, dict):
        raise RecordError(f"expected a JSON object, found a {type(found).__name__}")
    if found.get("schema") != SCHEMA:
        raise RecordError(
            f"expected a record of schema {SCHEMA}, found {found.get('schema')!r}; "
            "read it with the version of peftkit that wrote it"
        )
    return found


def _filled(cls: type[T], found: Mapping[str, Any]) -> T:
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # called with dataclasses only
    if set(found) != names:
        missing, unknown = sorted(names - set(found)), sorted(set(found) - names)
        raise RecordError(f"a record misses fields {missing} and has unknown fields {unknown}")
    return cls(**found)


def parsed(line: str) -> AnyRecord:
    """The record that a line holds, of whichever kind.

    Raises:
        RecordError: the line is not JSON, or its fields are not those of this version.
    """
    found = _loaded(line)
    return _filled(MergeRecord, found) if found.get("kind") == "merge" else _filled(Record, found)


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(directory: Path) -> list[AnyRecord]:
    """The records of a directory, oldest first; a last line cut off by a crash does not count.

    Raises:
        RecordError: a whole line cannot be read; names the file and the line.
    """
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found: list[AnyRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parsed(line.decode()))
        except (RecordError, UnicodeDecodeError) as error:
            raise RecordError(f"{path}:{number}: {error}") from None
    return found


class Writer:
    """Appends records to a directory's file; each is on the disk before `append` returns."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def append(self, record: AnyRecord) -> None:
        """Adds one line in one write."""
        self._file.write(record.to_line())
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writer(directory: Path) -> Iterator[Writer]:
    """A writer that no other process shares; cuts off what a crash left of a last line.

    Raises:
        RecordError: another process is writing to the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    with path.open("a+b") as raw:
        if fcntl is not None:
            try:
                fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RecordError(
                    f"{path} is being written by another run; wait for it or choose another --out"
                ) from None
        raw.seek(0)
        content = raw.read()
        raw.truncate(content.rfind(b"\n") + 1)
        with path.open("a", encoding="utf-8") as file:
            yield Writer(file)


def environment(root: Path | None = None) -> dict[str, Any]:
    """The stamp of this machine: processor, memory, system, versions, commit.

    Args:
        root: a folder of the source tree whose commit is stamped; None: that of this file.
    """
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": _commit(root or Path(__file__).resolve().parent),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions of the packages that decide what comes out; those not installed are left out."""
    found = {}
    for name in STAMPED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit(root: Path) -> str | None:
    """The commit of the tree, with "+" when it has changes; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None or git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None
    return commit + ("+" if git("status", "--porcelain") else "")
