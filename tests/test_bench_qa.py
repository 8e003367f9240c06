from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks.contract import Prepared, RowError, Split
from peftkit_bench.tasks.question_answering import QuestionAnswering, exact_match, f1, words
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

NOTHING = torch.finfo(torch.float32).min
TASK = QuestionAnswering(max_tokens=64, stride=30, max_answer_tokens=5)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: w0 to w99, q0 to q99."""
    names = [*(f"w{i}" for i in range(100)), *(f"q{i}" for i in range(100)), "?"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *names])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")


def row(first: int, last: int, count: int = 20, question: str = "q1 q2 ?") -> dict[str, Any]:
    """A context w0 w1 ... of `count` words, and the answer from one of them to another."""
    context = " ".join(f"w{i}" for i in range(count))
    answer = " ".join(f"w{i}" for i in range(first, last + 1))
    start = (" " + context + " ").index(f" {answer} ")
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def prepared(task: QuestionAnswering, rows: Sequence[dict[str, Any]]) -> Prepared:
    read = tuple(task.read(each) for each in rows)
    split = Split(
        rows=read, encoded=tuple(task.encode(tokenizer(), each, {}) for each in read), groups=tuple(range(len(read)))
    )
    return Prepared(folder="", backbone={}, data={}, facts={}, splits={"test": split}, padding=0)


class Pointer(nn.Module):
    """Start and end logits by the token's id."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(300, 2)
        nn.init.zeros_(self.scores.weight)
        self.rows: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.rows.append(len(input_ids))
        found = self.scores(input_ids)
        return SimpleNamespace(start_logits=found[..., 0], end_logits=found[..., 1])

    def point(self, start: str, end: str, height: float = 5.0) -> None:
        first, last = tokenizer().convert_tokens_to_ids([start, end])
        with torch.no_grad():
            self.scores.weight[first, 0] = height
            self.scores.weight[last, 1] = height


@pytest.mark.parametrize(
    ("predicted", "true", "exact", "overlap"),
    [
        ("the Eiffel Tower", "Eiffel tower.", 1, 1),
        ("Eiffel Tower in Paris", "Eiffel Tower", 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("Paris Paris", "Paris", 0, 2 / 3),
        ("Rome", "Paris", 0, 0),
        ("", "Paris", 0, 0),
        ("the", "a", 1, 1),
        ("U.S.", "us", 1, 1),
        ("well-known", "wellknown", 1, 1),
        ("theory", "ory", 0, 0),  # the article is a word, not letters
        ("1870 到 1939", "1870到1939", 1, 1),
        ("萨克森花园", "克森", 0, 2 * (2 / 5) * 1 / (2 / 5 + 1)),
        ("《红楼梦》。", "红楼梦", 1, 1),
    ],
)
def test_answers_are_compared_as_squad_does(predicted: str, true: str, exact: float, overlap: float) -> None:
    assert exact_match(predicted, true) == exact
    assert f1(predicted, true) == pytest.approx(overlap)
    assert f1(true, predicted) == pytest.approx(overlap)


def test_articles_go_in_english_alone() -> None:
    assert words("An “Ort”") == ["“ort”"]
    assert words("An “Ort”", "de") == ["an", "ort"]


FORMS = [
    {"answers": {"text": ["blue"], "answer_start": [4]}},
    {"answers": [{"text": "blue", "answer_start": 4}]},
    {"answers": '{"text": ["blue"], "answer_start": [4]}'},
    {"answer_text": "blue", "answer_start": "4"},
]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_read_from_the_usual_forms(form: dict[str, Any]) -> None:
    assert TASK.read({"question": " What? ", "context": "Sky blue.", **form}) == {
        "question": "What?",
        "context": "Sky blue.",
        "answers": {"text": ["blue"], "answer_start": [4]},
    }


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"answers": {"text": ["blue"], "answer_start": [3]}}, "expected 'blue' at 3 of the context, found ' blu'; the "
         "answer stands at 4"),
        ({"answers": {"text": ["red"], "answer_start": [4]}}, "found 'blu'; the answer does not occur in it"),
        ({"answers": {"text": ["blue"], "answer_start": [-5]}}, "expected 'blue' at -5 of the context, found ''"),
        ({"answers": {"text": [], "answer_start": []}}, "questions without one are not supported"),
        ({"answers": {"text": ["blue"], "answer_start": []}}, "expected a start for each of 1 texts, found []"),
        ({"answers": {"text": ["blue"], "answer_start": [4.0]}}, "expected a whole number as answer_start, found 4.0"),
        ({"answer_text": "blue"}, "expected a whole number as answer_start, found None"),
        ({"answers": {"text": [4], "answer_start": [4]}}, "expected texts, found 4 among them"),
        ({"answers": "blue"}, "column 'answers': expected JSON, found 'blue'"),
        ({}, "or the columns answer_text and answer_start, found None"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused(form: dict[str, Any], expected: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.read({"question": "What?", "context": "Sky blue.", **form})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metric": "F1"}, "expected one of answer F1, exact match, found 'F1'"),
        ({"max_tokens": 40}, "expected max_tokens of at least 64"),
        ({"stride": 200}, "a stride from 1 to half of it, found max_tokens 384 and stride 200"),
        ({"max_answer_tokens": 0}, "expected at least 1, found 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(SuiteError) as caught:
        QuestionAnswering(**options)
    assert expected in str(caught.value)


def test_short_text_is_one_window_with_the_answer_in_it() -> None:
    found = TASK.encode(tokenizer(), row(3, 5), {})
    assert len(found["windows"]) == 1
    names = tokenizer().convert_ids_to_tokens(found["input_ids"])
    assert names[found["start"] : found["end"] + 1] == ["w3", "w4", "w5"]
    assert names[:5] == ["[CLS]", "q1", "q2", "?", "[SEP]"]
    assert found["windows"][0]["begin"][:6] == [-1, -1, -1, -1, -1, 0]
    assert found["windows"][0]["begin"][-1] == -1
    assert found["windows"][0]["stop"][5] == 2


@pytest.mark.parametrize("first", range(0, 90, 7))
def test_training_sees_the_window_with_the_most_text_around_the_answer(first: int) -> None:
    found = TASK.encode(tokenizer(), row(first, first + 4, 95), {})
    names = tokenizer().convert_ids_to_tokens(found["input_ids"])
    assert names[found["start"] : found["end"] + 1] == [f"w{i}" for i in range(first, first + 5)]
    assert len(found["windows"]) == 3
    margins = []
    for window in found["windows"]:
        inside = [n for n in tokenizer().convert_ids_to_tokens(window["input_ids"]) if n.startswith("w")]
        if f"w{first}" in inside and f"w{first + 4}" in inside:
            margins.append(min(inside.index(f"w{first}"), len(inside) - 1 - inside.index(f"w{first + 4}")))
    context = [n for n in names if n.startswith("w")]
    assert min(context.index(f"w{first}"), len(context) - 1 - context.index(f"w{first + 4}")) == max(margins)
    # All windows together show the whole text.
    shown = {n for w in found["windows"] for n in tokenizer().convert_ids_to_tokens(w["input_ids"])}
    assert {f"w{i}" for i in range(95)} <= shown


def test_answers_that_fit_no_window_are_trained_on_in_part() -> None:
    found = TASK.encode(tokenizer(), row(5, 89, 95), {})
    names = tokenizer().convert_ids_to_tokens(found["input_ids"])
    answer = names[found["start"] : found["end"] + 1]
    assert answer == [n for n in names if n.startswith("w")][-len(answer) :]
    assert len(answer) > 40


def test_long_questions_are_cut_and_leave_room_for_the_text() -> None:
    question = " ".join(f"q{i}" for i in range(80))
    found = TASK.encode(tokenizer(), row(3, 5, 95, question), {})
    names = tokenizer().convert_ids_to_tokens(found["input_ids"])
    assert [n for n in names if n.startswith("q")] == [f"q{i}" for i in range(8)]
    assert max(len(window["input_ids"]) for window in found["windows"]) == 64
    with pytest.raises(SuiteError, match="expected a fast tokenizer"):
        TASK.encode(SimpleNamespace(is_fast=False), row(3, 5), {})


def test_prediction_is_the_best_span_of_all_windows() -> None:
    rows = [row(3, 5), row(60, 62, 95), row(90, 94, 95), row(0, 0, 8)]
    found = prepared(TASK, rows)
    model = Pointer()
    model.point("w60", "w62", 6.0)
    model.point("w3", "w5")
    model.point("q1", "q2", 50.0)  # of the question: never an answer
    predictions = TASK.predict(model, found, "test")
    assert predictions[:3] == ["w3 w4 w5", "w60 w61 w62", "w60 w61 w62"]
    assert sum(model.rows) == 8
    counts = TASK.counts(predictions, found, "test")
    assert counts[:3] == [(1,), (1,), (0,)]
    exact = QuestionAnswering(max_tokens=64, stride=30, max_answer_tokens=5, metric="exact match")
    assert exact.counts(["W3, w4 w5", "w60", "", "w0"], found, "test") == [(1,), (0,), (0,), (1,)]
    assert TASK.counts(["w3", "", "", ""], found, "test")[0] == (pytest.approx(0.5),)
    assert TASK.nats(model, found, "test") is None


def test_of_several_answers_the_nearest_counts() -> None:
    given = row(3, 5)
    given["answers"] = {"text": ["w3 w4 w5", "w7"], "answer_start": [9, 21]}
    found = prepared(TASK, [given])
    assert TASK.counts(["w7"], found, "test") == [(1,)]


@pytest.mark.parametrize("limit", [1, 3, 8, 50])
def test_best_span_agrees_with_a_search_of_all_pairs(limit: int) -> None:
    task = QuestionAnswering(max_answer_tokens=limit)
    generator = torch.Generator().manual_seed(limit)
    logits = torch.randn(2, 6, 17, generator=generator)
    logits[:, :, random.Random(limit).sample(range(17), 4)] = float("-inf")
    for index, (score, start, end) in enumerate(task._best(logits)):
        pairs = [(float(logits[0, index, a] + logits[1, index, b]), a, b) for a in range(17) for b in range(a, 17)]
        assert (score, start, end) == max(pair for pair in pairs if pair[2] - pair[1] < limit)


def test_loss_is_the_mean_of_both_ends_and_padding_does_not_change_it() -> None:
    found = prepared(TASK, [row(3, 5), row(1, 1, 40)])
    torch.manual_seed(0)
    model = Pointer()
    nn.init.normal_(model.scores.weight)
    encoded = found.splits["test"].encoded
    alone = [TASK.loss(model, TASK.collate([each], 0)) for each in encoded]
    both = TASK.loss(model, TASK.collate(encoded, 0))
    torch.testing.assert_close(both, torch.stack(alone).mean())
    scores = model.scores(torch.tensor(encoded[0]["input_ids"]))
    expected = -torch.log_softmax(scores[:, 0], 0)[encoded[0]["start"]]
    expected = (expected - torch.log_softmax(scores[:, 1], 0)[encoded[0]["end"]]) / 2
    torch.testing.assert_close(alone[0], expected)
