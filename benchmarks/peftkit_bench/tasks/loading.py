"""Columns of text, lists of classes, and models from a folder: what several tasks need in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from peftkit_bench.tasks.contract import RowError


def text(row: Mapping[str, Any], column: str) -> str:
    """A column that holds text.

    Raises:
        RowError: it is missing, empty, or no text.
    """
    found = row.get(column)
    if found is None:
        raise RowError(f"column {column!r} is missing; the row has {', '.join(map(repr, row)) or 'no columns'}")
    if not isinstance(found, str) or not found.strip():
        raise RowError(f"column {column!r}: expected text, found {found!r:.80}")
    return found


def classes(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], column: str, of: Callable[[Mapping[str, Any]], Iterable[str]]
) -> list[str]:
    """The classes of the training rows in order: by value where all are whole numbers, else by name.

    Args:
        rows: by split.
        column: for messages.
        of: the classes of one row.

    Raises:
        RowError: there are fewer than two, or another split has one that training never shows.
    """
    known = {each for row in rows["train"] for each in of(row)}
    if len(known) < 2:
        raise RowError(f"column {column!r}: expected at least two classes in the training rows, found {sorted(known)}")
    for name, found in rows.items():
        unknown = {each for row in found for each in of(row)} - known
        if unknown:
            raise RowError(
                f"column {column!r}: the {name} rows have {', '.join(sorted(unknown))}, which no training row has; "
                "add such rows to the training file or take them out of the other"
            )
    numbers = all(each.lstrip("-").isdecimal() for each in known)
    return sorted(known, key=int) if numbers else sorted(known)


def skeleton(auto: Any, folder: str, **head: Any) -> nn.Module:
    """A model on the meta device, from its config alone."""
    config = AutoConfig.from_pretrained(folder, **head)
    with torch.device("meta"):
        made: nn.Module = auto.from_config(config)
    return made


def model(auto: Any, folder: str, **head: Any) -> nn.Module:
    """A pretrained model in float32."""
    made: nn.Module = auto.from_pretrained(folder, dtype=torch.float32, **head)
    return made
