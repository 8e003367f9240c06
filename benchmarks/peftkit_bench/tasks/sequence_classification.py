"""Sequence classification: one class a text, or a pair of texts; cross-entropy; accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peftkit_bench.tasks import loading
from peftkit_bench.tasks.batching import in_batches, masks, padded
from peftkit_bench.tasks.contract import Batch, Column, Prepared, RowError

EVALUATION_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class SequenceClassification:
    """One class a row."""

    name: ClassVar[str] = "seq-cls"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="text", what="text", also=("sentence", "sentence1", "premise", "question", "content")),
        Column(name="text_pair", what="text", required=False, also=("sentence2", "hypothesis")),
        Column(name="label", what="class, as text or a number", also=("labels", "class", "target"), answer=True),
    )
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    architecture: ClassVar[str] = "AutoModelForSequenceClassification"
    max_tokens: int = 128
    """Texts are cut to this many tokens."""
    metric: str = "accuracy"

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`."""
        found: dict[str, Any] = {"text": loading.text(row, "text")}
        if row.get("text_pair") is not None:
            found["text_pair"] = loading.text(row, "text_pair")
        label = row.get("label")
        if not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
            raise RowError(f"column 'label': expected a class, as text or a whole number, found {label!r}")
        found["label"] = str(label)
        return found

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """See `Task`: the classes of the training rows, in order of their names, numbers by value."""
        return {"classes": loading.classes(rows, "label", lambda row: [row["label"]])}

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`."""
        found = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=self.max_tokens)
        kept = {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}
        return {**kept, "label": facts["classes"].index(row["label"])}

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.skeleton(AutoModelForSequenceClassification, folder, **self._head(facts))

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.model(AutoModelForSequenceClassification, folder, **self._head(facts))

    def _head(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_labels": len(facts["classes"])}

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """See `Task`."""
        ids = [row["input_ids"] for row in encoded]
        batch = {"input_ids": padded(ids, padding), "attention_mask": masks(ids)}
        if "token_type_ids" in encoded[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in encoded], 0)
        return {**batch, "labels": torch.tensor([row["label"] for row in encoded])}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`."""
        return F.cross_entropy(self._logits(model, batch).float(), batch["labels"])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return found

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """See `Task`: the number of a class for each row."""
        chosen = prepared.splits[split]
        found = [0] * len(chosen)
        for rows, batch in in_batches(self, model, chosen, prepared.padding, EVALUATION_ROWS):
            for index, label in zip(rows, self._logits(model, batch).argmax(-1).tolist(), strict=True):
                found[index] = label
        return found

    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """See `Task`: None, a classifier predicts no tokens."""
        return None

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """See `Task`."""
        labels = [row["label"] for row in prepared.splits[split].encoded]
        return [(float(p == y),) for p, y in zip(predictions, labels, strict=True)]
