from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peftkit_kernels
import pytest
from bench_records import made_up
from bench_suites import tiny_backbone, values
from peftkit_bench import cells, trials
from peftkit_bench.cell import overridden
from peftkit_bench.cells import Candidate, Cell, candidates, due, extension, remaining
from peftkit_bench.preparing import prepare
from peftkit_bench.record import Record
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import Suite, Training, parse
from peftkit_kernels import Status

SEARCHED = {"LoRA": {"method": "lora"}, "BitFit": {"method": "bitfit"}}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Suite, list[Candidate]]]:
    """The small suite with keys replaced, and its candidates."""
    folder = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    cache = str(tmp_path_factory.mktemp("cache"))

    def plan(**changes: Any) -> tuple[Suite, list[Candidate]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFTKIT_CACHE", cache)
            suite = parse(values(folder, **changes))
            prepared = prepare(suite)
        return suite, candidates(suite, prepared, suite.task.skeleton(prepared.folder, prepared.facts))

    return plan


def recorded(cell: Cell, score: float) -> Record:
    """A record as the cell would leave one."""
    made = made_up(
        cell.name, 0.5, 100, cell.seed, phase=cell.phase, learning_rate=cell.learning_rate, trial=cell.trial,
        key=cell.key, variant=cell.variant, searched=cell.searched, budget=cell.budget,
    )  # fmt: skip
    return dataclasses.replace(made, score=score)


def finished(suite: Suite, found: list[Candidate], score: Callable[[Cell], float], batch: int = 1000) -> list[Record]:
    """Every record of the suite, run as many cells at a time as asked; fails if it does not end."""
    records: list[Record] = []
    for _ in range(500):
        waiting = due(suite, found, records)
        if not waiting:
            return records
        records += [recorded(cell, score(cell)) for cell in waiting[:batch]]
    raise AssertionError("the suite does not end")


def peak(rate: float) -> Callable[[Cell], float]:
    """Scores that are best at one learning rate."""
    return lambda cell: -abs(cell.learning_rate - rate)


# Candidates ---------------------------------------------------------------------------------------------------------


def test_every_budget_makes_a_candidate_where_the_method_has_a_size(planned) -> None:
    _suite, found = planned(contenders=SEARCHED, budgets=[260, 600], tune={"learning_rates": [0.01]})
    assert [(c.name, c.budget, c.resolved.adapter_parameters) for c in found] == [
        ("LoRA", 260, 256), ("LoRA", 600, 512), ("BitFit", None, found[2].resolved.adapter_parameters),
    ]  # fmt: skip
    assert len({c.trial for c in found}) == 3


def test_size_that_is_nearest_to_two_budgets_is_run_once_at_the_nearer(planned) -> None:
    _, found = planned(contenders={"LoRA": {"method": "lora", "learning_rate": 1.0}}, budgets=[40, 150, 600])
    # The smallest rank has 128: above 40, and the largest not above 150.
    assert [(c.budget, c.resolved.adapter_parameters) for c in found] == [(150, 128), (600, 512)]


def test_budget_may_be_a_share_of_the_backbone(planned) -> None:
    _suite, found = planned(contenders={"LoRA": {"method": "lora", "learning_rate": 1.0}}, budgets=["5%"])
    backbone = 16 * (31 + 26) + 16 * 64 + 2 * 16 + 32  # embeddings and their norm
    assert found[0].budget is not None
    assert found[0].budget > 0.05 * backbone
    total = found[0].resolved.total_parameters - found[0].resolved.adapter_parameters - 34
    assert found[0].budget == round(0.05 * total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": {"X": {"method": "nosuch", "learning_rate": 1.0}}}, "contenders, X: no method 'nosuch'"),
        ({"contenders": {"X": {"method": "lora"}}}, "contenders, X: the key 'learning_rate' is missing"),
        (
            {"contenders": {"X": {"method": "lora"}}, "tune": {"trials": 3, "search": {"r": {"values": [1, 2]}}}},
            "tune, search: r is the size of X, which the budget decides",
        ),
        ({"budgets": ["0.5 %%"]}, r"budgets: expected a count or a share such as 0.5%, found '0.5 %%'"),
        ({"budgets": ["100", "1_00"]}, "budgets: expected different counts, found 100, 100"),
        (
            {"contenders": {"X": {"method": "lora", "learning_rate": 1.0, "quantization": "nf5"}}},
            "contenders, X: .*nf5",
        ),
    ],
)
def test_suite_that_cannot_be_meant_is_refused_with_its_contender(planned, changes, message) -> None:
    with pytest.raises(SuiteError, match=message):
        planned(**changes)


# Searches -----------------------------------------------------------------------------------------------------------

GRID = [0.001, 0.003, 0.01]


def rates(records: list[Record], phase: str, name: str = "LoRA") -> list[float]:
    return sorted({r.learning_rate for r in records if r.phase == phase and r.contender == name})


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (0.003, GRID, 0.003),
        (0.03, [*GRID, 0.03, 0.1], 0.03),
        (0.0003, [0.0001, 0.0003, *GRID], 0.0003),
        (50.0, [*GRID, 0.03, 0.1], 0.1),  # two more at an end, and no further
    ],
)
def test_grid_goes_on_where_its_best_lies_at_an_end(planned, best, tried, chosen) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID, "extend": 2})
    records = finished(suite, found, peak(best))
    assert rates(records, "search") == tried
    assert rates(records, "final") == [chosen]
    tunings = [cell.tuning for cell in due(suite, found, [r for r in records if r.phase == "search"])]
    assert all(t is not None and t["at_edge"] == (chosen in (min(tried), max(tried))) for t in tunings)
    assert all(t is not None and sorted([*t["learning_rates"], *t["extended"]]) == tried for t in tunings)


def test_every_contender_gets_the_same_grid_and_the_best_runs_with_every_seed(planned) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID, "seeds": [7, 8]}, seeds=[0, 1, 2])
    records = finished(suite, found, peak(0.003))
    for name in SEARCHED:
        mine = [r for r in records if r.contender == name]
        assert sorted((r.learning_rate, r.seed) for r in mine if r.phase == "search") == [
            (rate, seed) for rate in GRID for seed in (7, 8)
        ]
        assert [(r.learning_rate, r.seed) for r in mine if r.phase == "final"] == [(0.003, s) for s in (0, 1, 2)]


def test_search_uses_the_mean_over_its_seeds(planned) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID, "seeds": [7, 8], "extend": 0})

    def score(cell: Cell) -> float:
        return {0.001: (0.9, 0.1), 0.003: (0.6, 0.6), 0.01: (0.2, 0.7)}[cell.learning_rate][cell.seed == 8]

    assert rates(finished(suite, found, score), "final") == [0.003]


def test_lower_scores_win_where_the_metric_says_so(planned) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID, "extend": 0})
    task = dataclasses.replace(suite.task, metric="perplexity")
    suite = dataclasses.replace(suite, task=task)
    assert rates(finished(suite, found, lambda cell: cell.learning_rate), "final") == [0.001]


def test_equal_scores_choose_the_lower_rate(planned) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID, "extend": 0})
    assert rates(finished(suite, found, lambda cell: 0.5), "final") == [0.001]


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_suite_cut_anywhere_goes_on_to_the_same_records(planned, batch) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID}, seeds=[0, 1])
    whole = {r.key for r in finished(suite, found, peak(0.02))}
    assert {r.key for r in finished(suite, found, peak(0.02), batch)} == whole
    assert remaining(suite, found, finished(suite, found, peak(0.02))) == 0


def test_remaining_counts_what_is_known_to_come(planned) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID}, seeds=[0, 1])
    assert remaining(suite, found, []) == 2 * (3 + 2)
    records = [recorded(cell, peak(0.003)(cell)) for cell in due(suite, found, [])[:4]]
    assert remaining(suite, found, records) == 2 * (3 + 2) - 4


def test_rate_of_one_budget_serves_all_where_the_suite_says_so(planned) -> None:
    suite, found = planned(contenders=SEARCHED, budgets=[260, 600], tune={"learning_rates": GRID, "budget": 600})
    records = finished(suite, found, peak(0.003))
    search = [r for r in records if r.phase == "search" and r.contender == "LoRA"]
    assert {r.budget for r in search} == {600}
    final = [r for r in records if r.phase == "final" and r.contender == "LoRA"]
    assert sorted((r.budget, r.learning_rate) for r in final) == [(260, 0.003), (600, 0.003)]
    assert {r.trial for r in search} == {r.trial for r in final}


def test_result_of_another_version_does_not_count(planned, monkeypatch) -> None:
    suite, found = planned(contenders=SEARCHED, tune={"learning_rates": GRID})
    records = finished(suite, found, peak(0.003))
    monkeypatch.setattr("peftkit.__version__", "99")
    suite, newer = planned(contenders=SEARCHED, tune={"learning_rates": GRID})
    assert not {r.trial for r in records} & {c.trial for c in newer}
    assert len(due(suite, newer, records)) == 2 * 3


@pytest.mark.parametrize(
    ("grid", "best", "next_rate"),
    [
        ([0.001, 0.003, 0.01], 0.01, 0.03),
        ([0.001, 0.003, 0.01], 0.001, 0.0003),
        ([0.001, 0.01], 0.01, 0.1),
        ([0.001, 0.003, 0.01], 0.003, None),
        ([0.001], 0.001, None),
    ],
)
def test_extension_keeps_the_spacing_of_the_grid(grid, best, next_rate) -> None:
    assert extension(grid, best) == next_rate


# Trials -------------------------------------------------------------------------------------------------------------

TRIALS = {
    "learning_rates": [0.0001, 0.1], "trials": 5,
    "search": {"lora_alpha": {"values": [4, 8, 16]}, "training.weight_decay": {"low": 0.001, "high": 0.1}},
}  # fmt: skip


def test_trials_are_as_many_for_every_contender_and_the_best_is_run(planned) -> None:
    pytest.importorskip("optuna", reason="Optuna, of the extra `bench`")
    suite, found = planned(contenders=SEARCHED, tune=TRIALS)

    def score(cell: Cell) -> float:
        return -abs(cell.learning_rate - 0.01) - (cell.searched.get("lora_alpha", 8) != 8)

    records = finished(suite, found, score)
    for name in SEARCHED:
        search = [r for r in records if r.contender == name and r.phase == "search"]
        (final,) = [r for r in records if r.contender == name and r.phase == "final"]
        assert [r.searched["trial"] for r in search] == [0, 1, 2, 3, 4]
        assert all(0.0001 <= r.learning_rate <= 0.1 for r in search)
        assert all(0.001 <= r.searched["training.weight_decay"] <= 0.1 for r in search)
        assert all(("lora_alpha" in r.searched) == (name == "LoRA") for r in search)
        best = max(search, key=lambda r: r.score)
        assert final.learning_rate == best.learning_rate
        assert final.searched == {k: v for k, v in best.searched.items() if k != "trial"}


def test_trials_go_on_as_if_nothing_had_been_cut(planned) -> None:
    pytest.importorskip("optuna", reason="Optuna, of the extra `bench`")
    suite, found = planned(contenders=SEARCHED, tune=TRIALS)
    once = finished(suite, found, peak(0.02))
    again = finished(suite, found, peak(0.02), batch=1)
    assert {r.key for r in once} == {r.key for r in again}
    other = finished(suite, found, peak(0.0005))
    assert {r.key for r in once} != {r.key for r in other}


def test_trials_learn_from_what_was_tried(planned) -> None:
    pytest.importorskip("optuna", reason="Optuna, of the extra `bench`")
    suite, found = planned(contenders={"LoRA": {"method": "lora"}}, tune={**TRIALS, "trials": 30, "search": {}})
    records = finished(suite, found, lambda cell: -abs(cell.learning_rate - 0.01) / 0.01)
    late = [abs(r.learning_rate - 0.01) for r in records if r.phase == "search"][20:]
    assert sorted(late)[len(late) // 2] < 0.01
    assert abs(next(r.learning_rate for r in records if r.phase == "final") - 0.01) < 0.002


def test_missing_optuna_is_said_with_what_installs_it(planned, monkeypatch) -> None:
    import sys

    suite, found = planned(contenders={"LoRA": {"method": "lora"}}, tune=TRIALS)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SuiteError, match=r"Optuna is not installed; pip install 'peftkit\[bench\]'"):
        due(suite, found, [])


def test_what_a_search_chose_is_what_is_run(planned) -> None:
    _suite, found = planned(contenders=SEARCHED, tune=TRIALS)
    cell = Cell(
        name="LoRA", contender=found[0].contender, resolved=found[0].resolved, budget=600, budgets=(600,),
        phase="search", learning_rate=0.1, tuning=None, seed=0, key="", variant="", trial="",
        searched={"lora_alpha": 16, "training.weight_decay": 0.05, trials.NUMBER: 3},
    )  # fmt: skip
    fields, training = overridden(cell, Training(steps=4))
    assert fields == {**found[0].resolved.fields, "lora_alpha": 16}
    assert training == Training(steps=4, weight_decay=0.05)


def test_identity_holds_everything_that_decides(planned) -> None:
    base = {"contenders": {"LoRA": {"method": "lora", "learning_rate": 0.01}}}
    _, (one,) = planned(**base)
    for changes in (
        {"training": {"steps": 5, "batch_size": 8, "evaluations": 2}},
        {"task": {"name": "seq-cls", "max_tokens": 25}},
        {"contenders": {"LoRA": {"method": "lora", "learning_rate": 0.01, "config": {"lora_alpha": 3}}}},
        {"contenders": {"LoRA": {"method": "lora", "learning_rate": 0.01, "quantization": "nf4"}}},
        {"budgets": [300]},
        {"data": {**values(Path())["data"], "test": 26}},
    ):
        _, (other,) = planned(**{**base, **changes})
        assert other.trial != one.trial, changes
    _, (same,) = planned(**base, seeds=[5], name="other", title="other")
    assert same.trial == one.trial


def test_operations_that_run_compiled_are_named_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def status() -> list[Status]:
        return [
            Status(op=op, device=device, built=True, runnable=runnable, note="")
            for op, device, runnable in (("one", "cpu", True), ("one", "cuda", False), ("two", "cpu", True))
        ]

    monkeypatch.setattr(peftkit_kernels, "status", status)
    assert cells.compiled() == {"cpu": ["one", "two"]}
    monkeypatch.setattr(peftkit_kernels, "status", list)
    assert cells.compiled() == {}
