"""Rows of a data set on a hub, or of a folder laid out like one, through the package datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftkit_bench.data import rows, splits
from peftkit_bench.data.dataset import SPLITS, DataError, Dataset
from peftkit_bench.data.rows import Table
from peftkit_bench.tasks.contract import Task


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Rows of a data set by its name; how they become four splits stands in `peftkit_bench.data.splits`.

    Files are downloaded and read as data. Code that comes with a data set is never run; datasets refuses such sets.
    """

    name: ClassVar[str] = "hub"
    tasks: ClassVar[tuple[str, ...]] = ()
    path: str
    """Name on the hub, such as "stanfordnlp/sst2", or a folder."""
    config: str | None = None
    """Which of its configurations; None: the only one, or the default."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest. A commit makes sure that the rows stay the same."""
    train: str = "train"
    """Name of its split. Likewise the others; None: it is cut from `train`."""
    validation: str | None = None
    test: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of the set by column of the task, where the names differ."""
    train_rows: int | None = None
    """At most this many rows, a random choice; None: all. Likewise the others."""
    tune_rows: int | None = None
    stop_rows: int | None = None
    test_rows: int | None = None
    seed: int = 0
    """Of the cuts and of the choice of rows."""

    def dataset(self, task: Task) -> Dataset:
        """See `Source`."""
        given = {key: name for key in ("train", "validation", "test") if (name := getattr(self, key)) is not None}
        tables = {key: self._table(name) for key, name in given.items()}
        return splits.in_splits(
            rows.rows(tables, task, self.columns),
            name=" ".join(each for each in (self.path.rstrip("/").rsplit("/", 1)[-1], self.config) if each),
            limits={split: getattr(self, f"{split}_rows") for split in SPLITS},
            seed=self.seed,
            versions={self.path: self.revision} if self.revision else {},
        )

    def _table(self, split: str) -> Table:
        try:
            import datasets
        except ImportError:
            raise DataError("source 'hub' needs the package datasets; pip install 'peftkit[bench]'") from None
        shown = f"{self.path} {split}"
        try:
            found = datasets.load_dataset(self.path, name=self.config, revision=self.revision, split=split)
        except ConnectionError as error:
            raise DataError(
                f"{shown}: the hub cannot be reached ({error}); check the network and HF_HUB_OFFLINE, or download the "
                "files elsewhere and use `source: files`"
            ) from None
        except FileNotFoundError as error:
            raise DataError(
                f"{shown}: no such data set ({error}); check its name and revision, or log in where it is private"
            ) from None
        except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
            raise DataError(
                f"{shown}: cannot be loaded ({error}); check the split and `config`. Sets that bring code of their own "
                "are not run: use their Parquet files, or `source: files`"
            ) from None
        classes = {name: names for name, feature in found.features.items() if (names := _names(feature)) is not None}
        table: list[tuple[str, Mapping[str, Any]]] = []
        problems: list[str] = []
        for number, row in enumerate(found, start=1):
            place = f"{shown} row {number}"
            try:
                named = {key: _named(value, classes[key]) if key in classes else value for key, value in row.items()}
                table.append((place, named))
            except IndexError:
                problems.append(
                    f"{place}: a class without a name, as in splits whose answers are withheld; choose another split"
                )
        return Table(name=shown, rows=tuple(table), problems=tuple(problems))


def _names(feature: Any) -> list[str] | None:
    """The names of a class feature, or of a list of them."""
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return list(names) if names else None


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if isinstance(value, int):
        if value < 0:
            raise IndexError(value)
        return names[value]
    return value
