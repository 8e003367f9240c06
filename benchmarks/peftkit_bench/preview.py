"""What a run would do: its cells, the exact counts, and what memory and time they are predicted to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from peftkit_bench import subjects
from peftkit_bench.cells import Candidate
from peftkit_bench.engine import Part, duration, planned
from peftkit_bench.forecast import Forecast, Speed, forecast, machine_speed
from peftkit_bench.metrics import METRICS
from peftkit_bench.suite import Suite, load
from peftkit_bench.tasks.contract import Prepared

HEADINGS = ("contender", "budget", "size", "trainable", "head", "learning rate", "cells", "peak MB", "time")


def text(suites: Sequence[Suite] | Path) -> str:
    """A table of contenders with solved sizes, counts, cells, memory and time; nothing is run."""
    speed = machine_speed()
    return "\n\n".join(_part(part, speed) for part in planned(load(suites) if isinstance(suites, Path) else suites))


def _part(part: Part, speed: Speed) -> str:
    suite, prepared = part.suite, part.prepared
    rows: list[Sequence[str]] = [HEADINGS]
    seconds, cells, approximate = 0.0, 0, False
    for candidate in part.candidates:
        searched = _search_cells(suite, candidate)
        found = predicted(suite, prepared, candidate, speed)
        mine = searched + len(suite.seeds)
        seconds += found.seconds * mine
        cells += mine
        approximate |= found.approximate
        rows.append(_row(suite, candidate, mine, found))
    head = [
        f"{suite.title}: {cells} cells on {torch.cuda.device_count() or 'no'} GPU, "
        f"{METRICS[suite.task.metric].name} on the test split of {len(prepared.splits['test']):,} rows",
        f"backbone: {prepared.backbone['name']}, {prepared.backbone['parameters']:,} parameters with the head",
        f"data: {prepared.data['name']}, "
        + ", ".join(f"{name} {len(prepared.splits[name]):,}" for name in ("train", "tune", "stop", "test")),
        *(f"data: {note}" for note in prepared.data["notes"]),
    ]
    if suite.tune is not None:
        how = f"{suite.tune.trials} trials" if suite.tune.trials else f"{len(suite.tune.learning_rates)} learning rates"
        head.append(f"search: {how} for each contender on the tune split; a grid grows where its best lies at an end")
    tail = [f"in all about {duration(seconds)} with one cell at a time; times are right within a factor of two or so"]
    if approximate:
        tail.append("~: this model cannot be traced without its weights, so that the numbers are rough")
    return "\n".join([*head, "", *_aligned(rows), "", *tail])


def _search_cells(suite: Suite, candidate: Candidate) -> int:
    """Runs of a candidate's search before its grid grows."""
    if suite.tune is None or not candidate.searches:
        return 0
    return (suite.tune.trials or len(suite.tune.learning_rates)) * len(suite.tune.seeds)


def predicted(suite: Suite, prepared: Prepared, candidate: Candidate, speed: Speed) -> Forecast:
    """Memory and time of one cell."""
    return forecast(
        suite.task,
        prepared,
        subjects.subject(candidate.contender.subject),
        candidate.contender,
        candidate.resolved,
        batch_size=suite.training.batch_size // suite.training.accumulation,
        steps=suite.training.steps * suite.training.accumulation,
        evaluations=suite.training.evaluations,
        evaluated_rows={name: len(split) for name, split in prepared.splits.items()},
        speed=speed,
        precision=suite.training.precision,
    )


def _row(suite: Suite, candidate: Candidate, cells: int, found: Forecast) -> Sequence[str]:
    resolved = candidate.resolved
    size = f"{resolved.knob}={resolved.fields[resolved.knob]}" if resolved.knob else "its own"
    if suite.tune is not None:
        rates = suite.tune.learning_rates
        rate = f"{rates[0]:g} to {rates[-1]:g}" if candidate.searches else "as searched"
    else:
        rate = f"{candidate.contender.learning_rate or suite.training.head_learning_rate:g}"
    off = candidate.budget is not None and abs(resolved.adapter_parameters / candidate.budget - 1) > 0.1
    mark = "~" if found.approximate else ""
    return (
        candidate.name,
        f"{candidate.budget:,}{' (nearest)' if off else ''}" if candidate.budget else "-",
        size,
        f"{resolved.adapter_parameters:,}",
        f"{resolved.head_parameters:,}",
        rate,
        str(cells),
        f"{mark}{found.peak_bytes / 1e6:,.0f}",
        f"{mark}{duration(found.seconds * cells)}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 2)

    def line(row: Sequence[str]) -> str:
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in sized]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
