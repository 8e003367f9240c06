from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from bench_records import GRID, made_up, read_back, searches, standard, whole_suite
from bench_reports import undrawn, written
from peftkit_bench.record import Record
from peftkit_bench.report import columns, facts, findings, rates, training, tuning


def tried(scores: dict[float, float], **changes: Any) -> list[Record]:
    """Search records of LoRA with these scores by rate."""
    fields = {"tuning": {"learning_rates": list(GRID)}, **changes}
    return [made_up("LoRA", s, 5000, 1000, phase="search", learning_rate=r, **fields) for r, s in scores.items()]


def finals(rate: float, **changes: Any) -> list[Record]:
    return [made_up("LoRA", 0.7, 5000, seed, learning_rate=rate, **changes) for seed in range(3)]


def test_search_knows_the_best_the_chosen_and_the_extended_rates() -> None:
    records = [*searches("LoRA", 0.01, 0.7, 5000), *finals(0.01)]
    (found,) = tuning.tunings(records, True)
    assert found.grid == GRID
    assert found.extended == (0.03,)
    assert found.best == found.chosen == found.shown == 0.01
    assert not found.at_edge()


@pytest.mark.parametrize("extended", [[], [0.03], None])
def test_rates_outside_the_first_grid_are_extensions_whatever_the_record_calls_them(
    extended: list[float] | None,
) -> None:
    settings = {"learning_rates": [*GRID, *(extended or [])], "extended": extended}
    if not extended:
        settings = {"learning_rates": list(GRID)}
    (found,) = tuning.tunings(tried({0.003: 0.5, 0.01: 0.6, 0.03: 0.4}, tuning=settings), True)
    assert found.extended == (0.03,)


def test_lower_is_better_turns_the_choice_and_a_tie_takes_the_lower_rate() -> None:
    records = tried({0.001: 5.0, 0.003: 4.0, 0.01: 4.0}, metric="perplexity")
    assert tuning.tunings(records, False)[0].best == 0.003
    assert tuning.tunings(records, True)[0].best == 0.001


def test_seeds_of_a_search_are_averaged_and_a_repeated_cell_counts_once() -> None:
    records = [
        *tried({0.001: 0.4, 0.003: 0.5}),
        *(dataclasses.replace(r, seed=2000, key=f"b{r.key}", score=r.score + 0.2) for r in tried({0.001: 0.4})),
        *(dataclasses.replace(r, key=f"c{r.key}") for r in tried({0.003: 0.5})),
    ]
    assert tuning.tunings(records, True)[0].scores == {0.001: pytest.approx(0.5), 0.003: 0.5}


def test_only_the_search_that_the_runs_took_their_rate_from_counts() -> None:
    old = [dataclasses.replace(r, trial="old", key=f"o{r.key}") for r in tried({0.001: 0.9, 0.003: 0.5})]
    (found,) = tuning.tunings([*tried({0.001: 0.4, 0.003: 0.5}), *old, *finals(0.003)], True)
    assert found.scores == {0.001: 0.4, 0.003: 0.5}


@pytest.mark.parametrize(
    ("scores", "edge"),
    [({0.001: 0.4, 0.003: 0.5, 0.01: 0.3}, False), ({0.001: 0.6, 0.003: 0.5}, True), ({0.001: 0.6}, False)],
)
def test_best_at_an_end_of_all_that_was_tried_is_at_the_edge(scores: dict[float, float], edge: bool) -> None:
    assert tuning.tunings(tried(scores), True)[0].at_edge() is edge


@pytest.mark.parametrize(("rate", "edge"), [(0.00031, True), (0.0004, False), (0.0095, True)])
def test_sampled_rates_are_at_the_edge_of_their_range(rate: float, edge: bool) -> None:
    settings = {"learning_rates": [GRID[0], GRID[-1]], "trials": 3}
    records = [
        made_up("LoRA", s, 5000, 1000, phase="search", learning_rate=r, tuning=settings, searched={"trial": i, "a": i})
        for i, (r, s) in enumerate([(rate, 0.6), (0.002, 0.5), (0.003, 0.4)])
    ]
    (found,) = tuning.tunings(records, True)
    assert found.sampled
    assert found.extended == ()
    assert found.at_edge() is edge
    assert found.trials[0].searched == ({"a": 0} if rate < 0.002 else {"a": 1})
    (found,) = tuning.tunings([*records, *finals(rate, searched={"lora_alpha": 16})], True)
    note = columns.rate_rows([found], findings.metric_of(records[0]))[0][2]
    assert note == f"{rate:g} (lora_alpha 16, 3 trials" + (", at the edge of what was tried)" if edge else ")")


def test_edge_is_warned_of_in_a_report(tmp_path: Path) -> None:
    records = [*tried({0.001: 0.6, 0.003: 0.5}), *finals(0.001), *standard()[1:2]]
    (warning,) = (w for w in findings.findings(read_back(tmp_path, records)).warnings if "learning rate" in w)
    assert warning.startswith("The chosen learning rate is the lowest or the highest that was tried")
    assert "included: LoRA. A better one" in warning


def test_report_shows_rates_with_the_chosen_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    others = [r for r in standard() if r.contender != "LoRA"]
    markdown, page = written(tmp_path, [*searches("LoRA", 0.01, 0.7, 5000), *finals(0.01), *others])
    assert "| method | 0.0003 | 0.001 | 0.003 | 0.01 | 0.03 | chosen |" in markdown
    assert "| LoRA | 54.8 | 60.0 | 64.8 | 70.0 * | 65.2 | 0.01 (grid extended) |" in markdown
    assert "chosen on the tune split from one grid for all methods (0.0003, 0.001, 0.003, 0.01)" in markdown
    assert "it was extended: LoRA." in markdown
    assert "70.0 *" in page
    assert "Score on the tune split by learning rate, in %" in markdown


def test_search_without_final_runs_is_a_search_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    markdown, page = written(tmp_path, tried({0.001: 0.4, 0.003: 0.6, 0.01: 0.5}))
    assert "A search in progress: 3 runs of 1 contenders and sizes so far, and none that counts." in markdown
    assert "| LoRA | 40.0 | 60.0 * | 50.0 | 0.003 (best so far) |" in markdown
    assert "has the highest" not in markdown
    assert not (tmp_path / "out" / "results.csv").exists()
    assert "A search in progress" in page


def test_many_sampled_rates_are_left_to_the_plot() -> None:
    records = tried({0.001 + i / 1e5: 0.5 for i in range(20)}, tuning={"learning_rates": [1e-3, 1e-2], "trials": 20})
    found = tuning.tunings(records, True)
    assert columns.rates(found) == []
    assert "20 trials" in columns.rate_rows(found, findings.metric_of(records[0]))[0][2]
    assert "20 trials for each method" in facts._rates(found)


@pytest.mark.parametrize("task", ["intents", "source"])
def test_plot_of_rates_shows_the_choice_the_edge_and_the_extension(task: str) -> None:
    records = whole_suite(task, seeds=1)
    metric = findings.metric_of(records[0])
    found = tuning.tunings(records, metric.higher_is_better)
    figure = rates.rates_figure(found, metric, "Learning rates")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels)[:3] == ["LoRA", "DoRA", "AdaLoRA"]
    edges = {name for name, axes in panels.items() if any(t.get_text() == "at the edge" for t in axes.texts)}
    assert edges == {t.contender for t in found if t.at_edge()}
    shaded = {name for name, axes in panels.items() if axes.patches}
    assert shaded == {t.contender for t in found if t.extended} == {"LoHa", "Bottleneck", "(IA)³"}
    rings = [line for line in panels["LoHa"].lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in rings] == [0.01] * 3


def test_scores_of_a_run_that_diverged_do_not_flatten_the_plot() -> None:
    records = tried({0.001: 5.0, 0.003: 4.0, 0.01: 1e9}, metric="perplexity")
    metric = findings.metric_of(records[0])
    figure = rates.rates_figure(tuning.tunings(records, False), metric, "")
    assert figure.axes[0].get_ylim()[1] < 50


# Curves of training -------------------------------------------------------------------------------------------------


def test_curves_of_training_mark_the_kept_step(tmp_path: Path) -> None:
    found = findings.findings(read_back(tmp_path, standard()))
    figure = training.stopping_figure(found)
    assert figure is not None
    (panel,) = (axes for axes in figure.axes if axes.get_title(loc="left") == "LoRA")
    rings = [line for line in panel.lines if len(line.get_xdata()) == 1]
    assert [(line.get_xdata()[0], pytest.approx(line.get_ydata()[0])) for line in rings] == [
        (30, 69.5), (30, 70), (30, 70.5),
    ]  # fmt: skip


def test_stop_split_in_another_measure_is_named(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, stopping_measure="nats a token", stopping=[[10, 2.5], [30, 1.5]]) for r in standard()
    ]
    found = findings.findings(read_back(tmp_path, records))
    figure = training.stopping_figure(found)
    assert figure is not None
    assert any("nats a token, lower is better" in text.get_text() for text in figure.texts)
    assert figure.axes[0].get_ylim()[1] < 3
    assert "(by nats a token)" in dict(facts.how(found, pairs=False))["Splits"]


def test_curves_without_numbers_are_left_out(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, stopping=[], losses=[]) for r in standard()]
    found = findings.findings(read_back(tmp_path, records))
    assert training.stopping_figure(found) is None
    assert training.losses_figure(found) is None


def test_losses_of_runs_of_different_lengths_are_drawn_as_far_as_all_go(tmp_path: Path) -> None:
    records = standard()
    records[0] = dataclasses.replace(records[0], losses=records[0].losses[:20])
    figure = training.losses_figure(findings.findings(read_back(tmp_path, records)))
    assert figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert max(panels["LoRA"].lines[0].get_xdata()) == 20
    assert max(panels["Full"].lines[0].get_xdata()) == 40
