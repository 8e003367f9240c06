"""Reports made in tests: written from made-up records, with or without drawing the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from bench_records import write
from markupsafe import Markup
from matplotlib.figure import Figure
from peftkit_bench import report
from peftkit_bench.record import AnyRecord
from peftkit_bench.report import costs, forgetting, page, plots, ranks, rates, training


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their plots: in their places stand names."""
    nothing = Figure()
    monkeypatch.setattr(plots, "score_figure", lambda *_: (nothing, []))
    monkeypatch.setattr(
        forgetting, "forgetting_figure",
        lambda found: (nothing, []) if any(row.forgotten is not None for row in found.rows) else None,
    )  # fmt: skip
    for module, name in (
        (plots, "ranking_figure"), (rates, "rates_figure"), (costs, "costs_figure"), (ranks, "ranks_figure"),
        (training, "losses_figure"), (training, "stopping_figure"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_: nothing)

    def stand_in(self: page._Plotter, name: str, _: Figure, alt: str, caption: str = "") -> page.Plot:
        return page.Plot(f"{name}{self.suffix}.png", Markup("<svg></svg>"), alt, caption)

    monkeypatch.setattr(page._Plotter, "__call__", stand_in)


def written(folder: Path, records: Sequence[AnyRecord]) -> tuple[str, str]:
    """The report on the records: Markdown and HTML."""
    made = report.write([write(folder / "in", records)], folder / "out")
    assert made == folder / "out" / "index.html"
    return (folder / "out" / "report.md").read_text(), made.read_text()


def line(markdown: str, name: str) -> list[str]:
    """The cells of a method's row in the first table."""
    found = next(row for row in markdown.splitlines() if row.startswith(f"| {name}"))
    return [cell.strip() for cell in found.strip("|").split("|")]
