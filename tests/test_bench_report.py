from __future__ import annotations

import csv
import dataclasses
import html.parser
import re
import time
from pathlib import Path
from typing import Any

import pytest
from bench_records import GROUPS, made_up, read_back, searches, standard, tables, whole_suite, write
from bench_reports import line, undrawn, written
from peftkit_bench import record, report, statistics
from peftkit_bench.metrics import METRICS
from peftkit_bench.record import OUTCOMES, RecordError
from peftkit_bench.report import findings, sentences, style
from peftkit_bench.runs import run_variances

HARD = "Head only"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)


def right_tables() -> dict[str, Any]:
    """Of the standard records, 1 where a prediction is right."""
    return {name: counts[..., 0] for name, counts in tables(standard()).items()}


@pytest.mark.usefixtures("quick")
def test_table_shows_every_number_as_recorded(tmp_path: Path) -> None:
    markdown, page = written(tmp_path, standard())
    right = right_tables()
    runs = dict(zip(right, run_variances(list(right.values())), strict=True))
    lora = statistics.estimate(right["LoRA"], GROUPS, runs["LoRA"])
    accuracy = f"70.0 ± {100 * lora.half_width:.1f}"
    assert line(markdown, "LoRA") == [
        "LoRA", "5,000", "0.5", accuracy, "13.0", "123", "67", "45", "12.5", "10.1", "10.0", "1.000", "0.003", "30",
        "r = 8",
    ]  # fmt: skip
    assert line(markdown, "AdaLoRA")[1] == "4,990 (3,300 kept)"
    assert line(markdown, "Prefix")[9] == line(markdown, "Prefix")[11] == "–"
    assert line(markdown, "Full (baseline)")[1:3] == ["1,000,000", "100"]
    assert line(markdown, f"{HARD} (baseline)")[1] == "0"
    assert line(markdown, "(IA)³")[-1] == "its own"
    assert "Forgotten" not in markdown
    for text in (
        accuracy,
        "4,990 (3,300 kept)",
        "12.5",
        "(IA)³",
        "Peak memory",
        "Steady",
        '<span class="tag">own size',
    ):
        assert text in page


@pytest.mark.usefixtures("quick")
def test_words_say_which_differences_are_significant_and_which_are_not(tmp_path: Path) -> None:
    markdown, _ = written(tmp_path, standard())
    assert "Full has the highest mean accuracy, 71.0 ±" in markdown
    assert "It cannot be told apart from LoRA and AdaLoRA." in markdown
    assert re.search(r"Most accuracy for the fewest parameters: LoRA, 70\.0 ± \S+ % with 5,100 trainable", markdown)
    left_open = re.search(r"is \+1\.0 points, simultaneous .* -\S+ to \+(\S+), so up to (\S+) points are", markdown)
    assert left_open is not None
    assert left_open[1] == left_open[2]
    assert "cannot be told apart: LoRA and AdaLoRA; significantly worse: (IA)³ and Prefix." in markdown
    assert re.search(
        r"\*\*LoRA\*\* \(70\.0 %\): significantly better than \(IA\)³, Prefix and Head only; cannot be", markdown
    )
    assert "Holm's correction over all 15 pairs" in markdown
    assert "“Cannot be told apart” does not mean equal" in markdown


def test_names_are_listed_so_that_each_can_be_told() -> None:
    assert sentences.listed(["LoRA"]) == "LoRA"
    assert sentences.listed(["LoRA", "OFT", "(IA)³"]) == "LoRA, OFT and (IA)³"
    assert sentences.listed(["LoRA, NF4", "LoRA", "OFT"]) == "LoRA, NF4; LoRA; and OFT"


@pytest.mark.usefixtures("quick")
def test_every_pair_is_listed_with_the_p_value_of_the_paired_test(tmp_path: Path) -> None:
    markdown, _ = written(tmp_path, standard())
    found = statistics.compare_all(right_tables(), GROUPS)
    assert len(found) == 15
    with (tmp_path / "out" / "comparisons.csv").open(newline="") as file:
        listed = {(row["first"], row["second"]): row for row in csv.DictReader(file)}
    assert len(listed) == 15
    for each in found:
        row = next(r for r in markdown.splitlines() if r.startswith(f"| {each.first} | {each.second} |"))
        verdict = "significant" if each.p_corrected < 0.05 else "not significant"
        shown = [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in (each.p, each.p_corrected)]
        assert row.endswith(f"| {shown[0]} | {shown[1]} | {verdict} |")
        line = listed[each.first, each.second]
        assert float(line["p_corrected"]) == pytest.approx(each.p_corrected)
        assert float(line["difference"]) == pytest.approx(each.difference.mean)
        assert line["better"] == (each.first if each.p_corrected < 0.05 else "")


@pytest.mark.usefixtures("quick")
def test_results_are_a_line_of_csv_each(tmp_path: Path) -> None:
    written(tmp_path, standard())
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert next(iter(rows)) == "Full"
    lora = rows["LoRA"]
    assert (lora["budget"], lora["at_budget"], lora["knob"], lora["knob_value"]) == ("5000", "True", "r", "8")
    assert lora["scores"] == "0.695 0.7 0.705"
    assert lora["seeds"] == "0 1 2"
    assert float(lora["score"]) == pytest.approx(0.7)
    assert (lora["peak_bytes"], lora["steady_bytes"]) == ("123000000.0", "67000000.0")
    assert rows["Prefix"]["merged_latency_seconds"] == rows["(IA)³"]["budget"] == ""
    assert rows["(IA)³"]["at_budget"] == ""


def test_front_holds_what_nothing_beats_in_accuracy_and_parameters(tmp_path: Path) -> None:
    found = findings.findings(read_back(tmp_path, standard()))
    assert found.front == (HARD, "(IA)³", "AdaLoRA", "LoRA", "Full")


def test_thriftiest_takes_the_most_accurate_of_those_of_one_size(tmp_path: Path) -> None:
    (contest,) = findings.findings(read_back(tmp_path, standard())).contests
    assert [row.contender for row in contest.tied_with_best()] == ["Full", "LoRA", "AdaLoRA"]
    assert contest.thriftiest().contender == "LoRA"


# Warnings -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_missing_seeds_are_said_and_tests_use_the_seeds_that_all_have(tmp_path: Path) -> None:
    records = [r for r in standard() if (r.contender, r.seed) != ("LoRA", 2)]
    markdown, page = written(tmp_path, records)
    sentence = "Not all seeds have been run: LoRA lack some of [0, 1, 2]. Tests use the seeds that all have: [0, 1]."
    assert sentence in markdown
    assert sentence in page
    (contest,) = findings.findings(read_back(tmp_path / "again", records)).contests
    assert {c.difference.seeds for c in contest.comparisons} == {2}


@pytest.mark.parametrize(("seeds", "warning"), [(1, "One seed only"), (2, "Fewer than 3 seeds"), (3, None)])
def test_few_seeds_are_said(tmp_path: Path, seeds: int, warning: str | None) -> None:
    found = findings.findings(read_back(tmp_path, [r for r in standard() if r.seed < seeds]))
    assert [w.startswith(warning or "") for w in found.warnings] == ([True] if warning else [])


def test_one_seed_is_tested_as_that_run_alone(tmp_path: Path) -> None:
    (contest,) = findings.findings(read_back(tmp_path, [r for r in standard() if r.seed == 0])).contests
    assert {c.test for c in contest.comparisons} == {"permutation test"}


def test_records_of_an_older_setting_are_left_out_and_said(tmp_path: Path) -> None:
    old = made_up("LoRA", 0.2, 77, 7, key="old", variant="old", started="2025-01-01T00:00:00+00:00")
    fixed = made_up("AdaLoRA", 0.2, 77, 0, key="own", knob=None, started="2025-01-01T00:00:00+00:00")
    found = findings.findings(read_back(tmp_path, [*standard(), old, fixed]))
    assert found.row("LoRA").parameters == 5000
    assert found.row("LoRA").seeds == (0, 1, 2)
    assert [row.contender for row in found.rows].count("AdaLoRA") == 1
    assert [w for w in found.warnings if "with other settings before" in w] == [
        f"{name} was run with other settings before; only the newest are shown." for name in ("LoRA", "AdaLoRA")
    ]


def test_records_from_two_machines_or_from_several_cells_at_a_time_are_said(tmp_path: Path) -> None:
    records = standard()
    records[0] = dataclasses.replace(records[0], environment={**records[0].environment, "processor": "another"})
    assert any("different machines" in w for w in findings.findings(read_back(tmp_path / "a", records)).warnings)
    records = [dataclasses.replace(r, jobs=4) for r in standard()]
    (warning,) = findings.findings(read_back(tmp_path / "b", records)).warnings
    assert warning == "Up to 4 cells ran at the same time: times are less exact than those of one at a time."


# What cannot be read ------------------------------------------------------------------------------------------------


def test_report_of_nothing_raises(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"expected records in .*records\.jsonl, found none; run a suite first"):
        report.write([tmp_path], tmp_path)


def test_report_without_the_predictions_raises(tmp_path: Path) -> None:
    records = read_back(tmp_path, standard())
    (tmp_path / OUTCOMES / f"{records[3].key}.json.gz").unlink()
    with pytest.raises(RecordError, match=r"\(IA\)³, seed 0, cannot be read .*copy the folder predictions together"):
        report.write([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out" / "report.md").exists()


def test_predictions_of_other_examples_raise(tmp_path: Path) -> None:
    good, other = standard()[0], made_up("LoHa", 0.5, 10)
    shorter = record.Outcomes(predictions=[0], counts=[[1.0]], groups=[0])
    with record.writer(tmp_path) as writer:
        writer.append(dataclasses.replace(other, outcomes=shorter.digest), shorter)
    write(tmp_path, [good])
    with pytest.raises(RecordError, match="LoRA, seed 0, and of LoHa, seed 0, are of other examples"):
        findings.findings([r for r in record.read(tmp_path) if isinstance(r, record.Record)])


def test_unknown_metric_raises(tmp_path: Path) -> None:
    records = read_back(tmp_path, [dataclasses.replace(standard()[0], metric="charm")])
    with pytest.raises(RecordError, match=r"was scored by 'charm'; this version knows accuracy, .*read it with"):
        findings.findings(records)
    assert "charm" not in METRICS


# The page -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_other_data_or_another_task_make_a_section_of_their_own(tmp_path: Path) -> None:
    later = {"started": "2026-02-01T00:00:00+00:00"}
    other = [dataclasses.replace(r, key=f"o{r.key}", data={**r.data, "hash": "d1"}, **later) for r in standard()]
    task = [dataclasses.replace(r, key=f"t{r.key}", task={"name": "other"}) for r in standard()]
    markdown, page = written(tmp_path, [*standard(), *other, *task])
    assert markdown.count("# A made-up comparison\n") == 3
    assert "(score.png)" in markdown
    assert "(score-3.png)" in markdown
    assert page.count('<a href="#section-') == page.count("<section id=")


def test_page_is_self_contained_and_well_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "PNG_DPI", 40)
    hostile = [dataclasses.replace(r, title="<script>alert(1)</script>") for r in standard()]
    hostile += [dataclasses.replace(r, title=hostile[0].title) for r in searches("LoRA", 0.003, 0.7, 5000)]
    markdown, page = written(tmp_path, hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    names = {"score", "ranking", "rates", "costs", "losses", "stopping"}
    assert page.count("<svg") == len(names)
    for name in names:
        assert f"({name}.png)" in markdown
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 2000
        assert (tmp_path / "out" / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    body = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", body)
    assert "@import" not in body
    assert "http" not in body
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    for colour in re.findall(r"(?:fill|stroke): (#\w+)", page):
        assert colour in ("#000000",), f"{colour} would not follow the page into the dark"

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


@pytest.mark.usefixtures("quick")
def test_report_of_five_hundred_records_is_quick(tmp_path: Path) -> None:
    records = [*whole_suite("intents"), *whole_suite("source")]
    assert len(records) > 500
    folder = write(tmp_path, records)
    start = time.process_time()
    report.write([folder], tmp_path / "out")
    assert time.process_time() - start < 4
