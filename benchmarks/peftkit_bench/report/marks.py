"""What the plots of scores share: a row's marker and interval, axes, titles, the legend."""

from __future__ import annotations

from typing import Any

from peftkit_bench.metrics import Metric
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.labels import Point
from peftkit_bench.report.style import ACCENT, BASE, MUTED, OWN

MARKERS = {ACCENT: "o", OWN: "D", BASE: "s"}


def colour(row: Row) -> str:
    """Of a row's marker."""
    if row.baseline:
        return BASE
    return OWN if row.budget is None else ACCENT


def scale(metric: Metric) -> float:
    """What a score is multiplied by in plots."""
    return 100.0 if metric.percent else 1.0


def score_axis(metric: Metric, split: str) -> str:
    """The name of a score's axis."""
    better = "" if metric.higher_is_better else ", lower is better"
    return f"{metric.name} on the {split} split{' (%)' if metric.percent else ''}{better}"


def title(found: Findings) -> str:
    """What was compared, on how many seeds and examples."""
    seeds = len({seed for row in found.rows for seed in row.seeds})
    return f"{found.first.title}  ·  {seeds} seed{'s' * (seeds != 1)}, {found.examples:,} {found.first.split} examples"


def point(axes: Any, row: Row, metric: Metric) -> Point:
    """Where a row stands in the plot, and its label."""
    by = scale(metric)
    at = axes.transData.transform
    x, y = at((max(row.trainable, 1), by * row.score.mean))
    return Point(
        name=row.name, text=f"{row.contender}  {metric.shown(row.score.mean)}", colour=colour(row), bold=row.baseline,
        kind="own" if row.budget is None else "budget", x=float(x), y=float(y),
        low=float(at((1, by * row.score.low))[1]), high=float(at((1, by * row.score.high))[1]),
    )  # fmt: skip


def bar(axes: Any, row: Row, x: float, metric: Metric, own: str, marker: str) -> None:
    """Draws a row's marker and interval; hollow where the size is not at the budget.

    Args:
        x: pixels.
    """
    by = scale(metric)
    y = by * row.score.mean
    axes.errorbar(
        axes.transData.inverted().transform((x, 0))[0], y,
        yerr=[[y - by * row.score.low], [by * row.score.high - y]],
        fmt=marker, color=own, markersize=7.5, elinewidth=1.3, capsize=0, zorder=4,
        markerfacecolor="white" if row.off_budget else own, markeredgecolor=own if row.off_budget else "white",
        markeredgewidth=1.6 if row.off_budget else 0.8,
    )  # fmt: skip


def legend(axes: Any, handles: list[Any], names: list[str], front: bool) -> None:
    """A legend in one line above the plot, the front and the interval added."""
    if front:
        handles = [*handles, axes.plot([], [], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))[0]]
        names = [*names, "Pareto front"]
    handles = [*handles, axes.plot([], [], color=MUTED, linewidth=1.3, marker="|", linestyle="-")[0]]
    names = [*names, "95 % interval"]
    axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(-0.012, 1.0), frameon=False, fontsize=9, ncols=len(names),
        labelcolor=MUTED, handletextpad=0.4, columnspacing=1.4, borderaxespad=0.3,
    )  # fmt: skip
