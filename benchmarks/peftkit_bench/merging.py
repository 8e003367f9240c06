"""Runs a suite of merges: trains each adapter once, merges it every way, and records what is left of its effect."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.errors import PeftkitError
from peftkit_bench import cells as comparisons
from peftkit_bench import record, report, subjects
from peftkit_bench.cell import train as fit
from peftkit_bench.engine import BenchError, duration
from peftkit_bench.merge_suite import Adapter, MergeSuite, load
from peftkit_bench.merge_tools import Bases, merged
from peftkit_bench.merge_yardstick import (
    Kept,
    Reference,
    bytes_per_weight,
    reference,
    run_as_it_is,
    stored_weights,
)
from peftkit_bench.preparing import prepare
from peftkit_bench.quiet import quiet
from peftkit_bench.record import MergeRecord, RecordError, digest
from peftkit_bench.spec import Resolved, SuiteError
from peftkit_bench.strict import require
from peftkit_bench.tasks.contract import Batch, Prepared, Split, Task

ADAPTERS = "adapters"
"""Folder beside the records that keeps what was trained."""
WEIGHTS = "adapter_model.safetensors"
BATCH = 32
DECISIVE = (*comparisons.DECISIVE, "bitsandbytes")
"""Packages of which another version gives another result, so that merges are run again."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One adapter at one size, merged one way."""

    adapter: str
    size: float | None
    route: str
    key: str


def run(suite_path: Path, out: Path, *, jobs: int = 1, progress: bool = True) -> Path:
    """The page that reports every merge of the suite.

    Merges whose records are there already are not run again, so an interrupted run goes on where it stopped; trained
    adapters are kept in the folder too.

    Args:
        suite_path: a YAML file, see `peftkit_bench.merge_suite`.
        out: folder for `records.jsonl`, the adapters and the report.
        jobs: has to be 1: the merges of an adapter share what they are judged against.
        progress: show a line for each finished merge on stderr.

    Raises:
        SuiteError: the suite cannot be meant; nothing was run.
        DataError: the data cannot be had; nothing was run.
        BenchError: more than one job was asked for, a merge could not be measured, or another run is writing to the
            folder. A merge that a tool refuses is a finding, and is recorded as such.
    """
    suite = load(suite_path)
    if jobs != 1:
        raise BenchError(f"a suite of merges runs one merge at a time, found --jobs {jobs}; leave it out, or give 1")
    console = Console(stderr=True, quiet=not progress)
    with console.status("collecting data ..."):
        prepared = prepared_for(suite)
        configs = resolved(suite, prepared)
        planned = cells(suite, prepared)
    try:
        finished = {found.key for found in record.read(out)}
        pending = [cell for cell in planned if cell.key not in finished]
        if len(pending) < len(planned):
            console.print(f"{len(planned) - len(pending)} of {len(planned)} merges are recorded already")
        with record.writer(out) as writer, quiet(), _without_chatter("bitsandbytes"):
            failures = _run_cells(suite, prepared, configs, pending, out / ADAPTERS, writer, console)
        if failures:
            raise BenchError(
                f"{len(failures)} of {len(planned)} merges could not be measured, the records of the others are in "
                f"{out}; running the same command again runs only what is missing\n" + "\n".join(failures)
            )
        return report.write([out], out)
    except RecordError as error:
        raise BenchError(str(error)) from None


@contextlib.contextmanager
def _without_chatter(name: str) -> Iterator[None]:
    """Keeps a package's notes off the screen, such as one for every layer that computes in another dtype."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def dry_run(suite_path: Path) -> str:
    """What a run would do: adapters with their sizes and parameters, and routes."""
    suite = load(suite_path)
    prepared = prepared_for(suite)
    configs = resolved(suite, prepared)
    lines = [f"{suite.title}: {len(cells(suite, prepared))} merges"]
    for name, adapter in suite.adapters.items():
        sizes = ", ".join(f"{size:g}" for size in adapter.sizes) or "as trained"
        lines.append(f"adapter {name}: {configs[name].adapter_parameters:,} parameters; change / weight {sizes}")
    for name, route in suite.routes.items():
        with_ = (["calibrated"] if route.calibrated else []) + (
            [f"residual of rank {route.residual_rank}"] if route.residual_rank else []
        )
        lines.append(f"route {name}: {route.tool} merges {route.base} into {', '.join([route.into, *with_])}")
    return "\n".join(lines)


def prepared_for(suite: MergeSuite) -> Prepared:
    """The backbone and the rows that all merges of the suite share.

    Raises:
        SuiteError: the backbone is not there, or a split has fewer rows than the suite wants of it.
        DataError: the data cannot be had.
    """
    found = prepare(suite.comparison())
    for key, rows, split in (
        ("calibration_rows", suite.calibration_rows, "train"),
        ("judged_rows", suite.judged_rows, "test"),
    ):
        there = len(found.splits[split])
        require(rows <= there, f"{key}: expected 1 to {there}, the rows of the {split} split, found {rows}")
    return found


def resolved(suite: MergeSuite, prepared: Prepared) -> dict[str, Resolved]:
    """The adapters' whole configs and their counts, by name.

    Raises:
        SuiteError: one cannot be what the suite says; names it.
    """
    skeleton = suite.task.skeleton(prepared.folder, prepared.facts)
    found = {}
    for name, contender in suite.comparison().contenders.items():
        try:
            found[name] = subjects.subject(contender.subject).resolve(skeleton, contender, None)
        except PeftkitError as error:
            raise SuiteError(f"adapters, {name}: {error}") from error
    return found


def cells(suite: MergeSuite, prepared: Prepared) -> list[Cell]:
    """Every merge of the suite, adapter by adapter."""
    known = comparisons.versions()
    found = []
    for name, adapter in suite.adapters.items():
        for size in adapter.sizes or (None,):
            for route_name, route in suite.routes.items():
                identity = {
                    "adapter": _identity(suite, adapter, prepared),
                    "size": size,
                    "route": asdict(route),
                    "rows": [suite.calibration_rows, suite.judged_rows],
                    "minimum_effect": suite.minimum_effect,
                    "names": [name, route_name],
                    "versions": {each: known.get(each) for each in DECISIVE},
                }
                found.append(Cell(adapter=name, size=size, route=route_name, key=digest(identity)))
    return found


def _identity(suite: MergeSuite, adapter: Adapter, prepared: Prepared) -> dict[str, Any]:
    """What decides a trained adapter."""
    return {
        "method": adapter.method,
        "config": adapter.config,
        "learning_rate": adapter.learning_rate,
        "scaled": adapter.scaled,
        "training": asdict(suite.training),
        "seed": suite.seed,
        "data": prepared.data["hash"],
        "task": {"name": suite.task.name, **asdict(suite.task)},  # type: ignore[call-overload]  # tasks are dataclasses
        "backbone": prepared.backbone["hash"] or prepared.folder,
    }


# Running ------------------------------------------------------------------------------------------------------------


def _run_cells(
    suite: MergeSuite,
    prepared: Prepared,
    configs: Mapping[str, Resolved],
    pending: Sequence[Cell],
    kept: Path,
    writer: record.Writer,
    console: Console,
) -> list[str]:
    """Runs the merges and records each; returns what went wrong, a paragraph for each that could not be measured."""
    failures: list[str] = []
    if not pending:
        return failures
    stamp = {**record.environment(), "versions": comparisons.versions(), "device": "cpu"}
    bases = Bases(suite.task, prepared)
    judged = batches(suite.task, prepared.splits["test"], suite.judged_rows, prepared.padding, suite.judged_rows)[0]
    shown = batches(suite.task, prepared.splits["train"], suite.calibration_rows, prepared.padding)
    start, done = time.monotonic(), 0
    natural: dict[str, float] = {}
    for name, size in dict.fromkeys((cell.adapter, cell.size) for cell in pending):
        trained = kept / f"{digest(_identity(suite, suite.adapters[name], prepared))}"
        if not trained.is_dir():
            console.print(f"training {name}", highlight=False)
            train(suite, name, prepared, configs[name].fields, bases, trained)
        with tempfile.TemporaryDirectory() as scratch:
            references = References(bases, trained, judged, shown)
            if size is not None:
                parameter = suite.adapters[name].scaled
                assert parameter is not None
                if name not in natural:
                    natural[name] = references["nf4"].size
                folder = scaled(trained, Path(scratch) / "adapter", parameter, size / natural[name])
                references = References(bases, folder, judged, shown)
            for cell in pending:
                if (cell.adapter, cell.size) != (name, size):
                    continue
                done += 1
                try:
                    found = run_cell(suite, cell, prepared, references, stamp)
                except Exception:
                    failures.append(f"{name}, {size or 'as trained'}, {cell.route}: {traceback.format_exc()}")
                    continue
                writer.append(found)
                left = (time.monotonic() - start) / done * (len(pending) - done)
                console.print(
                    f"[{done:>3}/{len(pending)}] {name:<8} {found.size:6.2%}  {cell.route:<36} {_line(found)}"
                    f"   {duration(left)} left",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
    return failures


def _line(found: MergeRecord) -> str:
    if found.base not in found.kept:
        return f"cannot: {str(found.refused)[:60]}"
    effect, error = found.kept[found.base]["logits"]
    return f"logits keep {effect:6.3f}, error {error:.3f}, {found.merge_seconds:4.1f} s"


class References(dict[str, Reference]):
    """What merges of one adapter are judged against, by how the base is stored; made when first asked for."""

    def __init__(self, bases: Bases, folder: Path, judged: Batch, calibration: Sequence[Batch]) -> None:
        super().__init__()
        self.bases, self.folder, self.judged, self.calibration = bases, folder, judged, calibration

    def __missing__(self, base: str) -> Reference:
        made = reference(
            self.bases.plain(torch.float64), self.bases.weights[base], self.folder, self.judged, self.calibration
        )
        return self.setdefault(base, made)


def train(
    suite: MergeSuite, name: str, prepared: Prepared, fields: Mapping[str, Any], bases: Bases, folder: Path
) -> None:
    """Trains an adapter with a method's fields on the base in NF4, computing in float32, and saves it."""
    adapter = suite.adapters[name]
    subject = subjects.subject("peftkit")
    torch.manual_seed(suite.seed)
    model = subject.attach(bases.native(torch.float32), adapter.method, fields)
    fit(suite.task, subject, model, prepared, suite.training, adapter.learning_rate, seed=suite.seed)
    peftkit.save(model, folder)


def scaled(trained: Path, folder: Path, parameter: str, factor: float) -> Path:
    """A copy of an adapter folder in which one parameter of each site is multiplied by a factor.

    Raises:
        SuiteError: the adapter has no such parameter.
    """
    shutil.copytree(trained, folder)
    tensors = load_file(folder / WEIGHTS)
    chosen = [key for key in tensors if parameter in key.split(".")]
    if not chosen:
        raise SuiteError(
            f"scaled: the adapter has no parameter {parameter!r}; it has "
            f"{', '.join(sorted({part for key in tensors for part in key.split('.')[-2:] if '_' in part}))}"
        )
    save_file({k: v * factor if k in chosen else v for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def batches(task: Task, split: Split, rows: int, padding: int, size: int = BATCH) -> list[Batch]:
    """The first rows of a split, without their labels."""
    found = []
    for start in range(0, rows, size):
        batch = task.collate(split.encoded[start : min(start + size, rows)], padding)
        found.append({name: value for name, value in batch.items() if name != "labels"})
    return found


def run_cell(
    suite: MergeSuite, cell: Cell, prepared: Prepared, references: References, stamp: Mapping[str, Any]
) -> MergeRecord:
    """The record of one merge."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    adapter, route, bases = suite.adapters[cell.adapter], suite.routes[cell.route], references.bases
    own = references[route.base]
    outcome = merged(route, bases, references.folder, references.calibration, suite.minimum_effect)
    kept: dict[str, dict[str, list[float]]] = {}
    sites: dict[str, list[float]] = {}
    as_run = stored_bytes = certificate = None
    if outcome.model is not None:
        found = stored_weights(outcome.model, bases.paths)
        for base in dict.fromkeys((route.base, "nf4", "bf16")):
            judge = references[base]
            kept[base] = {
                "weights": _pair(judge.weights(found)[0]),
                "activations": _pair(judge.activations(found)[0]),
                "logits": _pair(judge.outputs(found)),
            }
        weights, activations = own.weights(found)[1], own.activations(found)[1]
        sites = {p: [_short(own.size_of(p)), *_pair(weights[p]), *_pair(activations[p])] for p in weights}
        stored_bytes = round(bytes_per_weight(outcome.model, list(own.meant)), 4)
        if outcome.report is not None:
            shown = own.activations(found, calibration=True)[1] if route.calibrated else {}
            certificate = compared(outcome.report, weights, shown)
        as_run = _pair(own.logits_kept(run_as_it_is(outcome.model, own.judged)))
    return MergeRecord(
        key=cell.key,
        suite=suite.name,
        title=suite.title,
        adapter=cell.adapter,
        method=adapter.method,
        config=dict(adapter.config),
        learning_rate=adapter.learning_rate,
        seed=suite.seed,
        scaled=adapter.scaled,
        asked_size=cell.size,
        size=_short(own.size),
        contender=cell.route,
        **{name: getattr(route, name) for name in ("tool", "base", "into", "calibrated", "residual_rank")},
        calibration_rows=suite.calibration_rows,
        judged_rows=suite.judged_rows,
        minimum_effect=suite.minimum_effect,
        refused=outcome.refused,
        kept=kept,
        as_run=as_run,
        sites=sites,
        bytes_per_weight=stored_bytes,
        certificate=certificate,
        merge_seconds=round(outcome.seconds, 3),
        training=asdict(suite.training),
        data={**prepared.data, "max_tokens": suite.task.max_tokens},
        backbone=prepared.backbone,
        threads=torch.get_num_threads(),
        environment=stamp,
        started=started,
    )


def compared(
    report: peftkit.MergeReport, weights: Mapping[str, Kept], activations: Mapping[str, Kept]
) -> dict[str, float]:
    """peftkit's own totals, and the largest differences of its certificate at any site.

    Args:
        weights: what the yardstick says, by site.
        activations: the same on the rows that the merge was shown; empty where it was shown none.
    """
    certified = {site.path: site for site in report.sites if site.parameter == "weight"}
    found = {
        "kept": _short(report.kept),
        "total_effect": _short(report.total_effect),
        "total_error": _short(report.total_error),
        "effect_difference": max(abs(certified[p].effect_kept - k.effect) for p, k in weights.items()),
        "error_difference": max(abs(certified[p].error_relative - k.error) for p, k in weights.items()),
    }
    for path, kept in activations.items():
        effect, error = certified[path].activation_effect, certified[path].activation_error
        assert effect is not None
        assert error is not None
        for name, difference in (("effect", effect - kept.effect), ("error", error - kept.error)):
            key = f"input_{name}_difference"
            found[key] = max(found.get(key, 0.0), abs(difference))
    return {name: _short(value) for name, value in found.items()}


def _pair(kept: Kept) -> list[float]:
    return [_short(kept.effect), _short(kept.error)]


def _short(value: float) -> float:
    """Four significant digits, which is more than other texts would leave standing."""
    return float(f"{value:.4g}")
