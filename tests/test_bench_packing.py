from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from bench_records import made_up, outcomes, standard, write
from bench_reports import undrawn
from peftkit_bench import packing, record, report
from peftkit_bench.record import FILE, OUTCOMES, PACKED, PACKED_OUTCOMES, Record, RecordError
from peftkit_bench.report import compare
from PIL import Image


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain", standard())


@pytest.mark.usefixtures("quick")
def test_packed_folder_holds_all_that_was_recorded(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    assert sorted(path.name for path in packed.iterdir()) == [PACKED_OUTCOMES, PACKED, "report.md"]
    before, after = ([r for r in record.read(each) if isinstance(r, Record)] for each in (plain, packed))
    assert [r.to_line() for r in after] == [r.to_line() for r in before]
    assert [r.read_outcomes() for r in after] == [r.read_outcomes() for r in before]


@pytest.mark.usefixtures("quick")
def test_report_and_comparison_of_a_packed_folder_are_those_of_the_folder(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    shown = [report.write([each], tmp_path / f"shown-{each.name}").parent for each in (plain, packed)]
    texts = {(folder / "report.md").read_text() for folder in [*shown, packed]}
    assert len(texts) == 1
    assert compare.text([packed], "LoRA", "AdaLoRA") == compare.text([plain], "LoRA", "AdaLoRA")


def test_plots_are_small_and_whole(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    shown = report.write([plain], tmp_path / "shown").parent
    names = {path.name for path in shown.glob("*.png")}
    assert names == {path.name for path in packed.glob("*.png")}
    assert "score.png" in names
    for name in names:
        assert (packed / name).stat().st_size < (shown / name).stat().st_size / 2
        with Image.open(packed / name) as small, Image.open(shown / name) as large:
            assert small.width / small.height == pytest.approx(large.width / large.height, rel=0.01)
            assert small.width == 11 * packing.DPI


@pytest.mark.usefixtures("quick")
def test_of_one_key_the_newest_record_is_packed(tmp_path: Path) -> None:
    old, new = made_up("LoRA", 0.6, 10, train_seconds=1.0), made_up("LoRA", 0.6, 10, train_seconds=2.0)
    packed = packing.pack(write(tmp_path / "plain", [old, made_up("LoHa", 0.5, 10), new]), tmp_path / "packed")
    assert [(r.contender, r.train_seconds) for r in record.read(packed) if isinstance(r, Record)] == [
        ("LoRA", 2.0), ("LoHa", 12.0),
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_in_a_packed_folder(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    more = made_up("LoHa", 0.65, 10)
    with record.writer(packed) as writer:
        writer.append(more, outcomes(0.65, 0))
    found = [r for r in record.read(packed) if isinstance(r, Record)]
    assert [r.key for r in found] == [*(r.key for r in standard()), more.key]
    assert found[-1].read_outcomes().digest == outcomes(0.65, 0).digest
    assert found[0].read_outcomes().digest == found[0].outcomes
    again = packing.pack(packed, tmp_path / "again")
    assert [r.key for r in record.read(again)] == [r.key for r in found]


@pytest.mark.usefixtures("quick")
def test_nothing_that_lies_there_is_lost(tmp_path: Path, plain: Path) -> None:
    fewer = write(tmp_path / "fewer", standard()[:-1])
    packed = packing.pack(plain, tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    with pytest.raises(RecordError, match=r"packed holds 1 records that .*fewer lacks; choose another folder$"):
        packing.pack(fewer, packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    assert packing.pack(plain, packed) == packed


@pytest.mark.usefixtures("quick")
def test_packing_writes_into_no_folder_of_something_else(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(RecordError, match="plain is not empty and holds no packed records; choose another folder"):
        packing.pack(plain, plain)
    (tmp_path / "holidays").mkdir()
    (tmp_path / "holidays" / "beach.png").write_bytes(b"sand")
    with pytest.raises(RecordError, match="holidays is not empty"):
        packing.pack(plain, tmp_path / "holidays")
    with pytest.raises(RecordError, match=r"beach\.png is a file; choose another name"):
        packing.pack(plain, tmp_path / "holidays" / "beach.png")
    assert (tmp_path / "holidays" / "beach.png").read_bytes() == b"sand"
    (tmp_path / "empty").mkdir()
    assert packing.pack(plain, tmp_path / "empty") == tmp_path / "empty"


@pytest.mark.usefixtures("quick")
def test_packing_again_takes_away_the_plots_of_the_last_report_and_nothing_else(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    shown = packed / "report.md"
    assert "](score.png)" in shown.read_text()
    shown.write_text(shown.read_text() + "![once](once.png)")
    for name in ("once.png", "score.png", "mine.png"):
        (packed / name).write_bytes(b"plot")
    assert packing.pack(plain, packed) == packed
    assert {path.name for path in packed.glob("*.png")} == {"mine.png"}


@pytest.mark.usefixtures("quick")
def test_cells_of_a_run_that_went_on_in_a_packed_folder_are_not_hidden(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    with record.writer(packed):
        pass
    assert packing.pack(plain, packed) == packed  # a run with nothing to do leaves an empty file
    with record.writer(packed) as writer:
        writer.append(made_up("LoHa", 0.65, 10), outcomes(0.65, 0))
    with pytest.raises(RecordError, match=r"records\.jsonl holds records of a run that went on there"):
        packing.pack(packed, packed)


@pytest.mark.usefixtures("quick")
def test_predictions_that_are_missing_stop_the_packing(tmp_path: Path, plain: Path) -> None:
    next((plain / OUTCOMES).iterdir()).unlink()
    with pytest.raises(RecordError, match=f"copy the folder {OUTCOMES} together with {FILE}"):
        packing.pack(plain, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.usefixtures("quick")
def test_damage_is_named(tmp_path: Path, plain: Path) -> None:
    packed = packing.pack(plain, tmp_path / "packed")
    first = record.read(packed)[0]
    assert isinstance(first, Record)
    whole = (packed / PACKED_OUTCOMES).read_bytes()
    (packed / PACKED_OUTCOMES).write_bytes(whole[:-30])
    with pytest.raises(RecordError, match=rf"{PACKED_OUTCOMES}: .* LoRA, seed 0, cannot be read"):
        first.read_outcomes()
    lines = lzma.decompress(whole).decode().splitlines(keepends=True)
    (packed / PACKED_OUTCOMES).write_bytes(lzma.compress("".join(lines[1:]).encode()))
    with pytest.raises(RecordError, match=f"LoRA, seed 0, cannot be read .* {PACKED_OUTCOMES} with {PACKED}"):
        first.read_outcomes()
    swapped = [lines[0].split('"outcomes"')[0] + '"outcomes"' + lines[1].split('"outcomes"')[1], *lines[1:]]
    (packed / PACKED_OUTCOMES).write_bytes(lzma.compress("".join(swapped).encode()))
    with pytest.raises(RecordError, match=rf"{PACKED_OUTCOMES}: not the predictions that LoRA, seed 0, was"):
        first.read_outcomes()
    (packed / PACKED).write_bytes((packed / PACKED).read_bytes()[:-5])
    with pytest.raises(RecordError, match=rf"{PACKED}: cannot be decompressed .*; copy it again"):
        record.read(packed)
