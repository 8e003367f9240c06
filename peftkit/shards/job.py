"""Everything that a merge of a folder is to do, settled before anything is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit import folder
from peftkit.errors import CheckpointError, ConfigError, MergeError, StateError
from peftkit.shards import files
from peftkit.shards.checking import Checker
from peftkit.shards.folds import by_rows
from peftkit.shards.names import Names, names_of
from peftkit.shards.skeleton import (
    Adapters,
    Checks,
    Given,
    Ignorable,
    as_stored,
    attached,
    build,
    checks_of,
    parse,
)
from peftkit.shards.source import FOLDABLE, NAMES, Entry, Source
from peftkit.shards.target import Place, Shard, laid_out, resharded
from peftkit.shards.units import STRIPE, Unit, aliases_of, row_need, units_of
from peftkit.wrap import is_wrapped

INTO = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What the weights can be stored as."""
COPIES = 3
CONSTANT = 256 * 1024 * 1024
"""Without a bound the buffers may take COPIES times the largest tensor and CONSTANT bytes."""
AT_ONCE = 24 * 1024 * 1024
"""Bytes that stripes take together: the allocator gives the same pages out again, where larger buffers are mapped anew
and their page faults cost more than the folding."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What was asked for."""

    base: Path
    out: Path
    adapters: Any
    into: str | None = None
    max_memory: int | None = None
    shard_size: int | None = None
    ignore: Collection[Ignorable] = ()
    overwrite: bool = False
    model: nn.Module | None = None

    def check(self) -> None:
        """Raises ConfigError when a field has no meaning, CheckpointError when OUT cannot be written there."""
        if self.into is not None and self.into not in INTO:
            raise ConfigError(
                f"into={self.into!r}: a folder is merged into {', '.join(INTO)}, or, without into, in the "
                "dtype that each "
                "weight has; quantize the merged model afterwards"
            )
        unknown = set(self.ignore) - {"unexpected", "base"}
        if unknown:
            raise ConfigError(f"ignore takes 'unexpected' and 'base', found {', '.join(map(repr, sorted(unknown)))}")
        for name, value in (("max_memory", self.max_memory), ("shard_size", self.shard_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a positive number of bytes, found {value}")


@dataclass
class Job:
    """A merge that is ready to run."""

    order: Order
    source: Source
    model: nn.Module
    given: list[Given]
    names: Names
    adapters: Adapters
    units: list[Unit]
    checker: Checker
    shards: list[Shard]
    small: files.Small
    memory: int
    """Bytes that buffers may take."""
    striped: set[int] = field(default_factory=set)
    """Identities of the units that are folded some rows at a time."""
    notes: list[str] = field(default_factory=list)

    @property
    def into(self) -> torch.dtype | None:
        """The dtype that floating-point tensors are stored in; None: as they are."""
        return None if self.order.into is None else INTO[self.order.into]

    @property
    def changed_keys(self) -> set[str]:
        """Tensors that adapters change, or that are new."""
        return {k for unit in self.units for k in unit.all_keys} | set(self.new_keys)

    @property
    def new_keys(self) -> list[str]:
        """Tensors that the base does not have."""
        return [name for unit in self.units for name, keys in unit.keys.items() if not keys]

    @property
    def size(self) -> int:
        """Bytes of the files with weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def need(self) -> int:
        """Bytes of buffers that are needed at a time."""
        whole = (u.need for u in self.units if id(u) not in self.striped)
        stripes = (
            max(STRIPE * row_need(u, self.source), min(self.memory, AT_ONCE))
            for u in self.units
            if id(u) in self.striped
        )
        return max([*whole, *stripes, 2 * 16 * 1024 * 1024])


def prepared(order: Order) -> Job:
    """The merge, settled to the last byte; nothing is written, and of the weights only headers are read.

    Raises:
        CheckpointError: base or adapter is damaged, or OUT cannot be written.
        MergeError: something cannot be merged, or not in the memory allowed.
        ConfigError, BackboneError, BaseMismatchError, TargetError: as the message says.
    """
    order.check()
    given = parse(order.adapters)
    source = Source(order.base)
    _check_out(order, [g.path for g in given])
    model = build(source, given) if order.model is None else _own(order.model)
    names = names_of(model, source)
    as_stored(model, source, names)
    attached(model, given, order.ignore)
    aliases = aliases_of(model)
    by_name = {name: list(everyone) for everyone in aliases.values() for name in everyone}
    checks = Checks({}, {}) if "base" in order.ignore else checks_of(model, given, names)
    adapters = Adapters(model, given)
    units = units_of(model, given, source, names, adapters)
    dropped, notes = _dropped(order, model, names)
    job = Job(
        order=order,
        source=source,
        model=model,
        given=given,
        names=names,
        adapters=adapters,
        units=units,
        checker=Checker(checks, by_name, names.provided),
        shards=[],
        small=files.small(order.base),
        memory=order.max_memory or CONSTANT + COPIES * max(e.size for e in source.entries.values()),
        notes=notes,
    )
    job.shards = _layout(job, dropped)
    _settle_memory(job)
    return job


def _own(model: nn.Module) -> nn.Module:
    """A given model, if it can serve.

    Raises:
        StateError: it is wrapped, or its weights are loaded.
    """
    if is_wrapped(model):
        raise StateError("model= is wrapped already; give a fresh one, built under torch.device('meta')")
    if not all(p.is_meta for p in model.parameters()):
        raise StateError("model= holds weights; build it under torch.device('meta'), so that it takes no memory")
    return model.eval()


def _check_out(order: Order, adapters: list[Path]) -> None:
    out = order.out.resolve()
    for path in (order.base, *adapters):
        inside = out.is_relative_to(path.resolve()) or path.resolve().is_relative_to(out)
        if inside:
            raise CheckpointError(f"OUT ({order.out}) and {path} lie in each other; choose another folder for OUT")
    if not order.out.exists() or (order.out.is_dir() and not any(order.out.iterdir())):
        return
    if not order.overwrite:
        raise CheckpointError(
            f"{order.out} exists; choose another folder, or replace it with overwrite=True, --overwrite"
        )
    if not (order.out / "config.json").is_file():
        raise CheckpointError(f"{order.out} is no folder of a model, so it is not overwritten; choose another folder")


def _dropped(order: Order, model: nn.Module, names: Names) -> tuple[set[str], list[str]]:
    """Tensors that are left out because the class changed, and what there is to say."""
    notes = []
    dropped: set[str] = set()
    if order.model is None:
        own = folder.read_json(order.base / "config.json").get("architectures") or [type(model).__name__]
        if type(model).__name__ not in own:
            dropped = set(names.unknown)
            notes.append(f"OUT is a {type(model).__name__}, as the adapter was trained, and not a {own[0]}")
    if dropped:
        notes.append(f"left out, having no place in it: {', '.join(sorted(dropped)[:4])}")
    elif names.unknown:
        notes.append(f"copied, having no place in {type(model).__name__}: {', '.join(names.unknown[:4])}")
    return dropped, notes


def _layout(job: Job, dropped: set[str]) -> list[Shard]:
    """The files, as the base has them or of the size that was asked for."""
    places: dict[str, list[Place]] = {file: [] for file in job.source.files}
    for key, entry in job.source.entries.items():
        if key not in dropped:
            places[entry.file].append(_place(entry, job.into))
    for name in job.new_keys:
        path, _, last = name.rpartition(".")
        parameter = job.model.get_submodule(path)._parameters[last]
        assert parameter is not None
        dtype = job.into or parameter.dtype
        places[job.source.files[-1]].append(
            Place(name, NAMES[dtype], tuple(parameter.shape), parameter.numel() * dtype.itemsize, dtype.itemsize)
        )
    metadata = job.source.metadata
    if job.order.shard_size is not None:
        first = next(iter(metadata.values()), {})
        split = resharded([p for group in places.values() for p in group], job.order.shard_size)
        return laid_out(split, dict.fromkeys(split, first))
    return laid_out({f: group for f, group in places.items() if group}, metadata)


def _place(entry: Entry, into: torch.dtype | None) -> Place:
    """Where an entry goes, as it is or in another dtype."""
    if into is not None and entry.dtype in FOLDABLE:
        return Place(entry.key, NAMES[into], entry.shape, entry.count * into.itemsize, into.itemsize)
    return Place(entry.key, entry.dtype, entry.shape, entry.size, max(1, entry.size // max(1, entry.count)))


def _settle_memory(job: Job) -> None:
    """Chooses which units are folded by rows.

    Raises:
        MergeError: a bound was given, and a unit takes more that cannot be cut into rows.
    """
    methods = ", ".join(sorted({g.planned.method.name for g in job.given if g.planned is not None}))
    for unit in job.units:
        if unit.need <= min(job.memory, AT_ONCE):
            continue
        stripes = by_rows(unit, job.adapters)
        if not stripes and unit.need <= job.memory:
            continue
        least = STRIPE * row_need(unit, job.source) if stripes else unit.need
        how = (
            f"{STRIPE} rows at a time" if stripes else f"all at once, because {methods} cannot be folded there by rows"
        )
        if stripes:
            job.striped.add(id(unit))
        if least > job.memory and job.order.max_memory is not None:
            raise MergeError(
                f"{unit.names[0]} takes {size_text(least)} to be folded, {how}; max_memory is {size_text(job.memory)}. "
                "Allow that much"
            )
        if not stripes:
            job.notes.append(f"{unit.names[0]} takes {size_text(least)} to be folded, {how}")


def size_text(size: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
