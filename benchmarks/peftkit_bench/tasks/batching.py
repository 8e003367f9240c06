"""Rows into batches: lengths that are near each other together, in an order that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit_bench.tasks.contract import Batch, Split, Task

BUCKET = 8
"""Batches are cut from this many batches' worth of shuffled rows, sorted by length: little padding, still random."""


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of ids as one tensor (rows, longest), int64, filled with `value` on the right, or on the left."""
    longest = max(len(row) for row in rows)
    found = torch.full((len(rows), longest), value)
    for index, row in enumerate(rows):
        if row:
            found[index, longest - len(row) if left else 0 : longest if left else len(row)] = torch.tensor(list(row))
    return found


def masks(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """1 where a row has a token, 0 where it is padded; (rows, longest), int64."""
    return padded([[1] * len(row) for row in rows], 0, left=left)


def length(encoded: Mapping[str, Any]) -> int:
    """Tokens of an encoded row."""
    return len(encoded["input_ids"])


def training_order(split: Split, *, size: int, batches: int, seed: int) -> list[list[int]]:
    """Rows of each training batch: whole passes over the split, each in a new order, similar lengths together."""
    generator = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < batches:
        order = list(range(len(split)))
        generator.shuffle(order)
        epoch = []
        for start in range(0, len(order), size * BUCKET):
            bucket = sorted(order[start : start + size * BUCKET], key=lambda i: length(split.encoded[i]))
            epoch += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        generator.shuffle(epoch)
        found += epoch
    return found[:batches]


def in_batches(
    task: Task, model: nn.Module, split: Split, padding: int, size: int
) -> Iterator[tuple[list[int], Batch]]:
    """All rows of a split in batches of similar length, on the model's device, each with its rows' places."""
    device = next(model.parameters()).device
    order = sorted(range(len(split)), key=lambda i: length(split.encoded[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, moved(task.collate([split.encoded[i] for i in rows], padding), device)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}
