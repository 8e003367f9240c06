from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from bench_records import BUDGETS, GROUPS, METHODS, made_up, read_back, standard, tables, whole_suite
from bench_reports import undrawn, written
from peftkit_bench import statistics
from peftkit_bench.metrics import METRICS
from peftkit_bench.report import columns, findings, labels, pairs, plots, sentences
from peftkit_bench.report.findings import Findings
from peftkit_bench.tables import table


@pytest.fixture(scope="module")
def intents(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Accuracy at three budgets."""
    return findings.findings(read_back(tmp_path_factory.mktemp("intents"), whole_suite("intents")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Perplexity at three budgets."""
    return findings.findings(read_back(tmp_path_factory.mktemp("source"), whole_suite("source")))


def test_contender_and_budget_make_a_row_each(intents: Findings) -> None:
    names = {row.name for row in intents.rows}
    assert {"LoRA, 5k", "LoRA, 10k", "LoRA, 20k", "BitFit", "Full fine-tuning"} <= names
    assert len(intents.rows) == 3 * (len(METHODS) + 1) + 4
    assert intents.budgets == list(BUDGETS)


def test_methods_of_a_size_of_their_own_and_baselines_join_each_budget(intents: Findings) -> None:
    for contest, budget in zip(intents.contests, BUDGETS, strict=True):
        assert {row.budget for row in contest.rows} == {budget, None}
        assert {"BitFit", "(IA)³", "Full fine-tuning", "Head only"} <= {row.contender for row in contest.rows}
        assert len(contest.comparisons) == 15 * 14 / 2


def test_budgets_that_look_alike_are_written_out(tmp_path: Path) -> None:
    records = [made_up("LoRA", 0.5, b, seed, budget=b) for b in (74_010, 74_020) for seed in range(3)]
    assert {row.name for row in findings.findings(read_back(tmp_path, records)).rows} == {
        "LoRA, 74,010", "LoRA, 74,020",
    }  # fmt: skip


@pytest.mark.parametrize(("parameters", "off"), [(4500, False), (4499, True), (5500, False), (5501, True)])
def test_size_that_cannot_come_near_the_budget_is_marked(tmp_path: Path, parameters: int, off: bool) -> None:
    (row,) = findings.findings(read_back(tmp_path, [made_up("BOFT", 0.5, parameters)])).rows
    assert row.off_budget is off
    assert columns.size(row) == ("r = 8 (nearest)" if off else "r = 8")


def test_lower_is_better_turns_order_front_and_comparisons(source: Findings) -> None:
    contest = source.contests[0]
    means = [row.score.mean for row in contest.rows]
    assert means == sorted(means)
    assert contest.rows[0].contender == "Full fine-tuning"
    for each in contest.comparisons:
        assert each.difference.mean <= 0
        assert contest.row(each.first).score.mean <= contest.row(each.second).score.mean
    sizes = [source.row(name).trainable for name in source.front]
    scores = [source.row(name).score.mean for name in source.front]
    assert sizes == sorted(sizes)
    assert scores == sorted(scores, reverse=True)
    assert (source.front[0], source.front[-1]) == ("Head only", "DoRA, 20k")


def test_lower_is_better_in_words(source: Findings) -> None:
    first, last = (" ".join(sentences.answer(source.contests[i])) for i in (0, -1))
    assert first.startswith("Full fine-tuning has the lowest mean perplexity, 7.656 ± ")
    assert "%" not in first.replace("95 %", "")
    assert "points" not in first
    assert "Best perplexity for the fewest parameters: Full fine-tuning; everything with fewer" in first
    assert "DoRA has the lowest mean perplexity" in last
    (against,) = (s for s in sentences.baseline_sentences(source.contests[0]) if "Head only" in s)
    assert re.match(r"Against Head only \(21\.941\): significantly better: DoRA, LoRA", against)


def test_perplexity_is_tested_on_its_jackknife_values(source: Findings) -> None:
    contest = source.contests[0]
    records = [r for r in whole_suite("source") if r.phase == "final" and r.budget in (None, BUDGETS[0])]
    made = {name: table(METRICS["perplexity"], counts) for name, counts in tables(records).items()}
    expected = {
        (c.first, c.second): (c.p, c.difference.low)
        for c in statistics.compare_all(made, GROUPS, metric=METRICS["perplexity"])
    }
    assert {(c.first, c.second): (c.p, c.difference.low) for c in contest.comparisons} == {
        pair: (pytest.approx(p), pytest.approx(low)) for pair, (p, low) in expected.items()
    }


def test_what_more_parameters_bring_is_tested_and_said(intents: Findings, source: Findings) -> None:
    for found in (intents, source):
        grown = pairs.growth(found)
        assert [each.first for each in grown] == [*METHODS, "LoRA (peft)"]
        assert [each.p_corrected for each in grown] == statistics.holm([each.p for each in grown])
        (text,) = sentences.growth_sentences(found, grown)
        assert text.startswith("From 5k to 20k parameters, significantly better: LoRA (")
        assert "significantly worse" not in text
    assert "LoRA (+4.0)" in sentences.growth_sentences(intents, pairs.growth(intents))[0]
    assert "LoRA (-1.204)" in sentences.growth_sentences(source, pairs.growth(source))[0]


def test_report_says_the_answer_at_each_budget_and_over_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    markdown, page = written(tmp_path, whole_suite("intents"))
    assert "**At 5k parameters:** Full fine-tuning has the highest mean accuracy" in markdown
    assert "**At 20k parameters:** DoRA has the highest mean accuracy" in markdown
    assert re.search(r"Pareto front: nothing measured beats these .*: Head only \(100: 40\.2 ± \S+ %\);", markdown)
    assert re.search(r"\| BOFT, 5k \| 3,500 .* \| r = 8 \(nearest\) \|", markdown)
    assert '<span class="tag nearest">nearest size</span>' in page
    assert '<span class="tag pick">most for the fewest at 20k</span>' in page
    assert "AdaLoRA, 5k | 4,980 (3,320 kept)" in markdown
    assert markdown.count("Forgotten, nats a token") == 1


# Parity -------------------------------------------------------------------------------------------------------------


def test_two_implementations_stand_side_by_side(intents: Findings) -> None:
    made = pairs.parity(intents)
    assert [(each.own.name, each.peer.name) for each in made] == [
        (f"LoRA, {size}", f"LoRA (peft), {size}") for size in ("5k", "10k", "20k")
    ]
    assert all(each.same for each in made)
    own, peer = (made[0].own.median("train_seconds"), made[0].peer.median("train_seconds"))
    assert own is not None
    assert peer is not None
    assert made[0].ratio("train_seconds") == pytest.approx(own / peer)
    row = columns.parity_rows(made, intents.metric)[0]
    assert row[1] == "same within noise"
    assert row[3] == f"{own:.1f} / {peer:.1f} s = {own / peer:.2f}"


@pytest.mark.parametrize(
    "changes",
    [{"subject": "peftkit"}, {"method": "loha"}, {"quantization": "nf4"}, {"parameters": 5200}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_rows_are_no_counterparts(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields = {"subject": "peft", "method": "lora", "parameters": 5000, **changes}
    records = [r for r in standard() if r.contender == "LoRA"]
    records += [made_up("theirs", 0.7, seed=seed, **fields) for seed in range(3)]
    assert pairs.parity(findings.findings(read_back(tmp_path, records))) == []


def test_implementations_that_name_a_method_otherwise_are_paired(tmp_path: Path) -> None:
    records = [made_up("mine", 0.7, 5000, seed, method="prefix") for seed in range(3)]
    records += [made_up("theirs", 0.7, 5000, seed, subject="peft", method="prefix_tuning") for seed in range(3)]
    (made,) = pairs.parity(findings.findings(read_back(tmp_path, records)))
    assert (made.own.name, made.peer.name) == ("mine", "theirs")


def test_a_difference_between_implementations_is_said(tmp_path: Path) -> None:
    records = [r for r in standard() if r.contender == "LoRA"]
    records += [made_up("theirs", 0.5, 5000, seed, subject="peft", method="lora") for seed in range(3)]
    found = findings.findings(read_back(tmp_path, records))
    (made,) = pairs.parity(found)
    assert not made.same
    row = columns.parity_rows([made], found.metric)[0]
    assert row[1] == "not the same"
    assert row[2].startswith("+20.0 (+")


# Plots --------------------------------------------------------------------------------------------------------------


def apart(made: list[labels.Label], width: float) -> None:
    """Checks that no label hides another or leaves the figure."""
    boxes = {label.name: label.box() for label in made}
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)
    for box in boxes.values():
        assert box.x0 >= 0
        assert box.x1 <= width


@pytest.mark.parametrize("which", ["intents", "source"])
def test_labels_of_the_curves_do_not_overlap(which: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(which)
    figure, made = plots.score_figure(found)
    assert {label.name for label in made} == {*METHODS, "LoRA (peft)", "(IA)³", "BitFit"}
    apart(made, figure.bbox.x1)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any(text.startswith("Full fine-tuning ") for text in texts)
    assert any(re.match("[↓↑] Head only ", text) for text in texts)


def test_labels_of_the_score_plot_do_not_overlap(tmp_path: Path) -> None:
    rows = [
        ("Full fine-tuning", 0.71, 1_000_000, True, None), ("Head only", 0.30, 0, True, None),
        ("(IA)³", 0.50, 900, False, None), ("LayerNorm tuning", 0.5025, 800, False, None),
        ("BitFit", 0.55, 2600, False, None),
    ] + [(f"Method {i}", 0.60 + 0.0025 * i, 5000 - 10 * i, False, "r") for i in range(9)]  # fmt: skip
    records = [
        made_up(name, accuracy, count, seed, baseline=base, knob=knob)
        for name, accuracy, count, base, knob in rows
        for seed in range(3)
    ]
    figure, made = plots.score_figure(findings.findings(read_back(tmp_path, records)))
    assert {label.name for label in made} == {row[0] for row in rows}
    apart(made, figure.bbox.x1)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([10, 50], [10, 50]), ([20, 20], [15, 25]), ([0, 0, 100], [5, 15, 95]), ([32, 30, 31], [41, 21, 31])],
)
def test_spread_keeps_labels_apart_and_near_their_points(wanted: list[float], expected: list[float]) -> None:
    assert labels.spread(wanted, 10, 0, 100) == pytest.approx(expected)
