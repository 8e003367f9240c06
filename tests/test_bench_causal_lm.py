from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bench_language import prepared, stored, trained
from peftkit_bench.metrics import METRICS
from peftkit_bench.spec import SuiteError
from peftkit_bench.tasks import task_class
from peftkit_bench.tasks.causal_lm import CausalLM, normalised
from peftkit_bench.tasks.contract import RowError
from transformers import AutoTokenizer

import peftkit

TEXTS = [
    {"text": "the fox jumps"},
    {"text": "over the lazy dog and the quick brown fox 0123"},
    {"text": "def add(x): return"},
]
PAIRS = [
    {"question": "dog?", "answer": "the lazy dog #### 1"},
    {"question": "the quick brown fox jumps?", "answer": "brown #### 1,200"},
    {"question": "0123 and 456 and 789?", "answer": "#### 7"},
]


def columns(task: CausalLM, row: dict[str, Any]) -> dict[str, Any]:
    """The row by the task's names, as a source of rows gives it."""
    found = {}
    for column in task.columns:
        name = next((each for each in (column.name, *column.also) if each in row), None)
        if name is not None:
            found[column.name] = row[name]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stored(tmp_path_factory.mktemp("decoder"), "llama")


def test_the_task_is_found_by_its_name() -> None:
    assert task_class("causal-lm") is CausalLM


def test_a_row_with_a_completion_is_a_prompt_and_what_follows() -> None:
    task = CausalLM()
    assert task.read({"text": "plain"}) == {"text": "plain"}
    assert task.read(columns(task, PAIRS[0])) == {"prompt": "dog?", "completion": "the lazy dog #### 1"}
    mbpp = {"text": "Write f.", "code": "def f(): 1", "test_list": ["assert f()"], "test_setup_code": "", "task_id": 1}
    assert task.read(columns(task, mbpp)) == {
        "prompt": "Write f.", "completion": "def f(): 1", "tests": ["assert f()"]}  # fmt: skip
    alpaca = {"instruction": "Say a.", "output": "a", "text": "### Instruction: Say a. ### Response: a"}
    assert task.read(columns(task, alpaca)) == {"prompt": "Say a.", "completion": "a"}
    assert task.read({"prompt": "p", "completion": "c", "setup": "x = 1"})["setup"] == "x = 1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "column 'text' is missing"),
        ({"text": "  "}, "column 'text': expected text, found '  '"),
        ({"prompt": "p"}, "column 'completion' is missing, which should follow the row's 'prompt'"),
        ({"completion": "c"}, "column 'text' is missing"),
        ({"prompt": "p", "completion": ""}, "column 'completion': expected text, found ''"),
        ({"prompt": "p", "completion": "c", "tests": "assert 1"}, "column 'tests': expected a list of lines of Python"),
        ({"prompt": "p", "completion": "c", "tests": []}, "column 'tests': expected a list of lines of Python"),
        ({"prompt": "p", "completion": "c", "tests": 3}, "column 'tests': expected a list of lines of Python"),
    ],
)
def test_a_bad_row_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        CausalLM().read(row)
    assert message in str(caught.value)


def test_rows_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(
        RowError, match=r"expected a final answer as answer_pattern 'is \(.\*\)' finds it, found 'seven'"
    ):
        CausalLM(metric="exact match", answer_pattern="is (.*)").read({"prompt": "p", "completion": "seven"})
    rows = {"train": [{"text": "a"}], "test": [{"text": "a"}, {"prompt": "p", "completion": "c"}]}
    assert CausalLM().facts(rows) == {}
    with pytest.raises(RowError, match="needs the column 'completion', which 1 of 2 test rows lack"):
        CausalLM(metric="exact match").facts(rows)
    with pytest.raises(RowError, match="needs the column 'tests', which 1 of 1 test rows lack"):
        CausalLM(metric="pass rate").facts({"test": rows["test"][1:]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "metric: expected one of perplexity, exact match, pass rate, found 'accuracy'"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2, found 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 2, found 0"),
        ({"template": "Q:"}, "template: expected {prompt}, and maybe {test}, in it, found 'Q:'"),
        ({"template": "{prompt} {answer}"}, "template: expected {prompt}, and maybe {test}"),
        ({"template": "{prompt"}, "a brace that is meant as such is doubled"),
        ({"program": "{prompt}"}, "program: expected {completion}, and maybe {prompt}"),
        ({"answer_pattern": "("}, "answer_pattern: '(' is no regular expression"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError) as caught:
        CausalLM(**options)
    assert message in str(caught.value)


def test_encoding_marks_where_the_completion_begins(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = CausalLM(template="Q {prompt} T {test} A")
    row = {"prompt": "the fox", "completion": "dog", "tests": ["assert 1", "assert 2"]}
    found = task.encode(tokenizer, row, {})
    prompt = tokenizer("Q the fox T assert 1 A")["input_ids"]
    assert found["input_ids"][: found["start"]] == prompt
    assert prompt[0] == tokenizer.bos_token_id
    assert found["input_ids"][found["start"] :] == [
        *tokenizer("dog", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # fmt: skip
    text = task.encode(tokenizer, {"text": "the fox"}, {})
    assert text == {"input_ids": tokenizer("the fox")["input_ids"], "start": 1}


def test_long_rows_lose_the_end_of_a_text_and_the_front_of_a_prompt(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = CausalLM(max_tokens=12)
    whole = CausalLM().encode(tokenizer, {"text": "0123456789" * 3}, {})["input_ids"]
    assert task.encode(tokenizer, {"text": "0123456789" * 3}, {})["input_ids"] == whole[:12]
    short = task.encode(tokenizer, {"prompt": "0123456789" * 3, "completion": "987"}, {})
    assert len(short["input_ids"]) == 12
    assert tokenizer.decode(short["input_ids"]) == "<|begin|>456789\n987<|end|>"
    assert short["start"] == 8
    both = task.encode(tokenizer, {"prompt": "0123456789" * 3, "completion": "9876543210"}, {})
    assert tokenizer.decode(both["input_ids"]) == "<|begin|>6789\n987654"
    assert both["start"] == 6


def oracle(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Nats and number of the tokens that count, token by token in float64."""
    ids, start = row["input_ids"], row["start"]
    with torch.no_grad():
        chances = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return -sum(float(chances[i - 1, ids[i]]) for i in range(start, len(ids))), len(ids) - start


METHODS = {
    "none": None,
    "lora": peftkit.LoRA(r=2, lora_alpha=8, init_lora_weights=False),
    "prefix": peftkit.PrefixTuning(num_virtual_tokens=3),
    "prompt": peftkit.PromptTuning(num_virtual_tokens=3),
}


def adapted(task: CausalLM, folder: str, method: str) -> Any:
    model = task.model(folder, {}).eval()
    config = METHODS[method]
    if config is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = peftkit.wrap(model, config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_perplexity_counts_every_token_once_whatever_the_batch(folder: str, method: str) -> None:
    task = CausalLM()
    ready = prepared(task, folder, {"test": [*TEXTS, *(columns(task, row) for row in PAIRS)] * 2})
    model = adapted(task, folder, method)
    expected = [oracle(model, row) for row in ready.splits["test"].encoded]
    found = task.predict(model, ready, "test")
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-4)
    mean = sum(nats for nats, _ in expected) / sum(tokens for _, tokens in expected)
    assert METRICS["perplexity"].score(task.counts(found, ready, "test")) == pytest.approx(math.exp(mean), rel=1e-4)
    assert task.nats(model, ready, "test") == pytest.approx(mean, rel=1e-4)
    batch = task.collate(ready.splits["test"].encoded, ready.padding)
    assert float(task.loss(model, batch).detach()) == pytest.approx(mean, rel=1e-4)


def test_a_text_of_one_token_has_no_loss_and_no_gradient_that_is_not_a_number(folder: str) -> None:
    task = CausalLM()
    model = task.model(folder, {})
    batch = task.collate([{"input_ids": [5], "start": 1}], 0)
    loss = task.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_generation_in_batches_is_that_of_each_row_alone(folder: str, method: str) -> None:
    task = CausalLM(metric="exact match", max_new_tokens=6)
    ready = prepared(task, folder, {"test": [columns(task, row) for row in PAIRS]})
    model = adapted(task, folder, method)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for row in ready.splits["test"].encoded:
        ids = list(row["input_ids"][: row["start"]])
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
        expected.append(tokenizer.decode(ids[row["start"] :], skip_special_tokens=True))
    found = task.predict(model, ready, "test")
    assert found == expected
    assert len(set(found)) > 1


def test_a_decoder_learns_to_answer(folder: str) -> None:
    task = CausalLM(metric="exact match", max_new_tokens=24)
    rows = [columns(task, row) for row in PAIRS]
    ready = prepared(task, folder, {"train": rows, "test": rows})
    model = task.model(folder, {}).eval()
    metric = METRICS[task.metric]
    assert metric.score(task.counts(task.predict(model, ready, "test"), ready, "test")) == 0
    losses = trained(task, model, ready, steps=80, rate=1e-2)
    assert losses[-1] < 0.1 < losses[0]
    found = task.predict(model, ready, "test")
    assert found == [row["completion"] for row in rows]
    assert metric.score(task.counts(found, ready, "test")) == 1


@pytest.mark.parametrize(
    ("completion", "reference", "pattern", "right"),
    [
        ("so #### 72", "it is 72 #### 72", "", True),
        ("so #### 72.00 \nand more", "#### 72", "", True),
        ("#### 71 #### 72", "#### 72", "", True),
        ("72", "#### 72", "", False),
        ("#### 7", "#### 72", "", False),
        ("#### $1,200.", "#### 1200", "", True),
        (" Paris. ", "paris", "", True),
        ("paris texas", "paris", "", False),
        ("It is 5. It is 6.", "It is 6.", r"is (\d+)", True),
        ("6", "It is 6.", r"is (\d+)", False),
        ("a 5 b 6", "6", r"\d+", True),
    ],
)
def test_an_answer_is_compared_in_its_normal_form(completion: str, reference: str, pattern: str, right: bool) -> None:
    task = CausalLM(metric="exact match", answer_pattern=pattern)
    ready = prepared_rows(task, [{"prompt": "p", "completion": reference}])
    assert task.counts([completion], ready, "test") == [(float(right),)]


def prepared_rows(task: CausalLM, rows: list[dict[str, Any]]) -> Any:
    from peftkit_bench.tasks.contract import Prepared, Split

    split = Split(rows=tuple(task.read(row) for row in rows), encoded=(), groups=())
    return Prepared(folder="", backbone={}, data={}, facts={}, splits={"test": split}, padding=0)


def test_normal_forms() -> None:
    assert normalised(" $1,200.00 ") == normalised("1200") == "1200"
    assert normalised("1e3") == "1000"
    assert normalised("1,2") == "1,2"
    assert normalised("-0.50") == "-0.5"
    assert normalised("50%") == "50"
    assert normalised("nan") == "nan"
    assert normalised("ＡＢ  c.") == "ab c"


def test_generated_programs_are_run_with_their_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    task = CausalLM(metric="pass rate", seconds=1)
    row = {"prompt": "Write f.", "completion": "def f(): return 2", "tests": ["assert f() == x", "assert f()"]}
    rows = [{**row, "setup": "x = 2"}] * 5
    ready = prepared_rows(task, rows)
    texts = ["def f(): return 2", "def f(): return 1", "Here:\n```python\ndef f(): return 2\n```\nDone.",
             "raise SystemExit(0)", "while True: pass"]  # fmt: skip
    monkeypatch.setattr(CausalLM, "_generate", lambda *_: texts)
    found = task.predict(torch.nn.Linear(1, 1), ready, "test")
    assert [each["text"] for each in found] == texts
    assert [each["reason"] for each in found] == [
        "", "AssertionError (checks.py, line 2)", "", "ended by itself, with status 0, before its last line",
        "was not done after 1 s"]  # fmt: skip
    assert task.counts(found, ready, "test") == [(1.0,), (0.0,), (1.0,), (0.0,), (0.0,)]
    whole = CausalLM(metric="pass rate", program="def g(): pass\n{completion}\n# {prompt}")
    monkeypatch.setattr(CausalLM, "_generate", lambda *_: ["f = lambda: 2 if g() is None else 0"] * 5)
    assert all(each["passed"] for each in whole.predict(torch.nn.Linear(1, 1), ready, "test"))


def test_the_skeleton_has_the_shapes_of_the_model_and_no_data(folder: str) -> None:
    task = CausalLM()
    skeleton, model = task.skeleton(folder, {}), task.model(folder, {})
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())
