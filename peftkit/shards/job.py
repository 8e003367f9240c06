"""Everything that a merge of a folder is to do, settled before anything is written; and doing it, file by file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import folder
from peftkit.certificate import FILE, MergeReport, SiteMerge
from peftkit.errors import BaseMismatchError, CheckpointError, ConfigError, MergeError, StateError
from peftkit.shards import files
from peftkit.shards.checking import Checker
from peftkit.shards.folds import STRIPE, Unit, aliases_of, by_rows, fold_rows, fold_whole, row_need, units_of
from peftkit.shards.names import Group, Names, converted, names_of
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
from peftkit.shards.source import FOLDABLE, INDEX, NAMES, Entry, Source
from peftkit.shards.target import Place, Shard, Writer, index, laid_out, resharded, unfinished
from peftkit.wrap import is_wrapped, sites_of

INTO = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What the weights can be stored as."""
COPIES = 3
CONSTANT = 256 * 1024 * 1024
"""Without a bound the buffers may take COPIES times the largest tensor and CONSTANT bytes."""
Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


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
        return max([*whole, self.memory if self.striped else 0, 2 * 16 * 1024 * 1024])


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
        if unit.need <= job.memory:
            continue
        stripes = by_rows(unit, job.adapters)
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


# Running ------------------------------------------------------------------------------------------------------------


def run(job: Job, progress: Progress | None = None) -> MergeReport:
    """Writes OUT and gives the certificate. Killed at any moment, OUT is not there, and running again goes on.

    Raises:
        BaseMismatchError: the base is not the one that an adapter was trained on. OUT is not there.
        MergeError: a value is not finite. OUT is not there.
        CheckpointError: the disk is full, or refuses.
    """
    writer = Writer(job.order.out, _inputs(job))
    _check_room(job, writer)
    with writer.opened(job.shards):
        running = _Running(job, writer, progress)
        try:
            for shard in job.shards:
                running.shard(shard)
        except (BaseMismatchError, MergeError):
            shutil.rmtree(writer.path, ignore_errors=True)
            raise
        finally:
            job.source.close()
        report = MergeReport(adapters=tuple(g.label for g in job.given), sites=running.sites())
        _put_small(job, writer, report)
        writer.finish()
    return report


def _inputs(job: Job) -> str:
    """A digest of everything that determines what is written."""
    from importlib.metadata import version

    order = job.order
    told = {
        "base": job.source.facts(),
        "config": [_file_digest(p) for p in (order.base / "config.json", order.base / INDEX)],
        "adapters": [
            [g.weight, [_file_digest(g.path / n) for n in (folder.CONFIG, folder.WEIGHTS, folder.PROVENANCE)]]
            for g in job.given
        ],
        "model": type(job.model).__name__,
        "into": order.into,
        "ignore": sorted(order.ignore),
        "shards": [[s.file, hashlib.sha256(s.header).hexdigest()] for s in job.shards],
        "striped": [i for i, unit in enumerate(job.units) if id(unit) in job.striped],
        "versions": [version("peftkit"), torch.__version__, version("transformers")],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(job: Job, writer: Writer) -> None:
    """Raises CheckpointError when the disk has no room for what is still to be written."""
    place = writer.path
    while not place.exists():
        place = place.parent
    there = sum(f.stat().st_size for f in writer.path.glob("*.safetensors")) if writer.path.is_dir() else 0
    needed = job.size + job.small.size - there
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{job.order.out} takes {size_text(needed)} more, and {place} has {size_text(free)} free; free "
            "some, or choose "
            "another disk"
        )


class _Running:
    """What goes on while the files are written."""

    def __init__(self, job: Job, writer: Writer, progress: Progress | None) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._unit_of = {k: unit for unit in job.units for k in (*unit.all_keys, *_new(unit))}
        touched = {id(g) for unit in job.units for g in unit.groups}
        self._to_verify: dict[str, Group] = {}
        for group in job.names.groups:
            if id(group) not in touched and any(job.checker.names(n) for n in group.names):
                self._to_verify[group.keys[0]] = group
        self._total = sum(p.size for s in job.shards for p in s.places)
        self._done = 0
        paths = {path: position for position, (path, _) in enumerate(sites_of(job.model))}
        self._order = {
            (site.path, name): (paths[site.path], position)
            for unit in job.units
            for site in unit.sites
            for position, name in enumerate(site.module._parameters)
        }
        self._key_of = _keys_by_parameter(job)
        self._found: list[SiteMerge] = []

    def sites(self) -> tuple[SiteMerge, ...]:
        """What was measured, in the order of the model."""
        return tuple(sorted(self._found, key=lambda s: self._order[s.path, s.parameter]))

    def shard(self, shard: Shard) -> None:
        """Writes one file, or takes it over from the journal."""
        whole = sum(p.size for p in shard.places)
        if shard.file in self._writer.done:
            self._found += [SiteMerge(**site) for site in self._writer.done[shard.file]]
            self._advance(whole)
            return
        here = {place.key: place for place in shard.places}
        written: set[str] = set()
        merged: list[SiteMerge] = []
        with self._writer.shard(shard):
            for place in shard.places:
                if place.key in self._to_verify:
                    self._verify(self._to_verify[place.key])
                if place.key in written:
                    continue
                if place.key in self._unit_of:
                    merged += self._fold(self._unit_of[place.key], here, written)
                else:
                    self._copy(place)
        self._writer.note(shard, [dataclasses.asdict(site) for site in merged])
        self._found += merged

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _fold(self, unit: Unit, here: dict[str, Place], written: set[str]) -> list[SiteMerge]:
        job, written_now = self._job, set()

        def put(key: str, tensor: Tensor, row: int) -> None:
            place = here.get(key)
            if place is not None:
                each = place.size // max(1, place.shape[0]) if place.shape else place.size
                self._writer.write(place.start + row * each, tensor)
                written_now.add(key)
                self._advance(tensor.numel() * tensor.element_size())

        if id(unit) in job.striped:
            begin = self._begin(unit)
            merged = fold_rows(unit, job.source, job.adapters, job.into, job.checker.whole, begin, put, job.memory)
        else:
            done, merged = fold_whole(job.model, unit, job.source, job.adapters, job.into, job.checker.whole)
            for key, tensor in done.items():
                put(key, tensor, 0)
        written |= written_now
        return [site for site in merged if self._key_of[site.name] in here]

    def _begin(self, unit: Unit) -> Callable[[str], Any]:
        def begin(name: str) -> Any:
            entry = self._job.source.entries[unit.keys[name][0]]
            return self._job.checker.begin(name, entry.shape, entry.torch_dtype)

        return begin

    def _copy(self, place: Place) -> None:
        """Copies a tensor that nothing touches, in another dtype where one was asked for."""
        entry = self._job.source.entries[place.key]
        name = self._job.names.direct.get(place.key)
        checked = name is not None and bool(self._job.checker.names(name))
        passing = (
            self._job.checker.begin(name, entry.shape, entry.torch_dtype) if name is not None and checked else None
        )
        into = self._job.into if place.dtype != entry.dtype else None
        offset = place.start
        for chunk in self._job.source.chunks(entry):
            if passing is not None:
                passing.add(chunk.view(entry.torch_dtype))
            data = chunk if into is None else _cast(chunk.view(entry.torch_dtype), into, place.key)
            self._writer.write(offset, data)
            offset += data.numel() * data.element_size()
            self._advance(data.numel() * data.element_size())
        if passing is not None:
            passing.finish()

    def _verify(self, group: Group) -> None:
        """Checks tensors that the model holds in another form than the checkpoint."""
        source = self._job.source
        made = converted(self._job.model, group, {k: source.tensor(source.entries[k]) for k in group.keys})
        for name, tensor in made.items():
            self._job.checker.whole(name, tensor)


def _new(unit: Unit) -> Iterator[str]:
    return (name for name, keys in unit.keys.items() if not keys)


def _cast(values: Tensor, into: torch.dtype, key: str) -> Tensor:
    """The values in another dtype.

    Raises:
        MergeError: a finite value has no finite counterpart there.
    """
    out = values.to(into)
    if bool((~out.isfinite() & values.isfinite()).any()):
        raise MergeError(
            f"{key} overflows {str(into).removeprefix('torch.')}; merge into bf16 or fp32, or leave into out"
        )
    return out


def _keys_by_parameter(job: Job) -> dict[str, str]:
    """Name of a changed parameter -> the key of the checkpoint whose file its measurement belongs to."""
    aliases = aliases_of(job.model)
    found: dict[str, str] = {}
    for unit in job.units:
        keys = {name: (stored or (name,))[0] for name, stored in unit.keys.items()}
        keys |= {name: group.keys[0] for group in unit.groups for name in group.names}
        for everyone in aliases.values():
            own = next((keys[n] for n in everyone if n in keys), None)
            if own is not None:
                found |= dict.fromkeys(everyone, own)
    return found


def _put_small(job: Job, writer: Writer, report: MergeReport) -> None:
    """Writes the index, the configs, the tokenizer's files, the certificate and the card."""
    if len(job.shards) > 1:
        writer.put(INDEX, index(job.shards, job.source.index))
    for name, content in job.small.contents():
        writer.put(name, content)
    config = job.order.base / "config.json"
    if config.is_file():
        writer.put("config.json", files.config(config.read_bytes(), job.model, job.order.into))
    writer.put(FILE, (report.to_json() + "\n").encode())
    writer.put("README.md", files.card(job.order.base, job.model, job.given, report, job.order.into).encode())


__all__ = ["COPIES", "INTO", "Job", "Order", "Progress", "prepared", "run", "size_text", "unfinished"]
