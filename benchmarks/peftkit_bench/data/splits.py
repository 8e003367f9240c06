"""Rows of one to three files into the four splits, by hashes of the rows' own content.

What a row is decides where it goes: not its place in the file, not how often the program ran, not Python's hash seed.
Equal texts go to one side together, as do rows of one group.

- test: its own file; without one, a fifth of the training file.
- tune and stop: the halves of the validation file; without one, a tenth of the training file each.
- A row whose text, or whose group, is in two splits stays in one: test before stop, stop before tune, tune before
  train. Case, spacing and punctuation make no difference.
- Rows that repeat inside one split are kept: how often a row stands in a file is the user's own weighting, and leaving
  it alone makes no method look better than another. They count as one group, so that repeats in the test rows do not
  pass for more evidence than there is.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from peftkit_bench.data.dataset import SPLITS, DataError, Dataset, Example
from peftkit_bench.data.rows import Row

TEST_SHARE, TEST_MOST = 0.2, 2000
HELD_SHARE, HELD_MOST = 0.1, 1000
FEWEST = 8
"""A split with fewer rows than this decides nothing."""


def rank(*parts: object) -> str:
    """A hash that puts things in an order of its own."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def in_splits(
    files: Mapping[str, Sequence[Row]],
    *,
    name: str,
    limits: Mapping[str, int | None],
    seed: int,
    versions: Mapping[str, str],
) -> Dataset:
    """The data set: cut where a file is missing, shared rows taken out, limited, and ordered by content.

    Args:
        files: rows of "train", and of "validation" and "test" where there are such files.
        name: of the data set.
        limits: rows kept of each split, a random choice; None: all.
        seed: of the cuts and of the choice.
        versions: see `Dataset`.

    Raises:
        DataError: a split has too few rows left.
    """
    notes: list[str] = []
    rest = list(files["train"])
    total = len(rest)
    splits: dict[str, list[Row]] = {}
    if "test" in files:
        splits["test"] = list(files["test"])
    else:
        splits["test"], rest = _cut(rest, min(int(TEST_SHARE * total), TEST_MOST), f"{seed} test")
        notes.append(f"test: {len(splits['test'])} rows cut from the {total} of the training file")
    if "validation" in files:
        held = files["validation"]
        splits["tune"], splits["stop"] = _cut(held, len(held) // 2, f"{seed} tune")
        notes.append(f"tune and stop: halves of the {len(held)} rows of the validation file")
    else:
        for split in ("tune", "stop"):
            splits[split], rest = _cut(rest, min(int(HELD_SHARE * total), HELD_MOST), f"{seed} {split}")
            notes.append(f"{split}: {len(splits[split])} rows cut from the {total} of the training file")
    splits["train"] = rest
    notes += _unshare(splits)
    repeats = len(splits["train"]) - len({row.identity for row in splits["train"]})
    if repeats:
        notes.append(f"train: {repeats} rows repeat another one and are kept")
    for split, most in limits.items():
        if most is not None and most < len(splits[split]):
            notes.append(f"{split}: {most} of {len(splits[split])} rows, chosen at random with seed {seed}")
            splits[split] = sorted(splits[split], key=lambda row: rank(seed, "limit", row.identity))[:most]
    if any(len(splits[split]) < FEWEST for split in SPLITS):
        sizes = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise DataError(
            f"expected at least {FEWEST} rows in each split, found {sizes} ({'; '.join(notes)}); give a larger file, "
            "files for validation and test, or higher limits"
        )
    groups = sorted({row.group for rows in splits.values() for row in rows}, key=rank)
    number = {group: index for index, group in enumerate(groups)}
    return Dataset(
        name=name,
        splits={
            split: tuple(
                Example(fields=row.fields, group=number[row.group], source=row.source)
                for row in sorted(splits[split], key=lambda row: row.identity)
            )
            for split in SPLITS
        },
        versions=dict(versions),
        notes=tuple(notes),
    )


def _cut(rows: Sequence[Row], count: int, salt: str) -> tuple[list[Row], list[Row]]:
    """At most `count` of the rows, whole groups in the order of their hashes, and the others."""
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row.group] += 1
    taken: set[str] = set()
    for group in sorted(sizes, key=lambda each: rank(salt, each)):
        if sizes[group] <= count:
            taken.add(group)
            count -= sizes[group]
    return [row for row in rows if row.group in taken], [row for row in rows if row.group not in taken]


def _unshare(splits: dict[str, list[Row]]) -> list[str]:
    """Takes rows out that share text or group with a split that comes first; says how many."""
    notes = []
    seen: list[tuple[str, set[str], set[str]]] = []
    for split in ("test", "stop", "tune", "train"):
        kept = []
        dropped: dict[str, int] = defaultdict(int)
        for row in splits[split]:
            where = next((name for name, texts, groups in seen if row.content in texts or row.group in groups), None)
            if where is None:
                kept.append(row)
            else:
                dropped[where] += 1
        for where, count in dropped.items():
            notes.append(f"{split}: {count} rows left out, their text or group is in the {where} rows too")
        splits[split] = kept
        seen.append((split, {row.content for row in kept}, {row.group for row in kept}))
    return notes
