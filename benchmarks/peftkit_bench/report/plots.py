"""Findings -> the plots of scores: against trainable parameters, and ranked with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from peftkit_bench.report import curves, labels, style
from peftkit_bench.report.findings import Contest, Findings
from peftkit_bench.report.labels import Label, Point
from peftkit_bench.report.marks import MARKERS, bar, colour, legend, point, scale, score_axis, title
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.sentences import plus_minus
from peftkit_bench.report.style import ACCENT, BAND, BASE, GRID, INK, MUTED, OWN, STYLE


def score_figure(found: Findings) -> tuple[Figure, list[Label]]:
    """Score against trainable parameters with intervals and the Pareto front: points, or curves over several budgets.

    Returns:
        the figure, and the labels that were placed in it.
    """
    with mpl.rc_context(STYLE):
        figure, axes = style.figure(6.4)
        axes.set_xscale("log")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        heads = ", head included" if found.first.head_parameters else ""
        axes.set_xlabel(f"trainable parameters{heads} (log scale)")
        axes.set_ylabel(score_axis(found.metric, found.first.split))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(length=0, pad=6)
        axes.set_title(title(found), loc="left", fontsize=12.5, fontweight="bold", pad=30)
        figure.subplots_adjust(left=0.075, right=0.985, top=0.875, bottom=0.11)
        made = curves.draw(axes, found) if len(found.budgets) > 1 else _points(axes, found)
    return figure, made


def _points(axes: Any, found: Findings) -> list[Label]:
    rows, by = found.rows, scale(found.metric)
    counts = [max(row.trainable, 1) for row in rows]
    span = max(math.log10(max(counts) / min(counts)), 1.0)
    axes.set_xlim(min(counts) / 10 ** (0.06 * span), max(counts) * 10 ** (0.06 * span))
    low, high = min(by * row.score.low for row in rows), max(by * row.score.high for row in rows)
    pad = 0.06 * max(high - low, 0.01 * by)
    axes.set_ylim(low - 1.6 * pad, high + pad)
    axes.figure.canvas.draw()
    points = labels.dodged([point(axes, row, found.metric) for row in rows])
    places = {p.name: p for p in points}
    _band(axes, found, places)
    drawn = [axes.transData.inverted().transform((places[name].x, places[name].y)) for name in found.front]
    if len(drawn) > 1:
        axes.plot(*zip(*drawn, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for row in rows:
        bar(axes, row, places[row.name].x, found.metric, colour(row), MARKERS[colour(row)])
    made = labels.label_clusters(axes, labels.chains(points, labels.COLUMN_PIXELS), points)
    _legend(axes, found)
    return made


def _band(axes: Any, found: Findings, places: Mapping[str, Point]) -> None:
    """Shades the place of the budget."""
    inside = [row for row in found.rows if row.budget is not None and not row.off_budget]
    if len(inside) < 2 or not found.budgets:
        return
    left, right = (pick(places[row.name].x for row in inside) for pick in (min, max))
    low, high = (axes.transData.inverted().transform((x, 0))[0] for x in (left - 14, right + 14))
    axes.axvspan(low, high, color=BAND, linewidth=0, zorder=0)
    head = " + head" if found.first.head_parameters else ""
    axes.annotate(
        f"equal budget\n{short_count(found.budgets[0])}{head}", (math.sqrt(low * high), 0.012),
        xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9, color=MUTED,
    )  # fmt: skip


def _legend(axes: Any, found: Findings) -> None:
    kinds = [(ACCENT, "size solved for the budget"), (OWN, "size of its own"), (BASE, "baseline")]
    present = {colour(row) for row in found.rows}
    handles = [
        axes.plot([], [], linestyle="", marker=MARKERS[c], color=c, markersize=7)[0] for c, _ in kinds if c in present
    ]
    names = [name for c, name in kinds if c in present]
    if any(row.off_budget for row in found.rows):
        handles.append(axes.plot([], [], "o", color=ACCENT, markersize=7, markerfacecolor="white")[0])
        names.append("nearest size it can have")
    legend(axes, handles, names, front=len(found.front) > 1)


def ranking_figure(contest: Contest) -> Figure:
    """Scores with intervals, best first; filled markers cannot be told from the best."""
    metric, by = contest.metric, scale(contest.metric)
    tied = {row.contender for row in contest.tied_with_best()} if contest.comparisons else set()
    with mpl.rc_context(STYLE):
        figure, axes = style.figure(1.15 + 0.36 * len(contest.rows))
        low = min(by * row.score.low for row in contest.rows)
        high = max(by * row.score.high for row in contest.rows)
        room = max(high - low, 0.01 * by)
        axes.set_xlim(low - 0.04 * room, high + 0.38 * room)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        for place, row in enumerate(contest.rows):
            own = colour(row)
            axes.plot([by * row.score.low, by * row.score.high], [place, place], color=own, linewidth=2.2,
                      alpha=0.55, solid_capstyle="round")  # fmt: skip
            axes.plot(by * row.score.mean, place, marker=MARKERS[own], color=own, markersize=8, zorder=3,
                      markerfacecolor="white" if tied and row.contender not in tied else own,
                      markeredgewidth=1.6)  # fmt: skip
            axes.annotate(plus_minus(metric, row.score), (high + 0.05 * room, place), va="center", fontsize=10)
            axes.annotate(short_count(row.trainable), (high + 0.37 * room, place), va="center", ha="right",
                          fontsize=10, color=MUTED)  # fmt: skip
        unit = ", %" if metric.percent else ""
        axes.annotate(f"{metric.name}{unit}", (high + 0.05 * room, -0.95), va="center", fontsize=9, color=MUTED,
                      annotation_clip=False)  # fmt: skip
        axes.annotate("trainable", (high + 0.37 * room, -0.95), va="center", ha="right", fontsize=9, color=MUTED,
                      annotation_clip=False)  # fmt: skip
        axes.set_yticks(range(len(contest.rows)), [row.contender for row in contest.rows], color=INK)
        axes.set_ylim(len(contest.rows) - 0.4, -0.6)
        axes.set_axisbelow(True)
        axes.set_xticks([tick for tick in axes.get_xticks() if low - 0.04 * room <= tick <= high + 0.02 * room])
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(
            f"{metric.name}{' (%)' if metric.percent else ''} with 95 % interval"
            + ("; filled: cannot be told from the best" if tied else "")
        )
        bottom = 0.62 / (1.15 + 0.36 * len(contest.rows))
        figure.subplots_adjust(left=0.16, right=0.985, top=1 - 0.62 * bottom, bottom=bottom)
    return figure
