from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from merge_suites import GOOD, changed
from peftkit_bench import merge_suite, merging, preview, suite
from peftkit_bench.spec import SuiteError

import peftkit

SUITES = Path(__file__).parents[1] / "benchmarks" / "suites"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("route", {}, r"the suite: unknown key 'route'; did you mean 'routes'"),
        ("routes/own/inn", "bf16", r"routes.own: unknown key 'inn'; did you mean 'into'"),
        ("adapters/LoRA/size", 1, r"adapters.LoRA: unknown key 'size'; did you mean 'sizes'"),
        ("kind", "comparison", r"kind: expected 'merge', found 'comparison'"),
        ("backbone", {}, r"backbone: give one of package, path and pretrained"),
        ("training/steps", 0, r"training, steps: expected at least 1, found 0"),
        ("training/batch_size", 0, r"training, batch_size: expected at least 1, found 0"),
        ("training/evaluations", 4, r"training, evaluations: expected at most one a step \(3\), found 4"),
        ("data/validation", 8, r"data: unknown key 'validation'"),
        ("data/source", "docstrings", r"data, source: did you mean 'docstring-origin'"),
        ("task/name", "token-cls", r"data: docstring-origin has rows for seq-cls, not for the task token-cls"),
        ("calibration_rows", 0, r"calibration_rows: expected at least 1, found 0"),
        ("judged_rows", 0, r"judged_rows: expected at least 1, found 0"),
        ("minimum_effect", 1.5, r"minimum_effect: expected a share in \[0, 1\], found 1.5"),
        ("adapters", {}, r"adapters: expected at least one"),
        ("routes", {}, r"routes: expected at least one"),
        ("adapters/LoRA/method", "loral", r"adapters, LoRA, method: did you mean 'lora'"),
        ("adapters/LoRA/method", "prefix", r"adapters, LoRA, method: prefix cannot be merged"),
        ("adapters/LoRA/learning_rate", 0, r"adapters, LoRA, learning_rate: expected a positive number"),
        ("adapters/LoRA/sizes", [0.1, 0], r"adapters, LoRA, sizes: expected positive shares"),
        ("adapters/LoRA/sizes", [], r"adapters, LoRA: sizes go with scaled"),
        ("adapters/(IA)³/sizes", [0.1], r"adapters, \(IA\)³: sizes go with scaled"),
        ("routes/own/tool", "axolotl", r"routes, own, tool: choices: bitsandbytes, dequantize, peft, peftkit"),
        ("routes/own/base", "fp4", r"routes, own, base: peftkit starts from bf16 or nf4 or int8, found 'fp4'"),
        ("routes/peft/into", "bf16", r"routes, peft, into: peft merges a base in nf4 into nf4, found 'bf16'"),
        ("routes/peft/calibrated", True, r"routes, peft, calibrated: peft merges without inputs"),
        ("routes/own/residual_rank", 2, r"routes, own, residual_rank: a positive rank goes beside peftkit's"),
        ("routes/peft/residual_rank", 2, r"routes, peft, residual_rank: a positive rank goes beside peftkit's"),
    ],
)
def test_suite_that_cannot_be_meant_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        merge_suite.parse(changed(path, value))


def test_suite_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(changed("kin", 1)))
    with pytest.raises(SuiteError, match=r"some\.yaml: the suite: unknown key 'kin'; did you mean 'kind'"):
        merge_suite.load(path)


def test_kind_decides_who_runs_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    for content, expected in (("kind: merge", "merging"), ("name: x", "engine"), ("kind: comparison", "engine")):
        path.write_text(content)
        assert suite.runner(path) == expected
    path.write_text("kind: merges")
    with pytest.raises(SuiteError, match=r"some\.yaml: kind: did you mean 'merge'"):
        suite.runner(path)
    path.write_text("- a list")
    assert suite.runner(path) == "engine"


def test_comparison_takes_no_other_kind() -> None:
    with pytest.raises(SuiteError, match="unknown key 'calibration_rows'"):
        suite.parse(copy.deepcopy(GOOD))


def test_data_and_task_are_those_of_a_comparison(tmp_path: Path) -> None:
    files = {"source": "files", "train": "a.jsonl", "test": "b.jsonl"}
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "data": files, "task": "seq-cls"}))
    found = merge_suite.load(path)
    common = {key: GOOD[key] for key in ("name", "title", "backbone")}
    training = {**GOOD["training"], "evaluations": 1}
    contenders = {"LoRA": {"method": "lora", "learning_rate": 1}}
    comparison = suite.parse(
        {**common, "data": files, "training": training, "seeds": [1], "contenders": contenders}, folder=tmp_path
    )
    assert (found.data, found.task, found.training) == (comparison.data, comparison.task, comparison.training)
    path.write_text(yaml.safe_dump({**GOOD, "data": files, "task": "token-cls"}))
    with pytest.raises(SuiteError, match=r"task: merges are judged by the logits of seq-cls, found 'token-cls'"):
        merge_suite.load(path)


def test_weights_after_the_last_step_are_kept_unless_the_suite_evaluates() -> None:
    assert merge_suite.parse(copy.deepcopy(GOOD)).training.evaluations == 1
    assert merge_suite.parse(changed("training/evaluations", 3)).training.evaluations == 3


def test_suite_that_comes_with_peftkit_has_every_tool_format_and_method() -> None:
    found = merge_suite.load(SUITES / "merge.yaml")
    assert {route.tool for route in found.routes.values()} == set(merge_suite.ROUTES)
    assert {route.into for route in found.routes.values()} == set(merge_suite.FORMATS)
    assert {adapter.method for adapter in found.adapters.values()} == {"lora", "adalora", "loha", "oft", "ia3"}
    assert found.adapters["LoRA"].sizes == (0.01, 0.02, 0.05, 0.1)
    for adapter in found.adapters.values():
        peftkit.METHODS[adapter.method].config(**adapter.config)


def test_command_line_shows_comparisons_and_merges_each_by_its_own_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from peftkit.cli.app import app

    seen: list[tuple[str, str]] = []
    for module, function in ((preview, "text"), (merging, "dry_run")):
        monkeypatch.setattr(
            module, function, lambda chosen, name=module.__name__: seen.append((name, chosen.stem)) or ""
        )
    for name in ("quick", "merge"):
        assert CliRunner().invoke(app, ["bench", "run", name, "--dry-run"]).exit_code == 0
    assert seen == [("peftkit_bench.preview", "quick"), ("peftkit_bench.merging", "merge")]
