"""Runs the cells of a suite and records each as it finishes; what is done stays done, and the report follows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from peftkit.errors import PeftkitError
from peftkit_bench import record, report
from peftkit_bench.cell import Job
from peftkit_bench.cells import Candidate, Cell, candidates, compiled, due, remaining, versions
from peftkit_bench.metrics import METRICS
from peftkit_bench.preparing import prepare
from peftkit_bench.record import Record, RecordError
from peftkit_bench.suite import Suite, load
from peftkit_bench.tasks.contract import Prepared
from peftkit_bench.workers import LocalWorkers, Workers

UNTIL_FAILED = 3
"""A suite whose first so many cells all fail is ended: something is wrong with all of them."""


class BenchError(PeftkitError, RuntimeError):
    """A run that could not finish all its cells, or a folder of records that cannot be used."""


def run(
    suites: Path | Sequence[Suite], out: Path, *, jobs: int = 0, progress: bool = True, ray: str | None = None
) -> Path:
    """The page that reports every cell of the suites.

    Cells whose records are there already are not run again, so an interrupted run goes on where it stopped.

    Args:
        suites: what is compared, or the YAML file that says it, see `peftkit_bench.suite`.
        out: folder for `records.jsonl`, the predictions and the report.
        jobs: cells at a time; 0: one for each GPU, else one. On a CPU each has its share of the cores, and more than
            one makes times and latencies less exact.
        progress: show a bar and a line for each finished cell on stderr.
        ray: address of a Ray cluster on whose machines the cells run; "auto": the one that this machine is in, or one
            made for the run; None: no Ray.

    Raises:
        SuiteError: the suite cannot be meant; nothing was run.
        DataError: the data cannot be had; nothing was run.
        BenchError: cells failed, or another run is writing to the folder. The records of the others are kept.
    """
    console = Console(stderr=True, quiet=not progress)
    with console.status("preparing the data ..."):
        parts = planned(load(suites) if isinstance(suites, Path) else suites)
    for part in parts:
        for note in part.prepared.data["notes"]:
            console.print(f"{part.suite.title}: {note}", markup=False, highlight=False)
    workers = _workers(jobs, parts[0].prepared, ray)
    try:
        records = [found for found in record.read(out) if isinstance(found, Record)]
        for part in parts:
            part.take(records)
        if known := sum(len(part.records) for part in parts):
            console.print(f"{known} cells are recorded already")
        # The machines of a cluster are others than this one.
        if ray is None and (slow := plain_torch(compiled(), [part.suite for part in parts])):
            console.print(slow, markup=False, highlight=False)
        with record.writer(out) as writer:
            failures = _run_cells(parts, writer, workers, console)
        written = report.write([out], out) if any(part.records for part in parts) else None
    except RecordError as error:
        raise BenchError(str(error)) from None
    if failures or written is None:
        raise BenchError(
            f"{len(failures)} cells failed, the records of the others are in {out}; "
            "running the same command again runs only what is missing\n" + "\n".join(failures)
        )
    return written


def _workers(jobs: int, prepared: Prepared, ray: str | None) -> Workers:
    if ray is not None:
        from peftkit_bench.ray_workers import RayWorkers

        return RayWorkers(ray, jobs)
    return LocalWorkers(jobs or max(1, torch.cuda.device_count()), prepared.backbone["type"])


@dataclass(kw_only=True)
class Part:
    """A suite with all that its cells share, and what is recorded of them."""

    suite: Suite
    prepared: Prepared
    candidates: Sequence[Candidate]
    records: list[Record] = field(default_factory=list)

    def take(self, records: Iterable[Record]) -> None:
        """Keeps those records that belong to this suite as it is now."""
        trials = {candidate.trial for candidate in self.candidates}
        self.records += [found for found in records if found.trial in trials]

    def due(self) -> list[Cell]:
        """See `cells.due`."""
        return due(self.suite, self.candidates, self.records)

    def remaining(self) -> int:
        """See `cells.remaining`."""
        return remaining(self.suite, self.candidates, self.records)


def planned(suites: Sequence[Suite]) -> list[Part]:
    """The suites with their data prepared and the sizes of their contenders solved.

    Raises:
        SuiteError: a suite cannot be meant; names its part.
    """
    found = []
    for suite in suites:
        prepared = prepare(suite)
        skeleton = suite.task.skeleton(prepared.folder, prepared.facts)
        found.append(Part(suite=suite, prepared=prepared, candidates=candidates(suite, prepared, skeleton)))
    return found


def _run_cells(parts: Sequence[Part], writer: record.Writer, workers: Workers, console: Console) -> list[str]:
    """Runs what is due until nothing is, recording each; returns what went wrong, a paragraph for each failed cell."""
    failures: list[str] = []
    running: dict[str, Part] = {}
    stamp = {**record.environment(), "versions": versions(), "compiled": compiled()}
    succeeded = 0

    def ready() -> Job | None:
        if len(failures) >= UNTIL_FAILED and not succeeded:
            return None
        for part in parts:
            for cell in part.due():
                if cell.key not in running:
                    running[cell.key] = part
                    return Job(suite=part.suite, prepared=part.prepared, cell=cell, environment=stamp,
                               threads=threads, jobs=workers.jobs)  # fmt: skip
        return None

    waiting = sum(part.remaining() for part in parts)
    if not waiting:
        return failures
    threads = max(1, min(stamp["cores"] // workers.jobs, torch.get_num_threads()))
    console.print(f"about {waiting} cells to run, {workers.where}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("running", total=waiting, left="")
        start = time.monotonic()
        for done, (cell, outcome) in enumerate(workers.outcomes(ready), start=1):
            if isinstance(outcome, str):
                failures.append(f"{described(cell)}: {outcome}")
                line = "FAILED: " + outcome.strip().splitlines()[-1]
            else:
                succeeded += 1
                writer.append(outcome.record, outcome.outcomes)
                running[cell.key].records.append(outcome.record)
                metric = METRICS[outcome.record.metric]
                line = f"{metric.name} {metric.shown(outcome.record.score)}, {outcome.record.cell_seconds:4.1f} s"
            left = sum(part.remaining() for part in parts) - len(failures)
            seconds = (time.monotonic() - start) / done * left
            bar.update(shown, completed=done, total=done + left, left=f"about {duration(seconds)} left")
            console.print(f"[{done:>3}/{done + left}] {described(cell):<46} {line}   {duration(seconds)} left",
                          markup=False, highlight=False, soft_wrap=True)  # fmt: skip
    return failures


def plain_torch(available: Mapping[str, Sequence[str]], suites: Iterable[Suite]) -> str:
    """What to say where operations of peftkit's methods are timed without their compiled code; "": nothing.

    Args:
        available: see `cells.compiled`.
    """
    from peftkit_kernels import OPS, has_code  # see `cells.compiled`

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = any(each.subject == "peftkit" for suite in suites for each in suite.contenders.values())
    missing = {name for name in OPS if has_code(name, device)} - set(available.get(device, ()))
    if not own or not missing:
        return ""
    return (
        f"{len(missing)} of peftkit's {len(OPS)} operations do not run compiled on {device} and will be timed as plain "
        "torch; python -m peftkit_kernels status says why, and what to do"
    )


def described(cell: Cell) -> str:
    """A cell in a few words."""
    budget = f" at {cell.budget:,}" if cell.budget is not None and len(cell.budgets) > 1 else ""
    return f"{cell.phase:<6} {cell.name}{budget}, rate {cell.learning_rate:g}, seed {cell.seed}"


def duration(seconds: float) -> str:
    """Such as "2 min 05 s", or "3 h 20 min"."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
