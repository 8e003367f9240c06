"""Search records -> score by learning rate for each contender and budget, and the rate that was chosen."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit_bench.record import Record

SAMPLED_EDGE = 1.1
"""A sampled rate within this factor of an end of its range lies at the edge."""
NUMBER = "trial"
"""Key in `Record.searched` that numbers the trials instead of naming a setting."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried."""

    rate: float
    score: float
    """On the tune split, mean over seeds."""
    searched: Mapping[str, Any]
    """What else was searched, by name."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The search of one contender at one budget."""

    contender: str
    budget: int | None
    name: str
    """The contender, and its budget where there are several."""
    trials: tuple[Trial, ...]
    """Ascending in the learning rate."""
    grid: tuple[float, ...]
    """The rates that were asked for at first, or the ends of the range that was sampled, ascending; may be unknown."""
    sampled: bool
    """Whether rates were drawn from the range of the grid instead of being its own."""
    chosen: float | None
    """The rate of the runs that count; None: they have not been made."""
    settings: Mapping[str, Any]
    """What else those runs took from the search, by name."""
    higher_is_better: bool

    @property
    def scores(self) -> dict[float, float]:
        """The best score at each rate, ascending in the rate."""
        found: dict[float, float] = {}
        for trial in self.trials:
            known = found.get(trial.rate)
            better = known is None or (trial.score > known) == self.higher_is_better
            found[trial.rate] = trial.score if known is None or better else known
        return found

    @property
    def best(self) -> float:
        """The learning rate with the best score; the lower one on a tie."""
        sign = 1 if self.higher_is_better else -1
        found = self.scores
        return max(found, key=lambda rate: (sign * found[rate], -rate))

    @property
    def shown(self) -> float:
        """The chosen rate, or the best so far."""
        return self.best if self.chosen is None else self.chosen

    @property
    def extended(self) -> tuple[float, ...]:
        """Rates tried outside the first grid."""
        if not self.grid:
            return ()
        low, high = self.grid[0] * (1 - 1e-6), self.grid[-1] * (1 + 1e-6)
        return tuple(rate for rate in self.scores if not low <= rate <= high)

    def at_edge(self) -> bool:
        """Whether the rate is the lowest or highest that was tried, so that a better one may lie outside."""
        rates = list(self.scores)
        if len(rates) < 2:
            return False
        if self.sampled:
            return bool(self.grid) and not self.grid[0] * SAMPLED_EDGE < self.shown < self.grid[-1] / SAMPLED_EDGE
        return any(math.isclose(self.shown, end, rel_tol=1e-6) for end in (rates[0], rates[-1]))


def tunings(group: Sequence[Record], higher_is_better: bool) -> list[Tuning]:
    """The searches of a group of records, of each contender and budget the one whose rate its newest final run took.

    A search may serve several budgets: `Record.trial` says which runs took its rate.
    """
    by_key: dict[tuple[str, int | None], list[Record]] = defaultdict(list)
    finals: dict[tuple[str, int | None], Record] = {}
    for each in sorted(group, key=lambda r: r.started):
        key = (each.contender, each.budget if each.knob is not None else None)
        if each.phase == "search":
            by_key[key].append(each)
        else:
            finals[key] = each
    several = len({budget for _, budget in by_key if budget is not None}) > 1
    found = []
    for (contender, budget), mine in by_key.items():
        final = finals.get((contender, budget))
        kept = [r for r in mine if r.trial == (final or mine[-1]).trial]
        if not kept:
            continue
        cells: dict[tuple[float, str], dict[int, Record]] = defaultdict(dict)
        for r in kept:
            cells[(r.learning_rate, repr(sorted(r.searched.items())))][r.seed] = r
        trials = [
            Trial(rate=rate, score=sum(r.score for r in runs.values()) / len(runs),
                  searched={k: v for k, v in next(iter(runs.values())).searched.items() if k != NUMBER})
            for (rate, _), runs in sorted(cells.items(), key=lambda item: item[0])
        ]  # fmt: skip
        found.append(
            Tuning(
                contender=contender,
                budget=budget,
                name=f"{contender}, {budget:,}" if several and budget is not None else contender,
                trials=tuple(trials),
                grid=_grid(kept),
                sampled=any("trials" in (r.tuning or {}) for r in kept),
                chosen=final.learning_rate if final else None,
                settings=final.searched if final else {},
                higher_is_better=higher_is_better,
            )
        )
    return found


def _grid(records: Sequence[Record]) -> tuple[float, ...]:
    """The first grid, wherever a record names one; rates that it calls extensions left out."""
    for each in records:
        tuning = each.tuning or {}
        rates = tuning.get("learning_rates")
        if isinstance(rates, Sequence) and not isinstance(rates, str) and rates:
            extensions = {float(rate) for rate in tuning.get("extended") or ()}
            return tuple(sorted({float(rate) for rate in rates} - extensions))
    return ()
