"""A small suite of merges as plain values, and changes to it."""

from __future__ import annotations

import copy
from typing import Any

GOOD: dict[str, Any] = {
    "kind": "merge",
    "name": "smoke",
    "title": "Smoke",
    "backbone": {"path": "somewhere"},
    "data": {
        "source": "docstring-origin",
        "origins": ["python", "numpy"],
        "train": 32,
        "tune": 4,
        "stop": 4,
        "test": 24,
    },
    "task": {"name": "seq-cls", "max_tokens": 16},
    "training": {"steps": 3, "batch_size": 8},
    "calibration_rows": 16,
    "judged_rows": 8,
    "adapters": {
        "LoRA": {"method": "lora", "learning_rate": 0.01, "config": {"r": 2}, "scaled": "lora_B", "sizes": [0.02, 0.1]},
        "(IA)³": {"method": "ia3", "learning_rate": 0.1},
    },
    "routes": {
        "own": {"tool": "peftkit", "base": "nf4", "into": "bf16"},
        "own nf4": {"tool": "peftkit", "base": "nf4", "into": "nf4", "calibrated": True, "residual_rank": 1},
        "own fused": {"tool": "peftkit", "base": "nf4", "into": "fused"},
        "peft": {"tool": "peft", "base": "nf4", "into": "nf4"},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one value replaced or added; "/" between keys."""
    made = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place = made
    for key in parents:
        place = place[key]
    place[last] = value
    return made
