"""Intervals that combine seeds and examples, paired tests on stored predictions, Holm's correction.

The data of one method is a table: a row a seed, a column an example, a cell 1 where the prediction was right. Seeds and
examples are both samples, of training runs and of texts; a statement about the method must hold for others of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Table = NDArray[np.float64]
"""(seeds, examples)."""
CONFIDENCE = 0.95


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

    def significant(self, level: float = 1 - CONFIDENCE) -> bool:
        """Whether the methods can be told apart."""
        return self.p_corrected < level


def correct_table(predictions: Sequence[Sequence[int]], labels: Sequence[int]) -> Table:
    """1 where a prediction equals the label, else 0; (seeds, examples)."""
    right: Table = np.equal(np.asarray(predictions), np.asarray(labels)[None, :]).astype(np.float64)
    return right


@dataclass(frozen=True, kw_only=True)
class RunVariance:
    """How much the accuracy of one training run varies with its seed."""

    variance: float
    degrees: float
    """Degrees of freedom of the estimate."""


def run_variance(tables: Sequence[Table]) -> RunVariance | None:
    """The variance of a seed's mean about its method's, pooled over methods; None where each has one seed.

    A few seeds say little about the spread of each method by itself; together they say how much training varies here.
    """
    squares = sum(float(np.square(table.mean(axis=1) - table.mean()).sum()) for table in tables)
    degrees = sum(table.shape[0] - 1 for table in tables)
    return RunVariance(variance=squares / degrees, degrees=degrees) if degrees else None


def difference_variance(tables: Sequence[Table]) -> RunVariance | None:
    """The variance of the difference of two methods' means on one seed, pooled over all pairs; None with one seed.

    Twice the residual mean square of methods × seeds: what a seed does to all methods alike cancels in a difference.
    """
    means = np.stack([table.mean(axis=1) for table in tables])
    methods, seeds = means.shape
    degrees = (methods - 1) * (seeds - 1)
    if not degrees:
        return None
    residuals = means - means.mean(axis=1, keepdims=True) - means.mean(axis=0, keepdims=True) + means.mean()
    return RunVariance(variance=2 * float(np.square(residuals).sum()) / degrees, degrees=degrees)


def estimate(
    table: Table,
    groups: Sequence[int] | None = None,
    runs: RunVariance | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The mean of a table with an interval for other seeds and other examples.

        V = v(runs) / S + s²(group means) / G,     mean ± t(df) √V

    v is the variance between training runs, s² the sample variance between examples. Each also holds part of what
    the other does, which is so counted twice: the interval errs on the wide side. df by Satterthwaite:
    V² / (a²/df(v) + b²/(G-1)) with a, b the two terms. Examples of one group (one source file) are not independent, so
    groups, not examples, are what varies: a group's value is the overall mean plus its summed deviations from it,
    divided by the mean group size, which makes groups of one example the examples themselves. With one seed and no v
    the first term is unknown and left out: the interval then holds for that run only.

    Args:
        table: (seeds, examples).
        groups: group of each example; None: each example is its own.
        runs: variance between runs, pooled over methods; None: that of this table's own seeds.
    """
    seeds, examples = table.shape
    mean = float(table.mean())
    _, numbers = np.unique(np.arange(examples) if groups is None else np.asarray(groups), return_inverse=True)
    count = int(numbers.max()) + 1
    deviations = np.zeros(count)
    np.add.at(deviations, numbers, table.mean(axis=0) - mean)
    by_group = deviations * count / examples
    runs = runs or run_variance([table])
    from_runs = runs.variance / seeds if runs else 0.0
    from_groups = float(by_group.var(ddof=1)) / count if count > 1 else 0.0
    variance = from_runs + from_groups
    degrees = math.inf
    if variance > 0:
        below = from_runs**2 / runs.degrees if runs else 0.0
        below += from_groups**2 / (count - 1) if count > 1 else 0.0
        degrees = variance**2 / below
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
    )


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
        runs: variance of the difference between runs; None: that of these two alone.

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


def compare_all(tables: dict[str, Table], groups: Sequence[int] | None = None) -> list[Comparison]:
    """Every pair of methods, the better one first: variance between runs pooled, Holm's correction over all pairs.

    The intervals of the differences are simultaneous (Bonferroni: each at 1 - 0.05 / pairs), so that a pair that cannot
    be told apart never has an interval without zero.
    """
    names = sorted(tables, key=lambda name: (-tables[name].mean(), name))
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    runs = difference_variance(list(tables.values()))
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(pairs))
    tested = [paired_test(tables[a], tables[b], groups, runs, confidence) for a, b in pairs]
    corrected = holm([p for _, p in tested])
    return [
        Comparison(first=a, second=b, difference=difference, p=p, p_corrected=q)
        for (a, b), (difference, p), q in zip(pairs, tested, corrected, strict=True)
    ]


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
