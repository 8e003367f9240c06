"""Compiles operations on request, never at import or installation: a shared library for each operation and device.

A library is named by the digests of its sources and schemas, is put in place in one step, and is not touched by a
build that fails. The lock is the system's own, so that it goes when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peftkit_kernels.errors import BuildError

LOCK_SECONDS = 600
COMPILE_SECONDS = 900
TARGET = "0x020b000000000000"
"""The oldest libtorch, 2.11, whose stable interface the compiled code uses."""
ARCHITECTURES = ("75", "80", "86", "89", "90")
"""Compute capabilities that CUDA code is built for where no GPU says which one is wanted; the last one as PTX too."""
_WIDE = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
SHARED = "include"
"""Folder of headers that operations share."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is compiled for one operation."""

    name: str
    schemas: tuple[str, ...]
    sources: Mapping[str, Path]
    """Device -> source file."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What became of one operation on one device."""

    name: str
    device: str
    path: Path
    seconds: float
    """0.0 where it was up to date."""


def folder() -> Path:
    """Where libraries of this installation lie: PEFTKIT_KERNELS_DIR, or a folder of its own in the user's cache."""
    chosen = os.environ.get("PEFTKIT_KERNELS_DIR")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    installation = hashlib.sha256(str(Path(__file__).resolve().parent).encode()).hexdigest()[:12]
    return Path(cache) / "peftkit" / "kernels" / installation


def _digest(parts: Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:12]


def _source_digest(unit: Unit, device: str) -> str:
    headers = sorted((Path(__file__).parent / SHARED).glob("*.h"))
    return _digest([path.read_bytes() for path in (unit.sources[device], *headers)])


def _pattern(unit: Unit, device: str) -> tuple[str, str]:
    """Stem and end of the library's name; the digest of the sources stands between them."""
    schemas = _digest([schema.encode() for schema in unit.schemas])
    return f"{unit.name}.{device}.", f".{schemas}.so"


def library_of(unit: Unit, device: str) -> Path | None:
    """The library of the present sources, else the newest with the same schemas, else None."""
    if device not in unit.sources:
        return None
    stem, end = _pattern(unit, device)
    exact = folder() / f"{stem}{_source_digest(unit, device)}{end}"
    if exact.is_file():
        return exact
    others = [p for p in folder().glob(f"{stem}*{end}") if p.is_file()] if folder().is_dir() else []
    return max(others, key=lambda p: p.stat().st_mtime, default=None)


def is_stale(unit: Unit, device: str) -> bool:
    """Whether there is a library, and it is of other sources than the present ones."""
    path = library_of(unit, device)
    return path is not None and _source_digest(unit, device) not in path.name


def compiler(device: str) -> str:
    """The command of the compiler for a device.

    Raises:
        BuildError: there is none.
    """
    if device == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
        hint = "install one (Debian: apt install g++) or name it in CXX"
    else:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        names = [os.path.join(home, "bin", "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
        hint = "install the CUDA toolkit, or set CUDA_HOME to its folder"
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no compiler for {device} ({', '.join(names)}); {hint}. Everything works without, only slower")


def command(unit: Unit, device: str, out: Path, architectures: Sequence[str] | None = None) -> list[str]:
    """The command line that compiles a unit for a device into `out`.

    Args:
        architectures: compute capabilities such as "90"; None: that of the GPUs here, or all that are supported.
    """
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{Path(__file__).parent / SHARED}"]
    link = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    common = ["-O3", "-std=c++20", "-shared", f"-DTORCH_TARGET_VERSION={TARGET}"]
    if device == "cpu":
        flags = [
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-Wno-psabi",
            *_WIDE,
            f"-Wl,-rpath,{root / 'lib'}",
        ]
        return [compiler(device), *common, *flags, *include, str(unit.sources[device]), "-o", str(out), *link]
    chosen = architectures or _present() or ARCHITECTURES
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    flags = ["-Xcompiler=-fPIC", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-diag-suppress=20012,20014"]
    return [compiler(device), *common, *flags, *codes, *include, str(unit.sources[device]), "-o", str(out), *link]


def _present() -> list[str]:
    """Compute capabilities of the GPUs here, smallest first."""
    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


@contextlib.contextmanager
def _locked(unit: Unit, device: str, wait_seconds: float) -> Iterator[None]:
    """Holds the lock of an operation and device, which the system takes back when the process ends.

    Raises:
        BuildError: another build holds it for longer.
    """
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"{unit.name}.{device}.lock"
    with open(path, "a+", encoding="utf-8") as file:
        end = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BuildError(
                        f"another build has held {path} for {wait_seconds:.0f} seconds; "
                        "wait for it, or end it, and build again"
                    ) from None
                time.sleep(0.1)
        yield


def build(
    unit: Unit,
    device: str,
    *,
    force: bool = False,
    architectures: Sequence[str] | None = None,
    wait_seconds: float = LOCK_SECONDS,
    started: Callable[[], None] = lambda: None,
) -> Built:
    """Compiles one operation for one device, unless it is up to date.

    Args:
        force: compile even so.
        architectures: see `command`.
        wait_seconds: how long to wait for another build.
        started: called when there is something to compile.

    Raises:
        BuildError: the compiler is missing, failed or took too long, or another build does not end; the library that
            was there is there still.
    """
    try:
        with _locked(unit, device, wait_seconds):
            return _build(unit, device, force, architectures, started)
    except OSError as error:
        raise BuildError(
            f"{folder()} cannot be written: {error}; set PEFTKIT_KERNELS_DIR to a folder that can"
        ) from error


def _build(
    unit: Unit, device: str, force: bool, architectures: Sequence[str] | None, started: Callable[[], None]
) -> Built:
    stem, end = _pattern(unit, device)
    final = folder() / f"{stem}{_source_digest(unit, device)}{end}"
    if final.is_file() and not force:
        return Built(name=unit.name, device=device, path=final, seconds=0.0)
    # Under the lock every unfinished file is one that a killed build left.
    for left in folder().glob(f"{stem}*.unfinished"):
        left.unlink(missing_ok=True)
    started()
    begin = time.monotonic()
    unfinished = final.with_name(final.name + ".unfinished")
    line = command(unit, device, unfinished, architectures)
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        unfinished.unlink(missing_ok=True)
        raise BuildError(f"{unit.name} for {device}: the compiler took over {COMPILE_SECONDS} seconds") from None
    if done.returncode != 0 or not unfinished.is_file():
        unfinished.unlink(missing_ok=True)
        said = "\n".join((done.stderr or done.stdout).splitlines()[:40])
        raise BuildError(
            f"{unit.name} for {device}: the compiler failed ({done.returncode}):\n{' '.join(line)}\n{said}"
        )
    os.replace(unfinished, final)
    for old in folder().glob(f"{stem}*.so"):
        if old != final:
            old.unlink(missing_ok=True)
    return Built(name=unit.name, device=device, path=final, seconds=time.monotonic() - begin)
