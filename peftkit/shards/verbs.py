"""merge_shards and plan_shards: a merged model folder from a model folder and adapter folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from peftkit.certificate import MergeReport
from peftkit.errors import ConfigError
from peftkit.shards.job import Job, Order, prepared, size_text
from peftkit.shards.running import Progress, run
from peftkit.shards.skeleton import Ignorable
from peftkit.swap import original_class

PathLike = str | os.PathLike[str]
Adapters = PathLike | Sequence[PathLike] | Mapping[PathLike, float]
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What merging a folder would do. Prints as a few lines."""

    base: str
    out: str
    model: str
    """Name of the class."""
    adapters: tuple[str, ...]
    changed: int
    """Tensors of the checkpoint that change."""
    copied: int
    """Tensors that are copied."""
    new: tuple[str, ...]
    """Tensors that the base does not have."""
    files: tuple[tuple[str, int], ...]
    """Files with weights and their bytes."""
    memory: int
    """Bytes of buffers at a time, the adapters' own tensors not counted."""
    by_rows: int
    """Groups of tensors that are folded some rows at a time."""
    small: tuple[str, ...]
    """Files beside the weights that are copied."""
    left_out: tuple[tuple[str, str], ...]
    """Files that are not, and why."""
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the weights that are written."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        lines = [
            f"{self.base} + {', '.join(self.adapters)} -> {self.out} ({self.model})",
            f"{size_text(self.size)} in {len(self.files)} file{'s' * (len(self.files) > 1)}: {self.changed} "
            "tensors change, "
            f"{self.copied} are copied" + (f", {len(self.new)} are new" if self.new else ""),
            f"buffers: {size_text(self.memory)} at a time"
            + (f", {self.by_rows} matrices by rows" if self.by_rows else ""),
            f"copied besides: {', '.join(self.small) or 'nothing'}",
        ]
        lines += [f"left out: {name}, {reason}" for name, reason in self.left_out]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def merge_shards(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    into: str | None = None,
    max_memory: int | str | None = None,
    shard_size: int | str | None = None,
    ignore: Collection[Ignorable] = (),
    overwrite: bool = False,
    model: nn.Module | None = None,
    minimum_effect: float = 0.9,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes the folder of a merged model, tensor by tensor, and gives the certificate.

    The weights are those that `peftkit.merge` gives in memory, to the bit. Killed at any moment OUT is not there, and
    the same call goes on where it was.

    Args:
        base: folder of a model: config.json and safetensors.
        adapters: an adapter's folder, several, or a mapping of folders to weights. An effect that is added to the
            base is scaled by its weight; several adapters are folded in the order given.
        out: folder to write.
        into: "bf16", "fp16" or "fp32" for every floating-point tensor; None: each as the base stores it.
        max_memory: bytes that buffers may take, such as 2_000_000_000 or "2GB"; None: three times the largest tensor.
            Matrices that take more are folded some rows at a time.
        shard_size: bytes of a file at most, such as "5GB"; None: the files of the base.
        ignore: "base" accepts a base that an adapter was not trained on, "unexpected" drops tensors of an adapter that
            have no place in the model.
        overwrite: replaces a model folder at OUT, in one step at the end.
        model: a module on the meta device, for a base that is none of transformers' own models.
        minimum_effect: the least share of the change that has to be stored, in total; 0 accepts anything.
        progress: called with the bytes that are done and those in all.

    Returns:
        What was stored against what was meant, for each changed parameter; it is in OUT too, as merge_report.json.

    Raises:
        MergeError: a method or a combination cannot be merged, a value is not finite, max_memory is too small, or too
            little of the change is kept.
        BaseMismatchError: the base is not the one that an adapter was trained on.
        CheckpointError: a folder is damaged, OUT exists, or the disk is full.
        BackboneError, ConfigError, TargetError, StateError: as the message says.
    """
    if not 0 <= minimum_effect <= 1:
        raise ConfigError(f"minimum_effect must lie in [0, 1], found {minimum_effect}")
    job = _prepared(base, adapters, out, into, max_memory, shard_size, ignore, overwrite, model)
    return run(job, progress, minimum_effect)


def plan_shards(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    into: str | None = None,
    max_memory: int | str | None = None,
    shard_size: int | str | None = None,
    ignore: Collection[Ignorable] = (),
    overwrite: bool = False,
    model: nn.Module | None = None,
) -> ShardPlan:
    """What `merge_shards` would do with the same arguments. Reads configs and headers, and writes nothing.

    Raises:
        PeftkitError: as `merge_shards`, where it shows without reading weights.
    """
    job = _prepared(base, adapters, out, into, max_memory, shard_size, ignore, overwrite, model)
    return ShardPlan(
        base=str(base),
        out=str(out),
        model=original_class(job.model).__name__,
        adapters=tuple(g.label for g in job.given),
        changed=len(job.changed_keys) - len(job.new_keys),
        copied=sum(p.key not in job.changed_keys for s in job.shards for p in s.places),
        new=tuple(job.new_keys),
        files=tuple((s.file, s.size) for s in job.shards),
        memory=job.need,
        by_rows=len(job.striped),
        small=job.small.names,
        left_out=job.small.left_out,
        notes=tuple(job.notes),
    )


def _prepared(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    into: str | None,
    max_memory: int | str | None,
    shard_size: int | str | None,
    ignore: Collection[Ignorable],
    overwrite: bool,
    model: nn.Module | None,
) -> Job:
    order = Order(
        base=Path(base),
        out=Path(out).absolute(),
        adapters=adapters,
        into=into,
        max_memory=byte_count(max_memory, "max_memory"),
        shard_size=byte_count(shard_size, "shard_size"),
        ignore=ignore,
        overwrite=overwrite,
        model=model,
    )
    return prepared(order)


def byte_count(value: int | str | None, name: str) -> int | None:
    """A number of bytes from a number or a text such as "2GB" or "512MiB".

    Raises:
        ConfigError: it is neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{name}={value!r}: expected a number of bytes such as 2000000000, '2GB' or '512MiB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])
