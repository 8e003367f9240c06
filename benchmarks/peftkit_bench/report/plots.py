"""Findings -> plots, as matplotlib figures and as SVG that follows the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from peftkit_bench.report.findings import Findings, Row, percent

INK, MUTED, GRID, ACCENT, OWN, BASE, BAND = "#1b1f24", "#5b6470", "#dfe3e8", "#2563c9", "#b4560e", "#3d4650", "#eef3fb"
"""Text, secondary text, grid, methods at the budget, methods of a size of their own, baselines, the budget's band."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", OWN: "--own", BASE: "--base",
             BAND: "--band"}  # fmt: skip
"""The page's variable for each colour."""
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "peftkit",
}
STACK_PIXELS = 12
"""Points nearer than this along x are spread sideways."""
COLUMN_PIXELS = 80
"""Points nearer than this along x have their labels in one column."""
DODGE_PIXELS = 9
LINE_PIXELS = 21
MARKERS = {ACCENT: "o", OWN: "D", BASE: "s"}


@dataclass(frozen=True)
class Label:
    """A label of the accuracy plot, for checks on overlaps."""

    name: str
    text: Any

    def box(self) -> Bbox:
        """Where the text stands, in pixels, the line to its point left out."""
        self.text.update_positions(self.text.get_figure().canvas.get_renderer())
        return Text.get_window_extent(self.text)


def colour(row: Row) -> str:
    """Of a row's marker."""
    if row.baseline:
        return BASE
    return ACCENT if row.at_budget else OWN


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    return figure, axes


def accuracy_figure(found: Findings) -> Figure:
    """Accuracy against trainable parameters, with intervals, the Pareto front and a label at each point."""
    return _accuracy(found)[0]


def _accuracy(found: Findings) -> tuple[Figure, list[Label]]:
    with mpl.rc_context(STYLE):
        figure, axes = _figure(11, 6.4)
        rows = found.rows
        counts = [row.trainable for row in rows]
        axes.set_xscale("log")
        span = max(math.log10(max(counts) / min(counts)), 1.0)
        axes.set_xlim(min(counts) / 10 ** (0.06 * span), max(counts) * 10 ** (0.06 * span))
        low = min(100 * row.accuracy.low for row in rows)
        high = max(100 * row.accuracy.high for row in rows)
        pad = 0.06 * max(high - low, 1.0)
        axes.set_ylim(low - 1.6 * pad, high + pad)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("trainable parameters, head included (log scale)")
        axes.set_ylabel("accuracy on the test split (%)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(length=0, pad=6)
        figure.subplots_adjust(left=0.075, right=0.985, top=0.875, bottom=0.11)
        figure.canvas.draw()
        places = _places(axes, rows)
        _band(axes, found, places)
        _front(axes, found, places)
        for row in rows:
            _draw_point(axes, row, places[row.name][0])
        labels: list[Label] = []
        for cluster in _chains(rows, {name: x for name, (x, _) in places.items()}, COLUMN_PIXELS):
            labels += _label_cluster(axes, cluster, places, rows, labels)
        _legend(axes, found)
        seeds = len({seed for row in rows for seed in row.seeds})
        axes.set_title(
            f"{found.first.title}  ·  {seeds} seed{'s' * (seeds != 1)}, {len(found.first.labels):,} test texts",
            loc="left", fontsize=12.5, fontweight="bold", pad=30,
        )  # fmt: skip
    return figure, labels


def short_count(value: float) -> str:
    """A count as a person says it: 3k, 75k, 22.7M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


Place = tuple[float, float]
"""Where a point is drawn, in pixels."""


def _band(axes: Any, found: Findings, places: Mapping[str, Place]) -> None:
    """Shades the place of the budget."""
    inside = [row for row in found.rows if row.at_budget]
    budget = found.first.budget
    if len(inside) < 2 or budget is None:
        return
    left, right = (pick(places[row.name][0] for row in inside) for pick in (min, max))
    low, high = (axes.transData.inverted().transform((x, 0))[0] for x in (left - 14, right + 14))
    axes.axvspan(low, high, color=BAND, linewidth=0, zorder=0)
    axes.annotate(
        f"equal budget\n{short_count(budget)} + head", (math.sqrt(low * high), 0.012),
        xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9, color=MUTED,
    )  # fmt: skip


def _front(axes: Any, found: Findings, places: Mapping[str, Place]) -> None:
    drawn = [axes.transData.inverted().transform(places[name]) for name in found.front]
    if len(drawn) > 1:
        axes.plot(*zip(*drawn, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)


def _places(axes: Any, rows: Sequence[Row]) -> dict[str, Place]:
    """Where each point is drawn: at its own place, or side by side in order of accuracy where several would hide."""
    at = {row.name: axes.transData.transform((row.trainable, 100 * row.accuracy.mean)) for row in rows}
    found = {}
    for stack in _chains(rows, {name: x for name, (x, _) in at.items()}, STACK_PIXELS):
        ordered = sorted(stack, key=lambda row: row.accuracy.mean)
        middle = sum(at[row.name][0] for row in ordered) / len(ordered)
        for index, row in enumerate(ordered):
            found[row.name] = (middle + (index - (len(ordered) - 1) / 2) * DODGE_PIXELS, float(at[row.name][1]))
    return found


def _chains(rows: Sequence[Row], xs: Mapping[str, float], gap: float) -> list[list[Row]]:
    """Rows of one kind in runs of neighbours along x that are nearer than `gap` to each other."""
    found: list[list[Row]] = []
    for kind in (True, False):
        last = -math.inf
        for row in sorted((r for r in rows if r.at_budget is kind), key=lambda r: xs[r.name]):
            if xs[row.name] - last < gap:
                found[-1].append(row)
            else:
                found.append([row])
            last = xs[row.name]
    return found


def _draw_point(axes: Any, row: Row, x: float) -> None:
    own, y = colour(row), 100 * row.accuracy.mean
    axes.errorbar(
        axes.transData.inverted().transform((x, 0))[0], y,
        yerr=[[y - 100 * row.accuracy.low], [100 * row.accuracy.high - y]],
        fmt=MARKERS[own], color=own, markersize=7.5, elinewidth=1.3, capsize=0,
        markeredgecolor="white", markeredgewidth=0.8, zorder=4,
    )  # fmt: skip


def _label_cluster(
    axes: Any, cluster: Sequence[Row], places: Mapping[str, Place], rows: Sequence[Row], labels: Sequence[Label]
) -> list[Label]:
    """Labels in a column beside the cluster, on the side where they hide less."""
    names = {row.name for row in cluster}
    others = [_bar_box(axes, row, places[row.name][0]) for row in rows if row.name not in names]
    inside = axes.get_window_extent()

    def hidden(made: Sequence[Label]) -> int:
        boxes = [label.box() for label in made]
        over = sum(bool(box.overlaps(other)) for box in boxes for other in others)
        over += 5 * sum(bool(box.overlaps(label.box())) for box in boxes for label in labels)
        return over + 10 * sum(bool(box.x0 < inside.x0 or box.x1 > axes.figure.bbox.x1) for box in boxes)

    right = _column(axes, cluster, places, side=1)
    cost = hidden(right)
    if not cost:
        return right
    left = _column(axes, cluster, places, side=-1)
    worse, better = (left, right) if hidden(left) >= cost else (right, left)
    for label in worse:
        label.text.remove()
    return better


def _bar_box(axes: Any, row: Row, x: float) -> Bbox:
    low, high = (axes.transData.transform((1, 100 * end))[1] for end in (row.accuracy.low, row.accuracy.high))
    return Bbox([[x - 6, low], [x + 6, high]])


def _column(axes: Any, cluster: Sequence[Row], places: Mapping[str, Place], side: int) -> list[Label]:
    back = axes.transData.inverted().transform
    ordered = sorted(cluster, key=lambda row: row.accuracy.mean)
    ends = (axes.transData.transform((1, edge))[1] for edge in axes.get_ylim())
    heights = spread([places[row.name][1] for row in ordered], LINE_PIXELS, *ends)
    edge = max(side * places[row.name][0] for row in ordered) * side
    column = edge + side * (13 if len(ordered) == 1 else 30)
    labels = []
    for row, height in zip(ordered, heights, strict=True):
        own = colour(row)
        text = axes.annotate(
            f"{row.name}  {percent(row.accuracy.mean)}", xy=back(places[row.name]), xytext=back((column, height)),
            fontsize=10, color=own, va="center", ha="left" if side > 0 else "right", zorder=6,
            fontweight="bold" if row.baseline else "normal",
            # Readable where it lies on a line.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            arrowprops=None if len(ordered) == 1 else {
                "arrowstyle": "-", "color": own, "linewidth": 0.7, "alpha": 0.5, "shrinkA": 1, "shrinkB": 5,
                "relpos": ((1 - side) / 2, 0.5),
            },
        )  # fmt: skip
        labels.append(Label(row.name, text))
    return labels


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights at least `gap` apart, within the ends where they fit, as near to the wanted ones as may be."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Neighbours that would overlap are joined into blocks, each centred on the mean of what its members want.
    blocks: list[list[int]] = []

    def centre(block: list[int]) -> float:
        half = gap * (len(block) - 1) / 2
        middle = sum(wanted[i] for i in block) / len(block)
        return min(max(middle, low + gap / 2 + half), high - gap / 2 - half)

    for index in order:
        blocks.append([index])
        while len(blocks) > 1:
            below, above = blocks[-2], blocks[-1]
            if centre(above) - centre(below) >= gap * (len(above) + len(below)) / 2:
                break
            blocks[-2:] = [below + above]
    found = [0.0] * len(wanted)
    for block in blocks:
        start = centre(block) - gap * (len(block) - 1) / 2
        for position, index in enumerate(block):
            found[index] = start + gap * position
    return found


def _legend(axes: Any, found: Findings) -> None:
    kinds = [(ACCENT, "size solved for the budget"), (OWN, "size of its own"), (BASE, "baseline")]
    present = {colour(row) for row in found.rows}
    handles = [
        axes.plot([], [], linestyle="", marker=MARKERS[c], color=c, markersize=7)[0] for c, _ in kinds if c in present
    ]
    names = [name for c, name in kinds if c in present]
    if len(found.front) > 1:
        handles.append(axes.plot([], [], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))[0])
        names.append("Pareto front")
    handles.append(axes.plot([], [], color=MUTED, linewidth=1.3, marker="|", linestyle="-")[0])
    names.append("95 % interval")
    axes.legend(
        handles, names, loc="lower left", bbox_to_anchor=(-0.012, 1.0), frameon=False, fontsize=9, ncols=len(names),
        labelcolor=MUTED, handletextpad=0.4, columnspacing=1.4, borderaxespad=0.3,
    )  # fmt: skip


def ranking_figure(found: Findings) -> Figure:
    """Accuracies with intervals, best first; filled markers cannot be told from the best."""
    tied = {row.name for row in found.tied_with_best()} if found.comparisons else set()
    with mpl.rc_context(STYLE):
        figure, axes = _figure(11, 1.15 + 0.36 * len(found.rows))
        low = min(100 * row.accuracy.low for row in found.rows)
        high = max(100 * row.accuracy.high for row in found.rows)
        room = max(high - low, 1.0)
        axes.set_xlim(low - 0.04 * room, high + 0.34 * room)
        for place, row in enumerate(found.rows):
            value, own = 100 * row.accuracy.mean, colour(row)
            axes.plot([100 * row.accuracy.low, 100 * row.accuracy.high], [place, place], color=own, linewidth=2.2,
                      alpha=0.55, solid_capstyle="round")  # fmt: skip
            axes.plot(value, place, marker=MARKERS[own], color=own, markersize=8, zorder=3,
                      markerfacecolor="white" if tied and row.name not in tied else own,
                      markeredgewidth=1.6)  # fmt: skip
            axes.annotate(
                f"{percent(row.accuracy.mean)} ± {percent(row.accuracy.half_width)}",
                (high + 0.04 * room, place), va="center", fontsize=10,
            )  # fmt: skip
            axes.annotate(
                short_count(row.trainable),
                (high + 0.33 * room, place),
                va="center",
                ha="right",
                fontsize=10,
                color=MUTED,
            )
        axes.annotate("accuracy, %", (high + 0.04 * room, -0.95), va="center", fontsize=9, color=MUTED,
                      annotation_clip=False)  # fmt: skip
        axes.annotate("trainable", (high + 0.33 * room, -0.95), va="center", ha="right", fontsize=9, color=MUTED,
                      annotation_clip=False)  # fmt: skip
        axes.set_yticks(range(len(found.rows)), [row.name for row in found.rows], color=INK)
        axes.set_ylim(len(found.rows) - 0.4, -0.6)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xticks([tick for tick in axes.get_xticks() if low - 0.04 * room <= tick <= high + 0.02 * room])
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(
            "accuracy (%) with 95 % interval; filled: cannot be told from the best"
            if tied else "accuracy (%) with 95 % interval"
        )  # fmt: skip
        bottom = 0.62 / (1.15 + 0.36 * len(found.rows))
        figure.subplots_adjust(left=0.16, right=0.985, top=1 - 0.62 * bottom, bottom=bottom)
    return figure


def save_svg(figure: Figure, path: Path) -> None:
    """Writes the figure as an SVG file that is the same whenever it is made."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def svg(figure: Figure) -> str:
    """The figure as an SVG element with the page's colour variables in place of fixed colours."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for fixed, variable in VARIABLES.items():
        text = text.replace(fixed, f"var({variable})")
    text = re.sub(r"(?:#ffffff|white)\b", "var(--paper)", text)
    # The page decides the size; the viewBox keeps the shape.
    return re.sub(
        r'^(<svg[^>]*?) height="[^"]*"', r"\1", re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1), count=1
    )


def unique_ids(text: str, prefix: str) -> str:
    """The SVG with a prefix to its ids, so that several can stand on one page."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
