"""Power: how many seeds, and how many examples, would make a difference as large as that seen significant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

from peftkit_bench.statistics import Estimate

LEVEL = 0.05
POWER = 0.8
MOST = 10**7
"""Seeds or groups beyond which a number counts as infinite."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a difference of two methods varies with, as variances of a single run on a single group."""

    runs: float
    """Between training runs."""
    groups: float
    """Between groups of examples."""
    interaction: float
    """Of what one run adds to one group, noise included."""
    degrees: float
    """Degrees of freedom that each further seed is taken to add to the variance of runs: 1, or more where runs of other
    methods speak too, which is an approximation."""

    def error(self, seeds: float, groups: float) -> float:
        """The standard error of the mean difference."""
        return math.sqrt(self.runs / seeds + self.groups / groups + self.interaction / (seeds * groups))


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What would settle a difference."""

    difference: float
    seeds: float | None
    """In all, on these examples; infinite where the examples alone are too few; None with one seed, where nothing is
    known of how runs vary."""
    examples: float
    """In all, with these seeds; infinite where the runs alone differ too much."""
    power: float
    """With which the numbers above would find it."""


def parts(found: Estimate) -> Parts:
    """The variances behind the estimate of a difference, each without what it holds of the others.

    The variance of runs that was measured holds interaction / groups, that of groups holds interaction / seeds.
    """
    seeds, groups = found.seeds, found.groups
    return Parts(
        runs=max(0.0, found.from_runs * seeds - found.interaction / groups),
        groups=max(0.0, found.from_groups * groups - found.interaction / seeds),
        interaction=found.interaction,
        degrees=found.runs_degrees / (seeds - 1) if seeds > 1 else 0.0,
    )


def power(difference: float, these: Parts, seeds: float, groups: float, level: float = LEVEL) -> float:
    """How often the t test of `statistics.paired_test` would find a difference of this size.

    From the noncentral t distribution, with the test's own degrees of freedom.

    Args:
        difference: true size, in the score's unit.
        these: what it varies with.
        seeds: of each method; one: the runs are taken as they are.
        groups: of examples.
        level: of the test.
    """
    from_runs = (these.runs + these.interaction / groups) / seeds if seeds > 1 else 0.0
    from_groups = (these.groups + these.interaction / seeds) / groups
    error = these.error(seeds, groups) if seeds > 1 else math.sqrt(from_groups)
    if error == 0:
        return 1.0 if difference else 0.0
    freedom = [groups - 1.0]
    below = from_groups**2 / freedom[0]
    if seeds > 1:
        freedom.append(these.degrees * (seeds - 1))
        below += from_runs**2 / freedom[1]
    degrees = min(max(error**4 / below, min(freedom)), 1e6)
    return float(stats.nct.sf(float(stats.t.ppf(1 - level / 2, degrees)), degrees, abs(difference) / error))


def needed(found: Estimate, *, difference: float | None = None, level: float = LEVEL, aim: float = POWER) -> Needed:
    """How many seeds on these examples, or examples with these seeds, would make a difference significant.

    Args:
        found: the difference of two methods, from `statistics.paired_test`.
        difference: true size to be found; None: as large as that seen.
        level: of the test.
        aim: power; 0.8 misses it once in five times.
    """
    size = found.mean if difference is None else difference
    these = parts(found)
    seeds: float | None = None
    if found.seeds > 1:
        seeds = _least(lambda count: power(size, these, count, found.groups, level), 2, aim)
    groups = _least(lambda count: power(size, these, found.seeds, count, level), 2, aim)
    examples = groups if math.isinf(groups) else math.ceil(groups * found.examples / found.groups)
    return Needed(difference=size, seeds=seeds, examples=examples, power=aim)


def _least(reached: Callable[[int], float], start: int, aim: float) -> float:
    """The smallest number from `start` on with which the aim is reached; infinite where none below MOST does."""
    low, high = start - 1, start
    while reached(high) < aim:
        if high >= MOST:
            return math.inf
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if reached(middle) < aim:
            low = middle
        else:
            high = middle
    return high
