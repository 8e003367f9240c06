"""Findings -> the columns of the table of all numbers, and the table of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftkit_bench.metrics import Metric
from peftkit_bench.report.costs import bytes_unit
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.pairs import RATIOS, Parity
from peftkit_bench.report.sentences import difference, interval, plus_minus
from peftkit_bench.report.tuning import Tuning

MOST_RATES = 14
"""Of a table; more are left to the plot."""


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    heading: str
    unit: str
    cell: Callable[[Row], str]


def columns(found: Findings) -> list[Column]:
    """Everything measured that is there, in the order of the table."""
    backbone = max(found.first.backbone["parameters"] - found.first.head_parameters, 1)
    memory, by = bytes_unit(max(value for row in found.rows for value in row.values("peak_bytes")))

    def parameters(row: Row) -> str:
        text = f"{row.parameters:,}"
        return f"{text} ({row.final_parameters:,} kept)" if row.final_parameters < row.parameters else text

    def measured(field: str, scale: float, digits: int) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            value = row.median(field)
            return "–" if value is None else f"{value * scale:,.{digits}f}"

        return cell

    made = [
        Column("Trainable", "parameters", parameters),
        Column("Of backbone", "%", lambda row: f"{100 * row.parameters / backbone:.3g}"),
        Column(
            found.metric.name[:1].upper() + found.metric.name[1:],
            "%" if found.metric.percent else ("" if found.metric.higher_is_better else "lower is better"),
            lambda row: plus_minus(found.metric, row.score),
        ),
        Column("Training", "s", measured("train_seconds", 1, 1)),
        Column("Peak memory", memory, measured("peak_bytes", by, 0 if memory == "MB" else 1)),
        Column("Steady", memory, measured("steady_bytes", by, 0 if memory == "MB" else 1)),
        Column("On disk", "kB", measured("adapter_bytes", 1e-3, 0)),
        Column("Latency", "ms", measured("latency_seconds", 1e3, 1)),
        Column("Merged", "ms", measured("merged_latency_seconds", 1e3, 1)),
        Column("Bare backbone", "ms", measured("base_latency_seconds", 1e3, 1)),
        Column("Effect kept", "on merge", measured("effect_kept", 1, 3)),
        Column("Forgotten", "nats a token", lambda row: "–" if row.forgotten is None else f"{row.forgotten:+.3f}"),
        Column("Learning rate", "", lambda row: f"{row.first.learning_rate:g}" if row.parameters else "–"),
        Column("Best step", "", measured("best_step", 1, 0)),
        Column("Size", "", size),
    ]
    # Columns without a single number say nothing.
    return [c for c in made if any(c.cell(row) != "–" for row in found.rows)]


def size(row: Row) -> str:
    """The solved field, or that there was none to solve."""
    if row.budget is None:
        return "–" if row.baseline else "its own"
    return f"{row.size} (nearest)" if row.off_budget else row.size


def blocks(found: Findings) -> list[tuple[str, list[Row]]]:
    """The rows in blocks of one budget, ascending, those of a size of their own last; a heading where several."""
    if len(found.budgets) < 2:
        return [("", list(found.rows))]
    made = [
        (f"{short_count(budget)} parameters", [row for row in found.rows if row.budget == budget])
        for budget in found.budgets
    ]
    own = [row for row in found.rows if row.budget is None]
    return [*made, ("Sizes of their own", own)] if own else made


def parity_header() -> list[str]:
    """Of the table of two implementations side by side."""
    return ["Method", "Scores", "Difference of scores", *RATIOS]


def parity_rows(pairs: Sequence[Parity], metric: Metric) -> list[list[str]]:
    """For each pair: the two measurements and their ratio, and whether the scores are the same within noise."""
    return [
        [
            f"{each.own.name} and {each.peer.name}",
            "same within noise" if each.same else "not the same",
            f"{difference(metric, each.difference.mean)} ({interval(metric, each.difference)})",
            *(_side_by_side(each, field) for field in RATIOS.values()),
        ]
        for each in pairs
    ]


def _side_by_side(pair: Parity, field: str) -> str:
    ratio = pair.ratio(field)
    if ratio is None:
        return "–"
    mine, other = pair.own.median(field), pair.peer.median(field)
    assert mine is not None
    assert other is not None
    by, unit, digits = {
        "train_seconds": (1.0, "s", 1), "latency_seconds": (1e3, "ms", 1), "adapter_bytes": (1e-3, "kB", 0),
    }.get(field, (1e-6, "MB", 0))  # fmt: skip
    return f"{mine * by:,.{digits}f} / {other * by:,.{digits}f} {unit} = {ratio:.2f}"


# Learning rates -----------------------------------------------------------------------------------------------------


def rates(searched: Sequence[Tuning]) -> list[float]:
    """All rates that were tried, ascending; none where they are too many for a table."""
    found = sorted({rate for each in searched for rate in each.scores})
    return found if len(found) <= MOST_RATES else []


def rate_rows(searched: Sequence[Tuning], metric: Metric) -> list[tuple[str, list[str], str]]:
    """For each search: its scores by rate with the chosen one marked, and that rate in words."""
    every = rates(searched)
    rows = []
    for each in searched:
        cells = [
            "–" if rate not in each.scores else metric.shown(each.scores[rate]) + (" *" if rate == each.shown else "")
            for rate in every
        ]
        notes = [f"{name} {value}" for name, value in each.settings.items()]
        notes += [f"{len(each.trials)} trials"] if each.sampled else []
        notes += ["grid extended"] if each.extended else []
        notes += ["at the edge of what was tried"] if each.at_edge() else []
        if each.chosen is None:
            notes.append("best so far")
        shown = f"{each.shown:g}" + (f" ({', '.join(notes)})" if notes else "")
        rows.append((each.name, cells, shown))
    return rows
