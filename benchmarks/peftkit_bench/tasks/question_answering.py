"""Extractive question answering: the span of a text that answers a question; cross-entropy of both ends; SQuAD's F1.

A text that is longer than the model's input is cut into windows that overlap. Training sees the window that shows the
answer with the most text on both sides of it; of an answer that no window holds whole, the part in the window that
holds most of it. Prediction sees all windows and takes the best span of them all.

Questions on one text are not independent: `columns: {group: context}` in the data says so.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import loading
from peftkit_bench.tasks.batching import length, masks, moved, padded
from peftkit_bench.tasks.contract import Batch, Column, Prepared, RowError

EVALUATION_WINDOWS = 32
IGNORED = -100
SPECIAL_TOKENS = 8
"""Room for the tokens that separate question and text."""

SMALLEST = 64
"""Tokens of a window: fewer hold no question and text."""

_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_CHARACTER}]|[^\s{_CHARACTER}]+")
_WIDE = "\u3000-\u303f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}{_WIDE}]")
_QUOTES = re.compile("[\u2010-\u2027\u2030-\u205e\u00ab\u00b7\u00bb]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """One span of its text a question; every question has an answer."""

    name: ClassVar[str] = "qa"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(name="question", what="text", also=("query",)),
        Column(name="context", what="text that holds the answer", also=("passage", "paragraph")),
        Column(
            name="answers",
            what='{"text": [...], "answer_start": [...]}, starts in characters of the context',
            required=False,
            answer=True,
        ),
        Column(name="answer_text", what="text, where there is no `answers`", required=False, answer=True),
        Column(name="answer_start", what="its first character, counted from 0", required=False, answer=True),
    )
    metrics: ClassVar[tuple[str, ...]] = ("answer F1", "exact match")
    architecture: ClassVar[str] = "AutoModelForQuestionAnswering"
    max_tokens: int = 384
    """Tokens of a window, the question included."""
    metric: str = "answer F1"
    stride: int = 128
    """Tokens that a window shares with the one before."""
    max_answer_tokens: int = 30
    """Longer spans are not predicted."""
    language: str = "en"
    """Of the answers: "en" compares them as SQuAD does; in others articles stay, and more punctuation goes."""

    def __post_init__(self) -> None:
        if self.metric not in self.metrics:
            raise SuiteError(f"task, metric: expected one of {', '.join(self.metrics)}, found {self.metric!r}")
        if self.max_tokens < SMALLEST or not 0 < self.stride <= self.max_tokens // 2:
            raise SuiteError(
                f"task: expected max_tokens of at least {SMALLEST} and a stride from 1 to half of it, found "
                f"max_tokens {self.max_tokens} and stride {self.stride}"
            )
        if self.max_answer_tokens < 1:
            raise SuiteError(f"task, max_answer_tokens: expected at least 1, found {self.max_answer_tokens}")

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: question, context, and answers as SQuAD has them."""
        context = loading.text(row, "context")
        texts, starts = _answers(row)
        for answer, start in zip(texts, starts, strict=True):
            found = context[start : start + len(answer)] if start >= 0 else ""
            if found != answer:
                other = context.find(answer)
                where = f"stands at {other}; starts are characters, from 0" if other >= 0 else "does not occur in it"
                raise RowError(
                    f"column 'answers': expected {answer!r:.60} at {start} of the context, found {found!r:.60}; "
                    f"the answer {where}"
                )
        return {
            "question": loading.text(row, "question").strip(),
            "context": context,
            "answers": {"text": texts, "answer_start": starts},
        }

    def facts(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """See `Task`: nothing."""
        return {}

    def encode(self, tokenizer: Any, row: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See `Task`: the training window, `start` and `end` of the answer in it, and all `windows`.

        A window has, beside its ids, `begin` and `stop` of each token in the context's characters; -1 for the tokens
        of the question. A question that would leave the text less than three quarters of the window is cut.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise SuiteError("task 'qa': expected a fast tokenizer, which says what characters a token covers, found "
                             f"{type(tokenizer).__name__}; choose a backbone with a tokenizer.json")  # fmt: skip
        question, most = row["question"], self.max_tokens // 4 - SPECIAL_TOKENS
        alone = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(alone) > most:
            question = question[: alone[most - 1][1]]
        found = tokenizer(
            question,
            row["context"],
            truncation="only_second",
            max_length=self.max_tokens,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: list[dict[str, Any]] = []
        for index, offsets in enumerate(found["offset_mapping"]):
            inside = [
                of == 1 and stop > begin for of, (begin, stop) in zip(found.sequence_ids(index), offsets, strict=True)
            ]
            window: dict[str, Any] = {
                name: list(found[name][index]) for name in ("input_ids", "token_type_ids") if name in found
            }
            window["begin"] = [pair[0] if good else -1 for good, pair in zip(inside, offsets, strict=True)]
            window["stop"] = [pair[1] if good else -1 for good, pair in zip(inside, offsets, strict=True)]
            windows.append(window)
        text, first = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        spans = [_tokens(window, first, first + len(text)) for window in windows]
        chosen = max(range(len(windows)), key=lambda index: _shown(windows[index], spans[index]))
        start, end = spans[chosen]
        kept: dict[str, Any] = {
            name: windows[chosen][name] for name in ("input_ids", "token_type_ids") if name in windows[chosen]
        }
        return {**kept, "start": start, "end": end, "windows": windows}

    def skeleton(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.skeleton(AutoModelForQuestionAnswering, folder)

    def model(self, folder: str, facts: Mapping[str, Any]) -> nn.Module:
        """See `Task`."""
        return loading.model(AutoModelForQuestionAnswering, folder)

    def collate(self, encoded: Sequence[Mapping[str, Any]], padding: int) -> Batch:
        """See `Task`: `labels` are first and last token of the answer, (rows, 2)."""
        return {
            **_inputs(encoded, padding),
            "labels": torch.tensor([[row["start"], row["end"]] for row in encoded]),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`: the mean of the cross-entropies of first and last token, over the tokens of the row."""
        logits, labels = self._logits(model, batch), batch["labels"]
        total = F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of first and last token, (2, rows, tokens), float32; padding cannot be either."""
        found = model(**{name: value for name, value in batch.items() if name != "labels"})
        both = torch.stack([found.start_logits, found.end_logits]).float()
        return both.masked_fill(batch["attention_mask"] == 0, torch.finfo(torch.float32).min)

    @torch.no_grad()
    def predict(self, model: nn.Module, prepared: Prepared, split: str) -> list[Any]:
        """See `Task`: the text of each answer."""
        chosen = prepared.splits[split]
        device = next(model.parameters()).device
        windows = [(place, window) for place, row in enumerate(chosen.encoded) for window in row["windows"]]
        windows.sort(key=lambda pair: length(pair[1]))
        best = [float("-inf")] * len(chosen)
        found = [""] * len(chosen)
        for at in range(0, len(windows), EVALUATION_WINDOWS):
            some = windows[at : at + EVALUATION_WINDOWS]
            batch = moved(_inputs([window for _, window in some], prepared.padding), device)
            begins = padded([window["begin"] for _, window in some], -1).to(device)
            scores = self._logits(model, batch).masked_fill(begins < 0, float("-inf"))
            for (place, window), (score, start, end) in zip(some, self._best(scores), strict=True):
                if score > best[place]:
                    best[place] = score
                    context = chosen.rows[place]["context"]
                    found[place] = context[window["begin"][start] : window["stop"][end]].strip()
        return found

    def _best(self, logits: Tensor) -> list[tuple[float, int, int]]:
        """Score, first and last token of the best span of each row; logits (2, rows, tokens)."""
        starts, ends = logits
        tokens = starts.shape[1]
        # One row of the table for each length of a span, rather than all pairs of tokens.
        spans = torch.full((min(self.max_answer_tokens, tokens), *starts.shape), float("-inf"), device=starts.device)
        for extra in range(len(spans)):
            spans[extra, :, : tokens - extra] = starts[:, : tokens - extra] + ends[:, extra:]
        scores, places = spans.transpose(0, 1).flatten(1).max(dim=1)
        return [
            (score, place % tokens, place % tokens + place // tokens)
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def nats(self, model: nn.Module, prepared: Prepared, split: str) -> float | None:
        """See `Task`: None, spans are pointed at, not written."""
        return None

    def counts(self, predictions: Sequence[Any], prepared: Prepared, split: str) -> list[tuple[float, ...]]:
        """See `Task`: of several right answers the nearest counts."""
        grade = f1 if self.metric == "answer F1" else exact_match
        return [
            (max(grade(found, answer, self.language) for answer in row["answers"]["text"]),)
            for found, row in zip(predictions, prepared.splits[split].rows, strict=True)
        ]


def words(answer: str, language: str = "en") -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, no punctuation, in English no articles.

    Chinese and Japanese are written without spaces: each of their characters is a word, and their own punctuation goes
    as well.
    """
    plain = _PUNCTUATION.sub("", answer.lower())
    plain = _ARTICLE.sub(" ", plain) if language == "en" else _QUOTES.sub("", plain)
    return _WORD.findall(plain)


def exact_match(predicted: str, true: str, language: str = "en") -> float:
    """1 where both are the same words, else 0."""
    return float(words(predicted, language) == words(true, language))


def f1(predicted: str, true: str, language: str = "en") -> float:
    """Harmonic mean of precision and recall of the words; of nothing with nothing 1."""
    ours, theirs = words(predicted, language), words(true, language)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def _answers(row: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and starts of a row's answers, in whichever of the usual forms."""
    found = row.get("answers")
    if found is None and row.get("answer_text") is not None:
        found = {"text": [row["answer_text"]], "answer_start": [row.get("answer_start")]}
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise RowError(f"column 'answers': expected JSON, found {found!r:.60}") from None
    if isinstance(found, list) and all(isinstance(each, Mapping) for each in found):
        found = {name: [each.get(name) for each in found] for name in ("text", "answer_start")}
    if not isinstance(found, Mapping) or not isinstance(found.get("text"), list):
        raise RowError(
            'expected answers as {"text": [...], "answer_start": [...]}, or the columns answer_text and answer_start, '
            f"found {found!r:.60}"
        )
    texts, starts = found["text"], found.get("answer_start")
    if not texts:
        raise RowError("column 'answers': expected at least one answer; questions without one are not supported")
    if not isinstance(starts, list) or len(starts) != len(texts):
        raise RowError(f"column 'answers': expected a start for each of {len(texts)} texts, found {starts!r:.60}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"column 'answers': expected texts, found {text!r:.60} among them")
    numbers = []
    for start in starts:
        try:
            if isinstance(start, bool | float):
                raise ValueError
            numbers.append(int(start))
        except (TypeError, ValueError):
            raise RowError(f"column 'answers': expected a whole number as answer_start, found {start!r:.60}") from None
    return list(texts), numbers


def _tokens(window: Mapping[str, Any], begin: int, stop: int) -> tuple[int, int]:
    """First and last token of a window that cover any of the context's characters from `begin` to before `stop`."""
    inside = [
        index
        for index, (first, last) in enumerate(zip(window["begin"], window["stop"], strict=True))
        if first >= 0 and first < stop and last > begin
    ]
    return (inside[0], inside[-1]) if inside else (IGNORED, IGNORED)


def _shown(window: Mapping[str, Any], span: tuple[int, int]) -> tuple[int, int]:
    """How well a window shows an answer: its tokens, and the least number of tokens on a side of it."""
    if span[0] < 0:
        return (0, 0)
    context = [index for index, begin in enumerate(window["begin"]) if begin >= 0]
    return (span[1] - span[0] + 1, min(span[0] - context[0], context[-1] - span[1]))


def _inputs(windows: Sequence[Mapping[str, Any]], padding: int) -> Batch:
    ids = [window["input_ids"] for window in windows]
    batch = {"input_ids": padded(ids, padding), "attention_mask": masks(ids)}
    if "token_type_ids" in windows[0]:
        batch["token_type_ids"] = padded([window["token_type_ids"] for window in windows], 0)
    return batch
