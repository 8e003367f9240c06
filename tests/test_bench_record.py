from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench_records import EXAMPLES, made_up, outcomes, read_back
from peftkit_bench import record
from peftkit_bench.metrics import METRICS
from peftkit_bench.record import FILE, OUTCOMES, Record, RecordError


def test_record_survives_the_round_trip(tmp_path: Path) -> None:
    made = [made_up("LoRA", 0.6, 5000, seed) for seed in range(3)]
    read = read_back(tmp_path, made)
    assert [r.key for r in read] == [r.key for r in made]
    assert [r.to_line() for r in read] == [r.to_line() for r in made]
    assert read == made
    assert {r.folder for r in read} == {tmp_path}
    assert "folder" not in read[0].to_line()


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.6), ("perplexity", 7.25)])
def test_recorded_score_is_that_of_the_outcomes(tmp_path: Path, metric: str, score: float) -> None:
    (made,) = read_back(tmp_path, [made_up("LoRA", score, 10, metric=metric)])
    found = made.read_outcomes()
    assert len(found.predictions) == len(found.counts) == len(found.groups) == EXAMPLES
    assert METRICS[metric].score(found.counts) == pytest.approx(made.score, rel=1e-12) == score


def test_outcomes_that_are_missing_torn_or_of_another_record_raise(tmp_path: Path) -> None:
    one, other = read_back(tmp_path, [made_up("LoRA", 0.6, 10), made_up("LoHa", 0.5, 10)])
    with pytest.raises(RecordError, match="was not read from a folder, where its predictions would be"):
        made_up("LoRA", 0.6, 10).read_outcomes()
    path, second = (tmp_path / OUTCOMES / f"{r.key}.json.gz" for r in (one, other))
    whole = path.read_bytes()
    path.write_bytes(second.read_bytes())
    with pytest.raises(RecordError, match="not the predictions that LoRA, seed 0, was recorded with"):
        one.read_outcomes()
    for damaged in (whole[:-20], b"", whole[:30] + b"????" + whole[34:]):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"of LoRA, seed 0, cannot be read|not the predictions that"):
            one.read_outcomes()
    path.unlink()
    with pytest.raises(RecordError, match=r"cannot be read .*; copy the folder predictions together with records"):
        one.read_outcomes()


def test_outcomes_are_on_the_disk_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_up("LoRA", 0.6, 10)
    monkeypatch.setattr(record.Record, "to_line", lambda _: 1 / 0)
    with record.writer(tmp_path) as writer, pytest.raises(ZeroDivisionError):
        writer.append(made, outcomes(0.6, 0))
    assert [path.name for path in (tmp_path / OUTCOMES).iterdir()] == [f"{made.key}.json.gz"]
    assert (tmp_path / FILE).read_text() == ""


def test_outcomes_that_cannot_be_placed_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(record.os, "replace", full)
    with record.writer(tmp_path) as writer, pytest.raises(OSError, match="disk full"):
        writer.append(made_up("LoRA", 0.6, 10), outcomes(0.6, 0))
    assert list((tmp_path / OUTCOMES).iterdir()) == []
    assert record.read(tmp_path) == []


def test_torn_last_line_is_ignored_and_cut_off_before_the_next_record(tmp_path: Path) -> None:
    first, second = made_up("LoRA", 0.6, 5000, 0), made_up("LoRA", 0.6, 5000, 1)
    (tmp_path / FILE).write_text(first.to_line() + second.to_line()[:200])
    assert [r.key for r in record.read(tmp_path)] == [first.key]
    with record.writer(tmp_path) as writer:
        writer.append(second)
    assert (tmp_path / FILE).read_text() == first.to_line() + second.to_line()


def test_damaged_line_in_the_middle_raises_with_file_and_line(tmp_path: Path) -> None:
    good = made_up("LoRA", 0.6, 5000).to_line()
    (tmp_path / FILE).write_text(good + "{broken\n" + good)
    with pytest.raises(RecordError, match=r"records\.jsonl:2: expected one JSON object"):
        record.read(tmp_path)


def test_record_of_another_schema_or_with_other_fields_raises() -> None:
    line = made_up("LoRA", 0.6, 5000).to_line()
    with pytest.raises(RecordError, match="expected a record of schema 2, found 99"):
        Record.from_line(line.replace('"schema":2', '"schema":99'))
    with pytest.raises(RecordError, match=r"misses fields \['metric'\] and has unknown fields \['metrc'\]"):
        Record.from_line(line.replace('"metric"', '"metrc"'))
    with pytest.raises(RecordError, match="expected a JSON object, found a list"):
        Record.from_line("[]")


def test_nothing_is_read_from_an_empty_folder(tmp_path: Path) -> None:
    assert record.read(tmp_path) == []


def test_two_writers_on_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="file locks")
    with (
        record.writer(tmp_path),
        pytest.raises(RecordError, match="is being written by another run"),
        record.writer(tmp_path),
    ):
        pass


def test_records_need_the_standard_library_only() -> None:
    root = Path(record.__file__).resolve().parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import peftkit_bench.record; "
        "print([n for n in ('torch', 'numpy', 'peftkit', 'yaml') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_names_machine_versions_and_commit() -> None:
    found = record.environment()
    assert set(found) == {"processor", "cores", "memory_bytes", "system", "python", "versions", "commit"}
    assert found["cores"] >= 1
    assert "torch" in found["versions"]


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert record.digest({"a": 1, "b": [2]}) == record.digest({"b": [2], "a": 1})
    assert record.digest({"a": 1}) != record.digest({"a": 2})
