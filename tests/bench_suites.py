"""A tiny backbone and a small suite for tests of the engine: real cells in about a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peftkit_bench.cell import Job, run_cell
from peftkit_bench.workers import Outcome
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_backbone(folder: Path) -> Path:
    """A tiny random BERT with a tokenizer of letters, saved into a folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The suite as plain values, top-level keys replaced."""
    return {
        "name": "smoke",
        "title": "Smoke",
        "backbone": {"path": str(folder)},
        "task": {"name": "seq-cls", "max_tokens": 24},
        "data": {"source": "docstring-origin", "origins": ["python", "numpy"], "train": 32, "tune": 16, "stop": 8,
                 "test": 24},
        "training": {"steps": 4, "batch_size": 8, "evaluations": 2},
        "seeds": [0],
        "budgets": [600],
        "contenders": {
            "LoRA": {"method": "lora", "learning_rate": 0.01},
            "Fixed": {"method": "lora", "learning_rate": 0.01, "budget": False, "config": {"r": 1}},
            "Bottleneck": {"method": "bottleneck", "learning_rate": 0.01},
            "Full": {"method": "full", "learning_rate": 0.001, "baseline": True},
            "Head": {"method": "head", "baseline": True},
        },
        **changes,
    }  # fmt: skip


def written(path: Path, found: dict[str, Any]) -> Path:
    """The file that holds a suite."""
    path.write_text(yaml.safe_dump(found, sort_keys=False))
    return path


class InProcess:
    """Workers that run cells in this process, which saves the start of others; names the cells as they run."""

    where = "this process"
    jobs = 1

    def __init__(self) -> None:
        self.ran: list[str] = []

    def outcomes(self, ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        """See `Workers`."""
        while (job := ready()) is not None:
            self.ran.append(f"{job.cell.name} {job.cell.seed}")
            yield job.cell, run_cell(job)
