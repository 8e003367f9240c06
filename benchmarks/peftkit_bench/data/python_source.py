"""Windows of Python source code, for language modelling: real text that is on every machine, in three shares of files.

A file belongs to one share for good, by a hash of its origin and path: decoders are pretrained on one share of the
packages in PRETRAINING, forgetting is measured on another, and the third may be adapted to. Every file of a package
that is not in PRETRAINING is new to such a decoder, and may be adapted to. Files are read, never imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftkit_bench.data.dataset import SPLITS, DataError, Dataset, Example, default_cache
from peftkit_bench.data.docstrings import STANDARD_LIBRARY, chosen, python_files, rank, source_root
from peftkit_bench.placing import place
from peftkit_bench.record import digest
from peftkit_bench.tasks.contract import Task

VERSION = 1
"""Raised whenever the same sources would give other rows; part of the cache's key."""
PRETRAINING = (STANDARD_LIBRARY, "numpy", "scipy", "matplotlib", "networkx", "transformers", "huggingface_hub",
               "accelerate", "jinja2", "rich", "pygments", "PIL")  # fmt: skip
"""What small decoders are pretrained on: the standard library and packages that come with peftkit. sympy and torch
come with it too and are left out, so that there is something to adapt to."""
SHARES = {"pretraining": 85, "general": 10, "benchmark": 5}
"""Parts in a hundred of the files of the packages in PRETRAINING."""
PARTS = ("benchmark", "general")
PER_FILE = 12
"""At most this many windows of one file, so that no file decides the result."""
MAX_FILE = 100_000
"""Of a file that is longer, mostly a table of data, this many characters are read."""
MIN_SHARE = 0.5
"""A window is at least this share of the asked-for length."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One Python file of an origin."""

    source: str
    """Origin and path within it, such as "numpy/linalg/_linalg.py": the same on every machine."""
    path: Path

    @property
    def text(self) -> str:
        """What stands in it, up to MAX_FILE characters; empty where it is not UTF-8."""
        try:
            return self.path.read_text(encoding="utf-8")[:MAX_FILE]
        except UnicodeDecodeError:
            return ""


def source_files(origin: str, root: Path | None = None) -> list[SourceFile]:
    """The Python files of an origin in an order that its paths' hashes decide, tests and vendored packages left out.

    Args:
        origin: "python" for the standard library, or the name of an installed package.
        root: folder of its sources; None: where it is installed.

    Raises:
        DataError: it is not installed.
    """
    folder = root or source_root(origin)
    found = [SourceFile(source=f"{origin}/{p.relative_to(folder).as_posix()}", path=p) for p in python_files(folder)]
    return sorted(found, key=lambda file: rank(file.source))


def share(source: str) -> str:
    """The share that a file belongs to, a name in SHARES: "benchmark" for all of a package that is not in PRETRAINING.

    Args:
        source: as in `SourceFile`.
    """
    if source.partition("/")[0] not in PRETRAINING:
        return "benchmark"
    return chosen("share " + source, SHARES)


def version(origin: str) -> str:
    """The version of an origin: of Python, or of the distribution that an installed package came with."""
    if origin == STANDARD_LIBRARY:
        return platform.python_version()
    return importlib.metadata.version((importlib.metadata.packages_distributions().get(origin) or [origin])[0])


def windows(text: str, characters: int) -> Iterator[str]:
    """Consecutive runs of whole lines of at most this many characters, blank lines around them left out.

    A line that is longer than a whole window ends one, and is in none. What is shorter than MIN_SHARE of the length is
    left out.
    """
    run = ""
    for line in [*text.splitlines(keepends=True), "x" * (characters + 1)]:
        if len(run) + len(line) <= characters:
            run += line
            continue
        window = run.strip("\n")
        if len(window) >= MIN_SHARE * characters:
            yield window
        run = line if len(line) <= characters else ""


@dataclass(frozen=True, kw_only=True)
class PythonSource:
    """Rows of source code for the task "causal-lm", whole files to one split."""

    name: ClassVar[str] = "python-source"
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm",)
    part: str = "benchmark"
    """ "benchmark": text to adapt to; "general": held-out files of the packages that decoders are pretrained on."""
    origins: tuple[str, ...] = ()
    """"python" for the standard library, or names of installed packages; empty: sympy, of "general": PRETRAINING."""
    train: int = 2000
    """Rows of this split; so `tune`, `stop` and `test`. 0 leaves a split empty."""
    tune: int = 200
    stop: int = 200
    test: int = 400
    characters: int = 900
    """Longest row; 256 tokens of the pretrained decoders hold about as much."""
    roots: Mapping[str, str] | None = None
    """Folder of sources by origin; None: where the packages are installed."""

    def dataset(self, task: Task) -> Dataset:
        """See `Source`: the same rows for the same sources, kept in the cache.

        Raises:
            DataError: an option cannot be meant, an origin is not installed or has too few rows.
        """
        origins = self._origins()
        sizes = {name: getattr(self, name) for name in SPLITS}
        if min(sizes.values()) < 0 or not any(sizes.values()):
            raise DataError(f"python-source: expected sizes that are not negative and not all 0, found {sizes}")
        if self.characters < 40:
            raise DataError(f"python-source, characters: expected at least 40, found {self.characters}")
        roots = {name: Path(folder) for name, folder in (self.roots or {}).items()}
        files = {origin: source_files(origin, roots.get(origin)) for origin in origins}
        versions = {origin: "given" if origin in roots else version(origin) for origin in origins}
        stamp = [VERSION, self.part, versions, sizes, self.characters, [SHARES, PRETRAINING, PER_FILE, MAX_FILE],
                 {o: [(f.source, f.path.stat().st_size) for f in found] for o, found in files.items()}]  # fmt: skip
        path = default_cache() / f"python-source-{digest(stamp)}.json"
        if not path.exists():
            place(path, json.dumps(_build(files, self.part, sizes, self.characters)))
        rows = json.loads(path.read_text(encoding="utf-8"))
        number = {source: n for n, source in enumerate(sorted({s for found in rows.values() for s, _ in found}))}
        splits = {
            name: tuple(
                Example(fields=task.read({"text": text}), group=number[source], source=source)
                for source, text in rows[name]
            )
            for name in SPLITS
        }
        return Dataset(name=f"python source, {self.part}", splits=splits, versions=versions)

    def _origins(self) -> tuple[str, ...]:
        if self.part not in PARTS:
            raise DataError(f"python-source, part: expected {' or '.join(map(repr, PARTS))}, found {self.part!r}")
        chosen = self.origins or (PRETRAINING if self.part == "general" else ("sympy",))
        if len(set(chosen)) != len(chosen):
            raise DataError(f"python-source, origins: expected each once, found {', '.join(chosen)}")
        strangers = [origin for origin in chosen if origin not in PRETRAINING]
        if self.part == "general" and strangers:
            raise DataError(
                f"python-source, origins: {', '.join(strangers)} is not among the packages that decoders are "
                f"pretrained on, so none of it is general text; expected some of {', '.join(PRETRAINING)}"
            )
        return tuple(chosen)


def _build(
    files: Mapping[str, Sequence[SourceFile]], part: str, sizes: Mapping[str, int], characters: int
) -> dict[str, list[tuple[str, str]]]:
    """(source, text) of each row by split, as many of each origin as it has, up to an equal part."""
    seen: set[str] = set()
    pools: dict[str, dict[str, list[tuple[str, str]]]] = {name: {} for name in SPLITS}
    for origin, found in files.items():
        for file in found:
            if share(file.source) != part:
                continue
            pool = pools[chosen("split " + file.source, sizes)].setdefault(origin, [])
            for text in sorted(set(windows(file.text, characters)), key=rank)[:PER_FILE]:
                # Licences and other texts that several files share would be in two splits.
                same = " ".join(text.split())
                if same not in seen:
                    seen.add(same)
                    pool.append((file.source, text))
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, size in sizes.items():
        # Turn by turn, so that each origin has an equal part as long as it has rows left.
        turns = sorted(
            (turn, index, row)
            for index, pool in enumerate(pools[name].values())
            for turn, row in enumerate(sorted(pool, key=lambda row: rank(row[1])))
        )
        rows[name] = [row for _, _, row in turns[:size]]
        if len(rows[name]) < size:
            raise DataError(
                f"python-source, {name}: expected {size} rows, found {len(rows[name])} in the {part} files of "
                f"{', '.join(files)}; ask for fewer, for shorter ones, or name more origins"
            )
    return rows
