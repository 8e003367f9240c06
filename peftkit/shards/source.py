"""A model folder of safetensors, read without trust: what tensors it holds, where their bytes are, and those bytes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit import folder
from peftkit.errors import CheckpointError, MergeError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
CHUNK = 16 * 1024 * 1024
"""Bytes that are read at a time."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names in safetensors headers -> dtypes that tensors here can have."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
FOLDABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that adapters can be folded into."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file."""

    key: str
    file: str
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensor.

        Raises:
            MergeError: it is one that cannot be computed with here.
        """
        if self.dtype not in DTYPES:
            raise MergeError(
                f"{self.key} in {self.file} is stored as {self.dtype}, which can be copied but not computed with; "
                f"known are {', '.join(DTYPES)}. Save the base in one of them"
            )
        return DTYPES[self.dtype]

    @property
    def count(self) -> int:
        """Elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total


class Source:
    """The tensors of a model folder. Reads with pread, so that memory holds what is asked for and nothing else."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the index and every header.

        Raises:
            CheckpointError: no model folder, a file is missing, truncated or damaged, or the index leads elsewhere.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is no folder; expected one with config.json and {SINGLE} or {INDEX}. Download a model of "
                "a hub first: hf download NAME --local-dir FOLDER"
            )
        self.index: dict[str, Any] = {}
        named = self._files()
        self.headers: dict[str, bytes] = {}
        """The header of each file, as it is stored."""
        self.entries: dict[str, Entry] = {}
        """Tensors by key, file by file, in the order of their bytes."""
        self.metadata: dict[str, dict[str, str]] = {}
        """What each file's header says about the file."""
        self._descriptors: dict[str, int] = {}
        for file, keys in named.items():
            for entry in self._header(file):
                if keys is not None and entry.key not in keys and entry.key in self.index["weight_map"]:
                    continue  # a second copy, which the index says is not the one that counts
                if entry.key in self.entries:
                    raise CheckpointError(
                        f"{self.path}: {entry.key} is in {self.entries[entry.key].file} and in {file}, and {INDEX} "
                        "does not say which one counts; get the files again"
                    )
                self.entries[entry.key] = entry
            lost = sorted((keys or set()) - {k for k, e in self.entries.items() if e.file == file})
            if lost:
                raise CheckpointError(
                    f"{self.path / INDEX} names {len(lost)} tensors in {file} that are not there, first {lost[0]!r}; "
                    "get both files again"
                )
        if not self.entries:
            raise CheckpointError(f"{self.path} holds no tensor; expected the weights of a model")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files with weights."""
        return tuple(self.headers)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """The floating-point dtype that most bytes have, as safetensors names it."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            if entry.dtype in FOLDABLE:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return max(sizes, key=sizes.__getitem__, default="F32")

    def _files(self) -> dict[str, set[str] | None]:
        """Names of the files with weights -> the keys that the index promises in each; None without an index."""
        if (self.path / SINGLE).is_file():
            return {SINGLE: None}
        index = self.path / INDEX
        if not index.is_file():
            pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in _PICKLES)
            if pickles:
                raise CheckpointError(
                    f"{self.path} holds its weights as pickles ({pickles[0]}), which can run code when they "
                    "are opened; "
                    "peftkit never opens one. Convert them where you trust them: "
                    "AutoModel.from_pretrained(...).save_pretrained(...)"
                )
            raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}; expected the weights of a model")
        self.index = folder.read_json(index)
        mapping = self.index.get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: weight_map is no object of file names by tensor; get the file again")
        found: dict[str, set[str] | None] = {}
        for key, file in mapping.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or "\\" in file
                or not file.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{index}: {key!r} is said to be in {file!r}; expected the name of a .safetensors file beside the "
                    "index. The folder is damaged or hostile: get it again from where you trust it"
                )
            keys = found.setdefault(file, set())
            assert keys is not None
            keys.add(key)
        missing = sorted(f for f in found if not (self.path / f).is_file())
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(found)} files that {INDEX} names are missing, first "
                f"{missing[0]}; "
                "get them again"
            )
        return dict(sorted(found.items()))

    def _header(self, file: str) -> list[Entry]:
        path = self.path / file
        with path.open("rb") as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file")
            length = int.from_bytes(handle.read(8), "little")
            if length > min(LARGEST_HEADER, status.st_size - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file, or a truncated one: a header of {length:,} bytes is "
                    "announced, and "
                    f"the file has {status.st_size:,}; get it again"
                )
            raw = handle.read(length)
        self.headers[file] = raw
        try:
            fields = json.loads(raw, object_pairs_hook=_unique)
            if not isinstance(fields, dict):
                raise ValueError(f"the header is a {type(fields).__name__}")
            about = fields.pop("__metadata__", {})
            if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
                raise ValueError("__metadata__ is no object of texts")
            found = [_entry(key, value, file, 8 + length) for key, value in fields.items()]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: the header is damaged: {error}; get the file again") from None
        self.metadata[file] = about
        found.sort(key=lambda e: (e.start, e.size))
        end = 8 + length
        for entry in found:
            if entry.start != end:
                raise CheckpointError(
                    f"{path}: the bytes of {entry.key} begin at {entry.start:,}, expected {end:,}; the header is "
                    "damaged or hostile, get the file again"
                )
            end += entry.size
        if end != status.st_size:
            what = "truncated" if end > status.st_size else "followed by something else"
            raise CheckpointError(
                f"{path} is {what}: its header describes {end:,} bytes, the file has {status.st_size:,}; get it again"
            )
        return found

    def read_into(self, buffer: Tensor, entry: Entry, offset: int = 0) -> None:
        """Fills a flat buffer of bytes from an entry's bytes, from `offset` on.

        Raises:
            CheckpointError: the file ends early.
        """
        array: Any = buffer.numpy()
        view = memoryview(array)
        descriptor = self._descriptor(entry.file)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + CHUNK]], entry.start + offset + done)
            if not count:
                raise CheckpointError(f"{self.path / entry.file} became shorter while it was read; start again")
            done += count

    def tensor(self, entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows start to stop along the first dimension, in memory of its own."""
        shape, offset, size = entry.shape, 0, entry.size
        if rows is not None:
            each = entry.size // max(1, entry.shape[0])
            shape, offset, size = (rows[1] - rows[0], *entry.shape[1:]), rows[0] * each, (rows[1] - rows[0]) * each
        buffer = torch.empty(size, dtype=torch.uint8)
        self.read_into(buffer, entry, offset)
        return buffer.view(entry.torch_dtype).view(shape)

    def chunks(self, entry: Entry) -> Iterator[Tensor]:
        """The bytes of a tensor in flat buffers; each is overwritten by the next."""
        buffer = torch.empty(min(CHUNK, entry.size), dtype=torch.uint8)
        for start in range(0, entry.size, CHUNK):
            part = buffer[: min(CHUNK, entry.size - start)]
            self.read_into(part, entry, start)
            yield part

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.path / file, os.O_RDONLY)
        return self._descriptors[file]

    def close(self) -> None:
        """Closes every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def facts(self) -> list[Any]:
        """What tells this folder from another without reading its weights: names, sizes, times and headers."""
        import hashlib

        found = []
        for file, raw in self.headers.items():
            status = (self.path / file).stat()
            found.append([file, status.st_size, status.st_mtime_ns, hashlib.sha256(raw).hexdigest()])
        return found


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(key: str, value: Any, file: str, data: int) -> Entry:
    """One entry of a header.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    dtype, shape = value["dtype"], value["shape"]
    start, stop = value["data_offsets"]
    whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    if not isinstance(dtype, str) or not whole or stop < start:
        raise ValueError(f"{key!r} has no dtype, shape and range of bytes")
    entry = Entry(key, file, dtype, tuple(shape), data + start, stop - start)
    bits = 8 * DTYPES[dtype].itemsize if dtype in DTYPES else _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{key!r} has the unknown dtype {dtype!r}")
    if entry.count * bits != 8 * entry.size:
        raise ValueError(f"{key!r} has shape {tuple(shape)} of {dtype} and {entry.size:,} bytes, which do not agree")
    return entry
