"""Record: everything that is known of one finished cell, one JSON line each, append-only; and the machine's stamp."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

from peftkit_bench.placing import place

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no file locks of this kind
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

FILE = "records.jsonl"
OUTCOMES = "predictions"
"""Folder beside the records with a file for each cell, named by its key."""
PACKED, PACKED_OUTCOMES = f"{FILE}.xz", f"{OUTCOMES}.jsonl.xz"
"""The same, compressed as a whole, see `write_packed`."""
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
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        values = {f.name: getattr(self, f.name) for f in fields if f.metadata.get("stored", True)}
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
    trial: str
    """The same without seed, learning rate, phase and split: what one search chooses among, and then runs."""
    suite: str
    title: str
    """What the suite calls itself."""
    contender: str
    """Name of the row in the suite."""
    subject: str
    """Who implements the method, such as "peftkit"."""
    method: str
    quantization: str | None
    """How the frozen weights were stored; None: as the backbone has them."""
    baseline: bool
    """Whether it is a mark to compare with rather than a candidate."""
    phase: str
    """"search": chooses a learning rate; "final": counts."""
    seed: int
    split: str
    """The split that was predicted: "tune" in a search, "test" in the end."""
    config: Mapping[str, Any]
    """The method's fields as they were used, the solved size included."""
    learning_rate: float
    searched: Mapping[str, Any]
    """Values of whatever else was searched, by name; empty: the learning rate alone."""
    training: Mapping[str, Any]
    """Steps, batch size and the rest of the training settings."""
    tuning: Mapping[str, Any] | None
    """How the learning rate was searched: the grid, or trials; None: the suite gave it."""
    task: Mapping[str, Any]
    """Name and options."""
    metric: str
    """Name in `peftkit_bench.metrics.METRICS`."""
    data: Mapping[str, Any]
    """Name, hash, split sizes, and what the task learnt from the rows."""
    backbone: Mapping[str, Any]
    """Name, hash of the weights and parameter count of the frozen model."""
    budget: int | None
    """Trainable parameters that the size was solved for, the head left out; None: no budget, or no size to solve."""
    budgets: Sequence[int]
    """All budgets of the suite, ascending."""
    knob: str | None
    """The field that was solved for the budget; None: the method has none."""
    adapter_parameters: int
    """Trainable parameters of the method, the head left out, as trained."""
    final_parameters: int
    """How many of them remain to be kept: fewer where the method prunes, or folds away what only training needs."""
    head_parameters: int
    total_parameters: int
    score: float
    """By `metric`, on `split`."""
    outcomes: str
    """Hash of the cell's file of predictions and counts, see `Outcomes`."""
    losses: Sequence[float]
    """Training loss of each step."""
    stopping: Sequence[Sequence[float]]
    """Pairs (steps made, value on the stop split), in the order of training."""
    stopping_measure: str
    """What that value is: the metric's name, or "nats a token" where the metric would have to generate text."""
    best_step: int
    """Steps after which the kept weights were as they are: the best of `stopping`."""
    train_seconds: float
    """Training without loading, tokenising and evaluation."""
    evaluate_seconds: float
    """Predicting `split` once."""
    peak_bytes: int
    """Peak memory of training over what the process held before the backbone was loaded."""
    steady_bytes: int
    """What is held between two training steps, over the same floor, freed memory given back; the median of the times
    that the stop split is predicted."""
    memory_method: str
    """How they were taken."""
    adapter_bytes: int
    """Size of the saved adapter folder, head included."""
    base_latency_seconds: float | None
    """Median time of one forward pass of the bare backbone, timed in the same process; None, as what follows: a run
    that searches is not timed."""
    latency_seconds: float | None
    """Median time of one forward pass with the adapter beside the weights."""
    merged_latency_seconds: float | None
    """The same after merging; None: the method cannot be merged."""
    merged_logit_difference: float | None
    """Largest difference of a logit between merged and unmerged over the timed rows."""
    effect_kept: float | None
    """⟨m - b, a - b⟩ / ‖a - b‖² with b, a, m the last hidden states of the timed rows for base, adapter beside the
    weights, and merged; None: the method cannot be merged, or changes nothing."""
    latency_rows: int
    latency_tokens: int
    forgetting: Mapping[str, float] | None
    """Nats a token on general text, "before" and "after" training; None: the suite names no such text."""
    threads: int
    jobs: int
    """Cells that ran at the same time."""
    environment: Mapping[str, Any]
    """Machine, versions and commit."""
    started: str
    """UTC, ISO 8601."""
    cell_seconds: float
    """The whole cell: loading, training, predicting, measuring."""
    schema: int = field(default=2)
    folder: Path | None = field(default=None, compare=False, metadata={"stored": False})
    """Where it was read from; no part of the record."""

    def read_outcomes(self) -> Outcomes:
        """What was predicted for each example.

        Raises:
            RecordError: the file beside the records is missing, or is not the one that the record was written with.
        """
        if self.folder is None:
            raise RecordError(f"record {self.key} was not read from a folder, where its predictions would be")
        path, packed = self.folder / OUTCOMES / f"{self.key}.json.gz", self.folder / PACKED_OUTCOMES
        try:
            if packed.exists() and not path.exists():
                path = packed
                text = _packed_outcomes(packed)[self.key]
            else:
                text = gzip.decompress(path.read_bytes()).decode()
        except (OSError, EOFError, KeyError, zlib.error, lzma.LZMAError) as error:
            raise RecordError(
                f"{path}: the predictions of {self.contender}, seed {self.seed}, cannot be read ({error}); copy the "
                f"folder {OUTCOMES} together with {FILE}, or {PACKED_OUTCOMES} with {PACKED}"
            ) from None
        if text_digest(text) != self.outcomes:
            raise RecordError(f"{path}: not the predictions that {self.contender}, seed {self.seed}, was recorded with")
        return Outcomes(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What one cell predicted for each example of its split, in the data set's order."""

    predictions: Sequence[Any]
    """As the task gives them: the number of a class, entities, an answer, nats and tokens."""
    counts: Sequence[Sequence[float]]
    """What the metric counts of each example."""
    groups: Sequence[int]
    """Examples of one group, such as one source file, are not independent."""

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """What a record says of it."""
        return text_digest(self.to_text())


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
    schema: int = field(default=1)


AnyRecord = Record | MergeRecord


def _loaded(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"expected one JSON object, found {line[:60]!r}: {error.msg}") from None
    if not isinstance(found, dict):
        raise RecordError(f"expected a JSON object, found a {type(found).__name__}")
    return found


def _filled(cls: type[T], found: Mapping[str, Any]) -> T:
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # called with dataclasses only
    names = {f.name for f in fields if f.metadata.get("stored", True)}
    schema = next(f.default for f in fields if f.name == "schema")
    if found.get("schema") != schema:
        raise RecordError(
            f"expected a record of schema {schema}, found {found.get('schema')!r}; "
            "read it with the version of peftkit that wrote it, or run its suite again"
        )
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
    return text_digest(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str))


def text_digest(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(directory: Path) -> list[AnyRecord]:
    """The records of a directory, the packed ones first, oldest first; a last line cut off by a crash does not count.

    Raises:
        RecordError: a whole line cannot be read; names the file and the line.
    """
    found: list[AnyRecord] = []
    for path in (directory / PACKED, directory / FILE):
        if not path.exists():
            continue
        try:
            content = lzma.decompress(path.read_bytes()) if path.name == PACKED else path.read_bytes()
        except lzma.LZMAError as error:
            raise RecordError(f"{path}: cannot be decompressed ({error}); copy it again") from None
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                made = parsed(line.decode())
            except (RecordError, UnicodeDecodeError) as error:
                raise RecordError(f"{path}:{number}: {error}") from None
            found.append(dataclasses.replace(made, folder=directory) if isinstance(made, Record) else made)
    return found


def write_packed(records: Iterable[AnyRecord], directory: Path) -> None:
    """Writes records and what their cells predicted as two files, each compressed as a whole: a tenth of the size.

    Raises:
        RecordError: predictions are missing.
    """
    records = list(records)
    outcomes = [
        f'{{"key":{json.dumps(each.key)},"outcomes":{each.read_outcomes().to_text()}}}\n'
        for each in records
        if isinstance(each, Record)
    ]
    if outcomes:
        place(directory / PACKED_OUTCOMES, lzma.compress("".join(outcomes).encode(), preset=9))
    place(directory / PACKED, lzma.compress("".join(each.to_line() for each in records).encode(), preset=9))


def _packed_outcomes(path: Path) -> Mapping[str, str]:
    """Canonical text of the outcomes by key."""
    return _unpacked(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _unpacked(path: Path, _changed: int) -> Mapping[str, str]:
    lines = lzma.decompress(path.read_bytes()).decode().splitlines()
    return {found["key"]: Outcomes(**found["outcomes"]).to_text() for found in map(json.loads, lines)}


class Writer:
    """Appends records to a directory's file; each is on the disk before `append` returns."""

    def __init__(self, file: TextIO, folder: Path) -> None:
        self._file, self._folder = file, folder

    def append(self, record: AnyRecord, outcomes: Outcomes | None = None) -> None:
        """Adds one line in one write; the file of its outcomes is there, whole, before it."""
        if outcomes is not None:
            packed = gzip.compress(outcomes.to_text().encode(), mtime=0)
            place(self._folder / OUTCOMES / f"{record.key}.json.gz", packed)
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
            yield Writer(file, directory)


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
