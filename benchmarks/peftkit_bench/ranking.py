"""Several tasks: wins, ties and losses, Friedman's test with Nemenyi's critical difference, Wilcoxon's signed ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from peftkit_bench.statistics import Comparison


@dataclass(frozen=True, kw_only=True)
class Tally:
    """On how many tasks one method did better than another."""

    wins: int
    """Tasks on which the first is significantly better."""
    ties: int
    """Tasks on which the two cannot be told apart."""
    losses: int

    @property
    def tasks(self) -> int:
        """Tasks on which both were compared."""
        return self.wins + self.ties + self.losses


def win_tie_loss(tasks: Mapping[str, Sequence[Comparison]], level: float = 0.05) -> dict[tuple[str, str], Tally]:
    """For each ordered pair of methods: on how many tasks the first is better, not to be told apart, worse.

    Args:
        tasks: the comparisons of each task, as `compare_all` gives them: corrected within the task.
        level: of the corrected p.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for comparison in itertools.chain.from_iterable(tasks.values()):
        winner = comparison.winner(level)
        for pair in ((comparison.first, comparison.second), (comparison.second, comparison.first)):
            place = 1 if winner is None else 0 if winner == pair[0] else 2
            found.setdefault(pair, [0, 0, 0])[place] += 1
    return {pair: Tally(wins=w, ties=t, losses=n) for pair, (w, t, n) in found.items()}


@dataclass(frozen=True, kw_only=True)
class Friedman:
    """Whether methods rank alike over tasks."""

    methods: tuple[str, ...]
    """Best average rank first."""
    ranks: tuple[float, ...]
    """Average rank of each over the blocks; 1 is best."""
    blocks: int
    chi_squared: float
    f: float
    """Iman and Davenport's F; infinite where all blocks agree."""
    p: float
    critical_difference: float
    """Average ranks that differ by less cannot be told apart (Nemenyi, at `level`)."""
    level: float

    @property
    def cliques(self) -> tuple[tuple[str, ...], ...]:
        """Groups of two and more neighbours in rank that cannot be told apart, none within another."""
        found: list[tuple[int, int]] = []
        for start, rank in enumerate(self.ranks):
            end = max(i for i, other in enumerate(self.ranks) if other - rank <= self.critical_difference)
            if end > start and not any(first <= start and end <= last for first, last in found):
                found.append((start, end))
        return tuple(self.methods[start : end + 1] for start, end in found)


def friedman(scores: Mapping[str, Sequence[float]], *, higher_is_better: Any = True, level: float = 0.05) -> Friedman:
    """Average ranks over blocks (tasks, or tasks × budgets), the test that all rank alike, and the critical difference.

        χ² = 12 N / (k (k + 1)) (sum of R² - k (k + 1)² / 4),    F = (N - 1) χ² / (N (k - 1) - χ²)

    for k methods, N blocks, R the average ranks, equal scores sharing theirs; F with k - 1 and (k - 1)(N - 1) degrees
    of freedom. CD = q √(k (k + 1) / 6N), with q the studentised range over √2. p is never below (k!)^(1 - N), the
    chance of blocks that all agree, where F would make it 0.

    Args:
        scores: a score for each block by method, blocks in the same order.
        higher_is_better: a truth value for all blocks, or one for each.
        level: of the critical difference.

    Raises:
        ValueError: fewer than two methods or blocks, or not a score of every method on every block.

    Source: Demšar 2006, "Statistical Comparisons of Classifiers over Multiple Data Sets", section 3.2; like there, ties
    do not enlarge χ², which errs on the side of finding nothing.
    """
    names = list(scores)
    if len({len(row) for row in scores.values()}) > 1:
        raise ValueError(f"expected a score of every method on every block, found {_lengths(scores)} of them")
    values = np.array([list(scores[name]) for name in names], dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite scores of at least two methods on at least two blocks, found shape {values.shape}; "
            "with one task there is nothing to rank over"
        )
    count, blocks = values.shape
    signs = np.where(np.broadcast_to(higher_is_better, (blocks,)), -1.0, 1.0)
    ranks = stats.rankdata(values * signs, axis=0).mean(axis=1)
    chi = 12 * blocks / (count * (count + 1)) * (float(np.square(ranks).sum()) - count * (count + 1) ** 2 / 4)
    rest = blocks * (count - 1) - chi
    f = (blocks - 1) * chi / rest if rest > 1e-9 else math.inf
    p = float(stats.f.sf(f, count - 1, (count - 1) * (blocks - 1)))
    order = sorted(range(count), key=lambda i: (ranks[i], names[i]))
    return Friedman(
        methods=tuple(names[i] for i in order),
        ranks=tuple(float(ranks[i]) for i in order),
        blocks=blocks,
        chi_squared=chi,
        f=f,
        p=min(1.0, max(p, math.exp((1 - blocks) * math.lgamma(count + 1)))),
        critical_difference=critical_difference(count, blocks, level),
        level=level,
    )


def critical_difference(methods: int, blocks: int, level: float = 0.05) -> float:
    """Nemenyi's critical difference of two average ranks."""
    q = float(stats.studentized_range.ppf(1 - level, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of two methods being equally good over tasks: Wilcoxon's signed ranks of their differences.

    Exact, ties included: every sign of every rank is counted. Tasks without a difference add half their rank to either
    side. Differences are ranked by size, so the tasks should be measured in one unit.

    Args:
        first: a score for each task.
        second: of the same tasks in the same order.

    Raises:
        ValueError: the two differ in length, or there is no task.

    Source: Demšar 2006, section 3.1.3.
    """
    differences = np.subtract(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    if len(first) != len(second) or differences.size == 0:
        raise ValueError(f"expected scores of the same tasks, found {len(first)} and {len(second)}")
    # Differences that are equal but for rounding must share a rank.
    differences = np.round(differences, 12)
    ranks = stats.rankdata(np.abs(differences))
    doubled = np.rint(2 * ranks[differences != 0]).astype(int)
    total = int(doubled.sum())
    found = int(doubled[differences[differences != 0] > 0].sum())
    ways = np.ones(1)
    for rank in doubled:
        ways = np.convolve(ways, np.concatenate([[0.5], np.zeros(rank - 1), [0.5]]))
    extreme = min(found, total - found)
    return min(1.0, 2 * float(ways[: extreme + 1].sum()))


def _lengths(scores: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {len(row)}" for name, row in scores.items())
