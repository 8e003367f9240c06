"""Runs the cells of a suite, each in a process of its own, and appends a record for each; what is done stays done."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import peftkit
from peftkit.errors import PeftkitError
from peftkit_bench import measure, record, report, subjects
from peftkit_bench.record import Record, RecordError, digest
from peftkit_bench.spec import Contender, Resolved, SuiteError
from peftkit_bench.suite import Suite, load
from peftkit_bench.task import TASKS, Prepared

LATENCY_ROWS, LATENCY_TOKENS, LATENCY_REPEATS, LATENCY_WARMUP = 1, 32, 30, 5

DECISIVE = ("peftkit", "torch", "transformers")
"""Packages of which another version gives another result, so that cells are run again."""


class BenchError(PeftkitError, RuntimeError):
    """A run that could not finish all its cells, or a folder of records that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One contender at one learning rate and one seed."""

    name: str
    contender: Contender
    resolved: Resolved
    learning_rate: float
    seed: int
    key: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker process needs to run one cell."""

    suite: Suite
    prepared: Prepared
    cell: Cell
    environment: dict[str, Any]
    threads: int
    jobs: int


def run(suite_path: Path, out: Path, *, jobs: int = 1, progress: bool = True) -> Path:
    """The folder with the records of every cell of the suite and the report on them.

    Cells whose records are there already are not run again, so an interrupted run goes on where it stopped.

    Args:
        suite_path: a YAML file, see `peftkit_bench.suite`.
        out: folder for `records.jsonl` and the report.
        jobs: cells at a time, each with its share of the cores; more than one makes times and latencies less exact.
        progress: show a bar and a line for each finished cell on stderr.

    Raises:
        SuiteError: the suite cannot be meant; nothing was run.
        BenchError: cells failed, or another run is writing to the folder. The records of the others are kept.
    """
    suite = load(suite_path)
    console = Console(stderr=True, quiet=not progress)
    with console.status("collecting data ..."):
        prepared = TASKS[suite.task]().prepare(suite)
        planned = cells(suite, prepared)
    try:
        finished = {found.key for found in record.read(out)}
        pending = [cell for cell in planned if cell.key not in finished]
        if len(pending) < len(planned):
            console.print(f"{len(planned) - len(pending)} of {len(planned)} cells are recorded already")
        with record.writer(out) as writer:
            failures = _run_cells(suite, prepared, pending, writer, jobs, console)
        written = report.write([out], out)
    except RecordError as error:
        raise BenchError(str(error)) from None
    if failures:
        raise BenchError(
            f"{len(failures)} of {len(planned)} cells failed, the records of the others are in {out}; "
            "running the same command again runs only what is missing\n" + "\n".join(failures)
        )
    return written


def dry_run(suite_path: Path) -> str:
    """What a run would do, as a table: contenders with solved sizes, exact parameter counts and learning rates."""
    suite = load(suite_path)
    prepared = TASKS[suite.task]().prepare(suite)
    planned = cells(suite, prepared)
    rows = [("contender", "size", "trainable", "head", "learning rate", "cells")]
    for name in suite.contenders:
        mine = [cell for cell in planned if cell.name == name]
        resolved = mine[0].resolved
        size = f"{resolved.knob}={resolved.fields[resolved.knob]}" if resolved.knob else "-"
        rates = sorted({cell.learning_rate for cell in mine})
        rows.append(
            (name, size, f"{resolved.adapter_parameters:,}", f"{resolved.head_parameters:,}",
             ", ".join(f"{rate:g}" for rate in rates), str(len(mine)))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    head = f"{suite.title}: {len(planned)} cells, predicting the {suite.split} split"
    if suite.budget is not None:
        head += f", sizes solved for {suite.budget:,} trainable parameters besides the head"
    return "\n".join([head, *(line.rstrip() for line in lines)])


def cells(suite: Suite, prepared: Prepared) -> list[Cell]:
    """Every cell of the suite, seed by seed, so that an early stop leaves whole comparisons."""
    skeleton = TASKS[suite.task]().skeleton(prepared)
    resolved: dict[str, Resolved] = {}
    for name, contender in suite.contenders.items():
        try:
            resolved[name] = subjects.subject(contender.subject).resolve(skeleton, contender, suite.budget)
        except PeftkitError as error:
            raise BenchError(f"contender {name}: {error}") from error
    known = versions()
    found = []
    for seed in suite.seeds:
        for name, contender in suite.contenders.items():
            for rate in _rates(suite, name, contender, resolved[name]):
                identity = {
                    "subject": contender.subject,
                    "method": contender.method,
                    "config": resolved[name].fields,
                    "learning_rate": rate,
                    "training": asdict(suite.training),
                    "task": suite.task,
                    "split": suite.split,
                    "data": [prepared.data["hash"], prepared.data["max_tokens"]],
                    "backbone": prepared.backbone["hash"] or prepared.folder,
                    "versions": {each: known.get(each) for each in DECISIVE},
                }
                variant = digest(identity)
                key = digest([variant, name, seed])
                found.append(
                    Cell(name=name, contender=contender, resolved=resolved[name], learning_rate=rate, seed=seed,
                         key=key, variant=variant)
                )  # fmt: skip
    return found


def versions() -> dict[str, str]:
    """Versions of what decides the result; peftkit's own also where it runs from a source tree."""
    return {**record.versions(), "peftkit": peftkit.__version__}


def _rates(suite: Suite, name: str, contender: Contender, resolved: Resolved) -> Sequence[float]:
    """The learning rates at which a contender is run."""
    if resolved.adapter_parameters == 0:
        return (suite.training.head_learning_rate,)
    if suite.tune is not None:
        return suite.tune.learning_rates
    if contender.learning_rate is None:
        raise SuiteError(f"contenders, {name}: the key 'learning_rate' is missing")
    return (contender.learning_rate,)


# Running ------------------------------------------------------------------------------------------------------------


def _run_cells(
    suite: Suite, prepared: Prepared, pending: Sequence[Cell], writer: record.Writer, jobs: int, console: Console
) -> list[str]:
    """Runs the cells, `jobs` at a time, and records each; returns what went wrong, a paragraph for each failed cell."""
    failures: list[str] = []
    if not pending:
        return failures
    stamp = {**record.environment(), "versions": versions()}
    threads = max(1, min(stamp["cores"] // jobs, torch.get_num_threads()))
    context = _context(prepared)
    waiting = iter(
        [Job(suite=suite, prepared=prepared, cell=c, environment=stamp, threads=threads, jobs=jobs) for c in pending]
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("running", total=len(pending), left="")
        start = time.monotonic()
        for done, (cell, outcome) in enumerate(_outcomes(context, waiting, jobs), start=1):
            left = (time.monotonic() - start) / done * (len(pending) - done)
            bar.update(shown, completed=done, left=f"about {duration(left)} left")
            if isinstance(outcome, Record):
                writer.append(outcome)
                line = f"accuracy {100 * outcome.accuracy:5.1f} %, {outcome.cell_seconds:4.1f} s"
            else:
                failures.append(f"{cell.name}, learning rate {cell.learning_rate:g}, seed {cell.seed}: {outcome}")
                line = "FAILED: " + outcome.strip().splitlines()[-1]
            console.print(
                f"[{done:>3}/{len(pending)}] {cell.name:<14} seed {cell.seed}  lr {cell.learning_rate:<7g} {line}"
                f"   {duration(left)} left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    return failures


def duration(seconds: float) -> str:
    """Such as "2 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _context(prepared: Prepared) -> BaseContext:
    """Where workers come from: forks of a process that has done the imports and nothing else, where there is fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    kind = prepared.backbone["type"]
    context.set_forkserver_preload([__name__, f"transformers.models.{kind}.modeling_{kind}"])
    return context


def _outcomes(context: BaseContext, waiting: Iterator[Job], jobs: int) -> Iterator[tuple[Cell, Record | str]]:
    """Each cell with its record, or with what went wrong, as they finish; ends the workers when it is closed."""
    running: dict[Any, tuple[Any, Cell]] = {}
    try:
        while True:
            while len(running) < jobs and (job := next(waiting, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, job), daemon=True)  # type: ignore[attr-defined]
                process.start()
                sender.close()
                running[receiver] = (process, job.cell)
            if not running:
                return
            for ready in connection.wait(list(running)):
                source: Any = ready
                process, cell = running.pop(source)
                try:
                    outcome = source.recv()
                except EOFError:
                    process.join()
                    outcome = f"the process ended with status {process.exitcode} before the cell was finished"
                process.join()
                source.close()
                yield cell, outcome
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _work(sender: connection.Connection, job: Job) -> None:
    """A worker's whole life: runs one cell and sends back the record, or the traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        sender.send(run_cell(job))
    except Exception:
        sender.send(traceback.format_exc())
    finally:
        sender.close()


def run_cell(job: Job) -> Record:
    """The record of one cell: load, wrap, train, predict, save, merge, measure."""
    suite, prepared, cell = job.suite, job.prepared, job.cell
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    task, subject = TASKS[suite.task](), subjects.subject(cell.contender.subject)
    torch.set_num_threads(job.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with measure.timed() as whole, quiet():
        memory = measure.PeakMemory(device)
        torch.manual_seed(cell.seed)
        model = task.model(prepared).to(device)
        model = subject.attach(model, cell.contender.method, cell.resolved.fields)
        batches = [
            {key: value.to(device) for key, value in b.items()} for b in task.batches(prepared, suite, cell.seed)
        ]
        memory.start()
        with measure.timed() as training:
            losses = train(job, model, batches)
        peak_bytes = memory.peak_bytes()
        with measure.timed() as evaluation:
            predictions = task.predict(model, prepared)
        with tempfile.TemporaryDirectory() as scratch:
            stored = subject.save(model, Path(scratch) / "adapter")
            adapter_bytes = measure.folder_bytes(Path(scratch) / "adapter")
        probe = {k: v.to(device) for k, v in task.probe(prepared, LATENCY_ROWS, LATENCY_TOKENS).items()}
        latency, logits = _timed_forward(model, probe)
        merged_latency = difference = None
        if subject.merge(model):
            merged_latency, merged_logits = _timed_forward(model, probe)
            difference = float((merged_logits - logits).abs().max())
        base_latency, _ = _timed_forward(subject.detach(model), probe)
    labels = prepared.evaluated.labels
    resolved = cell.resolved
    return Record(
        key=cell.key,
        variant=cell.variant,
        suite=suite.name,
        title=suite.title,
        contender=cell.name,
        subject=subject.name,
        method=cell.contender.method,
        baseline=cell.contender.baseline,
        seed=cell.seed,
        split=suite.split,
        config=dict(resolved.fields),
        learning_rate=cell.learning_rate,
        training=asdict(suite.training),
        task=task.name,
        data=prepared.data,
        backbone=prepared.backbone,
        budget=suite.budget,
        knob=resolved.knob,
        adapter_parameters=resolved.adapter_parameters,
        final_parameters=min(resolved.adapter_parameters, stored - resolved.head_parameters),
        head_parameters=resolved.head_parameters,
        total_parameters=resolved.total_parameters,
        accuracy=sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels),
        predictions=predictions,
        labels=labels,
        groups=prepared.evaluated.groups,
        losses=[round(loss, 6) for loss in losses],
        train_seconds=training.seconds,
        evaluate_seconds=evaluation.seconds,
        peak_bytes=peak_bytes,
        memory_method=memory.method,
        adapter_bytes=adapter_bytes,
        base_latency_seconds=base_latency,
        latency_seconds=latency,
        merged_latency_seconds=merged_latency,
        merged_logit_difference=difference,
        latency_rows=LATENCY_ROWS,
        latency_tokens=LATENCY_TOKENS,
        threads=job.threads,
        jobs=job.jobs,
        environment={**job.environment, "device": _device_name(device)},
        started=started,
        cell_seconds=whole.seconds,
    )


def train(job: Job, model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> list[float]:
    """Trains with AdamW, a linear warm-up and a linear decay to zero; returns the loss of each step."""
    training = job.suite.training
    task, subject = TASKS[job.suite.task](), subjects.subject(job.cell.contender.subject)
    adapter, head = subject.parameters(model)
    groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in ((adapter, job.cell.learning_rate), (head, training.head_learning_rate))
        if parameters
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    rising = max(1, round(training.warmup * training.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rising, (training.steps - step) / max(1, training.steps - rising)),
    )
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([*adapter, *head], training.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _timed_forward(model: nn.Module, probe: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Median seconds of one forward pass, and its logits."""
    model.eval()
    seconds = measure.median_seconds(lambda: model(**probe), repeats=LATENCY_REPEATS, warmup=LATENCY_WARMUP)
    return seconds, model(**probe).logits.float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' loading bars and notes about the new head off the screen."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
