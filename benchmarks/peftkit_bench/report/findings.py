"""Records -> findings: one row a contender and budget, every pair at a budget tested, the Pareto front over all."""

from __future__ import annotations

import statistics as median_of
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from peftkit_bench import statistics
from peftkit_bench.metrics import METRICS, Counts, Metric
from peftkit_bench.record import MergeRecord, Record, RecordError, digest
from peftkit_bench.report.matching import Key, newest_forms, short_count
from peftkit_bench.report.tuning import Tuning, tunings
from peftkit_bench.runs import run_variances
from peftkit_bench.statistics import Comparison, Estimate
from peftkit_bench.tables import Table, table

R = TypeVar("R", Record, MergeRecord)

SAME_SIZE = 1.05
"""Parameter counts within this factor count as the same size."""
NEAR = 0.1
"""A size within this share of the budget counts as at the budget."""
FEWEST_SEEDS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One contender at one budget, over its seeds."""

    contender: str
    name: str
    """The contender, and its budget where there are several."""
    records: tuple[Record, ...]
    score: Estimate
    counts: Counts = field(repr=False)
    """(seeds, examples, k): what the metric counts of each example."""
    table: Table = field(repr=False)
    """(seeds, examples), its mean over examples the score of a seed."""

    @property
    def first(self) -> Record:
        """A record for what all seeds share."""
        return self.records[0]

    @property
    def budget(self) -> int | None:
        """What the size was solved for; None: the size is the method's own."""
        return self.first.budget if self.first.knob is not None else None

    @property
    def baseline(self) -> bool:
        """Whether it is a mark to compare with."""
        return self.first.baseline

    @property
    def parameters(self) -> int:
        """Trainable parameters of the method, the head left out."""
        return self.first.adapter_parameters

    @property
    def final_parameters(self) -> int:
        """The most that any seed kept of them."""
        return max(record.final_parameters for record in self.records)

    @property
    def trainable(self) -> int:
        """Trainable parameters, the head included."""
        return self.parameters + self.first.head_parameters

    @property
    def off_budget(self) -> bool:
        """Whether the nearest size is further from the budget than a tenth of it."""
        return self.budget is not None and abs(self.parameters - self.budget) > NEAR * self.budget

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that were run, ascending."""
        return tuple(record.seed for record in self.records)

    def values(self, name: str) -> list[float]:
        """A measurement for each seed where it was taken."""
        found = [getattr(record, name) for record in self.records]
        return [float(value) for value in found if value is not None]

    def median(self, name: str) -> float | None:
        """The median of a measurement over seeds; None where it was not taken."""
        found = self.values(name)
        return median_of.median(found) if found else None

    @property
    def forgotten(self) -> float | None:
        """Nats a token that general text became harder to predict, median over seeds; None where not recorded."""
        found = [f["after"] - f["before"] for record in self.records if (f := record.forgetting)]
        return median_of.median(found) if found else None

    @property
    def size(self) -> str:
        """The solved field and its value, such as "r = 8"; "" where nothing was solved."""
        knob = self.first.knob
        return f"{knob} = {self.first.config[knob]}" if knob is not None else ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Contest:
    """The contenders at one budget, those of a size of their own among them."""

    budget: int | None
    metric: Metric
    rows: tuple[Row, ...]
    """Best first."""
    seeds: tuple[int, ...]
    """Those that all rows have."""
    comparisons: tuple[Comparison, ...]
    """All pairs of contenders over the common seeds, the better one first."""

    def row(self, name: str) -> Row:
        """The row of a contender."""
        return next(row for row in self.rows if row.contender == name)

    def between(self, one: str, other: str) -> Comparison | None:
        """The comparison of two contenders, whichever stands first; None where seeds do not allow one."""
        return next((c for c in self.comparisons if {c.first, c.second} == {one, other}), None)

    def tied_with_best(self) -> list[Row]:
        """The best row and those that cannot be told from it."""
        best = self.rows[0]
        found = [best]
        for row in self.rows[1:]:
            comparison = self.between(best.contender, row.contender)
            if comparison is None or not comparison.significant():
                found.append(row)
        return found

    def thriftiest(self) -> Row:
        """Among those that cannot be told from the best: the fewest trainable parameters.

        Sizes within SAME_SIZE of the fewest, such as one budget solved for several methods, count as equal; among them
        the best.
        """
        tied = self.tied_with_best()
        fewest = min(row.trainable for row in tied)
        return next(row for row in tied if row.trainable <= SAME_SIZE * fewest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """A comparison on one task, data set, backbone and split."""

    metric: Metric
    rows: tuple[Row, ...]
    """Best first, over all budgets."""
    contests: tuple[Contest, ...]
    """By budget, ascending; one without a budget where nothing was solved for one."""
    front: tuple[str, ...]
    """Names of rows that no other beats in both score and parameters, fewest parameters first."""
    contenders: tuple[str, ...]
    """In the order of the records."""
    groups: Sequence[int]
    """Of the examples."""
    tunings: tuple[Tuning, ...]
    """The searches for learning rates beside the comparison, in the order of the records."""
    warnings: tuple[str, ...]

    @property
    def first(self) -> Record:
        """A record for what all of them share."""
        return self.rows[0].first

    @property
    def budgets(self) -> list[int]:
        """Those that something was solved for, ascending."""
        return [contest.budget for contest in self.contests if contest.budget is not None]

    @property
    def examples(self) -> int:
        """On the split that was predicted."""
        return self.rows[0].score.examples

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def curves(self) -> dict[str, list[Row]]:
        """The rows of each contender, ascending in parameters, in the order of the records."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.contender].append(row)
        return {name: sorted(found[name], key=lambda row: row.parameters) for name in self.contenders}


def kind_of(found: Record | MergeRecord) -> tuple[Any, ...]:
    """What two records share that can stand in one comparison."""
    backbone = (found.backbone["name"], found.backbone["hash"])
    if isinstance(found, MergeRecord):
        return (found.suite, found.data["hash"], *backbone)
    return (found.suite, found.data["hash"], *backbone, digest(found.task), found.metric)


def grouped(records: Iterable[R]) -> list[list[R]]:
    """Records that belong together: of one suite, data set, backbone, task and metric; the newest group first."""
    groups: dict[Any, list[R]] = defaultdict(list)
    for each in records:
        groups[kind_of(each)].append(each)
    return sorted(groups.values(), key=lambda group: max(r.started for r in group), reverse=True)


def metric_of(found: Record) -> Metric:
    """The metric of a record.

    Raises:
        RecordError: this version does not know it.
    """
    if found.metric not in METRICS:
        raise RecordError(
            f"record {found.key} was scored by {found.metric!r}; this version knows {', '.join(METRICS)}; "
            "read it with the version of peftkit that wrote it"
        )
    return METRICS[found.metric]


def findings(group: Sequence[Record]) -> Findings:
    """The findings of one group; of a contender that was changed, its newest form counts.

    Raises:
        RecordError: the predictions of a record cannot be read, or do not fit those of the others.
    """
    finals = [r for r in group if r.phase == "final"]
    metric = metric_of(finals[0])
    chosen, warnings = _newest(finals)
    counts, example_groups = _counts(chosen)
    tables = {key: table(metric, found) for key, found in counts.items()}
    runs = dict(zip(tables, run_variances(list(tables.values())), strict=True))
    names = _names(chosen)
    sign = 1 if metric.higher_is_better else -1
    rows = [
        Row(
            contender=key[0],
            name=names[key],
            records=records,
            score=statistics.estimate(tables[key], example_groups, runs[key]),
            counts=counts[key],
            table=tables[key],
        )
        for key, records in chosen.items()
    ]
    rows.sort(key=lambda row: (-sign * row.score.mean, row.trainable))
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    contests = [
        _contest(metric, budget, [row for row in rows if row.budget in (None, budget)], example_groups)
        for budget in (budgets or (None,))
    ]
    searched = tunings(group, metric.higher_is_better)
    front = statistics.pareto({row.name: (float(row.trainable), sign * row.score.mean) for row in rows})
    return Findings(
        metric=metric,
        rows=tuple(rows),
        contests=tuple(contests),
        front=tuple(front),
        contenders=tuple(dict.fromkeys(contender for contender, _ in chosen)),
        groups=example_groups,
        tunings=tuple(searched),
        warnings=(*warnings, *_doubts(rows, contests, searched)),
    )


def _newest(finals: Sequence[Record]) -> tuple[dict[Key, tuple[Record, ...]], list[str]]:
    """The records of each contender and budget in its newest form, by ascending seed; and what was left out.

    A contender whose size is solved now and was its own before, or the other way round, has no rows of before.
    """
    forms, older = newest_forms(finals)
    solved = {r.contender: r.knob is not None for r in sorted(finals, key=lambda r: r.started)}
    chosen = {key: found for key, found in forms.items() if solved[key[0]] == (key[1] is not None)}
    changed = dict.fromkeys(key[0] for key in forms if key not in chosen or key[0] in older)
    return chosen, [f"{name} was run with other settings before; only the newest are shown." for name in changed]


def _names(chosen: Iterable[Key]) -> dict[Key, str]:
    """A name for each row: the contender's, and the budget where it has several."""
    budgets = {budget for _, budget in chosen if budget is not None}
    if len(budgets) < 2:
        return {key: key[0] for key in chosen}
    short = {budget: short_count(budget) for budget in budgets}
    twice = {text for text, times in Counter(short.values()).items() if times > 1}
    shown = {budget: f"{budget:,}" if text in twice else text for budget, text in short.items()}
    return {key: key[0] if key[1] is None else f"{key[0]}, {shown[key[1]]}" for key in chosen}


def _counts(chosen: dict[Key, tuple[Record, ...]]) -> tuple[dict[Key, Counts], Sequence[int]]:
    """The counts of each row, and the groups that the examples of all of them have."""
    made: dict[Key, Counts] = {}
    shared: tuple[Record, list[int]] | None = None
    for key, records in chosen.items():
        counts = []
        for each in records:
            found = each.read_outcomes()
            shared = shared or (each, list(found.groups))
            if list(found.groups) != shared[1] or len(found.counts) != len(found.groups):
                raise RecordError(
                    f"the predictions of {each.contender}, seed {each.seed}, and of {shared[0].contender}, seed "
                    f"{shared[0].seed}, are of other examples although their data have one hash; run one of them again"
                )
            counts.append(found.counts)
        made[key] = np.asarray(counts, dtype=np.float64)
    assert shared is not None
    return made, shared[1]


def _contest(metric: Metric, budget: int | None, rows: Sequence[Row], groups: Sequence[int]) -> Contest:
    seeds = sorted(set.intersection(*(set(row.seeds) for row in rows)))
    comparisons: list[Comparison] = []
    if seeds and len(rows) > 1:
        comparisons = statistics.compare_all(
            {row.contender: row.table[lines(row, seeds)] for row in rows},
            groups,
            metric=metric,
            counts={row.contender: row.counts[lines(row, seeds)] for row in rows},
        )
    return Contest(budget=budget, metric=metric, rows=tuple(rows), seeds=tuple(seeds), comparisons=tuple(comparisons))


def lines(row: Row, seeds: Sequence[int]) -> list[int]:
    """Where the seeds stand in a row's table, in their order."""
    return [row.seeds.index(seed) for seed in seeds]


def _doubts(rows: Sequence[Row], contests: Sequence[Contest], searched: Sequence[Tuning]) -> list[str]:
    """What weakens the comparison."""
    found: list[str] = []
    common = set.intersection(*(set(row.seeds) for row in rows))
    everything = sorted(set.union(*(set(row.seeds) for row in rows)))
    if set(everything) != common:
        lacking = ", ".join(row.name for row in rows if list(row.seeds) != everything)
        used = sorted({contest.seeds for contest in contests})
        shown = "; ".join(str(list(seeds)) if seeds else "none" for seeds in used)
        found.append(
            f"Not all seeds have been run: {lacking} lack some of {everything}. "
            f"Tests use the seeds that all have: {shown}."
        )
    if len(everything) == 1:
        found.append("One seed only: intervals and tests say nothing about other training runs.")
    elif len(everything) < FEWEST_SEEDS:
        found.append(
            f"Fewer than {FEWEST_SEEDS} seeds: how much training runs differ is hardly known, and the intervals are "
            "wide."
        )
    records = [r for row in rows for r in row.records]
    stamps = ("processor", "cores", "device")
    machines = {
        (*(r.environment.get(stamp) for stamp in stamps), str(r.environment.get("compiled")), r.threads, r.jobs)
        for r in records
    }
    if len(machines) > 1:
        found.append(
            "The records come from different machines, thread counts, numbers of cells at a time or compiled "
            "operations: times cannot be compared."
        )
    if any(r.jobs > 1 for r in records):
        most = max(r.jobs for r in records)
        found.append(f"Up to {most} cells ran at the same time: times are less exact than those of one at a time.")
    shown_rows = {(row.contender, row.budget) for row in rows}
    edges = list(dict.fromkeys(t.contender for t in searched if (t.contender, t.budget) in shown_rows and t.at_edge()))
    if edges:
        found.append(
            f"The chosen learning rate is the lowest or the highest that was tried, extensions of the grid included: "
            f"{', '.join(edges)}. A better one may lie beyond."
        )
    return found
