"""Findings -> plain sentences: what is better, what cannot be told apart, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit_bench.metrics import Metric
from peftkit_bench.report.findings import Contest, Findings, Row
from peftkit_bench.report.matching import short_count
from peftkit_bench.statistics import Comparison, Estimate


def unit(metric: Metric) -> str:
    """What stands behind a score: " %" or nothing."""
    return " %" if metric.percent else ""


def difference(metric: Metric, value: float) -> str:
    """A difference of scores with its sign, in points for a share, no unit."""
    return f"{100 * value:+.1f}" if metric.percent else f"{value:+.3f}"


def gap(metric: Metric, value: float) -> str:
    """The size of a difference, no sign, with its unit."""
    return f"{100 * abs(value):.1f} points" if metric.percent else f"{abs(value):.3f}"


def plus_minus(metric: Metric, estimate: Estimate) -> str:
    """A score with half its interval, no unit."""
    return f"{metric.shown(estimate.mean)} ± {metric.shown(estimate.half_width)}"


def points(metric: Metric, estimate: Estimate, what: str = "simultaneous 95 % interval") -> str:
    """A difference of scores with its interval."""
    shown = difference(metric, estimate.mean) + (" points" if metric.percent else "")
    return f"{shown}, {what} {interval(metric, estimate)}"


def interval(metric: Metric, estimate: Estimate) -> str:
    """The ends of a difference's interval."""
    return f"{difference(metric, estimate.low)} to {difference(metric, estimate.high)}"


def p_value(p: float) -> str:
    """A p value as a person writes it in a sentence."""
    return f"p {p_cell(p)}" if p < 0.001 else f"p = {p_cell(p)}"


def p_cell(p: float) -> str:
    """A p value in a table."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"; "a, x; b, y; and c" where names have commas of their own."""
    if len(names) == 1:
        return names[0]
    if any("," in name for name in names):
        return f"{'; '.join(names[:-1])}; and {names[-1]}"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def best_word(metric: Metric) -> str:
    """How the best score is called: "highest" or "lowest"."""
    return "highest" if metric.higher_is_better else "lowest"


def at_budget(contest: Contest) -> str:
    """ "At 74k parameters"."""
    assert contest.budget is not None
    return f"At {short_count(contest.budget)} parameters"


def answer(contest: Contest) -> list[str]:
    """The conclusion at one budget, a sentence each."""
    metric, best, thrifty, tied = contest.metric, contest.rows[0], contest.thriftiest(), contest.tied_with_best()
    sentences = [
        f"{best.contender} has the {best_word(metric)} mean {metric.name}, {plus_minus(metric, best.score)}"
        f"{unit(metric)}, with {best.trainable:,} trainable parameters."
    ]
    if not contest.comparisons:
        return [*sentences, "There is nothing to compare it with on common seeds."]
    others = [row.contender for row in tied[1:]]
    if others:
        sentences.append(f"It cannot be told apart from {listed(others)}.")
    else:
        sentences.append("It is significantly better than every other contender.")
    opening = f"{'Most' if metric.higher_is_better else 'Best'} {metric.name} for the fewest parameters: "
    if thrifty is best:
        fewer = any(row.trainable < best.trainable for row in contest.rows)
        sentences.append(
            f"{opening}{best.contender}; "
            + (
                "of those that cannot be told apart it also trains the fewest parameters."
                if others
                else "everything with fewer parameters is significantly worse."
                if fewer
                else "nothing has fewer parameters."
            )
        )
        return sentences
    comparison = contest.between(best.contender, thrifty.contender)
    left_open = ""
    if comparison:
        most = comparison.difference.high if metric.higher_is_better else comparison.difference.low
        left_open = (
            f"; the difference is {points(metric, comparison.difference)}, so up to {gap(metric, most)} are not ruled "
            "out"
        )
    share = thrifty.trainable / best.trainable
    sentences.append(
        f"{opening}{thrifty.contender}, {plus_minus(metric, thrifty.score)}{unit(metric)} with {thrifty.trainable:,} "
        f"trainable parameters, {100 * share:.2g} % of those of {best.contender}, from which these data cannot tell it "
        f"apart{left_open}."
    )
    return sentences


def front_sentence(found: Findings) -> str:
    """The Pareto front over all budgets, fewest parameters first."""
    rows = [found.row(name) for name in found.front]
    score = unit(found.metric)
    parts = [f"{row.name} ({row.trainable:,}: {plus_minus(found.metric, row.score)}{score})" for row in rows]
    return (
        f"Pareto front: nothing measured beats these in both {found.metric.name} and trainable parameters, from small "
        f"to large: {'; '.join(parts)}. Neighbours whose intervals overlap may change places with other seeds or "
        "examples."
    )


def growth_sentences(found: Findings, grown: Sequence[Comparison]) -> list[str]:
    """What more parameters bring to each contender with several budgets.

    Args:
        grown: for each contender its largest against its smallest budget, in this order or the other.
    """
    better: list[str] = []
    same: list[str] = []
    worse: list[str] = []
    sign = 1 if found.metric.higher_is_better else -1
    for each in grown:
        text = f"{each.first} ({difference(found.metric, each.difference.mean)})"
        if not each.significant():
            same.append(text)
        else:
            (better if sign * each.difference.mean > 0 else worse).append(text)
    if not grown:
        return []
    span = f"From {short_count(found.budgets[0])} to {short_count(found.budgets[-1])} parameters"
    parts = []
    if better:
        parts.append(f"significantly better: {listed(better)}")
    if same:
        parts.append(f"cannot be told from no change: {listed(same)}")
    if worse:
        parts.append(f"significantly worse: {listed(worse)}")
    return [f"{span}, {'; '.join(parts)}."]


Verdict = tuple[Row, list[str], list[str], list[str]]


def verdicts(contest: Contest) -> list[Verdict]:
    """For each row: the names it is significantly better than, those it cannot be told from, those better than it."""
    table = []
    for row in contest.rows:
        better: list[str] = []
        same: list[str] = []
        worse: list[str] = []
        for other in contest.rows:
            comparison = contest.between(row.contender, other.contender)
            if other is row or comparison is None:
                continue
            if not comparison.significant():
                same.append(other.contender)
            elif comparison.first == row.contender:
                better.append(other.contender)
            else:
                worse.append(other.contender)
        table.append((row, better, same, worse))
    return table


def baseline_sentences(contest: Contest) -> list[str]:
    """What can be said against each baseline."""
    sentences = []
    for base, better, same, worse in verdicts(contest):
        if not base.baseline:
            continue
        candidates = {row.contender for row in contest.rows if not row.baseline}
        parts = [
            f"{words}: {listed(names)}"
            for words, those in (
                ("significantly better", worse),
                ("cannot be told apart", same),
                ("significantly worse", better),
            )
            if (names := [name for name in those if name in candidates])
        ]
        if parts:
            shown = f"{contest.metric.shown(base.score.mean)}{unit(contest.metric)}"
            sentences.append(f"Against {base.contender} ({shown}): {'; '.join(parts)}.")
    return sentences
