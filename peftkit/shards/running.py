"""Doing what was settled: file by file, resumable, and OUT in one step at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import folder
from peftkit.certificate import FILE, MergeReport, SiteMerge
from peftkit.errors import BaseMismatchError, CheckpointError, MergeError
from peftkit.shards import files
from peftkit.shards.folds import fold_rows, fold_whole
from peftkit.shards.job import AT_ONCE, Job, size_text
from peftkit.shards.names import Group, converted
from peftkit.shards.source import INDEX
from peftkit.shards.target import Place, Shard, Writer, index
from peftkit.shards.units import Unit, aliases_of
from peftkit.wrap import sites_of

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


def run(job: Job, progress: Progress | None = None, minimum_effect: float = 0) -> MergeReport:
    """Writes OUT and gives the certificate. Killed at any moment, OUT is not there, and running again goes on.

    Raises:
        BaseMismatchError: the base is not the one that an adapter was trained on. OUT is not there.
        MergeError: a value is not finite, or less than minimum_effect of the change is stored. OUT is not there.
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
        if report.kept < minimum_effect:
            raise MergeError(
                f"only {report.kept:.1%} of what the adapters change would be stored, below "
                f"minimum_effect={minimum_effect}; {job.order.out} is not written. The steps of the dtype are too "
                "coarse for so small a change: merge into fp32, or accept it with minimum_effect=0, "
                "--minimum-effect 0, which "
                "goes on from here"
            )
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
            begin, memory = self._begin(unit), min(job.memory, AT_ONCE)
            merged = fold_rows(unit, job.source, job.adapters, job.into, job.checker.whole, begin, put, memory)
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
