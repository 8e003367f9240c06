"""Time, peak memory, latency and size on disk, and how each is taken."""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
CAN_RESET = _CLEAR.exists()
"""Whether the kernel's high-water mark can be reset."""


@dataclass
class Stopwatch:
    """Seconds that passed inside the `timed` block."""

    seconds: float = 0.0


@contextmanager
def timed() -> Iterator[Stopwatch]:
    """Gives a stopwatch that holds the block's wall-clock time when the block ends."""
    watch = Stopwatch()
    synchronise()
    start = time.perf_counter()
    try:
        yield watch
    finally:
        synchronise()
        watch.seconds = time.perf_counter() - start


def synchronise() -> None:
    """Waits for the accelerator's queued work, if there is an accelerator."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PeakMemory:
    """Peak memory of this process between `start` and `peak_bytes`, over what it held when the object was made.

    On an accelerator: the allocator's own peak. On Linux: the kernel's high-water mark of resident memory, reset at
    `start`. Elsewhere: the high-water mark of the process's whole life, so the process should do nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # what is garbage now must not be missing from what is held later
        if device.type == "cuda":
            self.method = "peak of the CUDA allocator during training"
            self._floor = torch.cuda.memory_allocated(device)
        elif CAN_RESET:
            self.method = (
                "peak resident memory of a process of its own during training (the kernel's VmHWM, reset when training "
                "starts), less what the process held before the backbone was loaded"
            )
            self._floor = _resident_bytes()
        else:
            self.method = (
                "peak resident memory of a process of its own (getrusage), less its peak before the backbone was loaded"
            )
            self._floor = _rusage_bytes()

    def start(self) -> None:
        """From here on peaks count."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CAN_RESET:
            _resident_bytes()  # gives back what was freed, so that it does not stand in the high-water mark
            _CLEAR.write_text("5")

    def held_bytes(self) -> int:
        """What is held now, over the floor; 0 where nothing but a peak can be read.

        Memory that was freed and that the C library has kept for itself is given back first, where it can be asked to;
        the next allocations are a little slower for it.
        """
        if self.device.type == "cuda":
            return max(0, torch.cuda.memory_allocated(self.device) - self._floor)
        if not CAN_RESET:
            return 0
        return max(0, _resident_bytes() - self._floor)

    def peak_bytes(self) -> int:
        """The peak since `start`, over the floor; 0 where a process that trains a tiny model shrank below it."""
        if self.device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self.device)
        else:
            found = _status_bytes("VmHWM") if CAN_RESET else _rusage_bytes()
        return max(0, found - self._floor)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function that gives freed memory back to the system; None with another C library."""
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def _resident_bytes() -> int:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")


def _rusage_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def hold(model: nn.Module) -> None:
    """Copies all weights, so that none lies in a mapped file.

    Pages of a mapped checkpoint count as resident, although they can be had back, and stay as long as one of its
    weights is in use: weights that were replaced by codes would never be seen to go.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def median_seconds(call: Callable[[], object], *, repeats: int, warmup: int) -> float:
    """The median wall-clock time of one call, after calls that do not count."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        with timed() as watch:
            call()
        times.append(watch.seconds)
    return statistics.median(times)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
