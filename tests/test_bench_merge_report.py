from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_records import made_up, write
from peftkit_bench import merge_suite, record, report
from peftkit_bench.record import MergeRecord
from peftkit_bench.report import merges

ROOT = Path(__file__).parents[1] / "benchmarks"


def made(contender: str, size: float | None = 0.02, **changes: Any) -> MergeRecord:
    """A made-up record; `changes` replace fields."""
    pairs = {"weights": [0.5, 0.25], "activations": [0.625, 0.375], "logits": [0.75, 0.125]}
    fields: dict[str, Any] = {
        "key": f"{contender} {size}", "suite": "made-up", "title": "Made up", "adapter": "LoRA", "method": "lora",
        "config": {}, "learning_rate": 0.1, "seed": 0, "scaled": "lora_B", "asked_size": size, "size": size or 0.3,
        "contender": contender, "tool": "peftkit", "base": "nf4", "into": "nf4", "calibrated": False,
        "residual_rank": 0, "calibration_rows": 4, "judged_rows": 2, "minimum_effect": 0.9, "refused": None,
        "kept": {"nf4": pairs, "bf16": pairs}, "as_run": [0.75, 0.125], "sites": {}, "bytes_per_weight": 0.5,
        "certificate": None, "merge_seconds": 1.0, "training": {"steps": 1, "batch_size": 2},
        "data": made_up("x", 0.5, 1).data, "backbone": made_up("x", 0.5, 1).backbone, "threads": 1,
        "environment": made_up("x", 0.5, 1).environment, "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return MergeRecord(**{**fields, **changes})


def test_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    both = [made("a"), made_up("LoRA", 0.5, 10)]
    found = record.read(write(tmp_path, both))
    assert [type(each) for each in found] == [type(each) for each in both]
    assert found[0] == both[0]
    assert MergeRecord.from_line(both[0].to_line()) == both[0]
    with pytest.raises(record.RecordError, match=r"misses fields \['tool'\] and has unknown fields \['tol'\]"):
        record.parsed(both[0].to_line().replace('"tool"', '"tol"'))


def test_report_shows_numbers_refusals_and_the_certificate(tmp_path: Path) -> None:
    certificate = {"effect_difference": 2e-5, "error_difference": 1e-6, "input_effect_difference": 0.003,
                   "input_error_difference": 0.001, "kept": 1.0}  # fmt: skip
    records = [
        made("own", certificate=certificate),
        made("own", None, adapter="OFT", refused="only 3 % would be stored"),
        made("theirs", tool="peft"),
        made("theirs", None, adapter="OFT", tool="peft", kept={}, as_run=None, refused="ValueError: not so"),
        made("dense", into="bf16", kept={"nf4": {"logits": [1.0, 0.004], "weights": [1, 0], "activations": [1, 0]},
                                         "bf16": {"logits": [0.9, 3.0]}}),
        made("fused", into="fused"),
    ]  # fmt: skip
    write(tmp_path / "in", [made("own", kept={}, started="2025-01-01T00:00:00+00:00"), *records, made_up("A", 0.5, 10)])
    page = report.write([tmp_path / "in"], tmp_path / "out")
    markdown, html = (tmp_path / "out" / "report.md").read_text(), page.read_text()
    for text in (
        "| Adapter | own | theirs | fused |\n|---|--:|--:|--:|",
        "| LoRA, 2 % | 0.75 / 0.12 | 0.75 / 0.12 | 0.75 / 0.12 |",
        "| OFT, 30 % as trained | 0.75 / 0.12 † | – | – |",
        "## Weights, merged into 4 bits (NF4): effect kept / error",
        "| LoRA, 2 % | 0.50 / 0.25 |",
        "| LoRA, 2 % | 1.00 / 0.004 |",
        "† own refuses OFT, 30 % as trained at minimum_effect=0.9; the numbers are those of minimum_effect=0.",
        "– theirs cannot merge OFT, 30 % as trained: ValueError: not so",
        "differ from these numbers by at most 2e-05 at any site of 1 merges, effect or error, on weights, and 0.003",
        "own 0.75 to 0.75 (error 0.12)",
        "# A made-up comparison",
    ):
        assert text in markdown
    assert "<td>0.75 / 0.12 †</td>" in html
    assert html.count('<figure role="img" aria-label="Effect kept and error against the size of the change;') == 1
    assert {each.suffix for each in (tmp_path / "out").glob("merges.*")} == {".png", ".svg"}
    assert "into 8 bits" not in markdown
    assert merges.tables(merges.merges(records))[-1].rows[0][:6] == (
        "dense",
        "16 bits",
        "1.00",
        "1.00",
        "0.004",
        "0.004",
    )


def test_report_takes_the_newest_record_of_a_merge() -> None:
    old = made("own", started="2025-01-01T00:00:00+00:00", merge_seconds=9.0)
    assert merges.merges([made("own"), old]).first.merge_seconds == 1.0


def test_committed_results_can_be_read_and_are_those_of_the_suite() -> None:
    folder = ROOT / "results" / "merge"
    found = record.read(folder)
    wanted = merge_suite.load(ROOT / "suites" / "merge.yaml")
    assert {r.contender for r in found} == set(wanted.routes)
    assert {(r.adapter, r.asked_size) for r in found} == {
        (name, size) for name, adapter in wanted.adapters.items() for size in adapter.sizes or (None,)
    }
