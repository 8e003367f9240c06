"""Records -> memory, training time and latency of each contender, a panel each, with what they are compared to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peftkit_bench.report import style
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.rates import add_budgets
from peftkit_bench.report.style import ACCENT, INK, MUTED, OWN, STYLE

Read = Callable[[Row], float | None]


@dataclass(frozen=True)
class _Panel:
    title: str
    marks: tuple[tuple[str, bool, Read], ...]
    """Name, whether the marker is filled, and the value of each mark."""
    bare: float | None = None
    """Where the bare backbone would stand."""
    spread: str | None = None
    """The field whose single seeds are drawn as ticks."""


def bytes_unit(largest: float) -> tuple[str, float]:
    """The unit in which bytes are shown, and what they are multiplied by."""
    return ("GB", 1e-9) if largest >= 1e10 else ("MB", 1e-6)


def ratio(row: Row, field: str) -> float | None:
    """A latency over that of the bare backbone in the same process, median over seeds."""
    found: list[float] = [
        getattr(r, field) / r.base_latency_seconds for r in row.records
        if getattr(r, field) is not None and r.base_latency_seconds
    ]  # fmt: skip
    return median(found) if found else None


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    unit, by = bytes_unit(max(value for row in rows for value in row.values("peak_bytes")))

    def memory(field: str) -> Read:
        return lambda row: None if (value := row.median(field)) is None else by * value

    return [
        _Panel(
            f"Memory of training, {unit}",
            (("peak", False, memory("peak_bytes")), ("steady", True, memory("steady_bytes"))),
        ),
        _Panel("Training time, s", (("", True, lambda row: row.median("train_seconds")),), spread="train_seconds"),
        _Panel(
            "Latency ÷ bare backbone's",
            (
                ("unmerged", True, lambda row: ratio(row, "latency_seconds")),
                ("merged", False, lambda row: ratio(row, "merged_latency_seconds")),
            ),
            bare=1.0,
        ),
    ]


def costs_figure(found: Findings) -> Figure:
    """Memory peak and steady, seconds of training and relative latency, a line for each contender."""
    curves = found.curves()
    names = sorted(curves, key=lambda name: max(row.median("peak_bytes") or 0.0 for row in curves[name]))
    several = len(found.budgets)
    line = 0.3 if several < 2 else 0.16 + 0.13 * several
    height = 1.45 + line * len(names)
    panels = _panels(found.rows)
    with mpl.rc_context(STYLE):
        figure, first = style.figure(height)
        first.remove()
        grid = figure.subplots(1, len(panels), sharey=True)
        for axes, panel in zip(grid, panels, strict=True):
            _draw(axes, panel, [curves[name] for name in names], found.budgets)
        grid[0].set_yticks(range(len(names)), names, color=INK)
        grid[0].set_ylim(len(names) - 0.4, -0.6)
        figure.subplots_adjust(left=0.16, right=0.985, top=1 - 1.1 / height, bottom=0.35 / height, wspace=0.07)
        style.headline(
            figure, f"Memory and time  ·  {found.first.title}", "medians over seeds; how they were taken stands below"
        )
        if several > 1:
            add_budgets(figure, found.budgets)
    return figure


def _draw(axes: Any, panel: _Panel, lines: Sequence[Sequence[Row]], budgets: Sequence[int]) -> None:
    style.plain(axes)
    axes.grid(axis="y", linewidth=0)
    axes.spines["left"].set_visible(False)
    for y in range(len(lines)):
        axes.axhline(y, color=style.GRID, linewidth=0.6, zorder=0)
    drawn = [panel.bare] if panel.bare is not None else [0.0]
    for y, rows in enumerate(lines):
        for row in rows:
            place = budgets.index(row.budget) if row.budget is not None else None
            offset = 0.0 if place is None or len(rows) < 2 else 0.22 * (place - (len(budgets) - 1) / 2)
            alpha = 1.0 if place is None else style.budget_alpha(place, len(budgets))
            shape = style.MARKERS[place] if place is not None and len(budgets) > 1 else "o"
            values = [(value, filled) for _, filled, read in panel.marks if (value := read(row)) is not None]
            if panel.spread:
                seeds = row.values(panel.spread)
                axes.plot(
                    seeds, [y + offset] * len(seeds), "|", color=ACCENT, alpha=0.5 * alpha, markersize=7, zorder=2
                )
            axes.plot([value for value, _ in values], [y + offset] * len(values), color=ACCENT, alpha=0.4 * alpha,
                      linewidth=1.2, zorder=1)  # fmt: skip
            for value, filled in values:
                axes.plot([value], [y + offset], shape, color=ACCENT, alpha=alpha, markersize=6, zorder=3,
                          markerfacecolor=ACCENT if filled else "white", markeredgewidth=1.3)  # fmt: skip
                drawn.append(value)
    if panel.bare is not None:
        axes.axvline(panel.bare, color=OWN, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    low, high = style.ends(drawn, 0.06, 0.1)
    axes.set_xlim(0 if panel.bare is None else low, high)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    marks = [f"{'●' if filled else '○'} {name}" for name, filled, _ in panel.marks if name]
    marks += ["| each seed"] if panel.spread else []
    axes.set_title(panel.title, loc="left", fontsize=10.5, pad=18)
    axes.annotate("   ".join(marks), (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points",
                  fontsize=9, color=MUTED, va="bottom")  # fmt: skip
