"""Records -> the verdict on two contenders: the paired test on every task that both were run on, and its power."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from peftkit_bench.metrics import METRICS, Counts, Metric
from peftkit_bench.power import Needed, needed
from peftkit_bench.ranking import wilcoxon
from peftkit_bench.record import AnyRecord, Record
from peftkit_bench.report.matching import CompareError, Pair, finals, pairs
from peftkit_bench.resampling import McNemar, mcnemar
from peftkit_bench.runs import difference_variances, run_variances
from peftkit_bench.statistics import (
    CONFIDENCE,
    T_TEST,
    Estimate,
    estimate,
    holm,
    paired_test,
    run_test,
)
from peftkit_bench.tables import table

FEWEST_TASKS = 6
"""With fewer tasks Wilcoxon's test cannot reach 5 %."""


@dataclass(frozen=True, kw_only=True)
class TaskVerdict:
    """Two contenders on one task, at one budget."""

    suite: str
    data: str
    backbone: str
    metric: str
    budget: int | None
    """Trainable parameters that sizes were solved for; None: sizes of their own."""
    names: tuple[str, str]
    """The two, with a budget where theirs differ."""
    parameters: tuple[int, int]
    """Trainable parameters of each, the head left out."""
    seeds: tuple[int, ...]
    scores: tuple[Estimate, Estimate]
    difference: Estimate
    """Of the scores, first minus second, whichever is better."""
    contenders: int
    """Contenders whose runs say how much runs vary."""
    test: str
    p: float
    """Two-sided."""
    p_corrected: float
    """After Holm's correction over the tasks and budgets of the verdict."""
    needed: Needed
    runs: tuple[tuple[int, McNemar], ...]
    """For accuracy: McNemar's test of the two runs of each seed; it takes examples as independent."""
    notes: tuple[str, ...]

    @property
    def advantage(self) -> int:
        """1: the first is better, -1: the second, 0: they cannot be told apart."""
        if self.p_corrected >= 1 - CONFIDENCE or self.difference.mean == 0:
            return 0
        return 1 if (self.difference.mean > 0) == METRICS[self.metric].higher_is_better else -1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Two contenders on every task that both were run on."""

    first: str
    second: str
    tasks: tuple[TaskVerdict, ...]
    over_tasks: float | None
    """p of Wilcoxon's test over tasks; None: fewer than FEWEST_TASKS, or not all measured in one unit."""

    def count(self, advantage: int) -> int:
        """On how many tasks the first is better (1), worse (-1), not to be told apart (0)."""
        return sum(task.advantage == advantage for task in self.tasks)


def compare(
    records: Iterable[AnyRecord], first: str, second: str, *, suite: str | None = None, budget: int | None = None
) -> Verdict:
    """What the records say of two contenders.

    Seeds that both have are compared on the stored outcomes of the test split, in each contender's newest form. The
    variance between runs is moderated by that of all contenders that were run beside them, as in the report.

    Args:
        records: of one or more folders.
        first: a contender's name.
        second: another's.
        suite: leaves other suites out.
        budget: leaves other budgets out.

    Raises:
        RecordError: a contender is not there, the two cannot be compared, or predictions cannot be read.
    """
    found = finals(records)
    if suite is not None:
        names = sorted({r.suite for r in found})
        found = [r for r in found if r.suite == suite]
        if not found:
            raise CompareError(f"expected one of the suites {', '.join(names)}, found {suite!r}")
    tasks = [_task(pair) for pair in pairs(found, first, second, budget)]
    corrected = holm([task.p for task in tasks])
    return Verdict(
        first=tasks[0].names[0] if len(tasks) == 1 else first,
        second=tasks[0].names[1] if len(tasks) == 1 else second,
        tasks=tuple(dataclasses.replace(t, p_corrected=p) for t, p in zip(tasks, corrected, strict=True)),
        over_tasks=_over_tasks(tasks),
    )


def _task(pair: Pair) -> TaskVerdict:
    metric = _metric(pair.first[0])
    counts, groups = _outcomes(pair)
    tables = [table(metric, each) for each in counts]
    beside = [np.array([[r.score] for r in other]) for other in pair.others]
    runs = run_variances([*tables, *beside])
    means = [each.mean(axis=1, keepdims=True) for each in tables]
    difference, p = paired_test(tables[0], tables[1], groups, difference_variances([*means, *beside])[0, 1])
    test = T_TEST
    if len(pair.first) == 1:
        p, test = run_test(metric, counts[0], counts[1], groups)
    apart = (pair.first[0].budget, pair.second[0].budget)
    named = pair.budget is None and pair.first[0].contender == pair.second[0].contender
    return TaskVerdict(
        suite=pair.first[0].suite,
        data=pair.first[0].data["name"],
        backbone=pair.first[0].backbone["name"],
        metric=metric.name,
        budget=pair.budget,
        names=(
            f"{pair.first[0].contender} at {apart[0]:,}" if named else pair.first[0].contender,
            f"{pair.second[0].contender} at {apart[1]:,}" if named else pair.second[0].contender,
        ),
        parameters=(pair.first[0].adapter_parameters, pair.second[0].adapter_parameters),
        seeds=tuple(r.seed for r in pair.first),
        scores=(estimate(tables[0], groups, runs[0]), estimate(tables[1], groups, runs[1])),
        difference=difference,
        contenders=2 + len(beside),
        test=test,
        p=p,
        p_corrected=p,
        needed=needed(difference),
        runs=_each_run(metric, pair, counts),
        notes=pair.notes,
    )


def _metric(found: Record) -> Metric:
    if found.metric not in METRICS:
        raise CompareError(
            f"record {found.key} was scored by {found.metric!r}; this version knows {', '.join(METRICS)}; "
            "read it with the version of peftkit that wrote it"
        )
    return METRICS[found.metric]


def _outcomes(pair: Pair) -> tuple[tuple[Counts, Counts], list[int]]:
    """The counts of both, (seeds, examples, k), and the group of each example, which all records share."""
    read = [[(each, each.read_outcomes()) for each in side] for side in (pair.first, pair.second)]
    known, shared = read[0][0][0], list(read[0][0][1].groups)
    for each, found in (*read[0], *read[1]):
        if list(found.groups) != shared or len(found.counts) != len(shared):
            raise CompareError(
                f"the predictions of {each.contender}, seed {each.seed}, and of {known.contender}, seed {known.seed}, "
                "are of other examples although their data have one hash; run one of them again"
            )
    first, second = (np.asarray([found.counts for _, found in side], dtype=np.float64) for side in read)
    return (first, second), shared


def _each_run(metric: Metric, pair: Pair, counts: Sequence[Counts]) -> tuple[tuple[int, McNemar], ...]:
    if metric.name != "accuracy":
        return ()
    return tuple(
        (r.seed, mcnemar(ours[:, 0], theirs[:, 0]))
        for r, ours, theirs in zip(pair.first, counts[0], counts[1], strict=True)
    )


def _over_tasks(tasks: Sequence[TaskVerdict]) -> float | None:
    """Wilcoxon's p over tasks, each task's mean over its budgets; None where it would say nothing."""
    means: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        sign = 1 if METRICS[task.metric].higher_is_better else -1
        means.setdefault((task.data, task.backbone), []).append(sign * task.difference.mean)
    if len(means) < FEWEST_TASKS or len({METRICS[task.metric].percent for task in tasks}) > 1:
        return None
    values = [sum(each) / len(each) for each in means.values()]
    return wilcoxon(values, [0.0] * len(values))
