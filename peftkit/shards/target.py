"""The folder that is written: which tensor goes where, files that become complete one by one, and their journal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import CheckpointError
from peftkit.folder import put_in_place, sync
from peftkit.shards.source import CHUNK, INDEX, SINGLE

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no file locks of this kind
    fcntl = None  # type: ignore[assignment]

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Place:
    """One tensor that is to be written."""

    key: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    align: int = 1
    """Bytes of one element."""
    file: str = ""
    start: int = 0
    """Offset of its first byte in the file."""


@dataclass(frozen=True)
class Shard:
    """One file that is to be written."""

    file: str
    header: bytes
    places: tuple[Place, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(p.size for p in self.places)


def laid_out(files: Mapping[str, Sequence[Place]], metadata: Mapping[str, Mapping[str, str]]) -> list[Shard]:
    """Every file with its header, the tensors in it by the size of their elements, larger ones first."""
    found = []
    for file, places in files.items():
        ordered = sorted(places, key=lambda p: -p.align)
        fields: dict[str, Any] = {"__metadata__": dict(metadata.get(file) or {"format": "pt"})}
        offset = 0
        for place in ordered:
            fields[place.key] = {
                "dtype": place.dtype,
                "shape": list(place.shape),
                "data_offsets": [offset, offset + place.size],
            }
            offset += place.size
        raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        header = len(raw).to_bytes(8, "little") + raw
        start, done = len(header), []
        for place in ordered:
            done.append(replace(place, file=file, start=start))
            start += place.size
        found.append(Shard(file, header, tuple(done)))
    return found


def resharded(places: Sequence[Place], limit: int) -> dict[str, list[Place]]:
    """The tensors in files of at most `limit` bytes, in order; a larger tensor gets a file of its own."""
    groups: list[list[Place]] = [[]]
    room = limit
    for place in places:
        if groups[-1] and place.size > room:
            groups.append([])
            room = limit
        groups[-1].append(place)
        room -= place.size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


class Writer:
    """The unfinished folder beside OUT, its journal, and the file that is being written."""

    def __init__(self, out: Path, inputs: str) -> None:
        self.out = out
        self.path = unfinished(out)
        self._inputs = inputs
        self._descriptor = -1
        self.done: dict[str, list[dict[str, Any]]] = {}
        """Finished files -> what was measured in them."""

    @contextmanager
    def opened(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Inside the block this process alone writes the folder; finished files of the same inputs are taken over.

        Raises:
            CheckpointError: another process is writing it, or the disk refuses.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
            with _locked(self.path):
                self.done = self._resumed(shards)
                if not self.done:
                    self._start_anew()
                yield
        except OSError as error:
            raise CheckpointError(f"{self.out} could not be written, and is as it was: {error}") from error

    def _resumed(self, shards: Sequence[Shard]) -> dict[str, list[dict[str, Any]]]:
        """Finished files, if the journal belongs to the same inputs and the files are as it says."""
        try:
            lines = (self.path / JOURNAL).read_text().splitlines()
            first = json.loads(lines[0]) if lines else {}
        except (OSError, ValueError):
            return {}
        if not isinstance(first, dict) or first.get("inputs") != self._inputs:
            return {}
        wanted = {s.file: s.size for s in shards}
        found = {}
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # the last line may be torn
                entry = json.loads(line)
                size = (self.path / entry["file"]).stat().st_size
                if size == entry["bytes"] == wanted.get(entry["file"]):
                    found[entry["file"]] = list(entry["sites"])
        return found

    def _start_anew(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.put(JOURNAL, json.dumps({"format": 1, "inputs": self._inputs}).encode() + b"\n")

    def put(self, name: str, content: bytes) -> None:
        """Writes a small file, to the disk."""
        part = self.path / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / name)

    @contextmanager
    def shard(self, shard: Shard) -> Iterator[None]:
        """Inside the block `write` fills this file; it gets its name, and its line in the journal, at the end."""
        part = self.path / f"{shard.file}.part"
        self._descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.pwrite(self._descriptor, shard.header, 0)
            yield
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
        part.replace(self.path / shard.file)
        sync(self.path)

    def write(self, offset: int, data: Tensor) -> None:
        """Writes the bytes of a tensor at an offset of the current file."""
        flat = data.contiguous().view(-1)
        view = memoryview(_bytes(flat)) if flat.numel() else memoryview(b"")
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + CHUNK], offset + done)

    def note(self, shard: Shard, sites: Sequence[Mapping[str, Any]]) -> None:
        """Notes a finished file in the journal, to the disk."""
        line = json.dumps({"file": shard.file, "bytes": shard.size, "sites": list(sites)}, sort_keys=True)
        with (self.path / JOURNAL).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the folder its name in one step; an old folder of that name goes."""
        (self.path / JOURNAL).unlink()
        sync(self.path)
        put_in_place(self.path, self.out)
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is in place; only its entry may not be on the disk yet
            sync(self.out.parent)


def _bytes(flat: Tensor) -> Any:
    return flat.view(torch.uint8).numpy()


def unfinished(out: Path) -> Path:
    """Where OUT is built."""
    return out.with_name(f".{out.name}.unfinished")


def index(shards: Sequence[Shard], old: Mapping[str, Any]) -> bytes:
    """The index of several files, with what the old one says besides."""
    metadata = dict(old.get("metadata") or {})
    metadata["total_size"] = sum(p.size for s in shards for p in s.places)
    if "total_parameters" in metadata or not old:
        metadata["total_parameters"] = sum(p.size // p.align for s in shards for p in s.places)
    mapping = {place.key: shard.file for shard in shards for place in shard.places}
    return (json.dumps({"metadata": metadata, "weight_map": mapping}, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside the block no other process can lock the folder.

    Raises:
        CheckpointError: one has.
    """
    if fcntl is None:  # pragma: no cover - Windows
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{path} is being written by another process; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)


__all__ = ["INDEX", "JOURNAL", "Place", "Shard", "Writer", "index", "laid_out", "resharded", "unfinished"]
