"""Rows from files of one's own: JSON lines, JSON, CSV, TSV and Parquet, by the ending of the name."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peftkit_bench.data import rows, splits
from peftkit_bench.data.dataset import SPLITS, DataError, Dataset
from peftkit_bench.data.rows import Table
from peftkit_bench.tasks.contract import Task

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_PLAIN_NAMES = ("train", "training", "data")
"""Names of files that say nothing; the folder's name stands for the data set then."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Rows of one to three local files; how they become four splits stands in `peftkit_bench.data.splits`."""

    name: ClassVar[str] = "files"
    tasks: ClassVar[tuple[str, ...]] = ()
    train: str
    """Path; may hold $VARIABLES of the environment and a leading ~. Likewise the others."""
    validation: str | None = None
    """Its halves choose learning rates and stop training; None: they are cut from `train`."""
    test: str | None = None
    """None: it is cut from `train`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of the files by column of the task, where the names differ."""
    train_rows: int | None = None
    """At most this many rows, a random choice; None: all. Likewise the others."""
    tune_rows: int | None = None
    stop_rows: int | None = None
    test_rows: int | None = None
    seed: int = 0
    """Of the cuts and of the choice of rows."""
    folder: str = ""
    """What relative paths are relative to; empty: the working folder."""

    def dataset(self, task: Task) -> Dataset:
        """See `Source`."""
        given = {key: path for key in ("train", "validation", "test") if (path := getattr(self, key)) is not None}
        paths = {key: located(path, self.folder, key) for key, path in given.items()}
        tables = {key: read_table(paths[key], given[key]) for key in given}
        stem = paths["train"].stem
        return splits.in_splits(
            rows.rows(tables, task, self.columns),
            name=paths["train"].resolve().parent.name if stem in _PLAIN_NAMES else stem,
            limits={split: getattr(self, f"{split}_rows") for split in SPLITS},
            seed=self.seed,
            versions={},
        )


def located(path: str, folder: str = "", key: str = "path") -> Path:
    """The file that a suite names, variables of the environment filled in.

    Args:
        path: as the suite has it.
        folder: what a relative path is relative to.
        key: the suite's key, for messages.

    Raises:
        DataError: a variable is not set, or there is no such file.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise DataError(f"{key}: {path!r} needs the environment variable {name}, which is not set; set it to the "
                            "path that is meant")  # fmt: skip
        return os.environ[name]

    found = Path(folder) / Path(_VARIABLE.sub(value, path)).expanduser()
    if not found.is_file():
        what = "is a folder" if found.is_dir() else "does not exist"
        raise DataError(f"{key}: expected a file ({', '.join(FORMATS)}), but {found} {what}")
    return found


def read_table(path: Path, name: str | None = None) -> Table:
    """The rows of a file; what cannot be read is among its problems.

    Args:
        path: to the file.
        name: what messages call it; None: the path.

    Raises:
        DataError: the format is not known, or the file as a whole cannot be read.
    """
    shown = name or str(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise DataError(
            f"{shown}: expected a file that ends in {', '.join(FORMATS)}, found {path.suffix or 'no ending'!r}"
        )
    found: list[tuple[str, Mapping[str, Any]]] = []
    problems: list[str] = []
    for place, row in FORMATS[ending](path):
        if isinstance(row, str):
            problems.append(f"{shown}:{place}: {row}")
        else:
            found.append((f"{shown}:{place}", row))
    return Table(name=shown, rows=tuple(found), problems=tuple(problems))


_Found = Iterator[tuple[int, Mapping[str, Any] | str]]
"""Line (of Parquet: row), counted from 1, and the row, or what is wrong with it."""


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8, found byte 0x{content[error.start]:02x}; convert the file"
        ) from None


def _object(found: Any) -> Mapping[str, Any] | str:
    if isinstance(found, dict):
        return found
    return f"expected an object with a value for each column, found {found!r:.60}"


def _json_lines(path: Path) -> _Found:
    # Not splitlines: JSON strings may hold the other line ends of Unicode as they are.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, _object(json.loads(line))
        except ValueError as error:
            yield number, f"expected one JSON object, found {line.strip()!r:.60} ({error})"


def _json(path: Path) -> _Found:
    text = _text(path)
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def after_space(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position = after_space(0)
    line, counted = 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}: expected a list of objects, found {text[position : position + 60]!r}; write its rows "
                        "as [{...}, {...}] or as one object a line in a file that ends in .jsonl")  # fmt: skip
    position = after_space(position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            found, end = decoder.raw_decode(text, position)
        except ValueError as error:
            raise DataError(f"{path}:{line}: expected JSON: {error}") from None
        yield line, _object(found)
        position = after_space(end)
        if text[position : position + 1] not in (",", "]"):
            raise DataError(f"{path}: expected a comma or the end of the list after the row of line {line}, found "
                            f"{text[position : position + 20] or 'the end of the file'!r}")  # fmt: skip
        if text[position] == ",":
            position = after_space(position + 1)
    if text[position + 1 :].strip():
        raise DataError(
            f"{path}: expected the end of the file after the list, found {text[position + 1 :].strip()!r:.60}"
        )


def _csv(path: Path) -> _Found:
    return _separated(path, csv.reader(io.StringIO(_text(path), newline=""), strict=True))


def _tsv(path: Path) -> _Found:
    # The format as registered (text/tab-separated-values) has no quoting: a quote is a character like any other.
    return _separated(path, csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def _separated(path: Path, reader: Any) -> _Found:
    line = 1
    header: list[str] | None = None
    try:
        for cells in reader:
            here, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) != len(header) or not all(each.strip() for each in header):
                    raise DataError(f"{path}:{here}: expected a header of different names, found {header}")
            elif len(cells) != len(header):
                yield here, f"expected {len(header)} cells as in the header, found {len(cells)}"
            else:
                yield here, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    except csv.Error as error:
        raise DataError(f"{path}:{line}: {error}; put cells with quotes, commas or line ends in quotes, and double "
                        "their own quotes") from None  # fmt: skip


def _parquet(path: Path) -> _Found:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow; pip install 'peftkit[bench]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), start=1)


FORMATS: Mapping[str, Callable[[Path], _Found]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""Readers by ending. Another format is one more entry."""
