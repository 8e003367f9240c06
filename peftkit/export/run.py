"""The one verb of the package: an adapter, a place and a reader -> what was written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftkit.errors import ConfigError, nearest
from peftkit.export import destination, gguf, merged, peft, vllm
from peftkit.export.factors import check_choice
from peftkit.export.result import Export
from peftkit.export.source import opened

TARGETS = ("peft", "merged", "gguf", "vllm")
"""Who can be exported for."""


def export(
    adapter: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | None = None,
    name: str = "default",
    rank: int | None = None,
    error: float | None = None,
    dtype: str = "float32",
    max_lora_rank: int | None = None,
    into: str | None = None,
    base_name: str | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Export:
    """What was written at `out` for another tool, or nothing: an export that would be read wrong is refused.

    Args:
        adapter: a wrapped model, or an adapter folder.
        out: folder to write; for "gguf" also a file name that ends in .gguf.
        to: "peft", "vllm" (a plain LoRA folder each), "gguf" (a LoRA for llama.cpp) or "merged".
        base: the base model of an adapter folder: a folder or a name on the hub; None: what the adapter names. Its
            config is read always, its weights only where the method reads or multiplies them, tensor by tensor.
        name: which adapter of the model, or subfolder of the folder.
        rank: convert to LoRA of at most this rank, by the nearest product of two factors.
        error: convert to LoRA with at most this error at each weight, relative to the update. With neither, only what
            is low-rank is converted, exactly.
        dtype: of the factors: "float32", "float16" or "bfloat16".
        max_lora_rank: what vLLM is started with; None: what it needs is said in the notes.
        into: dtype of merged weights: "bf16", "fp16" or "fp32"; None: as the base stores each.
        base_name: what the export shall call the base; None: what the adapter calls it.
        about: data, metrics and whatever else the card shall say; None: what the adapter was saved with.
        overwrite: whether to write into a folder that holds files.

    Raises:
        ExportError: the reader would reject the export or read something else; nothing was written.
        ConfigError: arguments that contradict each other.
        CheckpointError: the adapter or the base cannot be read, or the export cannot be written.
        BaseMismatchError: the base is not the one that the adapter was trained on.
        StateError: the model holds no such adapter, or it is merged.
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} is nobody to export for; {nearest(to, TARGETS)}")
    check_choice(rank, error, dtype)
    if into is not None and to != "merged":
        raise ConfigError(f"into is for to='merged', found to={to!r}; dtype is that of factors")
    if to == "merged" and (rank is not None or error is not None):
        raise ConfigError("rank and error are for conversions to LoRA; merged weights hold the whole update")
    if max_lora_rank is not None and to != "vllm":
        raise ConfigError(f"max_lora_rank is for to='vllm', found to={to!r}; leave it out")
    if about is not None:
        destination.as_json(about)
    source = opened(adapter, base=base, name=name, base_name=base_name)
    if about is not None:
        source = dataclasses.replace(source, origin={**source.origin, "about": dict(about)})
    place = Path(out)
    if to == "merged":
        return merged.write(source, place, into=into, overwrite=overwrite)
    if to == "gguf":
        return gguf.write(source, place, rank=rank, error=error, dtype=dtype, overwrite=overwrite)
    if to == "vllm":
        return vllm.write(
            source, place, rank=rank, error=error, dtype=dtype, overwrite=overwrite, max_lora_rank=max_lora_rank
        )
    return peft.write(source, place, rank=rank, error=error, dtype=dtype, overwrite=overwrite)
