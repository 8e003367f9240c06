from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench_records import made_up
from peftkit_bench import record
from peftkit_bench.record import FILE, Record, RecordError


def test_record_survives_the_round_trip(tmp_path: Path) -> None:
    made = [made_up("LoRA", 0.6, 5000, seed) for seed in range(3)]
    with record.writer(tmp_path) as writer:
        for each in made:
            writer.append(each)
    read = record.read(tmp_path)
    assert [r.key for r in read] == [r.key for r in made]
    assert [r.to_line() for r in read] == [r.to_line() for r in made]


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
    with pytest.raises(RecordError, match="expected a record of schema 1, found 99"):
        Record.from_line(line.replace('"schema":1', '"schema":99'))
    with pytest.raises(RecordError, match=r"misses fields \['accuracy'\] and has unknown fields \['accurcy'\]"):
        Record.from_line(line.replace('"accuracy"', '"accurcy"'))
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
