"""Adapter folders on disk: read without trust, written so that a reader sees the old or the new one, never a mix."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from peftkit.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "peftkit.json"
CARD = "README.md"
LARGEST_CONFIG = 64 * 1024 * 1024
"""Bytes; a larger JSON file is refused unread."""
ABANDONED_SECONDS = 24 * 60 * 60
"""Age at which an unfinished folder counts as left by a writer that was killed."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin", "adapter_model.pth")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: missing, too large, not JSON, or not an object.
    """
    try:
        status = path.stat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_CONFIG else None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; expected an adapter folder with {CONFIG} and {WEIGHTS}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if content is None:
        raise CheckpointError(
            f"{path} is no regular file of at most {LARGEST_CONFIG:,} bytes, as adapter configs are; it was not read"
        )
    try:
        found = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object of config fields")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's safetensors file, on the CPU; nothing else is ever unpacked.

    Raises:
        CheckpointError: missing, a pickle, truncated, or with a header that does not fit the file.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        for name in _PICKLES:
            if (folder / name).exists():
                raise CheckpointError(
                    f"{folder} holds its weights as a pickle ({name}), which can run code when it is opened; peftkit "
                    "never opens one. Convert it to safetensors where you trust it (torch.load, then "
                    "safetensors.torch.save_file)"
                )
        raise CheckpointError(f"{path} does not exist; the folder is not a complete adapter")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # the reader raises whatever its header parser meets
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}); get the file again") from None


def write(folder: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor] | None) -> None:
    """Writes a whole adapter folder in one step; foreign files and subfolders that lie in it are kept.

    Args:
        files: content by name.
        tensors: of the adapter's safetensors file; None: there is none to write.

    Raises:
        CheckpointError: the path is a file, or the disk refuses; the old folder is as it was.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder for the adapter")
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists() and previous_of(folder).is_dir():
            os.rename(previous_of(folder), folder)  # a writer died between two renames
        _remove_abandoned(folder)
        fresh.mkdir()
        if tensors is not None:
            safetensors.torch.save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt"})
            sync(fresh / WEIGHTS)
        for name, content in files.items():
            (fresh / name).write_bytes(content)
            sync(fresh / name)
        if folder.is_dir():
            _link_foreign(folder, fresh, {*files, *([] if tensors is None else [WEIGHTS])})
        sync(fresh)
        inside = _working_directory_below(folder)
        put_in_place(fresh, folder)
        if inside is not None:
            os.chdir(inside)
        with contextlib.suppress(OSError):  # the new folder is in place; only its entry may not be on the disk yet
            sync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        hint = "; it is a mount point, save into a subfolder of it" if os.path.ismount(folder) else ""
        raise CheckpointError(f"{folder} could not be written, and is as it was: {error}{hint}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes what writers that were killed left beside the folder; a younger one may still be at work."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.new"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _working_directory_below(folder: Path) -> Path | None:
    """The working directory if it is the folder or lies in it: after a swap it would be the one that is removed."""
    with contextlib.suppress(OSError):
        here = Path.cwd()
        if here.is_relative_to(folder):
            return here
    return None


def sync(path: Path) -> None:
    """Returns when what was written to a file, or into a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_foreign(source: Path, destination: Path, own: set[str]) -> None:
    """Gives the new folder the other files of the old one, as links, so that nothing is copied."""
    for entry in os.scandir(source):
        if entry.name in own:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, destination / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, str(destination / entry.name))


def _link(source: str, destination: str, **_: Any) -> str:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
    return destination


def put_in_place(fresh: Path, folder: Path) -> None:
    """After this, `folder` is the new one and `fresh` holds the old one, or nothing."""
    if not folder.exists():
        os.rename(fresh, folder)
    elif not _exchange(fresh, folder):
        previous = previous_of(folder)
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(folder, previous)
        os.rename(fresh, folder)
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # another C library, or another system
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def previous_of(folder: Path) -> Path:
    """Where the old folder waits for a moment on systems that cannot swap two folders."""
    return folder.with_name(f".{folder.name}.previous")


def located(path: str | os.PathLike[str], name: str) -> Path:
    """The folder that holds an adapter's files: the path itself, or its subfolder of the adapter's name.

    Raises:
        CheckpointError: neither exists.
    """
    root = Path(path)
    candidates = (root, root / name, previous_of(root), previous_of(root / name))
    for folder in candidates:
        if (folder / CONFIG).is_file():
            return folder
    if not root.exists():
        raise CheckpointError(f"{root} does not exist; expected an adapter folder with {CONFIG} and {WEIGHTS}")
    inside = sorted(p.parent.name for p in root.glob(f"*/{CONFIG}"))
    hint = f"; it holds adapters in {', '.join(inside)}" if inside else ""
    with contextlib.suppress(OSError):
        if (root / WEIGHTS).exists():
            raise CheckpointError(f"{root} holds {WEIGHTS} without {CONFIG}; the folder is not a complete adapter")
    raise CheckpointError(f"{root} holds no {CONFIG}{hint}")


def adapters_in(path: Path) -> Iterator[str]:
    """Names of the adapters in subfolders of a folder."""
    for config in sorted(path.glob(f"*/{CONFIG}")):
        yield config.parent.name
