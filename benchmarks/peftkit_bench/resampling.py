"""Exact tests and resampling on stored outcomes: McNemar, paired permutation, the bootstrap over seeds and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from peftkit_bench.metrics import Metric
from peftkit_bench.tables import scores, shaped, table

Numbers = NDArray[np.float64]
CELLS = 4_000_000
"""Numbers that are held at a time while resampling."""


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two runs on the same examples: where one is right and the other wrong."""

    first_only: int
    second_only: int
    p: float
    """Two-sided, exact."""


def mcnemar(right_a: Any, right_b: Any) -> McNemar:
    """Whether two runs are right equally often: the exact binomial test of the examples on which they differ.

        p = min(1, 2 P(X ≤ min(b, c))),   X ~ Binomial(b + c, 1/2)

    with b and c how often only the first and only the second run is right; 1 where they never differ. It speaks of
    these two runs; examples must be independent.

    Args:
        right_a: (examples,) truth values.
        right_b: the same examples in the same order.

    Raises:
        ValueError: the two differ in shape, or hold something else than 0 and 1.

    Source: Agresti 2013, "Categorical Data Analysis", section 11.1.
    """
    first, second = np.asarray(right_a), np.asarray(right_b)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"expected two runs of the same examples, found shapes {first.shape} and {second.shape}")
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("expected 0 or 1 for each example, found other numbers; McNemar's test is for right and wrong")
    only_first = int(np.sum((first == 1) & (second == 0)))
    only_second = int(np.sum((first == 0) & (second == 1)))
    p = 2 * stats.binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)
    return McNemar(first_only=only_first, second_only=only_second, p=min(1.0, float(p)))


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """A paired permutation test."""

    difference: float
    """Of the scores, first minus second, each the mean over seeds."""
    p: float
    """Two-sided."""
    rounds: int


def permutation_test(
    metric: Metric,
    counts_a: Any,
    counts_b: Any,
    groups: Sequence[int] | None = None,
    rounds: int = 9999,
    seed: int = 0,
) -> Permuted:
    """Whether it matters which of two methods a prediction is credited to: the paired randomisation test.

    Each round swaps the outcomes of the two for a random half of the groups, all seeds of a group together, and scores
    both again; p = (b + 1) / (m + 1), with b of m rounds in which the difference is at least as large as that found.
    It speaks of these runs: other examples, not other seeds, are what it allows for.

    Args:
        metric: gives the score.
        counts_a: (seeds, examples, k).
        counts_b: the same examples in the same order; seeds may be other in number.
        groups: group of each example; None: each is its own.
        rounds: m.
        seed: of the rounds.

    Source: Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; Yeh 2000 for F1.
    """
    first, second = shaped(metric, counts_a), shaped(metric, counts_b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"expected the same examples, found {first.shape[1]} and {second.shape[1]} of them")
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"expected the same seeds, found {first.shape[0]} and {second.shape[0]} of them")
    sums_a, sums_b = _sums(first, groups), _sums(second, groups)
    count, seeds, width = sums_a.shape
    examples = first.shape[1]
    swap = (sums_b - sums_a).reshape(count, -1)
    total_a, total_b = sums_a.sum(axis=0).ravel(), sums_b.sum(axis=0).ravel()

    def difference(moved: Numbers) -> Numbers:
        ours = ((total_a + moved) / examples).reshape(-1, seeds, width)
        theirs = ((total_b - moved) / examples).reshape(-1, seeds, width)
        found: Numbers = np.asarray(metric.formula(ours) - metric.formula(theirs)).mean(axis=1)
        return found

    observed = float(difference(np.zeros((1, seeds * width)))[0])
    # Rounding must not decide whether a round that only renames the two counts as large as what was found.
    limit = abs(observed) * (1 - 1e-9) - 1e-12
    rng = np.random.default_rng(seed)
    reached = 0
    for size in _pieces(rounds, count):
        chosen = rng.integers(0, 2, size=(size, count), dtype=np.int8).astype(np.float64)
        reached += int(np.sum(np.abs(difference(chosen @ swap)) >= limit))
    return Permuted(difference=observed, p=(reached + 1) / (rounds + 1), rounds=rounds)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A bootstrap interval."""

    score: float
    """Of the data themselves, or the difference of two scores."""
    low: float
    high: float
    rounds: int


def bootstrap(
    metric: Metric,
    counts: Any,
    groups: Sequence[int] | None = None,
    *,
    rounds: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    corrected: bool = False,
) -> Interval:
    """The score over seeds, with an interval from drawing seeds and groups again, each with replacement.

    A few seeds drawn from themselves vary less than seeds do, by (S - 1) / S: with three of them the interval is
    narrower than its confidence says where seeds are what varies; `statistics.estimate` has no such fault.

    Args:
        metric: gives the score.
        counts: (seeds, examples, k).
        groups: group of each example; None: each is its own.
        rounds: draws.
        seed: of the draws.
        confidence: of the interval.
        corrected: BCa, which moves the ends for bias and skew, instead of plain percentiles.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", sections 13.3 and 14.3.
    """
    found = shaped(metric, counts)
    return _interval(metric, (found,), groups, rounds, seed, confidence, corrected)


def paired_bootstrap(
    metric: Metric,
    counts_a: Any,
    counts_b: Any,
    groups: Sequence[int] | None = None,
    *,
    rounds: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    corrected: bool = False,
) -> Interval:
    """The difference of two methods' scores, first minus second: both are given the same draws of seeds and groups.

    Args:
        metric: gives the score.
        counts_a: (seeds, examples, k).
        counts_b: the same seeds and examples in the same order.
        groups: as in `bootstrap`.
        rounds: as in `bootstrap`.
        seed: as in `bootstrap`.
        confidence: as in `bootstrap`.
        corrected: as in `bootstrap`.
    """
    first, second = shaped(metric, counts_a), shaped(metric, counts_b)
    if first.shape != second.shape:
        raise ValueError(f"expected counts of the same seeds and examples, found {first.shape} and {second.shape}")
    return _interval(metric, (first, second), groups, rounds, seed, confidence, corrected)


def _interval(
    metric: Metric,
    sides: tuple[Numbers, ...],
    groups: Sequence[int] | None,
    rounds: int,
    seed: int,
    confidence: float,
    corrected: bool,
) -> Interval:
    seeds, examples, width = sides[0].shape
    sums = np.stack([_sums(side, groups) for side in sides], axis=1)
    count = sums.shape[0]
    flat = np.concatenate([sums.reshape(count, -1), _sizes(examples, groups)[:, None]], axis=1)
    rng = np.random.default_rng(seed)
    drawn: list[Numbers] = []
    for size in _pieces(rounds, count):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        totals = weights @ flat
        means = (totals[:, :-1] / totals[:, -1:]).reshape(size, len(sides), seeds, width)
        by_seed = np.asarray(metric.formula(means))
        values = by_seed[:, 0] - by_seed[:, 1] if len(sides) == 2 else by_seed[:, 0]
        drawn.append(np.take_along_axis(values, rng.integers(0, seeds, size=(size, seeds)), axis=1).mean(axis=1))
    found = np.concatenate(drawn)
    each = [float(scores(metric, side).mean()) for side in sides]
    score = each[0] - each[1] if len(sides) == 2 else each[0]
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if corrected:
        tables = [table(metric, side).mean(axis=0)[None, :] for side in sides]
        values = tables[0] - tables[1] if len(sides) == 2 else tables[0]
        tails = _moved(tails, found, score, _sums(values[..., None] - score, groups)[:, 0, 0])
    low, high = np.quantile(found, tails)
    return Interval(score=score, low=float(low), high=float(high), rounds=rounds)


def _moved(tails: Numbers, found: Numbers, score: float, added: Numbers) -> Numbers:
    """The levels at which BCa reads the percentiles, from the draws' bias and the jackknife's skew.

    Args:
        tails: the levels asked for.
        found: the draws.
        score: of the data.
        added: what each group adds to the score.
    """
    below = (np.sum(found < score) + 0.5 * np.sum(found == score)) / len(found)
    spread = float(np.square(added).sum()) ** 1.5
    if not 0 < below < 1 or not spread:
        return tails
    bias = stats.norm.ppf(below)
    skew = float((added**3).sum()) / (6 * spread)
    shifted = bias + stats.norm.ppf(tails)
    moved: Numbers = stats.norm.cdf(bias + shifted / (1 - skew * shifted))
    return moved


def _sums(counts: Numbers, groups: Sequence[int] | None) -> Numbers:
    """(groups, seeds, k): counts summed over the examples of each group.

    Raises:
        ValueError: not every example has a group.
    """
    by_example = np.swapaxes(counts, 0, 1)
    if groups is None:
        return by_example
    if len(groups) != counts.shape[1]:
        raise ValueError(f"expected a group for each of {counts.shape[1]} examples, found {len(groups)}")
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    found = np.zeros((len(names), *by_example.shape[1:]))
    np.add.at(found, numbers, by_example)
    return found


def _sizes(examples: int, groups: Sequence[int] | None) -> Numbers:
    """Examples of each group."""
    if groups is None:
        return np.ones(examples)
    return np.unique(np.asarray(groups), return_counts=True)[1].astype(np.float64)


def _pieces(rounds: int, width: int) -> list[int]:
    """Rounds split so that each piece holds CELLS numbers at most."""
    size = max(1, min(rounds, CELLS // max(1, width)))
    return [min(size, rounds - start) for start in range(0, rounds, size)]
