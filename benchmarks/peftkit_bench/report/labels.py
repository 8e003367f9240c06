"""Labels of points that do not hide each other: in a column beside a cluster, or wherever there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.text import Text
from matplotlib.transforms import Bbox

STACK_PIXELS = 12
"""Points nearer than this along x are spread sideways."""
COLUMN_PIXELS = 80
"""Points nearer than this along x have their labels in one column."""
DODGE_PIXELS = 9
LINE_PIXELS = 21


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a plot with its label; places are in pixels."""

    name: str
    text: str
    colour: str
    bold: bool
    kind: str
    """Points of different kinds are never labelled in one column."""
    x: float
    y: float
    low: float
    """Lower end of the bar."""
    high: float

    @property
    def box(self) -> Bbox:
        """What its marker and bar cover."""
        return Bbox([[self.x - 6, min(self.low, self.y - 6)], [self.x + 6, max(self.high, self.y + 6)]])


@dataclass(frozen=True)
class Label:
    """A label that was placed, for checks on overlaps."""

    name: str
    text: Any

    def box(self) -> Bbox:
        """Where the text stands, in pixels, the line to its point left out."""
        self.text.update_positions(self.text.get_figure().canvas.get_renderer())
        return Text.get_window_extent(self.text)


def chains(points: Sequence[Point], gap: float) -> list[list[Point]]:
    """Points of one kind in runs of neighbours along x that are nearer than `gap` to each other."""
    found: list[list[Point]] = []
    for kind in sorted({point.kind for point in points}):
        last = -math.inf
        for point in sorted((p for p in points if p.kind == kind), key=lambda p: p.x):
            if point.x - last < gap:
                found[-1].append(point)
            else:
                found.append([point])
            last = point.x
    return found


def dodged(points: Sequence[Point]) -> list[Point]:
    """Each at its own place, or side by side in order of height where several would hide each other."""
    found = []
    for stack in chains(points, STACK_PIXELS):
        ordered = sorted(stack, key=lambda p: p.y)
        middle = sum(p.x for p in ordered) / len(ordered)
        for index, point in enumerate(ordered):
            found.append(replace(point, x=middle + (index - (len(ordered) - 1) / 2) * DODGE_PIXELS))
    return found


def label_clusters(axes: Any, clusters: Sequence[Sequence[Point]], points: Sequence[Point]) -> list[Label]:
    """Labels for clusters of points, each in a column beside its cluster.

    Args:
        points: all that is drawn and should not be hidden.
    """
    labels: list[Label] = []
    for cluster in clusters:
        labels += _label_cluster(axes, cluster, points, labels)
    return labels


def _label_cluster(
    axes: Any, cluster: Sequence[Point], points: Sequence[Point], labels: Sequence[Label]
) -> list[Label]:
    """On the side where the labels hide less."""
    names = {point.name for point in cluster}
    others = [point.box for point in points if point.name not in names]
    inside = axes.get_window_extent()

    def hidden(made: Sequence[Label]) -> int:
        boxes = [label.box() for label in made]
        over = sum(bool(box.overlaps(other)) for box in boxes for other in others)
        over += 5 * sum(bool(box.overlaps(label.box())) for box in boxes for label in labels)
        return over + 10 * sum(bool(box.x0 < inside.x0 or box.x1 > axes.figure.bbox.x1) for box in boxes)

    right = _column(axes, cluster, side=1)
    cost = hidden(right)
    if not cost:
        return right
    left = _column(axes, cluster, side=-1)
    worse, better = (left, right) if hidden(left) >= cost else (right, left)
    for label in worse:
        label.text.remove()
    return better


def _column(axes: Any, cluster: Sequence[Point], side: int) -> list[Label]:
    ordered = sorted(cluster, key=lambda p: p.y)
    limits = (axes.transData.transform((1, edge))[1] for edge in sorted(axes.get_ylim()))
    heights = spread([p.y for p in ordered], LINE_PIXELS, *limits)
    edge = max(side * p.x for p in ordered) * side
    column = edge + side * (13 if len(ordered) == 1 else 30)
    return [
        _label(axes, point, column, height, side, line=len(ordered) > 1)
        for point, height in zip(ordered, heights, strict=True)
    ]


def _label(axes: Any, point: Point, x: float, y: float, side: int, line: bool) -> Label:
    back = axes.transData.inverted().transform
    text = axes.annotate(
        point.text, xy=back((point.x, point.y)), xytext=back((x, y)), fontsize=10, color=point.colour, va="center",
        ha="left" if side > 0 else "right", zorder=6, fontweight="bold" if point.bold else "normal",
        # Readable where it lies on a line.
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        arrowprops=None if not line else {
            "arrowstyle": "-", "color": point.colour, "linewidth": 0.7, "alpha": 0.5, "shrinkA": 1, "shrinkB": 5,
            "relpos": ((1 - side) / 2, 0.5),
        },
    )  # fmt: skip
    return Label(point.name, text)


def label_anywhere(axes: Any, points: Sequence[Point], others: Sequence[Point] = ()) -> list[Label]:
    """A label for each point at the nearest of some places around it where it hides nothing.

    Args:
        others: points without a label, which should not be hidden either.
    """
    labels: list[Label] = []
    boxes = {point.name: point.box for point in (*points, *others)}
    inside = axes.get_window_extent()
    for point in sorted(points, key=lambda p: -p.y):
        taken = [box for name, box in boxes.items() if name != point.name]
        best: tuple[float, Label] | None = None
        for distance in (13, 24, 40, 60, 85):
            for angle in (0, 180, 35, -35, 145, -145, 70, -70, 110, -110):
                side = 1 if abs(angle) < 90 else -1
                x = point.x + distance * math.cos(math.radians(angle))
                y = point.y + distance * math.sin(math.radians(angle))
                made = _label(axes, point, x, y, side, line=distance > 24)
                box = made.box()
                over = sum(bool(box.overlaps(other)) for other in taken)
                over += 5 * sum(bool(box.overlaps(label.box())) for label in labels)
                over += 10 * bool(box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1)
                if best is None or over < best[0]:
                    if best is not None:
                        best[1].text.remove()
                    best = (over, made)
                else:
                    made.text.remove()
                if not over:
                    break
            if best is not None and not best[0]:
                break
        assert best is not None
        labels.append(best[1])
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
