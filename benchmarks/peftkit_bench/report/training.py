"""Records -> curves of training: loss by step, and the score on the stop split with the step that was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from peftkit_bench.report import style
from peftkit_bench.report.findings import Findings, Row
from peftkit_bench.report.marks import scale
from peftkit_bench.report.matching import short_count
from peftkit_bench.report.rates import add_budgets
from peftkit_bench.report.style import ACCENT, OWN, STYLE

COLUMNS = 4
MOST_POINTS = 120
"""Of a curve; longer ones are thinned out."""


def window(steps: int) -> int:
    """Steps whose losses are averaged for one point of a curve."""
    return max(1, steps // 25)


def losses_figure(found: Findings) -> Figure | None:
    """Training loss by step for each contender; None where no losses were recorded."""
    rows = [row for row in found.rows if any(record.losses for record in row.records)]
    if not rows:
        return None
    steps = max(len(record.losses) for row in rows for record in row.records)
    smooth = f", mean of {window(steps)} steps" if window(steps) > 1 else ""
    return _figure(
        found, rows, f"Training loss  ·  {found.first.title}",
        f"by step{smooth}: median over seeds, and the band from the lowest to the highest seed", _draw_losses,
        _loss_limits(rows),
    )  # fmt: skip


def stopping_figure(found: Findings) -> Figure | None:
    """Value on the stop split by step for each contender, the kept step marked; None where nothing was measured."""
    rows = [row for row in found.rows if any(record.stopping for record in row.records)]
    if not rows:
        return None
    measure = next(record.stopping_measure for record in rows[0].records)
    own = measure == found.metric.name
    by = scale(found.metric) if own else 1.0
    values = [by * value for row in rows for record in row.records for _, value in record.stopping]
    percent = " in %" if own and found.metric.percent else ""
    better = "" if own and found.metric.higher_is_better else ", lower is better"

    def draw(axes: Any, row: Row, alpha: float) -> None:
        _draw_stopping(axes, row, alpha, by)

    high = max(values) if percent else min(max(values), 4 * float(np.median(values)))
    return _figure(
        found, rows, f"The stop split during training  ·  {found.first.title}",
        f"{measure}{percent}{better}, by step: a line a seed; ring: the step whose weights were kept", draw,
        style.ends([min(values), high], 0.08, 0.01 * by),
    )  # fmt: skip


def _loss_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Ends of the axis, without the few largest losses of the first steps or of a run that diverged."""
    smoothed = [_smooth(np.asarray(record.losses))[1] for row in rows for record in row.records if record.losses]
    every = np.concatenate(smoothed)
    return style.ends([float(every.min()), float(np.quantile(every, 0.98))], 0.08, 1e-3)


def _figure(
    found: Findings, rows: Sequence[Row], title: str, below: str, draw: Callable[[Any, Row, float], None],
    limits: tuple[float, float],
) -> Figure:  # fmt: skip
    curves = {name: [row for row in mine if row in rows] for name, mine in found.curves().items()}
    curves = {name: mine for name, mine in curves.items() if mine}
    with mpl.rc_context(STYLE):
        figure, panels = style.panels(len(curves), COLUMNS, 1.75, sharex=True, sharey=True)
        for axes, (name, mine) in zip(panels, curves.items(), strict=True):
            axes.set_title(name, loc="left", fontsize=10.5, pad=4)
            for row in mine:
                place = found.budgets.index(row.budget) if row.budget is not None else len(found.budgets) - 1
                draw(axes, row, style.budget_alpha(max(place, 0), len(found.budgets)))
        panels[0].set_ylim(*limits)
        panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        style.headline(figure, title, below)
        if len(found.budgets) > 1:
            add_budgets(figure, found.budgets, markers=False)
    return figure


def _smooth(losses: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and the mean losses of the steps up to each, thinned out."""
    width = window(len(losses))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    steps = np.arange(width, len(losses) + 1, dtype=np.float64)
    every = max(1, len(means) // MOST_POINTS)
    # The last step is kept, whatever the thinning.
    return steps[::-1][::every][::-1], means[::-1][::every][::-1]


def _draw_losses(axes: Any, row: Row, alpha: float) -> None:
    runs = [_smooth(np.asarray(record.losses)) for record in row.records if record.losses]
    shortest = min(len(steps) for steps, _ in runs)
    # Runs that were stopped early are shorter: what all seeds have is drawn.
    together = np.stack([means[:shortest] for _, means in runs])
    steps = runs[0][0][:shortest]
    axes.plot(steps, np.median(together, axis=0), color=ACCENT, alpha=alpha, linewidth=1.3, zorder=3)
    if len(runs) > 1:
        axes.fill_between(steps, together.min(axis=0), together.max(axis=0), color=ACCENT, alpha=0.18 * alpha,
                          linewidth=0, zorder=2)  # fmt: skip


def _draw_stopping(axes: Any, row: Row, alpha: float, by: float) -> None:
    for record in row.records:
        if not record.stopping:
            continue
        steps, scores = zip(*record.stopping, strict=True)
        axes.plot(steps, [by * score for score in scores], color=ACCENT, alpha=0.7 * alpha, linewidth=1.1, zorder=2)
        kept = [by * score for step, score in record.stopping if step == record.best_step]
        if kept:
            axes.plot([record.best_step], kept[:1], "o", color=OWN, markersize=6.5, markerfacecolor="none",
                      markeredgewidth=1.3, alpha=max(alpha, 0.6), zorder=3)  # fmt: skip
