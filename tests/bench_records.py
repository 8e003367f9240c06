"""Records made up for tests of the report: every number is chosen, so that what the report says can be checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from peftkit_bench.record import Record

EXAMPLES, CLASSES = 400, 4
LABELS = tuple(int(v) for v in np.random.default_rng(5).integers(0, CLASSES, EXAMPLES))
GROUPS = tuple(i // 2 for i in range(EXAMPLES))


def predictions(accuracy: float, seed: int) -> tuple[int, ...]:
    """Predictions of which exactly round(accuracy * EXAMPLES) are right; the same texts are hard for everyone."""
    hardness = np.random.default_rng(9).normal(size=EXAMPLES) + 0.4 * np.random.default_rng(seed).normal(size=EXAMPLES)
    right = set(np.argsort(hardness)[: round(accuracy * EXAMPLES)].tolist())
    return tuple(y if i in right else (y + 1) % CLASSES for i, y in enumerate(LABELS))


def made_up(contender: str, accuracy: float, parameters: int, seed: int = 0, **changes: Any) -> Record:
    """A record of one cell; `changes` replace fields."""
    found = predictions(accuracy, seed)
    fields: dict[str, Any] = {
        "key": f"{contender}-{seed}",
        "variant": contender,
        "suite": "made-up",
        "title": "A made-up comparison",
        "contender": contender,
        "subject": "peftkit",
        "method": contender.lower(),
        "baseline": False,
        "seed": seed,
        "split": "test",
        "config": {"r": 8},
        "learning_rate": 0.003,
        "training": {"steps": 5, "batch_size": 8, "warmup": 0.1, "weight_decay": 0.0, "head_learning_rate": 0.01,
                     "clip_norm": 1.0},
        "task": "seq-cls",
        "data": {"name": "made up", "hash": "d0", "classes": ["a", "b", "c", "d"], "train": 8, "validation": 8,
                 "test": EXAMPLES, "versions": {"python": "3.11.0"}, "max_tokens": 48},
        "backbone": {"name": "tiny", "hash": "b0", "class": "TinyForSequenceClassification", "parameters": 1_000_100},
        "budget": 5000,
        "knob": "r",
        "adapter_parameters": parameters,
        "final_parameters": parameters,
        "head_parameters": 100,
        "total_parameters": 1_000_100 + parameters,
        "accuracy": sum(p == y for p, y in zip(found, LABELS, strict=True)) / EXAMPLES,
        "predictions": found,
        "labels": LABELS,
        "groups": GROUPS,
        "losses": [1.0, 0.5],
        "train_seconds": 12.0 + seed,
        "evaluate_seconds": 1.0,
        "peak_bytes": 123_000_000,
        "memory_method": "made up",
        "adapter_bytes": 45_000,
        "base_latency_seconds": 0.010,
        "latency_seconds": 0.0125,
        "merged_latency_seconds": 0.0101,
        "merged_logit_difference": 1e-6,
        "latency_rows": 1,
        "latency_tokens": 32,
        "threads": 2,
        "jobs": 1,
        "environment": {"processor": "made up", "cores": 2, "memory_bytes": 2**34, "system": "Linux",
                        "python": "3.11.0", "versions": {"peftkit": "0"}, "commit": "abc", "device": "cpu"},
        "started": "2026-01-01T00:00:00+00:00",
        "cell_seconds": 15.0,
    }  # fmt: skip
    return Record(**{**fields, **changes})
