"""Records -> what was gained on the task against what was lost on general text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from peftkit_bench.report import labels, style
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.labels import Label, Point
from peftkit_bench.report.marks import MARKERS, colour, scale, score_axis
from peftkit_bench.report.style import MUTED, STYLE


def forgetting_figure(found: Findings) -> tuple[Figure, list[Label]] | None:
    """Score against nats a token lost on general text, with intervals; None where no such text was measured."""
    rows = [row for row in found.rows if row.forgotten is not None]
    if not rows:
        return None
    metric, by = found.metric, scale(found.metric)
    with mpl.rc_context(STYLE):
        figure, axes = style.figure(5.4)
        style.plain(axes)
        lost = [_lost(row) for row in rows]
        low, high = style.ends([0.0, *lost], 0.12, 1e-3)
        axes.set_xlim(low, high)
        axes.set_ylim(
            *style.ends([by * end for row in rows for end in (row.score.low, row.score.high)], 0.06, 0.01 * by)
        )
        axes.axvline(0, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xlabel("loss on general text after training less before, nats a token; right of the line: forgotten")
        axes.set_ylabel(score_axis(metric, found.first.split))
        figure.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.12)
        style.headline(figure, f"Gained and forgotten  ·  {found.first.title}")
        figure.canvas.draw()
        shown: dict[str, list[Point]] = {}
        for row in rows:
            _bar(axes, row, by)
            shown.setdefault(row.contender, []).append(_point(axes, row, by))
        for name, rows_of in found.curves().items():
            inside = [row for row in rows_of if row in rows]
            if len(inside) > 1:
                axes.plot([_lost(row) for row in inside], [by * row.score.mean for row in inside],
                          color=colour(inside[0]), linewidth=1.0, alpha=0.5, zorder=2)  # fmt: skip
            # The label stands at the largest size.
            last = next(p for p in shown[name] if p.name == inside[-1].name) if inside else None
            if last is not None:
                shown[name] = [replace(last, text=name)] + [p for p in shown[name] if p is not last]
        firsts = [mine[0] for mine in shown.values()]
        others = [p for mine in shown.values() for p in mine[1:]]
        made = labels.label_anywhere(axes, firsts, others)
    return figure, made


def _lost(row: Row) -> float:
    assert row.forgotten is not None
    return row.forgotten


def _bar(axes: Any, row: Row, by: float) -> None:
    own = colour(row)
    axes.errorbar([_lost(row)], [by * row.score.mean],
                  yerr=[[by * (row.score.mean - row.score.low)], [by * (row.score.high - row.score.mean)]],
                  fmt=MARKERS[own], color=own, markersize=7, elinewidth=1.1, alpha=0.9,
                  markeredgecolor="white", markeredgewidth=0.8, zorder=4)  # fmt: skip


def _point(axes: Any, row: Row, by: float) -> Point:
    at = axes.transData.transform
    x, y = at((_lost(row), by * row.score.mean))
    return Point(
        name=row.name, text=row.contender, colour=colour(row), bold=row.baseline, kind="", x=float(x), y=float(y),
        # Intervals may be crossed by labels: with many points nothing else is free.
        low=float(y), high=float(y),
    )  # fmt: skip
