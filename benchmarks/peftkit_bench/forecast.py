"""What a cell is predicted to take before anything runs: memory and time, by a traced step and the machine's speed."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkit.quantize import quantizable
from peftkit_bench import measure, tracing
from peftkit_bench.spec import Contender, Resolved, Subject
from peftkit_bench.tasks.batching import length, training_order
from peftkit_bench.tasks.contract import GENERAL, Batch, Prepared, Split, Task
from peftkit_bench.tracing import Pass, Step, Work

EVALUATION_ROWS = 128
"""Rows that a task predicts at a time whose module does not say."""
GENERATED_TOGETHER = 32
"""Rows for which tasks generate text at a time."""
GENERATES = {"causal-lm": "max_new_tokens", "seq2seq": "max_target_tokens"}
"""Tasks that generate text, save for its perplexity, and the option that says how much."""
TOUCHED_BYTES = 40_000_000
"""Code and buffers of libraries that a process on a CPU comes to hold when it first computes."""
HEAP = 1.6
"""What a process on a CPU holds for each byte of temporary tensors: glibc keeps holes between what is alive. Measured
1.4 to 1.9 over methods and models."""
OVERHEAD = 1.3
"""What a pass on a CPU takes over its operations timed by themselves, for memory that is new to the process and for
Python. Measured 1.3 to 1.5 over methods."""
CUBLAS_BYTES = 64_000_000
"""Workspaces of CUDA's matrix products."""
START_SECONDS = 4.0
"""A process, its model loaded and adapted, the adapter saved, and what else a cell measures."""
BITS = {"4": 4.5, "8": 8.0}
"""Bits a weight, with its share of a scale, by the digit in a quantization's name."""
HIDDEN_COPIES = 20
"""Activations that a layer keeps for its backward pass, as multiples of its output; for rough forecasts."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one cell is predicted to take."""

    peak_bytes: int
    """As `measure.PeakMemory` takes it: over what the process holds before the backbone is loaded."""
    steady_bytes: int
    """Between two steps, over the same floor: weights, the optimizer's state, and a copy of the best weights so far."""
    seconds: float
    """The whole cell, with nothing else running on the machine."""
    approximate: bool = False
    """True: the model could not be traced without its data, so that the numbers come from its sizes alone."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine achieves."""

    device: str
    """Type of the device: "cpu" or "cuda"."""
    flops_per_second: Mapping[torch.dtype, float]
    """In products of matrices of usual sizes, by dtype."""
    bytes_per_second: float
    """Read and written by operations on elements whose results are kept."""
    operation_seconds: float
    """The least time that one operation takes."""

    def seconds(self, work: Counter[Work], scale: float = 1.0) -> float:
        """The time of operations, one after another, with the sizes of all of them scaled."""
        slowest = min(self.flops_per_second.values())
        overhead = OVERHEAD if self.device == "cpu" else 1.0
        return overhead * sum(
            count
            * max(
                self.operation_seconds,
                scale * each.flops / self.flops_per_second.get(each.dtype, slowest),
                scale * each.bytes / self.bytes_per_second,
            )
            for each, count in work.items()
        )


def machine_speed(threads: int | None = None) -> Speed:
    """What this machine achieves on its first GPU, or on its CPU; measured in about two seconds.

    Args:
        threads: that a cell gets on a CPU; None: as many as torch uses now.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    best: Speed | None = None
    try:
        # On a busy machine several threads wait for each other, and one alone says more of what there is.
        for count in sorted({1, threads or before} if device.type == "cpu" else {before}):
            torch.set_num_threads(count)
            best = _faster(best, _measured(device))
    finally:
        torch.set_num_threads(before)
    assert best is not None
    return best


@torch.no_grad()
def _measured(device: torch.device) -> Speed:
    return Speed(
        device=device.type,
        flops_per_second={dtype: _products(device, dtype) for dtype in (torch.float32, torch.bfloat16)},
        bytes_per_second=_elements(device),
        operation_seconds=_small(device),
    )


def _faster(one: Speed | None, other: Speed) -> Speed:
    """The better of each number."""
    if one is None:
        return other
    return Speed(
        device=one.device,
        flops_per_second={t: max(rate, other.flops_per_second[t]) for t, rate in one.flops_per_second.items()},
        bytes_per_second=max(one.bytes_per_second, other.bytes_per_second),
        operation_seconds=min(one.operation_seconds, other.operation_seconds),
    )


def _seconds(call: Callable[[], object]) -> float:
    """The shortest of many calls: what the machine achieves where nothing else runs on it."""
    call()
    found: list[float] = []
    while len(found) < 5 or sum(found) < 0.2:
        with measure.timed() as watch:
            call()
        found.append(watch.seconds)
    return min(found)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    # Small enough on a CPU for some of the calls to end before the system lets another process run.
    rows, width, inner = (256, 512, 512) if device.type == "cpu" else (4096, 2048, 8192)
    x = torch.ones(rows, width, dtype=dtype, device=device)
    up, down = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((inner, width), (width, inner)))
    linear = torch.nn.functional.linear
    return 4 * rows * width * inner / _seconds(lambda: linear(linear(x, up), down))


def _elements(device: torch.device) -> float:
    # Each call takes the next part, so that nothing is in a cache from the call before.
    parts, size = (64, 1 << 18) if device.type == "cpu" else (16, 1 << 24)
    first, out = (torch.ones(parts, size, device=device) for _ in range(2))
    turn = itertools.cycle(range(parts))

    def call() -> None:
        i = next(turn)
        torch.add(torch.nn.functional.gelu(first[i]), first[i], out=out[i])

    return 5 * size * out.element_size() / _seconds(call)


def _small(device: torch.device) -> float:
    layers = nn.Sequential(*(nn.LayerNorm(4) if i % 2 else nn.Dropout(0.0) for i in range(100))).to(device)
    x = torch.ones(4, 4, device=device)
    return _seconds(lambda: layers(x)) / 100


def forecast(
    task: Task,
    prepared: Prepared,
    subject: Subject,
    contender: Contender,
    resolved: Resolved,
    *,
    batch_size: int,
    steps: int,
    evaluations: int,
    evaluated_rows: Mapping[str, int],
    speed: Speed,
    precision: str = "float32",
) -> Forecast:
    """Memory and time of one cell; no weight is allocated.

    One training step and one evaluation are traced on tensors without data: what is alive after each operation, what
    the operations compute and move. Memory is that of the longest batch, time that of the mean one.

    Args:
        batch_size: rows of one forward pass in training.
        steps: forward passes with a backward pass.
        evaluations: times that the stop split is predicted during training.
        evaluated_rows: rows by split; of tune and test the larger one is predicted once.
        speed: of the machine that is to run it, see `machine_speed`.
        precision: of the arithmetic, "float32" or "bfloat16".
    """
    sizes = _sizes(task, prepared, batch_size, steps, evaluations, evaluated_rows)
    device = torch.device(speed.device)
    for quantized in (True, False) if contender.quantization else (False,):
        model = task.skeleton(prepared.folder, prepared.facts)
        saved = 0 if quantized else _saved_bytes(model, contender.quantization)
        # Whatever a model, a method or another package cannot do without data: the next way is a rougher one.
        try:
            if quantized:
                assert contender.quantization is not None
                model = subject.quantize(model, contender.quantization)
            model = subject.attach(model, contender.method, resolved.fields)
            found = tracing.traced(
                task, subject, model, sizes.batch, sizes.evaluated, device=device, precision=precision
            )
        except Exception:
            continue
        return _traced(*found, sizes, speed, saved)
    return _rough(task.skeleton(prepared.folder, prepared.facts), contender, resolved, sizes, speed)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is computed, in batches and tokens, padding included."""

    batch: Batch
    """The longest of training."""
    batch_tokens: int
    trained_tokens: float
    """Of a batch on average."""
    steps: int
    evaluated: Batch
    """The longest that is predicted."""
    evaluated_tokens: int
    predicted_tokens: float
    """In all evaluations together."""
    generated_tokens: float
    """One after another, in all batches together."""
    best: bool
    """Whether the best weights so far are kept during training."""


def _sizes(
    task: Task, prepared: Prepared, batch_size: int, steps: int, evaluations: int, rows: Mapping[str, int]
) -> _Sizes:
    train = prepared.splits["train"]
    order = training_order(train, size=batch_size, batches=steps, seed=0)
    longest = max(order, key=lambda each: _tokens(train, each))
    new = _new_tokens(task)
    ending = max(("tune", "test"), key=lambda name: rows.get(name, 0))
    predicted = generated = 0.0
    widest = (train, longest[:1])
    for name, times in (("stop", evaluations), (GENERAL, 2), (ending, 1)):
        split = prepared.splits.get(name)
        if split is None or not rows.get(name):
            continue
        share = times * rows[name] / len(split)
        if new and name == ending:
            generated += share * new * math.ceil(len(split) / GENERATED_TOGETHER)
            continue
        chunks = _chunks(split, _together(task))
        predicted += share * sum(_tokens(split, each) for each in chunks)
        widest = max(widest, *((split, each) for each in chunks), key=lambda found: _tokens(*found))
    return _Sizes(
        batch=task.collate([train.encoded[i] for i in longest], prepared.padding),
        batch_tokens=_tokens(train, longest),
        trained_tokens=statistics.mean(_tokens(train, each) for each in order),
        steps=steps,
        evaluated=task.collate([widest[0].encoded[i] for i in widest[1]], prepared.padding),
        evaluated_tokens=_tokens(*widest),
        predicted_tokens=predicted,
        generated_tokens=generated,
        best=evaluations > 1,
    )


def _tokens(split: Split, rows: Sequence[int]) -> int:
    return len(rows) * max(length(split.encoded[i]) for i in rows)


def _chunks(split: Split, size: int) -> list[list[int]]:
    """Rows as tasks predict them: those of similar lengths together."""
    order = sorted(range(len(split)), key=lambda i: length(split.encoded[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _together(task: Task) -> int:
    """Rows that the task predicts at a time, which its module says."""
    return int(vars(sys.modules[type(task).__module__]).get("EVALUATION_ROWS", EVALUATION_ROWS))


def _new_tokens(task: Task) -> int:
    """Tokens that the task generates for a row; 0: it predicts without generating."""
    option = GENERATES.get(task.name)
    return 0 if option is None or task.metric == "perplexity" else int(getattr(task, option))


def _saved_bytes(model: nn.Module, quantization: str | None) -> int:
    """Bytes less than in float32 that the projections take when they are stored in so many bits."""
    digit = re.search(r"[48]", quantization or "")
    if digit is None:
        return 0
    weights: list[Any] = [module.weight for module in quantizable(model).values()]
    return sum(int(weight.numel() * (4 - BITS[digit[0]] / 8)) for weight in weights)


def _traced(step: Step, evaluation: Pass, sizes: _Sizes, speed: Speed, saved: int) -> Forecast:
    held = step.weights_bytes + step.state_bytes - saved
    passing = max(step.peak_bytes, evaluation.peak_bytes + step.state_bytes) - saved - held
    seconds = (
        START_SECONDS
        + sizes.steps * speed.seconds(step.passes, sizes.trained_tokens / sizes.batch_tokens)
        + sizes.steps * speed.seconds(step.update)
        + speed.seconds(evaluation.work) * sizes.predicted_tokens / sizes.evaluated_tokens
        + sizes.generated_tokens
        * (
            speed.seconds(evaluation.work, GENERATED_TOGETHER / sizes.evaluated_tokens)
            + step.weights_bytes / speed.bytes_per_second
        )
    )
    return _forecast(held, passing, step.trained_bytes * sizes.best, seconds, speed)


def _forecast(held: float, passing: float, best: float, seconds: float, speed: Speed, **facts: bool) -> Forecast:
    """Args: held, passing, best: bytes alive between steps, besides within a step, in a copy of the best weights."""
    on_cpu = speed.device == "cpu"
    fixed = TOUCHED_BYTES if on_cpu else CUBLAS_BYTES
    return Forecast(
        peak_bytes=round(held + best + passing * (HEAP if on_cpu else 1.0) + fixed),
        steady_bytes=round(held + best + fixed),
        seconds=seconds,
        **facts,
    )


def _rough(model: nn.Module, contender: Contender, resolved: Resolved, sizes: _Sizes, speed: Speed) -> Forecast:
    """From the numbers of parameters, layers and hidden features alone, where the model cannot be traced."""
    config: Any = model.config
    config = config.get_text_config()
    trained = 4 * (resolved.adapter_parameters + resolved.head_parameters)
    held = 4 * resolved.total_parameters - _saved_bytes(model, contender.quantization) + 2 * trained
    kept = 4 * HIDDEN_COPIES * config.hidden_size * config.num_hidden_layers
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    flops = 2 * (resolved.total_parameters - sum(embeddings.values()))
    ways = 3 if resolved.adapter_parameters > resolved.total_parameters / 2 else 2
    rate = speed.flops_per_second[torch.float32]
    tokens = ways * sizes.steps * sizes.trained_tokens + sizes.predicted_tokens
    tokens += sizes.generated_tokens * GENERATED_TOGETHER
    moved = tokens * kept / speed.bytes_per_second
    seconds = START_SECONDS + tokens * flops / rate + moved
    passing = sizes.batch_tokens * kept + trained
    return _forecast(held, passing, trained * sizes.best, seconds, speed, approximate=True)
