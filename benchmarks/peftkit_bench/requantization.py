"""What a trained adapter's effect is worth after merging into 4-bit codes: `python -m peftkit_bench.requantization`.

A LoRA of rank 8 is trained on every projection of MiniLM, whose weights were quantized to NF4 before, and scaled so
that the change is a given share of the weight. Each way of merging is judged on texts that it has not seen: on the
weights, on the inputs of each layer, and on the logits, against the adapter left unmerged.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peftkit_kernels import Quantized, dequantize_blockwise, quantize_blockwise
from torch import Tensor, nn

import peftkit
from peftkit.requantization import gram_of, requantized
from peftkit.wrap import adapters_of
from peftkit_bench import suite as suites
from peftkit_bench import timing
from peftkit_bench.preparing import prepare
from peftkit_bench.tasks.batching import training_order
from peftkit_bench.tasks.contract import Batch, Prepared, Task

TARGETS = ("query", "value", "dense")
SIZES = (0.02, 0.03, 0.05)
ROWS = 512
"""Texts for calibration, and as many others to judge by."""
FEW = 32
"""Texts, where it is asked how few will do."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One way of merging at one size of the change, over all layers."""

    size: float
    """‖dW‖ / ‖W‖, mean over layers."""
    route: str
    calibration_rows: int
    residual_rank: int
    weight_effect: float
    """Mean over layers, on weights; likewise the three that follow, on weights and on the inputs of unseen texts."""
    weight_error: float
    input_effect: float
    input_error: float
    logit_error: float
    """‖logits - unmerged‖ / ‖without adapter - unmerged‖ on unseen texts."""
    agreement: float
    """Share of unseen texts that get the class that the unmerged adapter gives them."""
    accuracy: float
    accuracy_unmerged: float
    accuracy_without: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory of one weight."""

    shape: tuple[int, int]
    route: str
    device: str
    seconds: float
    """Median."""
    rounds: int
    peak_bytes: int | None
    """Beyond what was held before; None: not measured on this kind of device."""


@dataclass(frozen=True)
class Route:
    """A way of merging one layer."""

    name: str
    merge: Callable[[Layer, str], Tensor]
    """(layer, kind of calibration) -> stored weight."""
    calibration: str = ""
    """"", "few" or "many"."""
    rank: int = 0


@dataclass(frozen=True)
class Layer:
    """What merging one layer starts from."""

    start: Quantized
    weight: Tensor
    change: Tensor
    down: Tensor
    grams: dict[str, Tensor]
    """By kind of calibration; "unseen" are the texts to judge by."""


def _plain(layer: Layer, calibration: str) -> Tensor:
    return dequantize_blockwise(quantize_blockwise(layer.weight + layer.change, layer.start.kind, layer.start.block))


def _chosen(layer: Layer, calibration: str, **fields: Any) -> Tensor:
    gram = layer.grams[calibration] if calibration else None
    found = requantized(layer.weight + layer.change, layer.start, gram=gram, directions=layer.down, **fields)
    return found.weight()


def _least(effect: float, **fields: Any) -> Callable[[Layer, str], Tensor]:
    return functools.partial(_chosen, least_effect=effect, **fields)


ROUTES = (
    Route("rounded", _plain),
    Route("chosen, effect at least 0.7", _least(0.7)),
    Route("chosen, least error", _least(0.0), "many"),
    Route("chosen, effect at least 0.9", _least(0.9), "many"),
    Route("chosen, effect at least 0.9", _least(0.9), "few"),
    Route("chosen, effect at least 0.9", _least(0.9, residual_rank=2), "many", 2),
    Route("chosen, effect at least 0.9", _least(0.9, residual_rank=8), "many", 8),
    Route("chosen, effect at least 0.9", _least(0.9)),
)


@dataclass(frozen=True)
class Trained:
    """A model whose projections lie on NF4's grid, and an adapter trained on it."""

    task: Task
    prepared: Prepared
    model: nn.Module
    """With the trained head; its projections are overwritten by each route."""
    starts: dict[str, Quantized]
    changes: dict[str, Tensor]
    downs: dict[str, Tensor]


def trained(suite: suites.Suite, steps: int = 100, rate: float = 3e-3) -> Trained:
    """The adapter that everything is measured on; about half a minute on two cores."""
    task, prepared = suite.task, prepare(suite)
    torch.manual_seed(0)
    model = task.model(prepared.folder, prepared.facts)
    starts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name and name.rpartition(".")[2] in TARGETS:
            starts[name] = quantize_blockwise(module.weight.detach())
            module.weight.data.copy_(dequantize_blockwise(starts[name]))
    peftkit.wrap(model, peftkit.LoRA(r=8, lora_alpha=16, target_modules=list(starts)))
    model.train()
    head = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "lora" in n]
    rates = (rate, suite.training.head_learning_rate)
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": head}], weight_decay=0.0)
    split = prepared.splits["train"]
    for step, chosen in enumerate(training_order(split, size=suite.training.batch_size, batches=steps, seed=0)):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * (1 - step / steps)
        task.loss(model, task.collate([split.encoded[i] for i in chosen], prepared.padding)).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapters: dict[str, Any] = {n: a for n, a in adapters_of(model, "default") if n in starts}
    changes = {name: adapter.delta() for name, adapter in adapters.items()}
    downs = {name: adapter.lora_A.detach().clone() for name, adapter in adapters.items()}
    plain = peftkit.merge_and_unload(model).eval()
    return Trained(task, prepared, plain, starts, changes, downs)


def _batches(found: Trained, split: str, rows: int) -> Iterator[Batch]:
    encoded = found.prepared.splits[split].encoded
    for first in range(0, rows, 64):
        batch = found.task.collate(encoded[first : min(first + 64, rows)], found.prepared.padding)
        yield {name: value for name, value in batch.items() if name != "labels"}


def _write(found: Trained, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        found.model.get_submodule(name).weight.data.copy_(weight)  # type: ignore[operator]  # a Linear


@torch.no_grad()
def _logits(found: Trained, weights: dict[str, Tensor], rows: int) -> Tensor:
    _write(found, weights)
    return torch.cat([found.model(**batch).logits for batch in _batches(found, "test", rows)])


@torch.no_grad()
def _grams(found: Trained, split: str, rows: int) -> dict[str, Tensor]:
    """Gram matrices of every target's inputs, padding left out; the weights are those that were written last."""
    grams: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def collect(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grams[name] = gram_of(inputs[0][mask], grams.get(name))

    hooks = [
        found.model.get_submodule(name).register_forward_pre_hook(functools.partial(collect, name))
        for name in found.starts
    ]
    try:
        for batch in _batches(found, split, rows):
            mask = batch["attention_mask"].bool()
            found.model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def kept(stored: Tensor, layer: Layer, gram: Tensor | None) -> tuple[float, float]:
    """Effect and error of a stored weight, on weights or on the inputs of a gram matrix."""
    rest = stored - layer.weight - layer.change
    seen = layer.change if gram is None else layer.change @ gram
    power = (seen.double() * layer.change).sum()
    effect = (seen.double() * (stored - layer.weight)).sum() / power
    error = (rest if gram is None else rest @ gram).double() * rest
    return float(effect), float((error.sum() / power).sqrt())


def study(found: Trained, size: float, rows: int = 1200) -> Iterator[Merged]:
    """Every route at one size of the change."""
    weights = {name: dequantize_blockwise(start) for name, start in found.starts.items()}
    mean = statistics.fmean(float(found.changes[n].norm() / weights[n].norm()) for n in weights)
    changes = {name: change * (size / mean) for name, change in found.changes.items()}
    labels = torch.tensor([row["label"] for row in found.prepared.splits["test"].encoded[:rows]])
    without = _logits(found, weights, rows)
    unmerged = _logits(found, {n: weights[n] + changes[n] for n in weights}, rows)
    many, few = (_grams(found, "train", count) for count in (ROWS, FEW))
    unseen = _grams(found, "test", ROWS)
    layers = {
        n: Layer(start, weights[n], changes[n], found.downs[n], {"many": many[n], "few": few[n], "unseen": unseen[n]})
        for n, start in found.starts.items()
    }
    for route in ROUTES:
        stored = {name: route.merge(layer, route.calibration) for name, layer in layers.items()}
        on_weights = [kept(stored[n], layer, None) for n, layer in layers.items()]
        on_inputs = [kept(stored[n], layer, layer.grams["unseen"]) for n, layer in layers.items()]
        logits = _logits(found, stored, rows)
        yield Merged(
            size=size,
            route=route.name,
            calibration_rows={"": 0, "few": FEW, "many": ROWS}[route.calibration],
            residual_rank=route.rank,
            weight_effect=statistics.fmean(effect for effect, _ in on_weights),
            weight_error=statistics.fmean(error for _, error in on_weights),
            input_effect=statistics.fmean(effect for effect, _ in on_inputs),
            input_error=statistics.fmean(error for _, error in on_inputs),
            logit_error=float((logits - unmerged).norm() / (without - unmerged).norm()),
            agreement=float((logits.argmax(1) == unmerged.argmax(1)).float().mean()),
            accuracy=float((logits.argmax(1) == labels).float().mean()),
            accuracy_unmerged=float((unmerged.argmax(1) == labels).float().mean()),
            accuracy_without=float((without.argmax(1) == labels).float().mean()),
        )


def cost(width: int = 4096, device: str = "cpu", rounds: int = 3) -> Iterator[Cost]:
    """Time and memory for one square weight, against plain rounding of it."""
    generator = torch.Generator().manual_seed(0)
    start = quantize_blockwise(torch.randn(width, width, generator=generator).to(device))
    weight = dequantize_blockwise(start)
    down = torch.randn(16, width, generator=generator).to(device)
    change = torch.randn(width, 16, generator=generator).to(device) @ down
    target = weight + change * (0.03 * weight.norm() / change.norm())
    inputs = torch.randn(1024, width, generator=generator) + 4 * torch.randn(
        1024, 32, generator=generator
    ) @ torch.randn(32, width, generator=generator)
    gram = gram_of(inputs.to(device))
    del weight, change, inputs
    calls: dict[str, Callable[[], object]] = {
        "rounded": lambda: quantize_blockwise(target),
        "chosen, no calibration": lambda: requantized(target, start, directions=down),
        "chosen, calibrated": lambda: requantized(target, start, gram=gram, directions=down),
        "chosen, calibrated, residual of rank 4": lambda: requantized(
            target, start, gram=gram, directions=down, residual_rank=4
        ),
    }
    for name, call in calls.items():
        gc.collect()
        peak = _peak(call, device)
        times = [_seconds(call, device) for _ in range(rounds)]
        yield Cost(
            shape=(width, width),
            route=name,
            device=device if device == "cpu" else torch.cuda.get_device_name(),
            seconds=statistics.median(times),
            rounds=rounds,
            peak_bytes=peak,
        )


def _seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes at the peak of a call over what was held before; on the CPU as the system counts them, where it does."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
        before = _status(status, "VmRSS")
        call()
        return _status(status, "VmHWM") - before
    except OSError:
        return None


def _status(path: Path, field: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Appends the measurements to a file and shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["study", "cost"])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--suite", type=Path, default=Path(__file__).parents[1] / "suites" / "quick.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge/requantization.jsonl"))
    options = parser.parse_args()

    def keep(rows: Iterator[Any]) -> None:
        for row in rows:
            timing.append([row], options.out)
            shown = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in vars(row).items())
            sys.stdout.write(shown + "\n")
            sys.stdout.flush()

    if "study" in options.what:
        parts = suites.load(options.suite)
        if len(parts) != 1:
            parser.error(f"--suite {options.suite}: expected a suite of one part, found {len(parts)}")
        found = trained(parts[0])
        for size in options.sizes:
            keep(study(found, size))
    if "cost" in options.what:
        keep(cost(options.width, options.device))


if __name__ == "__main__":
    main()
