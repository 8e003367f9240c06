"""A folder of records -> one small enough to be committed or sent: all that a report is made from, and the report."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from peftkit_bench import record, report
from peftkit_bench.record import RecordError

DPI, COLOURS = 110, 32
"""Of the plots: a third of the size of those of a report."""


def pack(folder: Path, out: Path) -> Path:
    """The folder that was written: packed records and predictions, `report.md` and its plots as small PNGs.

    `report`, `compare` and `run` read it as they read what was packed, which is left as it is. Of records with one key
    the newest is kept.

    Raises:
        RecordError: a file cannot be read, there are no records, or `out` holds records that are not in `folder`.
    """
    records = list({each.key: each for each in record.read(folder)}.values())
    with tempfile.TemporaryDirectory() as scratch:
        shown = report.write([folder], Path(scratch), dpi=DPI).parent
        lost = {each.key for each in record.read(out)} - {each.key for each in records}
        if lost:
            raise RecordError(
                f"{out} holds {len(lost)} records that {folder} lacks; choose another folder, or delete it"
            )
        if (out / record.FILE).exists():
            raise RecordError(f"{out / record.FILE} is there, unpacked; choose another folder, or delete it")
        record.write_packed(records, out)
        for old in out.glob("*.png"):
            old.unlink()
        (out / "report.md").write_bytes((shown / "report.md").read_bytes())
        for plot in sorted(shown.glob("*.png")):
            with Image.open(plot) as image:
                small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            small.save(out / plot.name, optimize=True)
    return out
