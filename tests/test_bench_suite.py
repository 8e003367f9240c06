from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from peftkit_bench import adhoc, suite
from peftkit_bench.spec import Contender, SuiteError
from peftkit_bench.suite import Suite, budget_counts, load, parse

import peftkit

SUITES = Path(__file__).parents[1] / "benchmarks" / "suites"
GOOD: dict[str, Any] = {
    "name": "good",
    "title": "Good",
    "backbone": {"path": "somewhere"},
    "task": {"name": "seq-cls", "max_tokens": 48},
    "data": {"source": "docstring-origin", "origins": ["python", "numpy"], "train": 8, "tune": 4, "stop": 4, "test": 4},
    "training": {"steps": 4, "head_learning_rate": 1, "evaluations": 2},
    "seeds": [0, 1],
    "contenders": {"LoRA": {"method": "lora", "learning_rate": "5e-3", "config": {"r": 2}}},
}
TUNED = {"contenders": {"LoRA": {"method": "lora"}}, "budgets": [100, "0.5%"]}


def changed(path: str, value: Any, **top: Any) -> dict[str, Any]:
    """GOOD with one value replaced or added."""
    made = {**copy.deepcopy(GOOD), **copy.deepcopy(top)}
    *parents, last = path.split(".")
    place = made
    for key in parents:
        place = place[key]
    place[last] = value
    return made


def test_suite_is_read_with_types_converted() -> None:
    found = parse(changed("budgets", [74_000, "0.5%"]))
    assert found.seeds == (0, 1)
    assert found.data.origins == ("python", "numpy")  # type: ignore[attr-defined]  # of this source
    assert found.contenders["LoRA"].learning_rate == 0.005
    assert found.training.head_learning_rate == 1.0
    assert found.contenders["LoRA"].config == {"r": 2}
    assert found.task.max_tokens == 48
    assert found.budgets == ("74000", "0.5%")


def test_method_may_name_its_subject() -> None:
    found = parse(changed("contenders.BOFT", {"method": "peft:boft", "learning_rate": 0.1}))
    assert found.contenders["BOFT"] == Contender(method="boft", subject="peft", learning_rate=0.1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sedes", [0], r"the suite: unknown key 'sedes'; did you mean 'seeds'"),
        ("training.step", 3, r"training: unknown key 'step'; did you mean 'steps'"),
        ("contenders.LoRA.learning_rat", 1, r"contenders.LoRA: unknown key 'learning_rat'; did you mean"),
        ("contenders.LoRA.subject", "peftkt", r"contenders, LoRA, subject: did you mean 'peftkit'"),
        ("contenders.LoRA.method", "pfet:boft", r"contenders, LoRA, subject: did you mean 'peft'"),
        ("seeds", 3, r"seeds: expected a list, found 3"),
        ("seeds", [0, 0], r"seeds: expected different numbers"),
        ("seeds", [0, "x"], r"seeds\[1\]: expected int, found 'x'"),
        ("training.steps", True, r"training, steps: expected int, found True"),
        ("training.steps", 0, r"training, steps: expected at least 1"),
        ("training.warmup", 1.5, r"training, warmup: expected a share in \[0, 1\), found 1.5"),
        ("training.accumulation", 5, r"training, accumulation: expected a part of the batch of 32, found 5"),
        ("training.evaluations", 9, r"training, evaluations: expected at most one a step \(4\), found 9"),
        ("training.precision", "bf16", r"training, precision: did you mean 'bfloat16'|training, precision: choices"),
        ("contenders.LoRA.learning_rate", "fast", r"contenders.LoRA, learning_rate: expected a number, found 'fast'"),
        ("contenders.LoRA.learning_rate", -1.0, r"learning rates are positive"),
        ("contenders", {}, r"contenders: expected at least one"),
        ("backbone", {"path": "a", "package": "b"}, r"backbone: give one of package, path and pretrained"),
        ("backbone", {}, r"backbone: give one of package, path and pretrained"),
        ("task", "generation", r"task: .*seq-cls"),
        ("task", {"max_tokens": 3}, r"task: expected a name, or its name and options"),
        ("task.max_token", 3, r"task: unknown key 'max_token'; did you mean 'max_tokens'"),
        ("task.metric", "BLEU", r"task, metric: .*accuracy"),
        ("task.max_tokens", 3, r"task, max_tokens: expected at least 8, found 3"),
        ("task.name", "token-cls", r"data: docstring-origin has rows for seq-cls, not for the task token-cls"),
        ("data", ["python"], r"data: expected keys and values, found list"),
        ("data", {"origins": []}, r"data: the key 'source' is missing"),
        ("data.source", "docstrings", r"data, source: did you mean 'docstring-origin'"),
        ("data.validation", 3, r"data: unknown key 'validation'"),
        ("general", GOOD["data"], r"general: forgetting is measured as loss on text, which the task seq-cls"),
        ("tune", {"learning_rates": []}, r"tune, learning_rates: expected at least one"),
    ],
)
def test_suite_that_cannot_be_meant_raises(path: str, value: Any, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse(changed(path, value))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"learning_rates": [0.1, 0.01]}, r"tune, learning_rates: expected ascending rates"),
        ({"learning_rates": [0.0, 0.01]}, r"learning rates are positive"),
        ({"seeds": [1]}, r"tune, seeds: \[1\] are among the seeds that count; choose others"),
        ({"extend": -1}, r"tune, extend: expected at least 0"),
        ({"search": {"lora_alpha": {"values": [1]}}}, r"tune, search: give trials too"),
        ({"trials": 3, "learning_rates": [0.1]}, r"tune, learning_rates: trials need the ends of a range"),
        ({"trials": 3, "search": {"x": {"low": 1}}}, r"tune, search, x: give either low and high, or values"),
        ({"trials": 3, "search": {"x": {"low": 2, "high": 1}}}, r"tune, search, x: expected low < high"),
        ({"trials": 3, "search": {"x": {"low": 0, "high": 1}}}, r"tune, search, x: a log scale needs low > 0"),
        ({"budget": 200}, r"tune, budget: expected one of the budgets \(100, 0.5%\), found '200'"),
    ],
)
def test_search_that_cannot_be_meant_raises(tune: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse(changed("tune", tune, **TUNED))
    assert parse(changed("tune", {"budget": 100}, **TUNED)).tune is not None


def test_rate_that_is_given_and_searched_raises() -> None:
    with pytest.raises(SuiteError, match=r"contenders, LoRA, learning_rate: the suite searches it \(tune\)"):
        parse(changed("tune", {}))


def test_missing_key_raises() -> None:
    made = copy.deepcopy(GOOD)
    del made["title"]
    with pytest.raises(SuiteError, match="the suite: the key 'title' is missing"):
        parse(made)


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"none\.yaml: expected a suite, found No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(SuiteError, match=r"bad\.yaml: not YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**GOOD, "budgts": [3]}))
    with pytest.raises(SuiteError, match=r"typo\.yaml: the suite: unknown key 'budgts'; did you mean 'budgets'"):
        load(tmp_path / "typo.yaml")


def test_parts_of_a_suite_share_what_they_do_not_change(tmp_path: Path) -> None:
    data = {**GOOD["data"], "train": 16}
    path = tmp_path / "parts.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "each": {"one": {}, "two": {"data": data, "title": "Second"}}}))
    one, two = load(path)
    assert (one.name, one.title, two.name, two.title) == ("good: one", "one", "good: two", "Second")
    assert (one.data.train, two.data.train) == (8, 16)  # type: ignore[attr-defined]  # of this source
    assert one.contenders == two.contenders
    path.write_text(yaml.safe_dump({**GOOD, "each": ["one"]}))
    with pytest.raises(SuiteError, match="each: expected parts by name with the keys that differ, found"):
        load(path)


def test_relative_paths_start_where_the_suite_lies(tmp_path: Path) -> None:
    path = tmp_path / "files.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "data": {"source": "files", "train": "train.jsonl"}}))
    (found,) = load(path)
    assert found.data.folder == str(tmp_path)  # type: ignore[attr-defined]  # of this source


@pytest.mark.parametrize(
    ("budgets", "counts"), [(["0.5%", "100"], (100, 5000)), (["1_000"], (1000,)), ([], ()), (["74,000"], (74_000,))]
)
def test_budgets_are_counts_or_shares(budgets: list[str], counts: tuple[int, ...]) -> None:
    assert budget_counts(budgets, 1_000_000) == counts


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (["half"], "expected a count or a share such as 0.5%, found 'half'"),
        (["0%"], "expected a positive count, found '0%'"),
        (["1000", "0.1%"], "expected different counts, found 1000, 1000"),
    ],
)
def test_budgets_that_cannot_be_meant_raise(budgets: list[str], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        budget_counts(budgets, 1_000_000)


# Suites that come with peftkit --------------------------------------------------------------------------------------

COMPARISONS = [path for path in sorted(SUITES.glob("*.yaml")) if suite.runner(path) == "engine"]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_suite_that_comes_with_peftkit_is_sound(path: Path) -> None:
    for found in load(path):
        assert found.name.partition(":")[0] == path.stem
        assert len(found.seeds) >= 3
        for contender in found.contenders.values():
            assert contender.subject == "peft" or contender.method in peftkit.METHODS


def test_quick_suite_differs_from_its_search_in_rates_only() -> None:
    (quick,), (tune,) = load(SUITES / "quick.yaml"), load(SUITES / "quick-tune.yaml")
    for field in ("backbone", "data", "training", "budgets", "task", "seeds", "title"):
        assert getattr(quick, field) == getattr(tune, field)
    assert tune.tune is not None
    assert list(tune.contenders) == list(quick.contenders)
    for name, searched in tune.contenders.items():
        given = quick.contenders[name]
        assert given.learning_rate is not None
        assert (given.method, given.config, given.baseline) == (searched.method, searched.config, searched.baseline)


def test_quick_suite_has_eight_methods_two_baselines_and_three_seeds() -> None:
    (quick,) = load(SUITES / "quick.yaml")
    assert sum(not c.baseline for c in quick.contenders.values()) >= 8
    assert {c.method for c in quick.contenders.values() if c.baseline} == {"full", "head"}
    assert len(quick.seeds) >= 3
    assert isinstance(quick.contenders["LoRA"], Contender)


# From the command line ----------------------------------------------------------------------------------------------


def from_options(**changes: Any) -> Suite:
    options: dict[str, Any] = {"model": "some/model", "data": ["train.jsonl"], "task": "seq-cls", "methods": ["lora"]}
    return adhoc.suite(**{**options, **changes})


def test_suite_from_options_says_what_they_say() -> None:
    found = from_options(
        data=["train.csv", "dev.csv", "test.csv"], methods=["lora", "peft:boft", "lora@nf4", "full", "head"],
        budgets=["0.5%"], seeds=5, steps=30, columns=["text=sentence"], max_tokens=40,
    )  # fmt: skip
    assert found.backbone.path == "some/model"
    data: Any = found.data
    assert (data.name, data.train, data.validation, data.test) == ("files", "train.csv", "dev.csv", "test.csv")
    assert data.columns == {"text": "sentence"}
    assert found.seeds == (0, 1, 2, 3, 4)
    assert found.training.steps == 30
    assert found.task.max_tokens == 40
    assert found.tune is not None
    assert {n: (c.subject, c.method, c.quantization, c.baseline) for n, c in found.contenders.items()} == {
        "lora": ("peftkit", "lora", None, False),
        "peft:boft": ("peft", "boft", None, False),
        "lora@nf4": ("peftkit", "lora", "nf4", False),
        "full": ("peftkit", "full", None, True),
        "head": ("peftkit", "head", None, True),
    }


def test_options_know_packages_and_names_on_a_hub() -> None:
    assert from_options(model="json").backbone.package == "json"
    found: Any = from_options(data=["nyu-mll/glue"]).data
    assert (found.name, found.path) == ("hub", "nyu-mll/glue")
    two: Any = from_options(data=["a.jsonl", "b.jsonl"]).data
    assert (two.train, two.validation, two.test) == ("a.jsonl", None, "b.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lroa"]}, "--methods: no method 'lroa'; did you mean 'lora'"),
        ({"methods": ["pef:boft"]}, "--methods: did you mean 'peft'"),
        ({"methods": ["lora", "lora"]}, "--methods: expected each once, found lora, lora"),
        ({"seeds": 0}, "--seeds: expected at least 1"),
        ({"data": []}, "--data: expected a file"),
        ({"data": ["a.csv", "b.csv", "c.csv", "d.csv"]}, "--data: expected at most train, validation and test"),
        ({"data": ["imdb", "b.csv"]}, "--data: 'imdb' is no file"),
        ({"data": ["docstring-origin"]}, "--data: docstring-origin has sizes to set; write a suite file"),
        ({"columns": ["text"]}, "--columns: expected text=sentence"),
        ({"task": "seqcls"}, "task: did you mean 'seq-cls'"),
        ({"budgets": ["much"]}, ""),
    ],
)
def test_options_that_cannot_be_meant_raise(changes: dict[str, Any], message: str) -> None:
    if not message:  # said when the backbone's size is known
        assert from_options(**changes).budgets == ("much",)
        return
    with pytest.raises(SuiteError, match=message):
        from_options(**changes)
