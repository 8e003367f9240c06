from __future__ import annotations

from typing import Any

import pytest
import sacrebleu
import torch
from bench_language import prepared, stored, trained
from peftkit_bench.metrics import METRICS
from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import sequence_to_sequence, task_class
from peftkit_bench.tasks.contract import Prepared, RowError, Split
from peftkit_bench.tasks.sequence_to_sequence import SequenceToSequence
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

import peftkit

COPIES = [
    {"source": text, "target": text} for text in ("the fox", "lazy dog jumps over 0123", "quick brown", "def add")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stored(tmp_path_factory.mktemp("encoder-decoder"), "t5")


def judged(task: SequenceToSequence, targets: list[Any]) -> Prepared:
    rows = tuple(task.read({"source": "s", "target": target}) for target in targets)
    split = Split(rows=rows, encoded=(), groups=())
    return Prepared(folder="", backbone={}, data={}, facts={}, splits={"test": split}, padding=0)


def test_the_task_is_found_by_its_name() -> None:
    assert task_class("seq2seq") is SequenceToSequence


def test_a_target_may_be_a_list() -> None:
    task = SequenceToSequence()
    assert task.read({"source": "s", "target": "t"}) == {"source": "s", "target": ["t"]}
    assert task.read({"source": "s", "target": ["t", "u"]}) == {"source": "s", "target": ["t", "u"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": "t"}, "column 'source' is missing; the row has 'target'"),
        ({"source": "s"}, "column 'target' is missing"),
        ({"source": "", "target": "t"}, "column 'source': expected text, found ''"),
        ({"source": "s", "target": ["t", 3]}, "column 'target': expected text, found 3"),
        ({"source": "s", "target": []}, "column 'target': expected text, found []"),
    ],
)
def test_a_bad_row_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        SequenceToSequence().read(row)
    assert message in str(caught.value)


def test_rouge_is_refused_where_it_counts_nothing() -> None:
    with pytest.raises(RowError, match="letters from a to z, which are all that ROUGE-L counts, found '你好'"):
        SequenceToSequence(metric="ROUGE-L").read({"source": "s", "target": "你好"})
    assert SequenceToSequence().read({"source": "s", "target": "你好"})["target"] == ["你好"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "chrF"}, "metric: expected one of BLEU, ROUGE-L, exact match, found 'chrF'"),
        ({"tokenize": "ja"}, "tokenize: expected one of 13a, intl, zh, char, none, found 'ja'"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2, found 1"),
        ({"max_target_tokens": 1}, "max_target_tokens: expected at least 2, found 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError) as caught:
        SequenceToSequence(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "module"), [("BLEU", "sacrebleu.metrics.bleu"), ("ROUGE-L", "rouge_score.rouge_scorer")]
)
def test_a_missing_package_is_named_before_anything_runs(
    metric: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence_to_sequence._bleu.cache_clear()
    sequence_to_sequence._rouge.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(SuiteError, match=r"pip install 'peftkit\[bench\]'"):
        SequenceToSequence(metric=metric).facts({})


REFERENCES: list[Any] = [
    ["The cat sat on the mat, didn't it?", "A cat was on the mat."],
    ["There is a place in the city centre, Alimentum."],
    ["One, two, three, four, five."],
    ["It costs $1,200.50 in total.", "The total is $1,200.50", "It is 1,200.50 dollars"],
    ["x"],
]
TEXTS = [
    "The cat sat on a mat, did it?",
    "there is a place in the city centre , Alimentum",
    "",
    "It costs $1,200.50.",
    "x",
]


@pytest.mark.parametrize("count", [5, 2, 1])
def test_bleu_of_the_counts_is_that_of_sacrebleu(count: int) -> None:
    task = SequenceToSequence()
    found = task.counts(TEXTS[:count], judged(task, REFERENCES[:count]), "test")
    most = max(len(each) for each in REFERENCES[:count])
    streams = [[each[i] if i < len(each) else None for each in REFERENCES[:count]] for i in range(most)]
    expected = sacrebleu.corpus_bleu(TEXTS[:count], streams, smooth_method="none", force=True)
    assert METRICS["BLEU"].score(found) == pytest.approx(expected.score / 100, abs=1e-12)
    assert [len(row) for row in found] == [len(METRICS["BLEU"].counts)] * count


def test_bleu_of_chinese_counts_characters() -> None:
    texts, targets = ["这个酒店很好，我们很喜欢。", "天气不错"], ["这个酒店非常好，我们很喜欢。", "今天天气不错"]
    task = SequenceToSequence(tokenize="zh")
    expected = sacrebleu.corpus_bleu(texts, [targets], smooth_method="none", force=True, tokenize="zh")
    assert METRICS["BLEU"].score(task.counts(texts, judged(task, targets), "test")) == pytest.approx(
        expected.score / 100
    )
    assert expected.score > 30


def test_rouge_is_the_best_over_the_references_with_stems() -> None:
    task = SequenceToSequence(metric="ROUGE-L")
    found = task.counts(TEXTS[:4], judged(task, REFERENCES[:4]), "test")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        max(scorer.score(target, text)["rougeL"].fmeasure for target in targets)
        for text, targets in zip(TEXTS, REFERENCES[:4], strict=False)
    ]
    assert [row[0] for row in found] == expected
    assert task.counts(["jumping cats"], judged(task, ["jumped cat"]), "test") == [(1.0,)]


def test_exact_match_is_with_any_reference() -> None:
    task = SequenceToSequence(metric="exact match")
    assert task.counts([" A  b", "c"], judged(task, [["x", "a B"], ["cc"]]), "test") == [(1.0,), (0.0,)]


def oracle(model: Any, row: dict[str, Any]) -> float:
    """Nats of the target, token by token in float64, the decoder's input made here."""
    labels = torch.tensor([row["labels"]])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=torch.cat([start, labels[:, :-1]], 1)
        ).logits
    return -float(torch.log_softmax(logits[0].double(), -1).gather(1, labels[0][:, None]).sum())


def test_the_loss_counts_every_token_of_the_targets_once_whatever_the_batch(folder: str) -> None:
    task = SequenceToSequence()
    ready = prepared(task, folder, {"test": COPIES * 5})
    model = task.model(folder, {}).eval()
    rows = ready.splits["test"].encoded
    mean = sum(oracle(model, row) for row in rows) / sum(len(row["labels"]) for row in rows)
    assert task.nats(model, ready, "test") == pytest.approx(mean, rel=1e-4)
    assert float(task.loss(model, task.collate(rows, ready.padding)).detach()) == pytest.approx(mean, rel=1e-4)


def test_encoding_cuts_and_puts_the_prefix_in_front(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = SequenceToSequence(prefix="add: ", max_tokens=9, max_target_tokens=4)
    found = task.encode(tokenizer, {"source": "0123456789", "target": ["9876543210", "x"]}, {})
    assert tokenizer.decode(found["input_ids"]) == "add: 01234"[: len(tokenizer.decode(found["input_ids"]))]
    assert len(found["input_ids"]) == 9
    assert tokenizer.decode(found["labels"]) == "9876"
    whole = SequenceToSequence().encode(tokenizer, {"source": "s", "target": ["98"]}, {})
    assert whole["labels"] == [*tokenizer("98")["input_ids"], tokenizer.eos_token_id]


def test_an_encoder_decoder_learns_to_copy_and_an_adapter_to_swap(folder: str) -> None:
    task = SequenceToSequence(max_target_tokens=24)
    swapped = [{**row, "target": other["target"]} for row, other in zip(COPIES, COPIES[::-1], strict=True)]
    copying, swapping = (prepared(task, folder, {"train": rows, "test": rows}) for rows in (COPIES, swapped))
    model = task.model(folder, {}).eval()

    def score(ready: Prepared) -> float:
        return METRICS["BLEU"].score(task.counts(task.predict(model.eval(), ready, "test"), ready, "test"))

    before = score(copying)
    losses = trained(task, model, copying, steps=100, rate=1e-2)
    assert before < 0.1 < 0.9 < score(copying), losses
    assert task.nats(model, copying, "test") == pytest.approx(losses[-1], abs=0.2)
    torch.manual_seed(0)
    model = peftkit.wrap(model, peftkit.LoRA(r=16, lora_alpha=32, target_modules="all-linear"))
    before = score(swapping)
    losses = trained(task, model, swapping, steps=100, rate=1e-2)
    assert before < 0.1 < 0.9 < score(swapping), losses


def test_the_skeleton_has_the_shapes_of_the_model_and_no_data(folder: str) -> None:
    task = SequenceToSequence()
    skeleton, model = task.skeleton(folder, {}), task.model(folder, {})
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())
