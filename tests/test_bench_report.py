from __future__ import annotations

import dataclasses
import html.parser
import re
from itertools import combinations
from pathlib import Path

import pytest
from bench_records import EXAMPLES, GROUPS, LABELS, made_up
from peftkit_bench import record, report, statistics
from peftkit_bench.record import Record, RecordError
from peftkit_bench.report import findings, plots

HARD = "Head only"


def standard() -> list[Record]:
    """Two methods that cannot be told apart, a worse one that cannot be merged, and two baselines; three seeds."""
    found = []
    for seed in range(3):
        found += [
            made_up("LoRA", 0.70 + 0.005 * (seed - 1), 5000, seed),
            made_up("AdaLoRA", 0.695 + 0.02 * (1 - seed), 4990, seed, final_parameters=3300),
            made_up("Prefix", 0.50, 4900, seed, merged_latency_seconds=None, merged_logit_difference=None),
            made_up("(IA)³", 0.60, 900, seed, knob=None),
            made_up("Full", 0.71, 1_000_000, seed, knob=None, baseline=True),
            made_up(HARD, 0.30, 0, seed, knob=None, baseline=True),
        ]
    return found


def written(tmp_path: Path, records: list[Record]) -> tuple[str, str]:
    """The report on the records: Markdown and HTML."""
    with record.writer(tmp_path / "in") as writer:
        for each in records:
            writer.append(each)
    page = report.write([tmp_path / "in"], tmp_path / "out")
    assert page == tmp_path / "out" / "index.html"
    return (tmp_path / "out" / "report.md").read_text(), page.read_text()


def line(markdown: str, name: str) -> list[str]:
    """The cells of a method's row in the first table."""
    found = next(row for row in markdown.splitlines() if row.startswith(f"| {name}"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_table_shows_every_number_as_recorded(tmp_path: Path) -> None:
    markdown, page = written(tmp_path, standard())
    tables = {
        name: statistics.correct_table([r.predictions for r in standard() if r.contender == name], LABELS)
        for name in {r.contender for r in standard()}
    }
    lora = statistics.estimate(tables["LoRA"], GROUPS, statistics.run_variance(list(tables.values())))
    accuracy = f"70.0 ± {100 * lora.half_width:.1f}"
    assert line(markdown, "LoRA") == [
        "LoRA", "5,000", "0.5", accuracy, "13.0", "123", "45", "12.5", "10.1", "10.0", "0.003", "r = 8",
    ]  # fmt: skip
    assert line(markdown, "AdaLoRA")[1] == "4,990 (3,300 kept)"
    assert line(markdown, "Prefix")[8] == "–"
    assert line(markdown, "Full (baseline)")[1:3] == ["1,000,000", "100"]
    assert line(markdown, f"{HARD} (baseline)")[1] == "0"
    assert line(markdown, "(IA)³")[-1] == "its own"
    for text in (accuracy, "4,990 (3,300 kept)", "12.5", "(IA)³"):
        assert text in page


def test_words_say_which_differences_are_significant_and_which_are_not(tmp_path: Path) -> None:
    markdown, _ = written(tmp_path, standard())
    assert "Full has the highest mean accuracy, 71.0 ±" in markdown
    assert "It cannot be told apart from LoRA and AdaLoRA." in markdown
    assert re.search(r"Most accuracy for the fewest parameters: LoRA, 70\.0 ± \S+ % with 5,100 trainable", markdown)
    assert "cannot be told apart: LoRA and AdaLoRA; significantly worse: (IA)³ and Prefix." in markdown
    assert re.search(
        r"\*\*LoRA\*\* \(70\.0 %\): significantly better than \(IA\)³, Prefix and Head only; cannot be", markdown
    )
    assert "Holm's correction over all 15 pairs" in markdown
    assert "“Cannot be told apart” does not mean equal" in markdown


def test_every_pair_is_listed_with_the_p_value_of_the_paired_test(tmp_path: Path) -> None:
    markdown, _ = written(tmp_path, standard())
    tables = {
        name: statistics.correct_table([r.predictions for r in standard() if r.contender == name], LABELS)
        for name in {r.contender for r in standard()}
    }
    found = statistics.compare_all(tables, GROUPS)
    assert len(found) == 15
    for each in found:
        row = next(r for r in markdown.splitlines() if r.startswith(f"| {each.first} | {each.second} |"))
        verdict = "significant" if each.p_corrected < 0.05 else "not significant"
        assert row.endswith(f"| {each.p:.4f} | {each.p_corrected:.4f} | {verdict} |")


def test_front_holds_what_nothing_beats_in_accuracy_and_parameters() -> None:
    found = findings.findings(standard())
    assert found.front == (HARD, "(IA)³", "AdaLoRA", "LoRA", "Full")


def test_thriftiest_takes_the_most_accurate_of_those_of_one_size() -> None:
    found = findings.findings(standard())
    assert [row.name for row in found.tied_with_best()] == ["Full", "LoRA", "AdaLoRA"]
    assert found.thriftiest().name == "LoRA"


def test_missing_seeds_are_said_and_tests_use_the_seeds_that_all_have(tmp_path: Path) -> None:
    records = [r for r in standard() if (r.contender, r.seed) != ("LoRA", 2)]
    markdown, page = written(tmp_path, records)
    sentence = "Not all seeds have been run: LoRA lack some of [0, 1, 2]. Tests use the seeds that all have: [0, 1]."
    assert sentence in markdown
    assert sentence in page
    assert {c.difference.seeds for c in findings.findings(records).comparisons} == {2}


def test_single_seed_is_said() -> None:
    found = findings.findings([r for r in standard() if r.seed == 0])
    assert any(w.startswith("One seed only") for w in found.warnings)


def test_records_of_an_older_setting_are_left_out_and_said() -> None:
    old = made_up("LoRA", 0.2, 77, 0, key="old", variant="old", started="2025-01-01T00:00:00+00:00")
    found = findings.findings([*standard(), old])
    assert found.row("LoRA").parameters == 5000
    assert any("LoRA was run with other settings before" in w for w in found.warnings)


def test_records_from_two_machines_are_said() -> None:
    records = standard()
    records[0] = dataclasses.replace(records[0], environment={**records[0].environment, "processor": "another"})
    assert any("different machines" in w for w in findings.findings(records).warnings)


def test_other_data_make_a_section_of_their_own(tmp_path: Path) -> None:
    other = [
        dataclasses.replace(r, data={**r.data, "hash": "d1"}, started="2026-02-01T00:00:00+00:00") for r in standard()
    ]
    markdown, _ = written(tmp_path, [*standard(), *other])
    assert markdown.count("# A made-up comparison") == 2
    assert "(accuracy.png)" in markdown
    assert "(accuracy-2.png)" in markdown
    assert (tmp_path / "out" / "accuracy-2.png").stat().st_size > 10_000


def test_search_lists_rates_and_marks_the_best_and_the_edge(tmp_path: Path) -> None:
    records = [
        made_up(name, accuracy, 5000, 0, key=f"{name}{rate}", learning_rate=rate, split="validation", title="A search")
        for name, values in {"LoRA": (0.4, 0.6, 0.5), "Prefix": (0.4, 0.5, 0.6)}.items()
        for rate, accuracy in zip((0.001, 0.003, 0.01), values, strict=True)
    ]
    markdown, page = written(tmp_path, records)
    assert "| LoRA | 40.0 | 60.0 * | 50.0 | 0.003 |" in markdown
    assert "| Prefix | 40.0 | 50.0 | 60.0 * | 0.01 (at the edge of the grid) |" in markdown
    assert "60.0 *" in page


def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    _, page = written(tmp_path, [dataclasses.replace(r, title="<script>alert(1)</script>") for r in standard()])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 2
    body = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", body)
    assert "@import" not in body
    assert "url(http" not in body
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))

    class Balance(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_labels_of_the_accuracy_plot_do_not_overlap() -> None:
    rows = [
        ("Full fine-tuning", 0.71, 1_000_000, True, None), (HARD, 0.30, 0, True, None),
        ("(IA)³", 0.50, 900, False, None), ("LayerNorm tuning", 0.5025, 800, False, None),
        ("BitFit", 0.55, 2600, False, None),
    ] + [(f"Method {i}", 0.60 + 0.0025 * i, 5000 - 10 * i, False, "r") for i in range(9)]  # fmt: skip
    records = [
        made_up(name, accuracy, count, seed, baseline=base, knob=knob)
        for name, accuracy, count, base, knob in rows
        for seed in range(3)
    ]
    figure, labels = plots._accuracy(findings.findings(records))
    boxes = {label.name: label.box() for label in labels}
    assert set(boxes) == {row[0] for row in rows}
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)
    for box in boxes.values():
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [([10, 50], [10, 50]), ([20, 20], [15, 25]), ([0, 0, 100], [5, 15, 95]), ([32, 30, 31], [41, 21, 31])],
)
def test_spread_keeps_labels_apart_and_near_their_points(wanted: list[float], expected: list[float]) -> None:
    assert plots.spread(wanted, 10, 0, 100) == pytest.approx(expected)


def test_report_of_nothing_raises(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"expected records in .*records\.jsonl, found none; run a suite first"):
        report.write([tmp_path], tmp_path)


def test_accuracy_recorded_is_the_share_of_right_predictions() -> None:
    made = made_up("LoRA", 0.6, 10)
    assert made.accuracy == 0.6 == sum(p == y for p, y in zip(made.predictions, made.labels, strict=True)) / EXAMPLES
