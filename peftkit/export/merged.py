"""Writes the folder of a merged model: what `peftkit.merge_shards` writes, with the card of an export."""

from __future__ import annotations

from pathlib import Path

from peftkit import folder
from peftkit.errors import ExportError
from peftkit.export import destination
from peftkit.export.card import card
from peftkit.export.result import Export
from peftkit.export.source import Source
from peftkit.shards import merge_shards


def write(source: Source, out: Path, *, into: str | None = None, overwrite: bool = False) -> Export:
    """Writes the base with the adapter folded in, tensor by tensor, and gives the certificate.

    Args:
        into: "bf16", "fp16" or "fp32"; None: each tensor as the base stores it.
        overwrite: whether to replace a model folder at `out`.

    Raises:
        ExportError: the adapter is in memory, or the base is no folder here.
        MergeError, CheckpointError: as `peftkit.merge_shards`.
    """
    if source.folder is None:
        raise ExportError(
            "merged weights are written from an adapter folder and a base folder, tensor by tensor. Save the adapter "
            "first (peftkit.save), or use peftkit.merge_and_unload(model).save_pretrained(...)"
        )
    base = Path(source.place)
    if not base.is_dir():
        raise ExportError(
            f"{source.place} is no folder here, and merged weights are written from the base's own files. Download it "
            "and give its folder with --base, or base=... in Python"
        )
    report = merge_shards(base, source.folder, out, into=into, overwrite=overwrite)
    made = Export(
        path=out,
        target="merged",
        method=source.planned.method.name,
        dtype=into or "the dtype of each weight of the base",
        extras=tuple(s.path for s in source.planned.extras),
        report=report,
    )
    text = card(source, made)
    destination.write_file(out / folder.CARD, lambda path: _put(path, text))
    return made


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
