from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peftkit_bench import power, simulation
from peftkit_bench.metrics import METRICS
from peftkit_bench.runs import run_variances
from peftkit_bench.simulation import DRAWS, SKILL, Model
from peftkit_bench.statistics import estimate
from peftkit_bench.tables import table
from scipy import stats

ROUNDS = 150


def bounds(share: float, rounds: int = ROUNDS) -> tuple[float, float]:
    """What a share that is `share` in truth comes to in all but one of a thousand draws."""
    low, high = stats.binom.ppf([0.0005, 0.9995], rounds, share) / rounds
    return float(low), float(high)


@pytest.mark.parametrize("metric", DRAWS)
def test_the_model_gives_the_score_that_it_says(metric: str) -> None:
    model = Model(metric=metric, seeds=40, examples=4000, skills=(SKILL, SKILL + 0.3))
    counts, runs = model.draw(np.random.default_rng(0))
    found = METRICS[metric].formula(counts.mean(axis=2))
    for each, skill, own in zip(found, model.skills, runs, strict=True):
        # Forty runs on the same texts: the error is that of 4000 texts.
        assert each.mean() == pytest.approx(model.truth(skill, own).mean(), rel=0.03)
        # From run to run on the same texts, what is left is the run's own truth and noise.
        assert np.corrcoef(each, model.truth(skill, own))[0, 1] > 0.6
        assert model.truth(skill) == pytest.approx(
            model.truth(skill, 0.05 * np.random.default_rng(1).normal(size=4000)).mean(), rel=2e-3
        )


@pytest.mark.parametrize("metric", DRAWS)
def test_intervals_hold_the_truth_as_often_as_they_say(metric: str) -> None:
    model = Model(metric=metric, seeds=3, examples=200, group_size=2 if metric == "accuracy" else 1)
    found = simulation.coverage(model, ROUNDS)["jackknife"]
    low, _ = bounds(0.95)
    assert found["score"] >= low
    assert found["difference"] >= low


def test_intervals_are_not_wider_than_they_need_to_be() -> None:
    # Runs that differ by chance alone: what seeds and examples vary together is all there is, and counted twice it
    # would make the interval of the difference hold the truth in 99.4 %.
    alike = Model(metric="accuracy", seeds=5, examples=200, run=0.0, method=0.0)
    assert simulation.coverage(alike, 400)["jackknife"]["difference"] <= 0.985


def test_intervals_of_one_seed_hold_the_runs_own_score_and_not_the_methods() -> None:
    model = Model(metric="perplexity", seeds=1, examples=400, run=0.1)
    found = simulation.coverage(model, ROUNDS)["jackknife"]
    low, _ = bounds(0.95)
    assert min(found["score"], found["difference"]) >= low
    assert found["score of the method"] < low
    assert found["difference of the method"] < low


def test_intervals_hold_the_truth_where_files_differ() -> None:
    grouped = Model(metric="perplexity", seeds=3, examples=400, group_size=8)
    assert simulation.coverage(grouped, ROUNDS)["jackknife"]["score"] >= bounds(0.95)[0]


def test_the_bootstrap_holds_the_truth_of_one_run() -> None:
    model = Model(metric="entity F1", seeds=1, examples=120, skills=(SKILL, SKILL))
    found = simulation.bootstrap_coverage(model, 100, corrected=False, draws=400)
    assert min(found.values()) >= bounds(0.94, 100)[0]


@pytest.mark.parametrize(("seeds", "run"), [(3, 0.05), (3, 0.2), (1, 0.0)])
def test_one_model_under_eight_names_is_rarely_told_apart(seeds: int, run: float) -> None:
    share = simulation.any_finding(simulation.null(seeds, 300, 1, run), "t", 100)
    assert share <= bounds(0.05, 100)[1]


def test_a_method_of_erratic_runs_is_not_taken_for_a_different_one() -> None:
    # With one variance for all this comes to 17 %.
    erratic = simulation.null(5, 300, uneven=8.0)
    assert simulation.any_finding(erratic, "t", 150) <= bounds(0.06)[1]


def test_a_method_of_erratic_runs_does_not_make_the_others_uncertain() -> None:
    even, uneven = (Model(metric="accuracy", seeds=5, examples=1000, skills=(SKILL,) * 8, uneven=u) for u in (1.0, 8.0))
    widths = []
    for model in (even, uneven):
        rng = np.random.default_rng(0)
        tables = [[table(METRICS["accuracy"], each) for each in model.draw(rng)[0]] for _ in range(20)]
        widths.append(np.mean([estimate(each[0], runs=run_variances(each)[0]).half_width for each in tables]))
    assert widths[1] < 1.25 * widths[0]


def test_tests_of_runs_take_seeds_for_methods() -> None:
    low, high = bounds(0.05, 60)
    assert simulation.any_finding(simulation.null(1, 400, run=0.0), "McNemar", 60) <= high
    assert simulation.any_finding(simulation.null(1, 400, run=0.2), "McNemar", 60) > high
    small = Model(metric="accuracy", seeds=3, examples=200, skills=(SKILL,) * 3, method=0.0, run=0.3)
    assert simulation.any_finding(small, "permutation", 30) > bounds(0.05, 30)[1]
    alike = Model(**{**vars(small), "run": 0.0, "seeds": 1})
    assert simulation.any_finding(alike, "permutation", 60) <= high
    assert low == 0


def test_power_is_what_it_was_predicted_to_be() -> None:
    model = Model(metric="accuracy", seeds=4, examples=600, skills=(SKILL + 0.25, SKILL, SKILL, SKILL))
    true = model.truth(model.skills[0]) - model.truth(SKILL)
    predicted = power.power(true, simulation.true_parts(model, sample=100), 4, 600)
    assert 0.6 < predicted < 0.95
    low, high = bounds(predicted, 200)
    assert low - 0.03 <= simulation.found_difference(model, 200) <= high + 0.03


def test_the_command_prints_a_table_and_appends_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(scale: float) -> Any:
        found = simulation.coverage(Model(metric="BLEU", seeds=2, examples=20), round(4 * scale))["jackknife"]
        yield {"what": "coverage", "way": "jackknife", "metric": "BLEU", "methods": 4, "seeds": 2, "examples": 20,
               "group_size": 1, "run": 0.05, "uneven": 1.0, "rounds": 2, **found}  # fmt: skip

    monkeypatch.setattr(simulation, "everything", few)
    out = tmp_path / "made" / "simulation.jsonl"
    simulation.main(["--scale", "0.5", "--out", str(out)])
    simulation.main(["--scale", "0.5", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0] == rows[1]
    assert "coverage          jackknife     BLEU        4 methods  2 seeds" in capsys.readouterr().out


def test_the_full_simulation_states_what_each_row_was_drawn_with(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"score": 1.0, "difference": 1.0}
    for name, value in (
        ("coverage", lambda model, rounds, ways=("jackknife",): dict.fromkeys(ways, nothing)),
        ("bootstrap_coverage", lambda *_: nothing),
        ("any_finding", lambda *_: 0.5),
        ("found_difference", lambda *_: 0.5),
        ("true_parts", lambda *_: power.Parts(runs=1.0, groups=1.0, interaction=1.0, degrees=1)),
    ):  # fmt: skip
        monkeypatch.setattr(simulation, name, value)
    rows = list(simulation.everything())
    stated = {"what", "metric", "methods", "seeds", "examples", "group_size", "run", "uneven", "rounds"}
    assert all(stated < set(row) for row in rows)
    assert {row["what"] for row in rows} == {"coverage", "any false finding", "power"}
    drawn = {(r["metric"], r["seeds"], r["examples"]) for r in rows if r["what"] == "coverage"}
    assert drawn == {(m, s, e) for m in DRAWS for s in (1, 3, 5) for e in (200, 1000)}
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(simulation.shown(row).startswith(row["what"]) for row in rows)
