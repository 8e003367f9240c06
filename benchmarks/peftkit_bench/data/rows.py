"""Rows as found into rows of a task: columns by their names, and every bad row reported with its place at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.errors import nearest
from peftkit_bench.data.dataset import DataError
from peftkit_bench.record import digest
from peftkit_bench.tasks.contract import RowError, Task

GROUP = "group"
"""Column, of any task, whose equal values mark rows that are not independent, such as those of one document."""
SHOWN = 10
"""At most this many bad rows are named; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one file, or of one split of a set on a hub, by its own column names."""

    name: str
    """As the suite names it."""
    rows: tuple[tuple[str, Mapping[str, Any]], ...]
    """Place, such as "train.jsonl:17", and row."""
    problems: tuple[str, ...] = ()
    """Places where no row could be read, and why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a task."""

    fields: Mapping[str, Any]
    """As `Task.read` gives them."""
    source: str
    """Its place."""
    content: str
    """What is given of it, answers left out, in letters and digits alone: rows that agree here are the same text."""
    group: str
    """Value of the column `group`; where there is none, the content."""
    identity: str
    """Hash of all fields."""


def rows(tables: Mapping[str, Table], task: Task, columns: Mapping[str, str]) -> dict[str, list[Row]]:
    """The rows of each table in the task's form.

    Args:
        tables: by what the suite calls them, such as "train".
        task: says which columns there are, and reads a row.
        columns: column of the table by column of the task, where it has neither the task's name nor one of the other
            names that the task knows. `group` may be named as well.

    Raises:
        DataError: a column is not there, or rows cannot be used; names all tables and counts all rows.
    """
    known = {column.name for column in task.columns} | {GROUP}
    for name in columns:
        if name not in known:
            raise DataError(f"columns: task {task.name!r} has no column {name!r}; {nearest(name, known)}")
    answers = {column.name for column in task.columns if column.answer}
    problems: list[str] = []
    found: dict[str, list[Row]] = {}
    for key, table in tables.items():
        problems += table.problems
        if not table.rows and not table.problems:
            raise DataError(f"{table.name}: expected rows, found none")
        names = _names(table, task, columns) if table.rows else {}
        found[key] = []
        for place, raw in table.rows:
            mapped = {name: raw[theirs] for name, theirs in names.items() if raw.get(theirs) is not None}
            group = mapped.pop(GROUP, None)
            try:
                fields = task.read(mapped)
            except RowError as error:
                problems.append(f"{place}: {error}")
                continue
            content = _content(fields, answers)
            found[key].append(
                Row(
                    fields=fields,
                    source=place,
                    content=content,
                    group=content if group is None else f"{GROUP} {group}",
                    identity=digest(fields),
                )
            )
    if problems:
        raise DataError(_listed(problems))
    return found


def _names(table: Table, task: Task, columns: Mapping[str, str]) -> dict[str, str]:
    """Column of the table by column of the task."""
    there = list(dict.fromkeys(name for _, row in table.rows for name in row))
    has = f"{table.name} has {', '.join(map(repr, there))}"
    found: dict[str, str] = {}
    for name, theirs in columns.items():
        if theirs not in there:
            raise DataError(f"columns, {name}: there is no column {theirs!r}; {has}")
        found[name] = theirs
    for column in task.columns:
        if column.name in found:
            continue
        theirs = next((each for each in (column.name, *column.also) if each in there), "")
        if theirs:
            found[column.name] = theirs
        elif column.required:
            raise DataError(
                f"{table.name}: expected a column {column.name!r} ({column.what}); {has}; say which of them it is with "
                f"`columns: {{{column.name}: ...}}` in a suite, or --column {column.name}=..."
            )
    if GROUP in there:
        found.setdefault(GROUP, GROUP)
    return found


def _listed(problems: Sequence[str]) -> str:
    left = len(problems) - SHOWN
    shown = "".join(f"\n  {each}" for each in problems[:SHOWN])
    more = f"\n  ... and {left} more" if left > 0 else ""
    return f"{len(problems)} row{'s' if len(problems) > 1 else ''} cannot be used; mend or remove:{shown}{more}"


class _Kept(dict[int, int | None]):
    """Letters, marks, digits and symbols of `str.translate`; spaces, punctuation and controls go."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_KEPT = _Kept()


def _content(fields: Mapping[str, Any], answers: set[str]) -> str:
    plain = [" ".join(_texts(fields[name])) for name in sorted(fields) if name not in answers]
    kept = [unicodedata.normalize("NFKC", text).casefold().translate(_KEPT) for text in plain]
    return "\n".join(kept if any(kept) else plain)


def _texts(value: Any) -> Iterator[str]:
    """The texts and numbers in a value of JSON, in order."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from _texts(value[name])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        yield str(value)
