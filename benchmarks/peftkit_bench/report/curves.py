"""Scores against trainable parameters over several budgets: a curve for each method, labelled at its end."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from peftkit_bench.report import labels
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.labels import Label, Point
from peftkit_bench.report.marks import MARKERS, bar, colour, legend, point, scale
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.sentences import plus_minus, unit
from peftkit_bench.report.style import ACCENT, BAND, BASE, MUTED, OWN, PALETTE
from peftkit_bench.report.style import MARKERS as SHAPES

FAR = 5
"""A baseline that is larger or smaller than all candidates by more than this factor is a line, not a point."""
LETTER_SHARE = 0.0072
"""Of the plot's width, kept free for each letter of the longest label at the end of a curve."""
WIDEST_STEP = 9
"""Pixels between two methods at one budget."""


@dataclass(frozen=True)
class _Layout:
    """What is drawn how."""

    curves: dict[str, list[Row]]
    points: list[Row]
    lines: list[Row]
    """Baselines far away in size."""


def draw(axes: Any, found: Findings) -> list[Label]:
    """Draws the curves, single points, far baselines as lines, and the front; the labels that were placed."""
    layout = _layout(found)
    _limits(axes, found, layout)
    axes.figure.canvas.draw()
    shifts = _shifts(axes, found, layout)
    tints = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(layout.curves)}
    placed: dict[str, Point] = {}
    for i, (name, rows) in enumerate(layout.curves.items()):
        for row in rows:
            at = point(axes, row, found.metric)
            placed[row.name] = replace(at, x=at.x + shifts[name], colour=tints[name])
            bar(axes, row, placed[row.name].x, found.metric, tints[name], SHAPES[i % len(SHAPES)])
        drawn = [axes.transData.inverted().transform((placed[r.name].x, placed[r.name].y)) for r in rows]
        axes.plot(*zip(*drawn, strict=True), color=tints[name], linewidth=1.4, alpha=0.75, zorder=3)
    for single in labels.dodged([point(axes, row, found.metric) for row in layout.points]):
        placed[single.name] = single
        row = found.row(single.name)
        bar(axes, row, single.x, found.metric, colour(row), MARKERS[colour(row)])
    front = [placed[name] for name in found.front if name in placed]
    if len(front) > 1:
        drawn = [axes.transData.inverted().transform((p.x, p.y)) for p in front]
        axes.plot(*zip(*drawn, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    ends = [placed[rows[-1].name] for rows in layout.curves.values()]
    ends = [replace(end, name=found.row(end.name).contender) for end in ends]
    singles = [placed[row.name] for row in layout.points]
    made = labels.label_clusters(axes, [ends, *labels.chains(singles, labels.COLUMN_PIXELS)], list(placed.values()))
    _far_baselines(axes, found, layout)
    _legend(axes, found, layout)
    return made


def _layout(found: Findings) -> _Layout:
    curves = {name: rows for name, rows in found.curves().items() if rows[0].budget is not None}
    candidates = [row.trainable for row in found.rows if not row.baseline]
    single = [row for row in found.rows if row.budget is None]
    if not candidates:
        return _Layout(curves, single, [])
    low, high = min(candidates) / FAR, max(candidates) * FAR
    far = [row for row in single if row.baseline and not low <= row.trainable <= high]
    return _Layout(curves, [row for row in single if row not in far], far)


def _limits(axes: Any, found: Findings, layout: _Layout) -> None:
    rows = [row for mine in layout.curves.values() for row in mine] + layout.points
    counts = [math.log10(max(row.trainable, 1)) for row in rows]
    left, right = min(counts), max(counts)
    last = max(math.log10(mine[-1].trainable) for mine in layout.curves.values())
    span = max(right - left, 0.5)
    # The labels stand right of the last budget, whatever lies further to the right.
    letters = max(len(name) + 2 + len(found.metric.shown(mine[-1].score.mean)) for name, mine in layout.curves.items())
    width = max(span * 1.1, (last - left + 0.05 * span) / (0.91 - LETTER_SHARE * letters))
    by = scale(found.metric)
    low, high = min(by * row.score.low for row in rows), max(by * row.score.high for row in rows)
    room = 0.25 * (high - low)
    near = [row for row in layout.lines if low - room <= by * row.score.mean <= high + room]
    low = min([low, *(by * row.score.low for row in near)])
    high = max([high, *(by * row.score.high for row in near)])
    pad = 0.05 * max(high - low, 0.01 * by)
    axes.set_ylim(low - pad, high + pad)
    ticks = [budget + found.first.head_parameters for budget in found.budgets]
    edges = [math.floor(edge) for edge in (left, left + width)]
    tens = [10.0**power for power in range(edges[0], edges[1] + 1)]
    axes.set_xticks([*ticks, *(ten for ten in tens if all(abs(math.log10(ten / tick)) > 0.15 for tick in ticks))])
    axes.set_xlim(10 ** (left - 0.05 * span), 10 ** (left - 0.05 * span + width))


def _shifts(axes: Any, found: Findings, layout: _Layout) -> dict[str, float]:
    """How far each curve is moved sideways, in pixels, so that intervals at one budget do not hide each other."""
    ordered = sorted(layout.curves, key=lambda name: layout.curves[name][-1].score.mean)
    heads = found.first.head_parameters
    at = [axes.transData.transform((budget + heads, 0))[0] for budget in found.budgets]
    gap = min(b - a for a, b in itertools.pairwise(at))
    step = min(WIDEST_STEP, 0.8 * gap / max(len(ordered), 1))
    for x in at:
        reach = step * len(ordered) / 2
        ends = (axes.transData.inverted().transform((x + side * reach, 0))[0] for side in (-1, 1))
        axes.axvspan(*ends, color=BAND, linewidth=0, zorder=0)
    return {name: (place - (len(ordered) - 1) / 2) * step for place, name in enumerate(ordered)}


def _far_baselines(axes: Any, found: Findings, layout: _Layout) -> None:
    """A dashed line at the score of a baseline of quite another size; a note at the edge where it lies outside."""
    by, (low, high) = scale(found.metric), axes.get_ylim()
    below = 0
    for row in layout.lines:
        value = by * row.score.mean
        text = (
            f"{row.contender}  {plus_minus(found.metric, row.score)}{unit(found.metric)}, "
            f"{short_count(row.trainable)} parameters"
        )
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        if low <= value <= high:
            axes.axhspan(by * row.score.low, by * row.score.high, color=BASE, alpha=0.07, linewidth=0, zorder=0)
            axes.axhline(value, color=BASE, linewidth=1.3, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(text, (0.008, value), xycoords=("axes fraction", "data"), xytext=(0, 9), va="center",
                          textcoords="offset points", fontsize=9.5, fontweight="bold", color=BASE, zorder=2,
                          bbox=box)  # fmt: skip
        else:
            edge = (0.012 + 0.05 * below) if value < low else 0.985
            below += value < low
            axes.annotate(f"{'↓' if value < low else '↑'} {text}", (0.008, edge), xycoords="axes fraction",
                          va="bottom" if value < low else "top", fontsize=9.5, fontweight="bold", color=BASE,
                          zorder=2, bbox=box)  # fmt: skip


def _legend(axes: Any, found: Findings, layout: _Layout) -> None:
    handles = [axes.plot([], [], "-o", color=ACCENT, markersize=6, linewidth=1.4)[0]]
    names = ["size solved for each budget"]
    if any(row.off_budget for row in found.rows):
        handles.append(axes.plot([], [], "o", color=ACCENT, markersize=6, markerfacecolor="white")[0])
        names.append("nearest size it can have")
    if any(not row.baseline for row in layout.points):
        handles.append(axes.plot([], [], "D", color=OWN, markersize=6)[0])
        names.append("size of its own")
    if any(row.baseline for row in layout.points):
        handles.append(axes.plot([], [], "s", color=BASE, markersize=6)[0])
        names.append("baseline")
    if layout.lines:
        handles.append(axes.plot([], [], color=BASE, linewidth=1.3, linestyle=(0, (1, 2)))[0])
        names.append("baseline of another size")
    legend(axes, handles, names, front=len(found.front) > 1)
