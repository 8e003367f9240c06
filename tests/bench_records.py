"""Records made up for tests of the report: every number is chosen, so that what the report says can be checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from peftkit_bench import record
from peftkit_bench.record import AnyRecord, Outcomes, Record

EXAMPLES, CLASSES, TOKENS = 400, 4, 20
LABELS = tuple(int(v) for v in np.random.default_rng(5).integers(0, CLASSES, EXAMPLES))
GROUPS = tuple(i // 2 for i in range(EXAMPLES))

_MADE: dict[str, Outcomes] = {}
"""Outcomes of the records made so far, by their hash."""


def predictions(accuracy: float, seed: int) -> tuple[int, ...]:
    """Predictions of which exactly round(accuracy * EXAMPLES) are right; the same texts are hard for everyone."""
    hardness = np.random.default_rng(9).normal(size=EXAMPLES) + 0.4 * np.random.default_rng(seed).normal(size=EXAMPLES)
    right = set(np.argsort(hardness)[: round(accuracy * EXAMPLES)].tolist())
    return tuple(y if i in right else (y + 1) % CLASSES for i, y in enumerate(LABELS))


def outcomes(score: float, seed: int, metric: str = "accuracy") -> Outcomes:
    """What a cell predicted whose score is the one asked for, to the nearest example."""
    if metric == "perplexity":
        common, own = (np.random.default_rng(s).normal(size=EXAMPLES) for s in (9, seed))
        spread = common + 0.4 * own
        nats = TOKENS * (math.log(score) + 0.3 * (spread - spread.mean()))
        counts = [(float(value), float(TOKENS)) for value in nats]
        return Outcomes(predictions=[list(pair) for pair in counts], counts=counts, groups=GROUPS)
    found = predictions(score, seed)
    counts = [(float(p == y),) for p, y in zip(found, LABELS, strict=True)]
    return Outcomes(predictions=found, counts=counts, groups=GROUPS)


def made_up(contender: str, score: float, parameters: int, seed: int = 0, **changes: Any) -> Record:
    """A record of one cell; `changes` replace fields."""
    metric = changes.get("metric", "accuracy")
    name = f"{changes.get('suite', '')}{contender}-{changes.get('budget', '')}"
    phase = changes.get("phase", "final")
    rate = changes.get("learning_rate", 0.003)
    digest = "not kept"
    if phase == "final":
        found = outcomes(score, seed, metric)
        digest = found.digest
        _MADE[digest] = found
    fields: dict[str, Any] = {
        "key": f"{name}-{phase}-{rate:g}-{seed}".replace("/", "_"),
        "variant": f"{name}-{phase}-{rate:g}",
        "trial": name,
        "suite": "made-up",
        "title": "A made-up comparison",
        "contender": contender,
        "subject": "peftkit",
        "method": contender.lower(),
        "quantization": None,
        "baseline": False,
        "phase": phase,
        "seed": seed,
        "split": "test" if phase == "final" else "tune",
        "config": {"r": 8},
        "learning_rate": rate,
        "searched": {},
        "training": {"steps": 40, "batch_size": 8, "warmup": 0.1, "weight_decay": 0.0, "head_learning_rate": 0.01,
                     "clip_norm": 1.0},
        "tuning": None,
        "task": {"name": "seq-cls", "max_tokens": 48},
        "metric": metric,
        "data": {"name": "made up", "hash": "d0", "train": 8, "tune": 8, "stop": 8, "test": EXAMPLES,
                 "versions": {"python": "3.11.0"}, "notes": ["two rows were left out"],
                 "facts": {"classes": ["a", "b", "c", "d"]}, "max_tokens": 48},
        "backbone": {"name": "tiny", "hash": "b0", "class": "TinyForSequenceClassification", "parameters": 1_000_000},
        "budget": 5000 if changes.get("knob", "r") else None,
        "budgets": [5000],
        "knob": "r",
        "adapter_parameters": parameters,
        "final_parameters": parameters,
        "head_parameters": 100,
        "total_parameters": 1_000_100 + parameters,
        "score": score if metric == "perplexity" else round(score * EXAMPLES) / EXAMPLES,
        "outcomes": digest,
        "losses": [2 * math.exp(-i / 15) + 0.1 * math.sin(7 * i + seed) for i in range(40)],
        "stopping": [[10, 0.8 * score], [20, 0.95 * score], [30, score], [40, 0.97 * score]],
        "stopping_measure": metric,
        "best_step": 30,
        "train_seconds": 12.0 + seed,
        "evaluate_seconds": 1.0,
        "peak_bytes": 123_000_000,
        "steady_bytes": 67_000_000,
        "memory_method": "resident memory, sampled every 5 ms",
        "adapter_bytes": 45_000,
        "base_latency_seconds": 0.010,
        "latency_seconds": 0.0125,
        "merged_latency_seconds": 0.0101,
        "merged_logit_difference": 1e-6,
        "effect_kept": 1.0,
        "latency_rows": 1,
        "latency_tokens": 32,
        "forgetting": None,
        "threads": 2,
        "jobs": 1,
        "environment": {"processor": "made up", "cores": 2, "memory_bytes": 2**34, "system": "Linux",
                        "python": "3.11.0", "versions": {"peftkit": "0"}, "commit": "abc", "device": "cpu"},
        "started": "2026-01-01T00:00:00+00:00",
        "cell_seconds": 15.0,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def write(folder: Path, records: Sequence[AnyRecord]) -> Path:
    """The folder with the records and what the cells that count predicted."""
    # Nobody waits for the disk in a test.
    with mock.patch.object(record.os, "fsync"), record.writer(folder) as writer:
        for each in records:
            writer.append(each, _MADE.get(each.outcomes) if isinstance(each, Record) else None)
    return folder


def tables(records: Sequence[Record]) -> dict[str, Any]:
    """Counts (seeds, examples, k) of the records by contender, seeds ascending."""
    found: dict[str, list[Any]] = {}
    for each in sorted(records, key=lambda r: r.seed):
        found.setdefault(each.contender, []).append(_MADE[each.outcomes].counts)
    return {name: np.asarray(counts, dtype=np.float64) for name, counts in found.items()}


def read_back(folder: Path, records: Sequence[Record]) -> list[Record]:
    """The records as they are read after they were written."""
    return [each for each in record.read(write(folder, records)) if isinstance(each, Record)]


def standard() -> list[Record]:
    """Two methods that cannot be told apart, a worse one that cannot be merged, and two baselines; three seeds."""
    own = {"knob": None}
    found = []
    for seed in range(3):
        found += [
            made_up("LoRA", 0.70 + 0.005 * (seed - 1), 5000, seed),
            made_up("AdaLoRA", 0.695 + 0.02 * (1 - seed), 4990, seed, final_parameters=3300),
            made_up("Prefix", 0.50, 4900, seed, merged_latency_seconds=None, merged_logit_difference=None,
                    effect_kept=None),
            made_up("(IA)³", 0.60, 900, seed, **own),
            made_up("Full", 0.71, 1_000_000, seed, **own, baseline=True),
            made_up("Head only", 0.30, 0, seed, **own, baseline=True),
        ]  # fmt: skip
    return found


GRID = (0.0003, 0.001, 0.003, 0.01)


def searches(contender: str, best: float, score: float, parameters: int, **changes: Any) -> list[Record]:
    """Search records over GRID, and one rate beyond where the best is at its upper end."""
    rates = [*GRID, GRID[-1] * 3] if best >= GRID[-1] else list(GRID)
    tuning = {"learning_rates": list(GRID), "extended": rates[len(GRID) :]}
    falls = 3.0 if changes.get("metric") == "perplexity" else -0.1
    return [
        made_up(
            contender, score + falls * abs(math.log10(rate / best)), parameters, 0, phase="search",
            learning_rate=rate, tuning=tuning, stopping=[], **changes,
        )
        for rate in rates
    ]  # fmt: skip


BUDGETS = (5_000, 10_000, 20_000)
TASKS: dict[str, dict[str, Any]] = {
    "intents": {"title": "Intents of short requests", "metric": "accuracy"},
    "source": {"title": "Next token of Python source", "metric": "perplexity", "task": {"name": "causal-lm"},
               "head_parameters": 0},
}  # fmt: skip
METHODS = {"LoRA": 0.84, "DoRA": 0.845, "AdaLoRA": 0.82, "LoHa": 0.80, "LoKr": 0.78, "OFT": 0.825, "BOFT": 0.81,
           "Bottleneck": 0.835, "Prefix tuning": 0.72, "LoReFT": 0.79}  # fmt: skip
"""Accuracy at the first budget."""


def whole_suite(task: str = "intents", seeds: int = 3) -> list[Record]:
    """Ten methods at three budgets, some of a size of their own, baselines, a peer, searches: all that a suite has."""
    return list(_whole_suite(task, seeds))


@functools.cache
def _whole_suite(task: str, seeds: int) -> tuple[Record, ...]:
    shared = {**TASKS[task], "suite": task, "budgets": list(BUDGETS)}
    shared["data"] = {**made_up("x", 0.5, 1).data, "name": task, "hash": task}
    lower = shared["metric"] == "perplexity"

    def score(share: float, seed: int) -> float:
        noisy = share + 0.004 * math.sin(12 * seed + 50 * share)
        return 4 + 30 * (1 - noisy) if lower else noisy

    found: list[Record] = []

    def add(name: str, share: float, parameters: int, rate: float | None = 0.003, **changes: Any) -> None:
        fields = {**shared, **changes}
        if rate is not None:
            found.extend(searches(name, rate, score(share, 0), parameters, **fields))
            fields["tuning"] = found[-1].tuning
        cost = 1 + 0.5 * math.sin(len(name)) ** 2
        for seed in range(seeds):
            found.append(
                made_up(
                    name, score(share, seed), parameters, seed, learning_rate=rate or 0.003,
                    train_seconds=30 * cost + seed, peak_bytes=int(2e8 * cost), steady_bytes=int(1.2e8 * cost),
                    latency_seconds=0.0100 + 0.002 * (cost - 1), forgetting={"before": 3.2, "after": 3.2 + share**4},
                    **{"merged_latency_seconds": 0.0101, **fields},
                )
            )  # fmt: skip

    for place, (name, share) in enumerate(METHODS.items()):
        for step, budget in enumerate(BUDGETS):
            off = 0.7 if name == "BOFT" and step == 0 else 1.0 - 0.002 * place
            size = round(budget * off)
            kept = round(size * 2 / 3) if name == "AdaLoRA" else size
            merged = (
                {"merged_latency_seconds": None, "effect_kept": None} if "tuning" in name else {"effect_kept": 0.999}
            )
            better = 0.02 * step * (1 - 0.1 * place)
            add(name, share + better, size, GRID[place % len(GRID)], budget=budget, final_parameters=kept, **merged)
    for step, budget in enumerate(BUDGETS):
        add("LoRA (peft)", 0.84 + 0.02 * step, budget, 0.003, budget=budget, subject="peft", method="lora")
    own = {"knob": None, "budget": None}
    add("(IA)³", 0.74, 900, 0.01, **own)
    add("BitFit", 0.77, 2600, **own)
    add("Full fine-tuning", 0.88, 1_000_000, 0.0003, baseline=True, **own)
    add("Head only", 0.40, 0, None, baseline=True, **own)
    return tuple(found)
