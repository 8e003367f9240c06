"""One cell from beginning to end: load, attach, train with early stopping, predict, save, merge, measure."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit_bench import measure, subjects
from peftkit_bench.cells import Cell
from peftkit_bench.metrics import METRICS
from peftkit_bench.quiet import quiet
from peftkit_bench.record import Outcomes, Record
from peftkit_bench.spec import Subject
from peftkit_bench.subjects.quantized import BITSANDBYTES, package
from peftkit_bench.suite import Suite, Training
from peftkit_bench.tasks.batching import moved, training_order
from peftkit_bench.tasks.contract import GENERAL, Batch, Prepared, Task

LATENCY_ROWS, LATENCY_TOKENS, LATENCY_REPEATS, LATENCY_WARMUP = 1, 32, 30, 5
TIMED = ("latency_seconds", "merged_latency_seconds", "base_latency_seconds", "merged_logit_difference", "effect_kept")
"""Fields of a record that only runs that count fill."""
LARGEST = 1e9
"""Stands for a count or a score that is not finite, which a run that diverged may give."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to run one cell."""

    suite: Suite
    prepared: Prepared
    cell: Cell
    environment: Mapping[str, Any]
    threads: int
    jobs: int
    """Cells that run at the same time."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A cell's record and its predictions."""

    record: Record
    outcomes: Outcomes


@dataclass(kw_only=True)
class Trained:
    """What training showed on its way."""

    losses: list[float]
    stopping: list[tuple[int, float]]
    best_step: int
    seconds: float
    steady_bytes: int


def run_cell(job: Job) -> Finished:
    """The record of one cell."""
    suite, prepared, cell, task = job.suite, job.prepared, job.cell, job.suite.task
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    subject, metric = subjects.subject(cell.contender.subject), METRICS[suite.task.metric]
    torch.set_num_threads(job.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # One seed is to give one result; where PyTorch has no such algorithm it goes on with the one it has.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    fields, training = overridden(cell, suite.training)
    if cell.contender.quantization in BITSANDBYTES:
        package(cell.contender.quantization)  # no part of what a method holds
    with measure.timed() as whole, quiet():
        memory = measure.PeakMemory(device)
        torch.manual_seed(cell.seed)
        model = task.model(prepared.folder, prepared.facts)
        if device.type == "cpu":
            measure.hold(model)
        if cell.contender.quantization is not None:
            model = subject.quantize(model, cell.contender.quantization)
        model = model.to(device)
        before = _nats(task, model, prepared)
        model = subject.attach(model, cell.contender.method, fields)
        memory.start()
        head_rate = training.head_learning_rate if cell.resolved.adapter_parameters else cell.learning_rate
        trained = train(
            task, subject, model, prepared, replace(training, head_learning_rate=head_rate), cell.learning_rate,
            seed=cell.seed, memory=memory,
        )  # fmt: skip
        peak_bytes = memory.peak_bytes()
        model.eval()
        with measure.timed() as evaluation, precise(training, device):
            predictions = task.predict(model, prepared, cell.split)
        outcomes = Outcomes(
            predictions=predictions,
            counts=[[finite(v) for v in row] for row in task.counts(predictions, prepared, cell.split)],
            groups=prepared.splits[cell.split].groups,
        )
        after = _nats(task, model, prepared)
        with tempfile.TemporaryDirectory() as scratch:
            stored = subject.save(model, Path(scratch) / "adapter")
            adapter_bytes = measure.folder_bytes(Path(scratch) / "adapter")
        speeds: dict[str, Any] = dict.fromkeys(TIMED)
        if cell.phase == "final":
            speeds = latencies(subject, model, probe(model, prepared, device))
    resolved = cell.resolved
    record = Record(
        key=cell.key,
        variant=cell.variant,
        trial=cell.trial,
        suite=suite.name,
        title=suite.title,
        contender=cell.name,
        subject=subject.name,
        method=cell.contender.method,
        quantization=cell.contender.quantization,
        baseline=cell.contender.baseline,
        phase=cell.phase,
        seed=cell.seed,
        split=cell.split,
        config=dict(fields),
        learning_rate=cell.learning_rate,
        searched=dict(cell.searched),
        training=asdict(training),
        tuning=cell.tuning,
        task={"name": task.name, **asdict(task)},  # type: ignore[call-overload]  # tasks are dataclasses
        metric=metric.name,
        data=prepared.data,
        backbone=prepared.backbone,
        budget=cell.budget,
        budgets=list(cell.budgets),
        knob=resolved.knob,
        adapter_parameters=resolved.adapter_parameters,
        final_parameters=max(0, min(resolved.adapter_parameters, stored - resolved.head_parameters)),
        head_parameters=resolved.head_parameters,
        total_parameters=resolved.total_parameters,
        score=finite(metric.score(outcomes.counts)),
        outcomes=outcomes.digest,
        losses=[round(loss, 4) for loss in trained.losses],
        stopping=[[step, round(score, 6)] for step, score in trained.stopping],
        stopping_measure=stopping_measure(task)[0],
        best_step=trained.best_step,
        train_seconds=trained.seconds,
        evaluate_seconds=evaluation.seconds,
        peak_bytes=peak_bytes,
        steady_bytes=trained.steady_bytes,
        memory_method=memory.method,
        adapter_bytes=adapter_bytes,
        **speeds,
        latency_rows=LATENCY_ROWS,
        latency_tokens=LATENCY_TOKENS,
        forgetting=None if before is None or after is None else {"before": finite(before), "after": finite(after)},
        threads=job.threads,
        jobs=job.jobs,
        environment={**job.environment, "device": _device_name(device)},
        started=started,
        cell_seconds=whole.seconds,
    )
    return Finished(record=record, outcomes=outcomes)


def overridden(cell: Cell, training: Training) -> tuple[dict[str, Any], Training]:
    """The method's fields and the training settings with what the search chose in their places."""
    fields, changed = dict(cell.resolved.fields), {}
    for name, value in cell.searched.items():
        if name.startswith("training."):
            changed[name.removeprefix("training.")] = value
        elif name in fields:
            fields[name] = value
    return fields, replace(training, **changed)


# Training -----------------------------------------------------------------------------------------------------------


def train(
    task: Task,
    subject: Subject,
    model: nn.Module,
    prepared: Prepared,
    training: Training,
    learning_rate: float,
    *,
    seed: int,
    memory: measure.PeakMemory | None = None,
) -> Trained:
    """Trains with AdamW, a linear warm-up and a linear decay to zero, and leaves the best weights by the stop split.

    A loss that is not finite ends the training.

    Args:
        learning_rate: of the method; the head's is `training.head_learning_rate`.
        seed: of the order of the rows.
        memory: measures what is held between steps, each time before the stop split is predicted; None: nothing is.
    """
    device = next(model.parameters()).device
    adapter, head = subject.parameters(model)
    groups = [
        {"params": parameters, "lr": rate}
        for parameters, rate in ((adapter, learning_rate), (head, training.head_learning_rate))
        if parameters
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    rising = max(1, round(training.warmup * training.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rising, (training.steps - step) / max(1, training.steps - rising)),
    )
    split = prepared.splits["train"]
    order = training_order(split, size=training.batch_size, batches=training.steps, seed=seed)
    looks = {round(training.steps * (i + 1) / training.evaluations) for i in range(training.evaluations)}
    found = Trained(losses=[], stopping=[], best_step=0, seconds=0.0, steady_bytes=0)
    best: dict[str, Tensor] | None = None
    held: list[int] = []
    subject.begin(model, training.steps)
    for step, rows in enumerate(order):
        model.train()
        with measure.timed() as watch:
            part = math.ceil(len(rows) / training.accumulation)
            total = 0.0
            for start in range(0, len(rows), part):
                share = rows[start : start + part]
                batch = moved(task.collate([split.encoded[i] for i in share], prepared.padding), device)
                with precise(training, device):
                    loss = task.loss(model, batch) * (len(share) / len(rows))
                    penalty = subject.penalty(model)
                total += float(loss.detach())
                (loss if penalty is None else loss + penalty * (len(share) / len(rows))).backward()
            if math.isfinite(total):
                nn.utils.clip_grad_norm_([*adapter, *head], training.clip_norm)
                optimizer.step()
                subject.stepped(model, step)
            optimizer.zero_grad()
            schedule.step()
        found.seconds += watch.seconds
        if not math.isfinite(total):
            break
        found.losses.append(total)
        if step + 1 in looks:
            if memory is not None:
                held.append(memory.held_bytes())
            score, improved = _look(task, subject, model, prepared, training, device, found.stopping)
            found.stopping.append((step + 1, score))
            if improved:
                found.best_step = step + 1
                best = subject.state(model) if step + 1 < training.steps else None
            elif training.patience and _waited(found) >= training.patience:
                break
    if found.best_step < len(found.losses) and best is not None:
        subject.restore(model, best)
    found.steady_bytes = round(statistics.median(held)) if held else 0
    return found


def stopping_measure(task: Task) -> tuple[str, bool]:
    """What the stop split is judged by, and whether more is better: loss where the metric would generate text."""
    metric = METRICS[task.metric]
    if task.name in ("causal-lm", "seq2seq"):
        return "nats a token", False
    return metric.name, metric.higher_is_better


def _look(
    task: Task,
    subject: Subject,
    model: nn.Module,
    prepared: Prepared,
    training: Training,
    device: torch.device,
    before: Sequence[tuple[int, float]],
) -> tuple[float, bool]:
    """The score on the stop split, and whether it is the best so far; the later one on a tie."""
    model.eval()
    name, higher = stopping_measure(task)
    with precise(training, device):
        if name == "nats a token":
            nats = task.nats(model, prepared, "stop")
            assert nats is not None
            score = finite(nats)
        else:
            counts = task.counts(task.predict(model, prepared, "stop"), prepared, "stop")
            score = finite(METRICS[task.metric].score(counts))
    sign = 1 if higher else -1
    return score, all(sign * score >= sign * other for _, other in before)


def _waited(found: Trained) -> int:
    """Evaluations since the best one."""
    return sum(step > found.best_step for step, _ in found.stopping)


def _nats(task: Task, model: nn.Module, prepared: Prepared) -> float | None:
    if GENERAL not in prepared.splits:
        return None
    model.eval()
    return task.nats(model, prepared, GENERAL)


def finite(value: float) -> float:
    """The value, or ±LARGEST where it is larger or not a number."""
    return min(max(value, -LARGEST), LARGEST) if not math.isnan(value) else LARGEST


@contextlib.contextmanager
def precise(training: Training, device: torch.device) -> Iterator[None]:
    """Autocast where the training computes in bfloat16."""
    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
        yield


# Measuring ----------------------------------------------------------------------------------------------------------


def probe(model: nn.Module, prepared: Prepared, device: torch.device) -> Batch:
    """LATENCY_ROWS rows of exactly LATENCY_TOKENS tokens, from the test texts one after another."""
    stream = [token for row in prepared.splits["test"].encoded for token in row["input_ids"]]
    size = LATENCY_ROWS * LATENCY_TOKENS
    stream *= math.ceil(size / len(stream))
    ids = torch.tensor(stream[:size], device=device).reshape(LATENCY_ROWS, LATENCY_TOKENS)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids
    return found


@torch.no_grad()
def latencies(subject: Subject, model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The record's fields on one forward pass: with the adapter, merged, and of the bare backbone; ends detached."""
    seconds, (states, logits) = _timed(model, batch)
    with subject.disabled(model):
        base_states, _ = _outputs(model, batch)
    merged_seconds = difference = kept = None
    if subject.merge(model):
        merged_seconds, (merged_states, merged_logits) = _timed(model, batch)
        difference = finite(float((merged_logits - logits).abs().max()))
        kept = effect_kept(base_states, states, merged_states)
    base_seconds, _ = _timed(subject.detach(model), batch)
    return {
        "latency_seconds": seconds,
        "merged_latency_seconds": merged_seconds,
        "base_latency_seconds": base_seconds,
        "merged_logit_difference": difference,
        "effect_kept": kept,
    }


def effect_kept(base: Tensor, adapted: Tensor, merged: Tensor) -> float | None:
    """⟨m - b, a - b⟩ / ‖a - b‖²; None where the adapter changes nothing."""
    effect = (adapted - base).double()
    size = float((effect * effect).sum())
    if not size or not math.isfinite(size):
        return None
    return finite(float(((merged - base).double() * effect).sum()) / size)


def _outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Last hidden states, before any head, and the logits."""
    found = model(**batch, output_hidden_states=True)
    states = found.get("hidden_states") or found["decoder_hidden_states"]
    logits = found["logits"] if "logits" in found else found["start_logits"]
    return states[-1].float(), logits.float()


def _timed(model: nn.Module, batch: Batch) -> tuple[float, tuple[Tensor, Tensor]]:
    """Median seconds of one forward pass, and what it gives."""
    model.eval()
    seconds = measure.median_seconds(lambda: model(**batch), repeats=LATENCY_REPEATS, warmup=LATENCY_WARMUP)
    return seconds, _outputs(model, batch)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
