"""Records -> findings: one row a contender, every pair tested, and what follows from it in words."""

from __future__ import annotations

import statistics as median_of
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peftkit_bench import statistics
from peftkit_bench.record import MergeRecord, Record
from peftkit_bench.statistics import Comparison, Estimate

R = TypeVar("R", Record, MergeRecord)

SAME_SIZE = 1.05
"""Parameter counts within this factor count as the same size."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender over its seeds."""

    name: str
    method: str
    baseline: bool
    records: tuple[Record, ...]
    accuracy: Estimate

    @property
    def parameters(self) -> int:
        """Trainable parameters of the method, the head left out."""
        return self.records[0].adapter_parameters

    @property
    def final_parameters(self) -> int:
        """The most that any seed kept of them."""
        return max(record.final_parameters for record in self.records)

    @property
    def trainable(self) -> int:
        """Trainable parameters, the head included."""
        return self.parameters + self.records[0].head_parameters

    @property
    def at_budget(self) -> bool:
        """Whether the size was solved for the suite's budget."""
        return self.records[0].knob is not None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were run, ascending."""
        return tuple(sorted(record.seed for record in self.records))

    def median(self, field: str) -> float | None:
        """The median of a measurement over seeds; None where it was not taken."""
        values = [getattr(record, field) for record in self.records]
        found = [value for value in values if value is not None]
        return median_of.median(found) if found else None

    @property
    def size(self) -> str:
        """The solved field and its value, such as "r = 8"; "" where nothing was solved."""
        first = self.records[0]
        return f"{first.knob} = {first.config[first.knob]}" if first.knob is not None else ""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A comparison on one data set, backbone and split."""

    rows: tuple[Row, ...]
    """Best accuracy first."""
    comparisons: tuple[Comparison, ...]
    """All pairs of contenders over the seeds that all have."""
    front: tuple[str, ...]
    """Contenders that no other beats in both accuracy and parameters, fewest parameters first."""
    warnings: tuple[str, ...]

    @property
    def first(self) -> Record:
        """A record for what all of them share."""
        return self.rows[0].records[0]

    def row(self, name: str) -> Row:
        """The row of a contender."""
        return next(row for row in self.rows if row.name == name)

    def between(self, one: str, other: str) -> Comparison | None:
        """The comparison of two contenders, whichever stands first; None where seeds do not allow one."""
        return next((c for c in self.comparisons if {c.first, c.second} == {one, other}), None)

    def tied_with_best(self) -> list[Row]:
        """The best row and those that cannot be told from it."""
        best = self.rows[0]
        found = [best]
        for row in self.rows[1:]:
            comparison = self.between(best.name, row.name)
            if comparison is None or not comparison.significant():
                found.append(row)
        return found

    def thriftiest(self) -> Row:
        """Among those that cannot be told from the best: the fewest trainable parameters.

        Sizes within SAME_SIZE of the fewest, such as one budget solved for several methods, count as equal; among them
        the most accurate.
        """
        tied = self.tied_with_best()
        fewest = min(row.trainable for row in tied)
        return max((row for row in tied if row.trainable <= SAME_SIZE * fewest), key=lambda row: row.accuracy.mean)


@dataclass(frozen=True, kw_only=True)
class Search:
    """Learning rates against accuracy on the validation split."""

    records: tuple[Record, ...]
    rates: tuple[float, ...]
    accuracies: dict[str, dict[float, float]]
    """Mean accuracy by contender and learning rate."""

    @property
    def first(self) -> Record:
        """A record for what all of them share."""
        return self.records[0]

    def best(self, name: str) -> float:
        """The learning rate with the highest mean accuracy; the lower one on a tie."""
        found = self.accuracies[name]
        return max(sorted(found), key=lambda rate: (found[rate], -rate))

    def at_edge(self, name: str) -> bool:
        """Whether the best rate is the lowest or highest that was tried, so that a better one may lie outside."""
        found = self.accuracies[name]
        return len(found) > 1 and self.best(name) in (min(found), max(found))


def grouped(records: Sequence[R]) -> list[list[R]]:
    """Records that can be compared: of one suite, data set, backbone and split; the newest group first."""
    groups: dict[Any, list[R]] = defaultdict(list)
    for record in records:
        split = record.split if isinstance(record, Record) else ""
        groups[(record.suite, split, record.data["hash"], record.backbone["name"], record.backbone["hash"])].append(
            record
        )
    return sorted(groups.values(), key=lambda group: max(r.started for r in group), reverse=True)


def is_search(group: Sequence[Record]) -> bool:
    """Whether a group of records is a search for learning rates."""
    return group[0].split != "test"


def findings(group: Sequence[Record]) -> Findings:
    """The findings of one group of comparable records; of a contender that was changed, its newest form counts."""
    warnings: list[str] = []
    by_name: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        by_name[record.contender].append(record)
    chosen: dict[str, tuple[Record, ...]] = {}
    for name, mine in by_name.items():
        newest = max(mine, key=lambda r: r.started).variant
        kept = {r.seed: r for r in sorted(mine, key=lambda r: r.started) if r.variant == newest}
        if any(r.variant != newest for r in mine):
            warnings.append(f"{name} was run with other settings before; only the newest are shown.")
        chosen[name] = tuple(kept[seed] for seed in sorted(kept))
    tables = {name: statistics.correct_table([r.predictions for r in c], c[0].labels) for name, c in chosen.items()}
    runs = statistics.run_variance(list(tables.values()))
    rows = [
        Row(
            name=name,
            method=c[0].method,
            baseline=c[0].baseline,
            records=c,
            accuracy=statistics.estimate(tables[name], c[0].groups, runs),
        )
        for name, c in chosen.items()
    ]
    rows.sort(key=lambda row: (-row.accuracy.mean, row.trainable))
    seeds = sorted(set.intersection(*(set(row.seeds) for row in rows)))
    everything = sorted(set.union(*(set(row.seeds) for row in rows)))
    if seeds != everything:
        lacking = ", ".join(row.name for row in rows if list(row.seeds) != everything)
        warnings.append(
            f"Not all seeds have been run: {lacking} lack some of {everything}. "
            f"Tests use the seeds that all have: {seeds or 'none'}."
        )
    if len(everything) == 1:
        warnings.append("One seed only: intervals and tests say nothing about other training runs.")
    machines = {
        (r.environment["processor"], r.environment["cores"], r.threads, r.jobs) for row in rows for r in row.records
    }
    if len(machines) > 1:
        warnings.append(
            "The records come from different machines, thread counts or numbers of cells at a time: times cannot be "
            "compared."
        )
    comparisons: list[Comparison] = []
    if seeds and len(rows) > 1:
        common = {row.name: tables[row.name][[i for i, seed in enumerate(row.seeds) if seed in seeds]] for row in rows}
        comparisons = statistics.compare_all(common, rows[0].records[0].groups)
    front = statistics.pareto({row.name: (float(row.trainable), row.accuracy.mean) for row in rows})
    return Findings(rows=tuple(rows), comparisons=tuple(comparisons), front=tuple(front), warnings=tuple(warnings))


def search(group: Sequence[Record]) -> Search:
    """Mean accuracy over seeds by contender and learning rate."""
    newest: dict[tuple[str, float, int], Record] = {}
    for record in sorted(group, key=lambda r: r.started):
        newest[(record.contender, record.learning_rate, record.seed)] = record
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (name, rate, _), record in newest.items():
        cells[name][rate].append(record.accuracy)
    means = {name: {rate: sum(v) / len(v) for rate, v in sorted(found.items())} for name, found in cells.items()}
    return Search(
        records=tuple(newest.values()),
        rates=tuple(sorted({rate for found in means.values() for rate in found})),
        accuracies=means,
    )


# In words -----------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A share as a percentage with one decimal, no sign."""
    return f"{100 * value:.1f}"


def points(estimate: Estimate) -> str:
    """A difference in percentage points with its interval."""
    ends = f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"
    return f"{100 * estimate.mean:+.1f} points, simultaneous 95 % interval {ends}"


def p_value(p: float) -> str:
    """A p value as a person writes it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def answer(found: Findings) -> list[str]:
    """The conclusion, a sentence each."""
    best, thrifty, tied = found.rows[0], found.thriftiest(), found.tied_with_best()
    sentences = [
        f"{best.name} has the highest mean accuracy, {percent(best.accuracy.mean)} ± "
        f"{percent(best.accuracy.half_width)} %, with {best.trainable:,} trainable parameters."
    ]
    if not found.comparisons:
        return [*sentences, "There is nothing to compare it with on common seeds."]
    others = [row.name for row in tied[1:]]
    if others:
        sentences.append(f"It cannot be told apart from {listed(others)}.")
    else:
        sentences.append("It is significantly better than every other contender.")
    if thrifty is best:
        sentences.append(
            f"Most accuracy for the fewest parameters: {best.name}; "
            + (
                "of those that cannot be told apart it also trains the fewest parameters."
                if others
                else "nothing with fewer parameters comes near it."
            )
        )
    else:
        comparison = found.between(best.name, thrifty.name)
        gap = (
            f"; the difference is {points(comparison.difference)}, so up to {100 * comparison.difference.high:.1f} "
            "points are not ruled out"
            if comparison
            else ""
        )
        share = thrifty.trainable / best.trainable
        sentences.append(
            f"Most accuracy for the fewest parameters: {thrifty.name}, {percent(thrifty.accuracy.mean)} ± "
            f"{percent(thrifty.accuracy.half_width)} % with {thrifty.trainable:,} trainable parameters, "
            f"{100 * share:.2g} % of those of {best.name}, from which these data cannot tell it apart{gap}."
        )
    return sentences


def verdicts(found: Findings) -> list[tuple[Row, list[str], list[str], list[str]]]:
    """For each row: the names it is significantly better than, those it cannot be told from, those better than it."""
    table = []
    for row in found.rows:
        better: list[str] = []
        same: list[str] = []
        worse: list[str] = []
        for other in found.rows:
            comparison = found.between(row.name, other.name)
            if other is row or comparison is None:
                continue
            if not comparison.significant():
                same.append(other.name)
            elif comparison.first == row.name:
                better.append(other.name)
            else:
                worse.append(other.name)
        table.append((row, better, same, worse))
    return table


def baseline_sentences(found: Findings) -> list[str]:
    """What can be said against each baseline."""
    sentences = []
    for base in (row for row in found.rows if row.baseline):
        better: list[str] = []
        same: list[str] = []
        worse: list[str] = []
        for row in found.rows:
            comparison = found.between(row.name, base.name)
            if row.baseline or comparison is None:
                continue
            if not comparison.significant():
                same.append(row.name)
            else:
                (better if comparison.first == row.name else worse).append(row.name)
        parts = []
        if better:
            parts.append(f"significantly better: {listed(better)}")
        if same:
            parts.append(f"cannot be told apart: {listed(same)}")
        if worse:
            parts.append(f"significantly worse: {listed(worse)}")
        if parts:
            sentences.append(f"Against {base.name} ({percent(base.accuracy.mean)} %): {'; '.join(parts)}.")
    return sentences
