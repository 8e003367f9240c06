"""Token classification: a tag for each word; whole entities by BIO tags, or plain tags; cross-entropy; entity F1.

Tags of entities are read as conlleval and seqeval (its default) read them: an entity begins at B-, and also at an I-
that follows O or another type, so IOB1 and sequences that break the rules of BIO have a meaning; E- (or L-) and S- (or
U-) of the five-tag schemes end it. Rows are rewritten in these terms, so that a model learns B- and I- alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import loading
from peftkit_bench.tasks.batching import in_batches, masks, padded
from peftkit_bench.tasks.contract import Batch, Column, Prepared, RowError

EVALUATION_ROWS = 128
IGNORED = -100
"""Label of a token that has none: special tokens, and all but the first of a word."""
OUTSIDE = "O"

Entity = tuple[int, int, str]
"""First word, the word after the last, type."""


@dataclass(frozen=True, kw_only=True)
class TokenClassification:
    """One tag a word."""

    name: ClassVar[str] = "token-cls"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="tokens", what="list of words, or words with spaces between", also=("words",)),
        Column(name="tags", what="list of tags, one a word", also=("ner_tags", "labels", "pos_tags"), answer=True),
    )
    metrics: ClassVar[tuple[str, ...]] = ("entity F1", "token accuracy")
    architecture: ClassVar[str] = "AutoModelForTokenClassification"
    max_tokens: int = 128
    """Rows are cut to this many tokens; words beyond count as O, so their entities are missed."""
    metric: str = "entity F1"
    """With "token accuracy" tags may be of any kind, such as parts of speech."""

    def __post_init__(self) -> None:
        if self.metric not in self.metrics:
            raise SuiteError(f"task, metric: expected one of {', '.join(self.metrics)}, found {self.metric!r}")

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: tokens; tags, those of entities as B-, I- and O."""
        tokens, tags = _words(row, "tokens"), _words(row, "tags")
        if len(tokens) != len(tags):
            raise RowError(f"expected as many tags as tokens, found {len(tags)} tags and {len(tokens)} tokens")
        if self.metric == "entity F1":
            tags = bio(entities(tags), len(tags))
        return {"tokens": tokens, "tags": tags}

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """See `Task`: the tags of the training rows; of entities O, and B- and I- of each type.

        Another split may have tags that training never shows: nobody can predict them, they count as missed, and they
        are missed by every method alike. In data made to be hard, such as names that only just came up, that happens.
        """
        tags = {tag for row in rows["train"] for tag in row["tags"]}
        if self.metric == "entity F1":
            types = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
            if not types:
                raise RowError("column 'tags': expected entities in the training rows, found O alone")
            return {"tags": [OUTSIDE, *(prefix + kind for kind in types for prefix in ("B-", "I-"))]}
        if len(tags) < 2:
            raise RowError(f"column 'tags': expected at least two tags in the training rows, found {sorted(tags)}")
        return {"tags": sorted(tags)}

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: also `labels` of the tokens, and `first`, the first token of each word, -1 where there is none.

        Words are joined with spaces and found again by the characters that a token covers. Tokenizers that mark a
        word's beginning by the space before it see running text this way, as they did when they were trained.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise SuiteError("task 'token-cls': expected a fast tokenizer, which says what characters a token covers, "
                             f"found {type(tokenizer).__name__}; choose a backbone with a tokenizer.json")  # fmt: skip
        starts, ends, position = [], [], 0
        for word in row["tokens"]:
            starts.append(position)
            ends.append(position + len(word))
            position = ends[-1] + 1
        found = tokenizer(
            " ".join(row["tokens"]), truncation=True, max_length=self.max_tokens, return_offsets_mapping=True
        )
        number = {tag: index for index, tag in enumerate(facts["tags"])}
        first = [-1] * len(starts)
        labels = [IGNORED] * len(found["input_ids"])
        for token, (begin, end) in enumerate(found["offset_mapping"]):
            if end <= begin:
                continue
            # Some tokenizers count the space before a word to its first token: the last character is the safe one.
            word = bisect_right(starts, end - 1) - 1
            if first[word] < 0 and end - 1 < ends[word]:
                first[word] = token
                labels[token] = number.get(row["tags"][word], IGNORED)
        kept = {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}
        return {**kept, "labels": labels, "first": first}

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.skeleton(AutoModelForTokenClassification, folder, num_labels=len(facts["tags"]))

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.model(AutoModelForTokenClassification, folder, num_labels=len(facts["tags"]))

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """See `Task`."""
        ids = [row["input_ids"] for row in encoded]
        batch = {"input_ids": padded(ids, padding), "attention_mask": masks(ids)}
        if "token_type_ids" in encoded[0]:
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in encoded], 0)
        return {**batch, "labels": padded([row["labels"] for row in encoded], IGNORED)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`: the mean over the words of the batch."""
        labels = batch["labels"].flatten()
        total = F.cross_entropy(
            self._logits(model, batch).flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
        )
        return total / (labels != IGNORED).sum().clamp(min=1)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return found

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """See `Task`: the entities of each row as [first word, the word after the last, type], or the tags."""
        chosen = prepared.splits[split]
        tags = prepared.facts["tags"]
        fallback = OUTSIDE if self.metric == "entity F1" else ""
        found: list[Any] = [[]] * len(chosen)
        for places, batch in in_batches(self, model, chosen, prepared.padding, EVALUATION_ROWS):
            best = self._logits(model, batch).argmax(-1).tolist()
            for place, numbers in zip(places, best, strict=True):
                first = chosen.encoded[place]["first"]
                predicted = [tags[numbers[token]] if token >= 0 else fallback for token in first]
                found[place] = [list(each) for each in entities(predicted)] if fallback else predicted
        return found

    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """See `Task`: None, a tagger predicts no tokens."""
        return None

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """See `Task`."""
        rows = prepared.splits[split].rows
        if self.metric == "entity F1":
            return [entity_counts(found, entities(row["tags"])) for found, row in zip(predictions, rows, strict=True)]
        return [
            (float(sum(p == y for p, y in zip(found, row["tags"], strict=True))), float(len(row["tags"])))
            for found, row in zip(predictions, rows, strict=True)
        ]


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sequence of tags, in order.

    Raises:
        RowError: a tag is neither O nor one of B-, I-, E-, L-, S-, U- with a type.
    """
    found: list[Entity] = []
    start, kind = 0, ""
    for position, tag in enumerate(tags):
        prefix, _, this = tag.partition("-")
        if tag == OUTSIDE:
            this = ""
        elif prefix not in ("B", "I", "E", "L", "S", "U") or not this:
            raise RowError(
                f"column 'tags': expected O, or B- or I- and a type, such as B-person, found {tag!r}; tags that are no "
                "entities need the task's `metric: token accuracy`"
            )
        if kind and (this != kind or prefix in ("B", "S", "U")):
            found.append((start, position, kind))
            kind = ""
        if this and not kind:
            start, kind = position, this
        if kind and prefix in ("E", "L", "S", "U"):
            found.append((start, position + 1, kind))
            kind = ""
    return [*found, (start, len(tags), kind)] if kind else found


def bio(found: Iterable[Entity], count: int) -> list[str]:
    """The tags of `count` words, B- at the beginning of each entity and I- inside."""
    tags = [OUTSIDE] * count
    for start, end, kind in found:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def entity_counts(predicted: Iterable[Sequence[Any]], true: Iterable[Entity]) -> tuple[float, float, float]:
    """How many entities are right, wrong and missed; right is who agrees in beginning, end and type."""
    ours, theirs = {tuple(each) for each in predicted}, set(true)
    right = len(ours & theirs)
    return float(right), float(len(ours) - right), float(len(theirs) - right)


def _words(row: Mapping[str, Any], column: str) -> list[str]:
    """A column that holds a list of texts: a list, the same as JSON, or texts with spaces between."""
    found = row.get(column)
    if isinstance(found, str):
        if found.lstrip().startswith(('["', "['", "[]")):
            try:
                found = json.loads(found)
            except ValueError:
                raise RowError(
                    f'column {column!r}: expected a list as JSON writes it, such as ["a", "b"], found {found!r:.60}'
                ) from None
        else:
            found = found.split()
    if not isinstance(found, list) or not found:
        raise RowError(f"column {column!r}: expected a list of at least one text, found {found!r:.60}")
    for each in found:
        if not isinstance(each, str) or not each.strip():
            more = "; numbers of classes need their names" if isinstance(each, int) else ""
            raise RowError(f"column {column!r}: expected a list of texts, found {each!r} in it{more}")
    return list(found)
