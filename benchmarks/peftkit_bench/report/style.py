"""What all plots share: colours that follow the page, fonts, figures, and figures as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, OWN, BASE, BAND = "#1b1f24", "#5b6470", "#dfe3e8", "#2563c9", "#b4560e", "#3d4650", "#eef3fb"
"""Text, secondary text, grid, methods at the budget, methods of a size of their own, baselines, the budget's band."""
PALETTE = (ACCENT, "#c02f3e", "#1a7f4b", "#7a3fb8", OWN, "#0b7c86", "#b8327f", "#7a6a00", "#7b4b2a", "#4d7d0f")
"""Curves of several methods in one plot."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", OWN: "--own", BASE: "--base",
             BAND: "--band"} | {c: f"--c{i}" for i, c in enumerate(PALETTE) if c not in (ACCENT, OWN)}  # fmt: skip
"""The page's variable for each colour."""
MARKERS = ("o", "s", "^", "v", "P", "X", "p", "h", "<", ">")
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
WIDTH = 11.0
"""Inches of every figure."""
PNG_DPI = 200


def figure(height: float) -> tuple[Figure, Any]:
    """A figure of the common width with one pair of axes."""
    made = Figure(figsize=(WIDTH, height), dpi=100)
    FigureCanvasAgg(made)
    return made, made.add_subplot()


def panels(count: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each of `count`, row by row; panels that are not needed are taken away.

    Args:
        height: of a panel, inches.
        shared: `sharex`, `sharey`.
    """
    rows = -(-count // columns)
    made = Figure(figsize=(WIDTH, rows * height + 1.15), dpi=100)
    FigureCanvasAgg(made)
    grid = made.subplots(rows, columns, squeeze=False, **shared)
    found = list(grid.flat)
    for unused in found[count:]:
        unused.remove()
    for place, axes in enumerate(found[:count]):
        plain(axes)
        # Shared axes are labelled below the last panel of each column only.
        axes.tick_params(
            labelbottom=place + columns >= count, labelleft=not shared.get("sharey") or not place % columns
        )
    inch = 1 / (rows * height + 1.15)
    made.subplots_adjust(left=0.062, right=0.988, top=1 - 0.9 * inch, bottom=0.32 * inch, hspace=0.36, wspace=0.12)
    return made, found[:count]


def plain(axes: Any) -> None:
    """Axes with a light grid and no tick marks."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def headline(made: Figure, text: str, below: str = "") -> None:
    """A title at the left, and a muted line below it."""
    inch = 1 / made.get_figheight()
    made.text(0.012, 1 - 0.1 * inch, text, fontsize=12.5, fontweight="bold", va="top")
    if below:
        made.text(0.012, 1 - 0.34 * inch, below, fontsize=9, color=MUTED, va="top")


def budget_alpha(place: int, count: int) -> float:
    """How strong the colour of a budget is: the larger the stronger."""
    return 1.0 if count < 2 else 0.4 + 0.6 * place / (count - 1)


def write_figure(made: Figure, folder: Path, name: str, dpi: int = PNG_DPI) -> str:
    """Writes the figure as PNG and SVG, the latter the same whenever it is made, and returns it as an SVG element.

    The element has the page's colour variables in place of fixed colours, and no size of its own.
    """
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        made.savefig(folder / f"{name}.png", dpi=dpi, facecolor="white")
        made.savefig(stream, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = _rounded(stream.getvalue())
    (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    for fixed, variable in VARIABLES.items():
        text = text.replace(fixed, f"var({variable})")
    text = re.sub(r"(?:#ffffff|white)\b", "var(--paper)", text)
    # The page decides the size; the viewBox keeps the shape.
    for side in ("width", "height"):
        text = re.sub(rf'^(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    return _unique_ids(text, name.replace(".", "_"))


def _rounded(text: str) -> str:
    """The SVG with its places to a hundredth of a pixel: a third less to load."""

    def shorter(found: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", found[0])

    return re.sub(r' (?:d|x|y|points)="[^"]*"|translate\([^)]*\)', shorter, text)


def _unique_ids(text: str, prefix: str) -> str:
    """The SVG with a prefix to its ids, so that several can stand on one page."""
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)


def ends(values: Sequence[float], share: float = 0.06, least: float = 0.0) -> tuple[float, float]:
    """The lowest and highest of the values with room around them.

    Args:
        share: of their distance, kept free at each end.
        least: the distance is taken to be at least this.
    """
    low, high = min(values), max(values)
    room = share * max(high - low, least)
    return low - room, high + room
