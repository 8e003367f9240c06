"""Where an export goes: checked before anything is computed, and written in one step."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit import certificate, folder
from peftkit.errors import CheckpointError, ExportError
from peftkit.export.result import Export
from peftkit.export.source import Source


def check_folder(out: Path, source: Source, overwrite: bool) -> None:
    """Raises ExportError unless a folder may be written at `out`."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; choose a folder to export into")
    if source.folder is not None and out.exists() and os.path.samefile(out, source.folder):
        raise ExportError(f"{out} is the adapter itself; choose another folder to export into")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{out} holds files already; choose another folder, or pass --overwrite (overwrite=True)")


def check_file(out: Path, overwrite: bool) -> None:
    """Raises ExportError unless a file may be written at `out`."""
    if out.is_dir():
        raise ExportError(f"{out} is a folder; choose a file name to export into")
    if out.exists() and not overwrite:
        raise ExportError(f"{out} exists already; choose another name, or pass --overwrite (overwrite=True)")


def as_json(value: Mapping[str, Any]) -> bytes:
    """The value as a JSON file.

    Raises:
        ExportError: it holds something that JSON cannot say.
    """
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ExportError(f"about must hold plain JSON values: {error}") from None


def write_folder(
    out: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor] | None, source: Source, made: Export
) -> None:
    """Writes a whole folder in one step: the files, a safetensors file, and what is known of the adapter's origin.

    Raises:
        CheckpointError: the disk refuses; what was there is as it was.
        ExportError: what is known of the origin is not plain JSON.
    """
    origin = {
        "format": 1,
        "method": "lora",
        **source.origin,
        "converted": {
            "from": made.method,
            "exact": made.exact,
            "rank": made.rank,
            "error_relative": made.error_relative,
            "largest_error": made.largest_error,
        },
    }
    written = {**files, folder.PROVENANCE: as_json(origin)}
    if source.report is not None:
        written[certificate.FILE] = (source.report.to_json() + "\n").encode()
    folder.write(out, written, tensors)
    if source.report is None:
        with suppress(FileNotFoundError):  # a certificate of what was there before is none of this adapter
            (out / certificate.FILE).unlink()


def write_file(out: Path, fill: Callable[[Path], None]) -> None:
    """Writes a file in one step.

    Args:
        fill: writes the whole content to the path that it is given.

    Raises:
        CheckpointError: the disk refuses; what was there is as it was.
    """
    out = Path(os.path.realpath(out))
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fill(fresh)
        descriptor = os.open(fresh, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, out)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written, and is as it was: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
