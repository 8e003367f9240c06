"""Average ranks -> the diagram of critical differences (Demšar 2006, figure 1)."""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.figure import Figure

from peftkit_bench.report import style
from peftkit_bench.report.across import Across
from peftkit_bench.report.style import ACCENT, INK, MUTED, OWN, STYLE

LINE = 0.27
"""Inches from one name to the next."""
BAR = 0.13
"""Inches from one bar to the next."""


def ranks_figure(found: Across) -> Figure:
    """Contenders on an axis of average ranks, best at the left; bars join those that cannot be told apart."""
    made = found.friedman
    count = len(made.methods)
    bars = made.cliques
    left = math.ceil(count / 2)
    top, below = 1.25, 0.22 + BAR * len(bars)
    height = top + below + LINE * left + 0.25
    with mpl.rc_context(STYLE):
        figure, axes = style.figure(height)
        axes.set_position((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set_xlim(0, style.WIDTH)
        axes.set_ylim(height, 0)
        edges = (2.1, style.WIDTH - 2.1)
        lowest, highest = math.floor(made.ranks[0]), max(math.ceil(made.ranks[-1]), math.floor(made.ranks[0]) + 1)

        def at(rank: float) -> float:
            return edges[0] + (edges[1] - edges[0]) * (rank - lowest) / (highest - lowest)

        axes.plot(edges, [top, top], color=MUTED, linewidth=1.1)
        for tick in range(lowest, highest + 1):
            axes.plot([at(tick)] * 2, [top - 0.06, top], color=MUTED, linewidth=1.1)
            axes.text(at(tick), top - 0.1, str(tick), ha="center", va="bottom", fontsize=9.5, color=MUTED)
        # Nothing is wider than the axis: a larger difference is written, not drawn.
        reach = made.critical_difference / (highest - lowest) * (edges[1] - edges[0])
        text = f"critical difference {made.critical_difference:.2f}"
        if reach <= edges[1] - edges[0]:
            axes.plot(
                [edges[0], edges[0] + reach], [top - 0.42] * 2, color=OWN, linewidth=2.2, marker="|", markersize=8
            )
            axes.text(edges[0] + reach + 0.1, top - 0.42, text, va="center", fontsize=9.5, color=OWN)
        else:
            axes.text(
                edges[0], top - 0.42, f"{text}, more than all ranks lie apart", va="center", fontsize=9.5, color=OWN
            )
        for place, clique in enumerate(bars):
            ends = (at(found.rank(clique[0])) - 0.05, at(found.rank(clique[-1])) + 0.05)
            axes.plot(ends, [top + 0.14 + BAR * place] * 2, color=INK, linewidth=3.4, solid_capstyle="round", zorder=3)
        for place, (name, rank) in enumerate(zip(made.methods, made.ranks, strict=True)):
            leftward = place < left
            row = place if leftward else count - 1 - place
            y = top + below + 0.1 + LINE * row
            end = edges[0] - 0.12 if leftward else edges[1] + 0.12
            axes.plot([at(rank), at(rank), end], [top, y, y], color=ACCENT, linewidth=1.0, alpha=0.8, zorder=2)
            axes.plot([at(rank)], [top], "o", color=ACCENT, markersize=5, zorder=4)
            label = f"{name}  {rank:.1f}" if leftward else f"{rank:.1f}  {name}"
            axes.text(end - 0.08 if leftward else end + 0.08, y, label, ha="right" if leftward else "left", va="center",
                      fontsize=10)  # fmt: skip
        where = f" at {found.level}" if found.level else ""
        style.headline(
            figure, f"Average rank over {len(found.tasks)} tasks{where}",
            "1 is best; bars join methods that cannot be told apart (Nemenyi, 5 %)",
        )  # fmt: skip
    return figure
