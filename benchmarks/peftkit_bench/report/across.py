"""Findings on several tasks -> average ranks, what they say of the methods, and wins, ties and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peftkit_bench import ranking
from peftkit_bench.ranking import Friedman, Tally
from peftkit_bench.record import digest
from peftkit_bench.report.findings import Contest, Findings
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.sentences import listed, p_value

FEWEST_SHARED = 3
"""Contenders that two tasks must share to be ranked together."""
FEWEST_TASKS = 5
"""With fewer tasks the ranks can hardly be told apart."""


@dataclass(frozen=True, kw_only=True)
class Across:
    """Contenders that several tasks share, at one level of size."""

    level: str
    """The size in words, such as "74k parameters"; "" where there are no budgets."""
    tasks: tuple[str, ...]
    contests: tuple[Contest, ...]
    """One for each task."""
    friedman: Friedman
    tallies: Mapping[tuple[str, str], Tally]

    def rank(self, name: str) -> float:
        """The average rank of a contender."""
        return self.friedman.ranks[self.friedman.methods.index(name)]

    def total(self, name: str) -> Tally:
        """Wins, ties and losses against all others over all tasks."""
        mine = [tally for (first, _), tally in self.tallies.items() if first == name]
        return Tally(wins=sum(t.wins for t in mine), ties=sum(t.ties for t in mine), losses=sum(t.losses for t in mine))


def across(everything: Sequence[Findings]) -> list[list[Across]]:
    """For each set of tasks that share contenders: the ranks at each level of size, ascending."""
    pools: list[list[Findings]] = []
    seen: set[str] = set()
    for found in everything:
        first = found.first
        # The same task twice is no second task.
        same = digest([first.data["hash"], first.task, first.backbone["hash"], first.backbone["name"], first.metric])
        if same in seen:
            continue
        seen.add(same)
        names = {row.contender for row in found.rows}
        for pool in pools:
            shared = names.intersection(*({row.contender for row in each.rows} for each in pool))
            if len(shared) >= FEWEST_SHARED:
                pool.append(found)
                break
        else:
            pools.append([found])
    made = [_levels(pool) for pool in pools if len(pool) > 1]
    return [levels for levels in made if levels]


def _levels(pool: Sequence[Findings]) -> list[Across]:
    found = []
    for level, contests in _aligned(pool):
        shared = set.intersection(*({row.contender for row in contest.rows} for contest in contests))
        if len(shared) < FEWEST_SHARED:
            continue
        order = [row.contender for row in contests[0].rows if row.contender in shared]
        tasks = _titles(pool)
        found.append(
            Across(
                level=level,
                tasks=tuple(tasks),
                contests=tuple(contests),
                friedman=ranking.friedman(
                    {name: [contest.row(name).score.mean for contest in contests] for name in order},
                    higher_is_better=[contest.metric.higher_is_better for contest in contests],
                ),
                tallies=ranking.win_tie_loss(
                    {
                        task: [c for c in contest.comparisons if {c.first, c.second} <= shared]
                        for task, contest in zip(tasks, contests, strict=True)
                    }
                ),
            )
        )
    return found


def _titles(pool: Sequence[Findings]) -> list[str]:
    """A name for each task, told apart by data and backbone where titles are equal."""
    titles = [found.first.title for found in pool]
    return [
        title if titles.count(title) == 1 else f"{title} ({f.first.data['name']}, {f.first.backbone['name']})"
        for title, f in zip(titles, pool, strict=True)
    ]


def _aligned(pool: Sequence[Findings]) -> list[tuple[str, list[Contest]]]:
    """The contests of the tasks side by side: by equal budgets, by their order, or the largest of each."""
    common = set.intersection(*({contest.budget for contest in found.contests} for found in pool))
    if common:
        levels: list[tuple[str, list[Contest]]] = []
        for budget in sorted(common, key=lambda b: b or 0):
            side = [next(c for c in found.contests if c.budget == budget) for found in pool]
            levels.append((f"{short_count(budget)} parameters" if budget is not None else "", side))
        return levels
    counts = {len(found.contests) for found in pool}
    if len(counts) == 1 and all(found.budgets for found in pool):
        levels = []
        for place in range(counts.pop()):
            side = [found.contests[place] for found in pool]
            budgets = [contest.budget or 0 for contest in side]
            levels.append((f"{short_count(min(budgets))} to {short_count(max(budgets))} parameters", side))
        return levels
    return [("the largest budget of each", [found.contests[-1] for found in pool])]


def answer(found: Across) -> list[str]:
    """What the ranks say, a sentence each."""
    made, count = found.friedman, len(found.tasks)
    best = made.methods[0]
    where = f" at {found.level}" if found.level else ""
    sentences = [
        f"Over {count} tasks{where}, {best} has the best average rank, {made.ranks[0]:.1f} of {len(made.methods)}."
    ]
    if made.p >= made.level:
        sentences.append(
            f"Taken together, the methods cannot be told apart by their ranks (Friedman's test, {p_value(made.p)})."
        )
    else:
        tied = [name for name in made.methods[1:] if found.rank(name) - made.ranks[0] <= made.critical_difference]
        worse = [name for name in made.methods[1:] if name not in tied]
        sentences.append(f"The methods do not rank alike (Friedman's test, {p_value(made.p)}).")
        parts = [] if worse else ["no two of them can be told apart"]
        if tied and worse:
            parts.append(f"{best} cannot be told apart from {listed(tied)}")
        if worse:
            parts.append(f"significantly worse than {best}: {listed(worse)}")
        sentences.append(
            f"By Nemenyi's critical difference of {made.critical_difference:.1f} ranks, {'; '.join(parts)}."
        )
    if count < FEWEST_TASKS:
        sentences.append(
            f"With only {count} tasks, ranks can hardly be told apart; the comparisons within each task say more."
        )
    return sentences


def tally_text(tally: Tally | None) -> str:
    """Wins, ties and losses as "2 / 1 / 0"."""
    return "–" if tally is None else f"{tally.wins} / {tally.ties} / {tally.losses}"
