"""Searches -> score by learning rate, a panel for each contender: what was chosen, and where the grid was extended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from peftkit_bench.metrics import Metric
from peftkit_bench.report import style
from peftkit_bench.report.marks import scale
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.style import ACCENT, BAND, MUTED, OWN, STYLE
from peftkit_bench.report.tuning import Tuning

COLUMNS = 4
WORST = 8
"""Scores without an upper end are drawn up to this many times the best."""


def rates_figure(searched: Sequence[Tuning], metric: Metric, title: str) -> Figure:
    """Score on the tune split against the learning rate for each contender; lines are budgets, rings the choice."""
    by_contender: dict[str, list[Tuning]] = {}
    for each in searched:
        by_contender.setdefault(each.contender, []).append(each)
    budgets = sorted({each.budget for each in searched if each.budget is not None})
    with mpl.rc_context(STYLE):
        figure, found = style.panels(len(by_contender), COLUMNS, 2.05, sharex=True, sharey=True)
        bottom, top = _scores(found[0], searched, metric)
        every = [trial.rate for each in searched for trial in each.trials if trial.rate > 0]
        low, high = (math.log10(end) for end in (min(every), max(every)))
        room = max(0.07 * (high - low), 0.1)
        found[0].set_xscale("log")
        found[0].set_xlim(10 ** (low - room), 10 ** (high + room))
        found[0].xaxis.set_major_locator(FixedLocator([10.0**p for p in range(math.floor(low), math.ceil(high) + 1)]))
        found[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{round(math.log10(value))}}}$"))
        found[0].xaxis.set_minor_locator(NullLocator())
        for axes, (name, mine) in zip(found, by_contender.items(), strict=True):
            axes.set_title(name, loc="left", fontsize=10.5, pad=4)
            _extension(axes, mine)
            for each in sorted(mine, key=lambda t: t.budget or 0):
                place = budgets.index(each.budget) if each.budget is not None else len(budgets) - 1
                alpha = style.budget_alpha(max(place, 0), len(budgets))
                _draw(axes, each, metric, alpha, style.MARKERS[max(place, 0)], (bottom, top))
            if any(each.at_edge() for each in mine):
                axes.annotate("at the edge", (1, 1), xycoords="axes fraction", xytext=(0, 4), ha="right", va="bottom",
                              textcoords="offset points", fontsize=9, color=OWN)  # fmt: skip
        percent = " in %" if metric.percent else ""
        better = "" if metric.higher_is_better else ", lower is better"
        shaded = "; shaded: the grid was extended" if any(each.extended for each in searched) else ""
        ring = "chosen" if any(each.chosen is not None for each in searched) else "best so far"
        style.headline(
            figure,
            title,
            f"{metric.name}{percent}{better}, on the tune split, against the learning rate; ring: {ring}{shaded}",
        )
        if len(budgets) > 1:
            add_budgets(figure, budgets)
    return figure


def _scores(axes: Any, searched: Sequence[Tuning], metric: Metric) -> tuple[float, float]:
    """Sets the axis of scores; its ends."""
    by = scale(metric)
    values = [by * trial.score for each in searched for trial in each.trials]
    if metric.percent:
        bottom, top = style.ends(values, 0.08, 1.0)
    else:
        axes.set_yscale("log")
        best = min(values) if not metric.higher_is_better else max(values)
        bottom, top = min(values), min(max(values), best * WORST) if not metric.higher_is_better else max(values)
        ratio = max(top / bottom, 1.1) ** 0.08
        bottom, top = bottom / ratio, top * ratio
        axes.yaxis.set_major_locator(FixedLocator(_round_between(bottom, top)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom, top)
    return bottom, top


def _round_between(low: float, high: float) -> list[float]:
    """A few round numbers between the ends."""
    steps = (1, 1.5, 2, 3, 5, 7)
    found = [s * 10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    found = [value for value in found if low <= value <= high]
    return found if len(found) > 1 else [float(f"{end:.3g}") for end in (low * 1.02, high / 1.02)]


def _extension(axes: Any, mine: Sequence[Tuning]) -> None:
    """Shades the rates outside the first grid."""
    grid = next((each.grid for each in mine if each.grid), ())
    extended = [rate for each in mine for rate in each.extended]
    for end, outside in (
        (grid[0] if grid else 0.0, [rate for rate in extended if grid and rate < grid[0]]),
        (grid[-1] if grid else 0.0, [rate for rate in extended if grid and rate > grid[-1]]),
    ):
        if outside:
            far = min(outside) if outside[0] < end else max(outside)
            # From half way between the grid's end and the first rate beyond it.
            near = max(outside) if outside[0] < end else min(outside)
            axes.axvspan(
                math.sqrt(end * near), far * (1.35 if far > end else 1 / 1.35), color=BAND, linewidth=0, zorder=0
            )


def _draw(axes: Any, each: Tuning, metric: Metric, alpha: float, marker: str, limits: tuple[float, float]) -> None:
    by = scale(metric)

    def inside(value: float) -> float:
        return min(max(by * value, limits[0]), limits[1])

    scores = {rate: score for rate, score in each.scores.items() if rate > 0}
    if any(trial.searched for trial in each.trials):
        axes.plot([t.rate for t in each.trials], [inside(t.score) for t in each.trials], ".", color=MUTED,
                  markersize=5, alpha=0.5 * alpha, zorder=2)  # fmt: skip
    axes.plot(list(scores), [inside(score) for score in scores.values()], "-", color=ACCENT, alpha=alpha,
              marker=marker, markersize=4, linewidth=1.4, zorder=3)  # fmt: skip
    shown = each.shown
    if shown in scores:
        axes.plot([shown], [inside(scores[shown])], "o", color=OWN, markersize=10, markerfacecolor="none",
                  markeredgewidth=1.6, alpha=max(alpha, 0.6), zorder=4)  # fmt: skip


def add_budgets(figure: Figure, budgets: Sequence[int], *, markers: bool = True) -> None:
    """A legend of the budgets in the upper right corner."""
    handles = [
        Line2D(
            [],
            [],
            color=ACCENT,
            alpha=style.budget_alpha(i, len(budgets)),
            marker=style.MARKERS[i] if markers else "",
            markersize=5,
            linewidth=1.4,
        )
        for i in range(len(budgets))
    ]
    figure.legend(
        handles, [short_count(budget) for budget in budgets], loc="upper right", ncols=len(budgets), frameon=False,
        fontsize=9, labelcolor=MUTED, bbox_to_anchor=(0.995, 1.0), columnspacing=1.2, handletextpad=0.5,
        title="parameters", title_fontsize=9, borderaxespad=0.2,
    )  # fmt: skip
