"""Writes an adapter as a plain LoRA folder: one rank, scale 1, nothing that a reader could overlook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import checkpoint, folder
from peftkit.export import destination
from peftkit.export.card import card
from peftkit.export.factors import Factors, factors_of
from peftkit.export.result import Export, SiteExport
from peftkit.export.source import Source
from peftkit.methods.lora import LoRA
from peftkit.plan import plan
from peftkit.spec import State


def write(
    source: Source,
    out: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Export:
    """Writes a LoRA folder and gives what is in it.

    Every site gets the same rank, smaller ones filled up with zeros, and lora_alpha equals it: the scale of the update
    is in B. So a reader that knows nothing of rank_pattern, alpha_pattern or rsLoRA computes the same as one that does.

    Args:
        rank: largest rank of the factors; None: that of the update, which must be low-rank.
        error: largest relative error at a site; None: 0.
        dtype: of the factors.
        overwrite: whether a folder that is there may be written into.

    Raises:
        ExportError, ConfigError: as `factors_of`, or the folder exists.
        CheckpointError: it cannot be written.
    """
    destination.check_folder(out, source, overwrite)
    return write_found(source, out, list(factors_of(source, rank=rank, error=error, dtype=dtype)), dtype=dtype)


def write_found(
    source: Source,
    out: Path,
    found: Sequence[Factors],
    *,
    dtype: str,
    target: str = "peft",
    notes: Iterable[str] = (),
    max_lora_rank: int = 0,
) -> Export:
    """Writes factors as a LoRA folder, into a place that was checked before.

    Args:
        target: for whom, "peft" or "vllm".
        notes: what the reader has to be told.
        max_lora_rank: what vLLM has to be told to allow.
    """
    made = Export(
        path=out,
        target=target,
        method=source.planned.method.name,
        dtype=dtype,
        sites=tuple(SiteExport.of(f) for f in found),
        extras=tuple(s.path for s in source.planned.extras),
        notes=tuple(notes),
    )
    fields, tensors = folder_of(source, found)
    files = {
        folder.CONFIG: destination.as_json(fields),
        folder.CARD: card(source, made, max_lora_rank=max_lora_rank),
    }
    destination.write_folder(out, files, tensors, source, made)
    return made


def folder_of(source: Source, found: Sequence[Factors]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of the LoRA folder, by their names on disk."""
    common = max(1, *(f.rank for f in found))
    original = source.planned.config
    config = LoRA(
        r=common,
        lora_alpha=common,
        target_modules=source.planned.targets,
        modules_to_save=original.modules_to_save,
        task_type=original.task_type,
    )
    planned = plan(source.model, config)
    assert {s.path for s in planned.sites} == {f.site.path for f in found}
    names = checkpoint.expected_state(planned)
    state: State = {path: dict(tensors) for path, tensors in source.extras.items()}
    for factors in found:
        # "lora_A.weight" and "lora_B.weight", or "lora_embedding_A" and "lora_embedding_B".
        down, up = sorted(names[factors.site.path])
        state[factors.site.path] = {down: _filled(factors.down, common, 0), up: _filled(factors.up, common, 1)}
    fields = checkpoint.written_config(source.model, planned)
    fields["base_model_name_or_path"] = source.base_name
    return fields, {k: t.detach().cpu().contiguous() for k, t in checkpoint.packed(planned, state).items()}


def _filled(factor: Tensor, rank: int, axis: int) -> Tensor:
    """The factor with zeros up to the common rank."""
    missing = list(factor.shape)
    missing[axis] = rank - missing[axis]
    return torch.cat((factor, factor.new_zeros(missing)), dim=axis)
