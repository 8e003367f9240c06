from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench_records import TASKS, read_back, standard, whole_suite
from bench_reports import undrawn, written
from peftkit_bench import ranking
from peftkit_bench.record import Record
from peftkit_bench.report import across, costs, findings, forgetting, ranks
from peftkit_bench.report.findings import Findings


def on(records: list[Record], data: str, shift: float = 0.0, **changes: object) -> list[Record]:
    """The records as those of other data."""
    return [
        dataclasses.replace(
            r, key=f"{data}{r.key}", data={**r.data, "hash": data, "name": data}, title=f"On {data}",
            started=f"2026-01-0{1 + len(data)}T00:00:00+00:00", **changes,
        )
        for r in records
    ]  # fmt: skip


def found_on(folder: Path, *groups: list[Record]) -> list[Findings]:
    return [findings.findings(read_back(folder / str(i), group)) for i, group in enumerate(groups)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Findings]:
    """Two tasks, in one of which less is better."""
    return found_on(tmp_path_factory.mktemp("both"), *(whole_suite(task) for task in TASKS))


def test_ranks_follow_each_metric_in_its_own_direction(both: list[Findings]) -> None:
    (levels,) = across.across(both)
    assert [each.level for each in levels] == ["5k parameters", "10k parameters", "20k parameters"]
    first = levels[0]
    assert first.tasks == ("Intents of short requests", "Next token of Python source")
    assert first.friedman.methods[0] == "Full fine-tuning"
    assert first.friedman.ranks[0] == 1.0
    assert first.friedman.methods[-1] == "Head only"
    assert first.friedman.critical_difference == pytest.approx(ranking.critical_difference(15, 2))


def test_wins_ties_and_losses_count_significant_differences_within_tasks(both: list[Findings]) -> None:
    first = across.across(both)[0][0]
    pair = first.tallies["Full fine-tuning", "Head only"]
    assert (pair.wins, pair.ties, pair.losses) == (2, 0, 0)
    assert across.tally_text(first.tallies["LoRA", "LoRA (peft)"]) == "0 / 2 / 0"
    assert first.total("Head only").tasks == 28
    assert first.total("Head only").losses == 28


def test_tasks_that_share_too_few_contenders_or_are_the_same_are_not_ranked_together(tmp_path: Path) -> None:
    one, same = standard(), on(standard(), "d0")
    few = on([r for r in standard() if r.contender in ("LoRA", "Full")], "few")
    assert across.across(found_on(tmp_path / "a", one, same)) == []
    assert across.across(found_on(tmp_path / "b", one, few)) == []
    assert len(across.across(found_on(tmp_path / "c", one, on(standard(), "d9")))) == 1


def test_budgets_that_differ_are_put_side_by_side_in_their_order(tmp_path: Path) -> None:
    other = on([dataclasses.replace(r, budget=7000 if r.knob else None) for r in standard()], "d9")
    ((level,),) = across.across(found_on(tmp_path, standard(), other))
    assert level.level == "5k to 7k parameters"
    assert {contest.budget for contest in level.contests} == {5000, 7000}


def test_words_across_tasks(tmp_path: Path) -> None:
    groups = [on(standard(), f"d{'x' * i}") for i in range(6)]
    ((level,),) = across.across(found_on(tmp_path, *groups))
    text = " ".join(across.answer(level))
    assert text.startswith("Over 6 tasks at 5k parameters, Full has the best average rank, 1.0 of 6.")
    assert "The methods do not rank alike (Friedman's test, p < 0.001)." in text
    assert "Full cannot be told apart from LoRA, AdaLoRA and (IA)³; significantly worse than Full: Prefix" in text
    assert "can hardly" not in text
    ((two,),) = across.across(found_on(tmp_path / "two", *groups[:2]))
    assert "no two of them can be told apart" in " ".join(across.answer(two))
    assert "With only 2 tasks, ranks can hardly be told apart" in " ".join(across.answer(two))


def test_diagram_joins_what_cannot_be_told_apart(tmp_path: Path) -> None:
    groups = [on(standard(), f"d{'x' * i}") for i in range(6)]
    ((level,),) = across.across(found_on(tmp_path, *groups))
    (axes,) = ranks.ranks_figure(level).axes
    bars = [line for line in axes.lines if line.get_linewidth() == 3.4]
    assert len(bars) == len(level.friedman.cliques) > 0
    texts = {text.get_text() for text in axes.texts}
    assert {"Full  1.0", "6.0  Head only"} <= texts
    assert f"critical difference {level.friedman.critical_difference:.2f}" in texts


def test_report_on_two_tasks_opens_with_what_holds_across_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    markdown, page = written(tmp_path, [*standard(), *on(standard(), "d9")])
    assert markdown.index("# Across 2 tasks") < markdown.index("# On d9") < markdown.index("# A made-up comparison")
    assert "| Full | 1.00 | 6 / 4 / 0 | 71.0 | 71.0 |" in markdown
    assert "![Average ranks with the critical difference; the numbers are in the table](ranks.png)" in markdown
    assert '<li><a href="#section-1">Across 2 tasks</a></li>' in page


# Memory, time, forgetting -------------------------------------------------------------------------------------------


def test_costs_show_peak_and_steady_memory_and_latency_over_the_bare_backbone(both: list[Findings]) -> None:
    figure = costs.costs_figure(both[0])
    memory, seconds, latency = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Memory of training, MB", "Training time, s", "Latency ÷ bare backbone's",
    ]  # fmt: skip
    order = [label.get_text() for label in memory.get_yticklabels()]
    head = order.index("Head only")
    row = both[0].row("Head only")
    peak, steady, trained = (row.median(f"{name}") for name in ("peak_bytes", "steady_bytes", "train_seconds"))
    assert peak is not None
    assert steady is not None
    at = [line for line in memory.lines if list(line.get_ydata()) == [head] and line.get_marker() == "o"]
    assert sorted(line.get_xdata()[0] for line in at) == [
        pytest.approx(steady / 1e6), pytest.approx(peak / 1e6),
    ]  # fmt: skip
    (at_time,) = (line for line in seconds.lines if list(line.get_ydata()) == [head] and line.get_marker() == "o")
    assert at_time.get_xdata()[0] == trained
    assert costs.ratio(both[0].row("Prefix tuning, 5k"), "merged_latency_seconds") is None
    assert costs.ratio(row, "merged_latency_seconds") == pytest.approx(1.01)
    assert any(line.get_xdata()[0] == 1.0 == line.get_xdata()[1] for line in latency.lines if len(line.get_xdata()) > 1)


def test_forgetting_is_drawn_where_it_was_measured(both: list[Findings], tmp_path: Path) -> None:
    made = forgetting.forgetting_figure(both[0])
    assert made is not None
    _, found = made
    assert {label.name for label in found} >= {"LoRA, 20k", "BitFit", "Head only"}
    assert len(found) == 15
    row = both[0].row("BitFit")
    assert row.forgotten == pytest.approx(0.77**4)
    assert forgetting.forgetting_figure(findings.findings(read_back(tmp_path, standard()))) is None
