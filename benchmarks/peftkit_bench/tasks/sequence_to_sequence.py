"""Sequence to sequence: a text for a text, such as a translation or a summary; BLEU, ROUGE-L or exact match."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import loading
from peftkit_bench.tasks.batching import in_batches, masks, padded
from peftkit_bench.tasks.contract import Batch, Column, Prepared, RowError

EVALUATION_ROWS = 16
IGNORED = -100
TOKENIZERS = ("13a", "intl", "zh", "char", "none")
"""Of sacrebleu, those that need no dictionary."""
_CONFIGURED = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True, kw_only=True)
class SequenceToSequence:
    """One text a row, that an encoder and decoder write."""

    name: ClassVar[str] = "seq2seq"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="source", what="text",
               also=("document", "article", "mr", "dialogue", "src", "input", "question", "text")),
        Column(name="target", what="text, or a list of texts that are all right", answer=True,
               also=("summary", "highlights", "reference", "references", "tgt", "output", "answer", "completion")),
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = ("BLEU", "ROUGE-L", "exact match")
    architecture: ClassVar[str] = "AutoModelForSeq2SeqLM"
    max_tokens: int = 256
    """Sources are cut to this many tokens."""
    max_target_tokens: int = 64
    """Targets are cut to this many tokens; no more are generated."""
    metric: str = "BLEU"
    prefix: str = ""
    """Stands before every source, such as "translate English to German: "."""
    tokenize: str = "13a"
    """How BLEU cuts texts into words, a name in TOKENIZERS: "zh" for Chinese."""

    def __post_init__(self) -> None:
        """Checks what does not depend on the rows."""
        for name in ("max_tokens", "max_target_tokens"):
            if getattr(self, name) < 2:
                raise SuiteError(f"task, {name}: expected at least 2, found {getattr(self, name)}")
        if self.metric not in self.metrics:
            raise SuiteError(f"task, metric: expected one of {', '.join(self.metrics)}, found {self.metric!r}")
        if self.tokenize not in TOKENIZERS:
            raise SuiteError(f"task, tokenize: expected one of {', '.join(TOKENIZERS)}, found {self.tokenize!r}")

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: the source, and the targets as a list."""
        target = row.get("target")
        many = target if isinstance(target, list | tuple) and target else [target]
        targets = [loading.text({**row, "target": each}, "target") for each in many]
        if self.metric == "ROUGE-L" and not any(re.search("[a-z0-9]", each.lower()) for each in targets):
            raise RowError(
                f"column 'target': expected words in letters from a to z, which are all that ROUGE-L counts, found "
                f"{targets[0]!r:.80}; take the metric BLEU"
            )
        return {"source": loading.text(row, "source"), "target": targets}

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """See `Task`: nothing; but what counts has to be installed.

        Raises:
            SuiteError: the package that the metric needs is not installed.
        """
        self._counted("", [""])
        return {}

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: the tokens of the source, and `labels`, those of the first target."""
        source = tokenizer(self.prefix + row["source"], truncation=True, max_length=self.max_tokens)
        target = tokenizer(text_target=row["target"][0], truncation=True, max_length=self.max_target_tokens)
        labels = list(target["input_ids"])
        # Some tokenizers leave it to the caller, and a model that is never shown an end would write on for ever.
        if tokenizer.eos_token_id not in (None, labels[-1]):
            labels.append(tokenizer.eos_token_id)
        return {"input_ids": list(source["input_ids"]), "labels": labels[: self.max_target_tokens]}

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.skeleton(AutoModelForSeq2SeqLM, folder)

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.model(AutoModelForSeq2SeqLM, folder)

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """See `Task`."""
        ids = [row["input_ids"] for row in encoded]
        labels = padded([row["labels"] for row in encoded], IGNORED)
        return {"input_ids": padded(ids, padding), "attention_mask": masks(ids), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`: the mean over the targets' tokens."""
        return self._nats(model, batch) / (batch["labels"] != IGNORED).sum().clamp(min=1)

    def _nats(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        # The model makes the decoder's input of the labels.
        logits = model(**batch, use_cache=False).logits[:, -labels.shape[1] :]
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """See `Task`: the text that the likeliest token each time gives, without special tokens."""
        tokenizer = _tokenizer(prepared.folder)
        generator: Any = model
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_target_tokens,
            pad_token_id=prepared.padding,
            **{name: getattr(generator.generation_config, name, None) for name in _CONFIGURED},
        )
        chosen = prepared.splits[split]
        found = [""] * len(chosen)
        for rows, batch in in_batches(self, model, chosen, prepared.padding, EVALUATION_ROWS):
            made = generator.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
            )
            for index, text in zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                found[index] = text.strip()
        return found

    @torch.no_grad()
    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """See `Task`: of the targets."""
        total, tokens = 0.0, 0
        for _, batch in in_batches(self, model, prepared.splits[split], prepared.padding, EVALUATION_ROWS):
            total += float(self._nats(model, batch))
            tokens += int((batch["labels"] != IGNORED).sum())
        return total / tokens if tokens else None

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """See `Task`."""
        rows = prepared.splits[split].rows
        return [self._counted(text, row["target"]) for text, row in zip(predictions, rows, strict=True)]

    def _counted(self, text: str, targets: Sequence[str]) -> tuple[float, ...]:
        """What the metric counts of one prediction."""
        if self.metric == "BLEU":
            found = _bleu(self.tokenize).sentence_score(text, list(targets))
            return tuple(map(float, (*found.counts, *found.totals, found.sys_len, found.ref_len)))
        if self.metric == "ROUGE-L":
            return (float(_rouge().score_multi(list(targets), text)["rougeL"].fmeasure),)
        plain = {" ".join(each.casefold().split()) for each in targets}
        return (float(" ".join(text.casefold().split()) in plain),)


@functools.cache
def _bleu(tokenize: str) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise SuiteError("metric BLEU is counted by sacrebleu: pip install 'peftkit[bench]'") from None
    # The counts of a sentence do not depend on the order that its own score takes; a smaller one spares a warning.
    return BLEU(tokenize=tokenize, effective_order=True)


@functools.cache
def _rouge() -> Any:
    try:
        scorer: Any = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError:
        raise SuiteError("metric ROUGE-L is counted by rouge-score: pip install 'peftkit[bench]'") from None
    return scorer.RougeScorer(["rougeL"], use_stemmer=True)


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)
