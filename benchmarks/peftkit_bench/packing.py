"""A folder of records -> one small enough to be committed or sent: all that a report is made from, and the report."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

from PIL import Image

from peftkit_bench import record, report
from peftkit_bench.placing import place
from peftkit_bench.record import RecordError

DPI, COLOURS = 110, 32
"""Of the plots: less than half the size of those of a report."""
PICTURES = re.compile(r"\]\(([^)/]+\.png)\)")
"""Files that a report shows."""


def pack(folder: Path, out: Path) -> Path:
    """The folder that was written: packed records and predictions, `report.md` and its plots as small PNGs.

    `report`, `compare` and `run` read it as they read what was packed, which is left as it is. Of records with one key
    the newest is kept.

    Raises:
        RecordError: a file cannot be read, there are no records, or `out` holds what is not in `folder`.
    """
    _check(out)
    records = list({each.key: each for each in record.read(folder)}.values())
    lost = {each.key for each in record.read(out)} - {each.key for each in records}
    if lost:
        raise RecordError(f"{out} holds {len(lost)} records that {folder} lacks; choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        shown = report.write([folder], Path(scratch), dpi=DPI).parent
        record.write_packed(records, out)
        for old in _pictures(out):
            (out / old).unlink(missing_ok=True)
        place(out / "report.md", (shown / "report.md").read_bytes())
        for plot in sorted(shown.glob("*.png")):
            with Image.open(plot) as image:
                small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            packed = io.BytesIO()
            small.save(packed, "PNG", optimize=True)
            place(out / plot.name, packed.getvalue())
    return out


def _check(out: Path) -> None:
    """Raises: RecordError: the folder holds something that packing did not put there."""
    if not out.exists():
        return
    if not out.is_dir():
        raise RecordError(f"{out} is a file; choose another name for the folder")
    if any(out.iterdir()) and not (out / record.PACKED).exists():
        raise RecordError(f"{out} is not empty and holds no packed records; choose another folder")
    running = out / record.FILE
    if running.exists() and running.stat().st_size:
        raise RecordError(f"{running} holds records of a run that went on there; choose another folder")


def _pictures(out: Path) -> list[str]:
    """Plots that the report in the folder shows."""
    written = out / "report.md"
    return PICTURES.findall(written.read_text("utf-8")) if written.exists() else []
