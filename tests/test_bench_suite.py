from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from peftkit_bench import suite
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import load, parse

import peftkit

SUITES = Path(__file__).parents[1] / "benchmarks" / "suites"
GOOD: dict[str, Any] = {
    "name": "good",
    "title": "Good",
    "backbone": {"path": "somewhere"},
    "data": {"origins": ["python", "numpy"], "train": 8, "validation": 4, "test": 4},
    "training": {"steps": 2, "head_learning_rate": 1},
    "seeds": [0, 1],
    "contenders": {"LoRA": {"method": "lora", "learning_rate": "5e-3", "config": {"r": 2}}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one value replaced or added."""
    made = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = made
    for key in parents:
        place = place[key]
    place[last] = value
    return made


def test_suite_is_read_with_types_converted() -> None:
    found = parse(copy.deepcopy(GOOD))
    assert found.seeds == (0, 1)
    assert found.data.origins == ("python", "numpy")
    assert found.contenders["LoRA"].learning_rate == 0.005
    assert found.training.head_learning_rate == 1.0
    assert found.contenders["LoRA"].config == {"r": 2}
    assert found.split == "test"


def test_suite_that_tunes_predicts_the_validation_split() -> None:
    assert parse(changed("tune", {"learning_rates": [0.1]})).split == "validation"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sedes", [0], r"the suite: unknown key 'sedes'; did you mean 'seeds'"),
        ("training.step", 3, r"training: unknown key 'step'; did you mean 'steps'"),
        (
            "contenders.LoRA.learning_rat",
            1,
            r"contenders.LoRA: unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        ("contenders.LoRA.subject", "peftkt", r"contenders, LoRA, subject: did you mean 'peftkit'"),
        ("seeds", 3, r"seeds: expected a list, found 3"),
        ("seeds", [0, 0], r"seeds: expected different numbers"),
        ("seeds", [0, "x"], r"seeds\[1\]: expected int, found 'x'"),
        ("training.steps", True, r"training, steps: expected int, found True"),
        ("training.steps", 0, r"training, steps: expected at least 1"),
        ("training.warmup", 1.5, r"training, warmup: expected a share in \[0, 1\), found 1.5"),
        ("contenders.LoRA.learning_rate", "fast", r"contenders.LoRA, learning_rate: expected a number, found 'fast'"),
        ("contenders.LoRA.learning_rate", -1.0, r"learning rates are positive"),
        ("contenders", {}, r"contenders: expected at least one"),
        ("backbone", {"path": "a", "package": "b"}, r"backbone: give either package or path"),
        ("backbone", {}, r"backbone: give either package or path"),
        ("budget", -5, r"budget: expected a positive count"),
        ("task", "generation", r"task: expected 'seq-cls'"),
        ("data", ["python"], r"data: expected keys and values, found list"),
        ("tune", {"learning_rates": []}, r"tune, learning_rates: expected at least one"),
    ],
)
def test_suite_that_cannot_be_meant_raises(path: str, value: Any, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        parse(changed(path, value))


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
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**GOOD, "buget": 3}))
    with pytest.raises(SuiteError, match=r"typo\.yaml: the suite: unknown key 'buget'; did you mean 'budget'"):
        load(tmp_path / "typo.yaml")


COMPARISONS = [path for path in sorted(SUITES.glob("*.yaml")) if suite.runner(path) == "engine"]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_suite_that_comes_with_peftkit_is_sound(path: Path) -> None:
    found = load(path)
    assert found.name == path.stem
    for contender in found.contenders.values():
        assert contender.method in peftkit.METHODS


def test_quick_suite_differs_from_its_search_in_rates_only() -> None:
    quick, tune = load(SUITES / "quick.yaml"), load(SUITES / "quick-tune.yaml")
    for field in ("backbone", "data", "training", "budget", "task"):
        assert getattr(quick, field) == getattr(tune, field)
    assert tune.tune is not None
    for name, searched in tune.contenders.items():
        contender = quick.contenders[name]
        assert (contender.method, contender.config, contender.budget) == (
            searched.method,
            searched.config,
            searched.budget,
        )
        assert contender.learning_rate in tune.tune.learning_rates
    untuned = set(quick.contenders) - set(tune.contenders)
    assert all(quick.contenders[name].learning_rate is None for name in untuned)


def test_quick_suite_has_eight_methods_two_baselines_and_three_seeds() -> None:
    quick = load(SUITES / "quick.yaml")
    assert sum(not c.baseline for c in quick.contenders.values()) >= 8
    assert {c.method for c in quick.contenders.values() if c.baseline} == {"full", "head"}
    assert len(quick.seeds) >= 3
    assert isinstance(quick.contenders["LoRA"], suite.Contender)
