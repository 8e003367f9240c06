"""Intervals that combine seeds and examples, paired tests on stored outcomes, Holm's correction.

The data of one method is a table: a row a seed, a column an example, a cell what the example adds to the seed's score,
such as 1 where the prediction was right; `tables.table` makes one for any metric. Seeds and examples are both samples,
of training runs and of texts; a statement about the method must hold for others of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from peftkit_bench.metrics import METRICS, Metric
from peftkit_bench.resampling import mcnemar, permutation_test
from peftkit_bench.runs import RunVariance, difference_variances, run_variances
from peftkit_bench.tables import Table

CONFIDENCE = 0.95
T_TEST = "t test"
MCNEMAR = "McNemar's test"
PERMUTATION = "permutation test"
_MEAN = METRICS["accuracy"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and examples with its uncertainty."""

    mean: float
    low: float
    high: float
    """Ends of the confidence interval."""
    standard_error: float
    degrees: float
    """Degrees of freedom of the t distribution."""
    seeds: int
    examples: int
    groups: int
    from_runs: float = 0.0
    """Part of the squared standard error that is due to runs; 0 with one seed, where it is unknown."""
    from_groups: float = 0.0
    """Part that is due to groups of examples."""
    interaction: float = 0.0
    """Variance of what one run adds to one group; both parts above hold it, divided by seeds · groups."""
    runs_degrees: float = 0.0
    """Degrees of freedom of the variance of runs; 0 with one seed."""

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two methods on the same examples."""

    first: str
    second: str
    difference: Estimate
    """First minus second, with a simultaneous interval."""
    p: float
    """Two-sided, before correction."""
    p_corrected: float
    """After Holm's correction over all comparisons that were made together."""
    test: str = T_TEST
    """Which test p is of: T_TEST, MCNEMAR or PERMUTATION."""
    higher_is_better: bool = True
    """Whether a positive difference speaks for the first."""

    @property
    def these_runs_only(self) -> bool:
        """Whether the test allows for other examples but not for other training runs: there was one seed."""
        return self.difference.seeds == 1

    def significant(self, level: float = 1 - CONFIDENCE) -> bool:
        """Whether the methods can be told apart."""
        return self.p_corrected < level

    def winner(self, level: float = 1 - CONFIDENCE) -> str | None:
        """The name of the better method; None where they cannot be told apart."""
        if not self.significant(level) or self.difference.mean == 0:
            return None
        return self.first if (self.difference.mean > 0) == self.higher_is_better else self.second


def estimate(
    table: Table,
    groups: Sequence[int] | None = None,
    runs: RunVariance | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The mean of a table with an interval for other seeds and other examples.

        V = v(runs) / S + s²(group means) / G - r / (S G),     mean ± t(df) √V

    v is the variance between training runs, s² the sample variance between groups of examples, r that of what one run
    adds to one group, which both hold part of and which counts once (Cameron, Gelbach & Miller 2011, clustering two
    ways); V is never below either of the two. df by Satterthwaite: V² / (a² / df(v) + b² / (G - 1)) with a, b the two
    terms, not below the smaller of df(v) and G - 1. Examples of one group (one source file) are not independent, so
    groups, not examples, are what varies: a group's value is the overall mean plus its summed deviations from it,
    divided by the mean group size, which makes groups of one example the examples themselves. With one seed and no v
    the first term is unknown and left out: the interval then holds for that run only.

    Args:
        table: (seeds, examples).
        groups: group of each example; None: each example is its own.
        runs: variance between runs, see `run_variances`; None: that of this table's own seeds.
    """
    seeds, examples = table.shape
    mean = float(table.mean())
    added = _by_group(table - table.mean(axis=1, keepdims=True), groups)
    count = added.shape[1]
    by_group = added.mean(axis=0)
    apart = (seeds - 1) * (count - 1)
    runs = runs or run_variances([table])[0]
    from_runs = runs.variance / seeds if runs else 0.0
    from_groups = float(by_group.var(ddof=1)) / count if count > 1 else 0.0
    interaction = float(np.square(added - by_group).sum()) / apart if apart else 0.0
    variance = max(from_runs, from_groups, from_runs + from_groups - interaction / (seeds * count))
    degrees = math.inf
    if variance > 0:
        below = from_runs**2 / runs.degrees if runs else 0.0
        below += from_groups**2 / (count - 1) if count > 1 else 0.0
        degrees = variance**2 / below
        if runs and count > 1:
            degrees = max(degrees, min(runs.degrees, count - 1))
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.5 + confidence / 2, degrees)) * error if error else 0.0
    return Estimate(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        standard_error=error,
        degrees=degrees,
        seeds=seeds,
        examples=examples,
        groups=count,
        from_runs=from_runs,
        from_groups=from_groups,
        interaction=interaction,
        runs_degrees=runs.degrees if runs else 0.0,
    )


def _by_group(deviations: Table, groups: Sequence[int] | None) -> Table:
    """(seeds, groups): deviations summed over the examples of each group, divided by the mean group size."""
    if groups is None:
        return deviations
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    count = int(numbers.max()) + 1
    sums = [np.bincount(numbers, weights=row, minlength=count) for row in deviations]
    found: Table = np.stack(sums) * (count / deviations.shape[1])
    return found


def paired_test(
    first: Table,
    second: Table,
    groups: Sequence[int] | None = None,
    runs: RunVariance | None = None,
    confidence: float = CONFIDENCE,
) -> tuple[Estimate, float]:
    """The difference of two methods, first minus second, and the two-sided p of there being none.

    Both tables hold the same examples and the same seeds in the same order; their difference is estimated as in
    `estimate`, and t = mean / √V is looked up with its degrees of freedom.

    Args:
        runs: variance of the difference between runs, see `difference_variances`; None: that of these two alone.

    Raises:
        ValueError: the tables differ in shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected tables of the same seeds and examples, found {first.shape} and {second.shape}")
    found = estimate(first - second, groups, runs, confidence)
    if found.standard_error == 0:
        return found, 1.0 if found.mean == 0 else 0.0
    return found, float(2 * stats.t.sf(abs(found.mean) / found.standard_error, found.degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number: the k-th smallest of m times m - k + 1, never falling, at most 1.

    Holm 1979, "A simple sequentially rejective multiple test procedure": keeps the chance of any false finding at the
    level, whatever the dependence.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    running = 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        corrected[index] = running
    return corrected


def compare_all(
    tables: Mapping[str, Table],
    groups: Sequence[int] | None = None,
    *,
    metric: Metric | None = None,
    counts: Mapping[str, Any] | None = None,
) -> list[Comparison]:
    """Every pair of methods, the better one first: variance between runs moderated, Holm's correction over all pairs.

    The intervals of the differences are simultaneous (Bonferroni: each at 1 - 0.05 / pairs), so that a pair that cannot
    be told apart never has an interval without zero.

    With one seed nothing is known of how runs vary: the test is then one of these runs, exact where t is not, and
    `Comparison.test` names it: McNemar's where all is right or wrong and each example its own group, else the
    permutation test. The intervals stay those of t, and may disagree with an exact test close to the edge.

    Args:
        tables: by method, of the same seeds and examples.
        groups: group of each example; None: each is its own.
        metric: what the tables are of; None: a mean, the higher the better.
        counts: (seeds, examples, k) by method: what the permutation test scores; None: the tables' own means.
    """
    higher = metric is None or metric.higher_is_better
    sign = 1 if higher else -1
    names = sorted(tables, key=lambda name: (-sign * tables[name].mean(), name))
    runs = difference_variances([tables[name] for name in names]) if len(names) > 1 else {}
    pairs = [(names[i], names[j]) for i, j in runs]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(pairs))
    found: list[tuple[Estimate, float, str]] = []
    for (a, b), variance in zip(pairs, runs.values(), strict=True):
        difference, p = paired_test(tables[a], tables[b], groups, variance, confidence)
        test = T_TEST
        if difference.seeds == 1 and metric is not None and counts is not None:
            p, test = run_test(metric, counts[a], counts[b], groups)
        elif difference.seeds == 1:
            p, test = run_test(_MEAN, tables[a][..., None], tables[b][..., None], groups)
        found.append((difference, p, test))
    corrected = holm([p for _, p, _ in found])
    return [
        Comparison(first=a, second=b, difference=each, p=p, p_corrected=q, test=test, higher_is_better=higher)
        for (a, b), (each, p, test), q in zip(pairs, found, corrected, strict=True)
    ]


def run_test(metric: Metric, first: Any, second: Any, groups: Sequence[int] | None = None) -> tuple[float, str]:
    """The two-sided p of two runs being equally good, and the name of the test: McNemar's or the permutation test.

    Args:
        metric: what is counted.
        first: counts (1, examples, k) of one run.
        second: counts of the other.
        groups: group of each example; None: each is its own.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    alone = groups is None or len(set(groups)) == one.shape[1]
    binary = metric.formula is _MEAN.formula and np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()
    if alone and binary:
        return mcnemar(one[0, :, 0], other[0, :, 0]).p, MCNEMAR
    return permutation_test(metric, one, other, groups).p, PERMUTATION


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other beats, cheapest first.

    Args:
        points: (cost, value) by name; a point is beaten by one that costs no more and is worth more, or costs less and
            is worth no less.
    """
    front: list[str] = []
    best = -math.inf
    for name in sorted(points, key=lambda n: (points[n][0], -points[n][1], n)):
        if points[name][1] > best:
            front.append(name)
            best = points[name][1]
    return front
