"""Operations of peftkit_kernels against their peers: calls in turn in one process, ratios of medians, shares of limits.

One file an operation; each gives its comparisons, with the peers imported where they are called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftkit_bench.record import environment
from peftkit_bench.timing import interleaved

FILES = (
    "merge_lora",
    "lora_linear",
    "dora_scale",
    "quantize_blockwise",
    "nf4_linear",
    "int8_linear",
    "multi_lora",
    "prefix_attention",
)
"""Operations that have comparisons, in the order of the table."""
OURS = "peftkit"
LONGEST = 60.0
"""Seconds that the rounds of one comparison take, about, unless a single one takes longer."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is called in one comparison, and facts beside the time."""

    calls: Mapping[str, Callable[[], Any]]
    """Contender -> one call; "peftkit" is the operation as it is installed here."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Measured besides, such as bytes kept or wrong elements."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table."""

    op: str
    label: str
    """What is computed, with sizes."""
    setting: Callable[[torch.device], Setting]
    against: str = ""
    """The peer that the aim is about."""
    aim: float | None = None
    """How many times faster than that peer peftkit's operation should be."""
    flops: int = 0
    bytes: int = 0
    """Least bytes read and written."""
    rounds: int = 15
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender in one comparison."""

    op: str
    label: str
    device: str
    contender: str
    median_seconds: float | None
    """None: not measured, see `note`."""
    faster: float | None
    """How many times faster peftkit is, by medians."""
    limit_share: float | None
    """Time that bytes and arithmetic need at this machine's measured rates, over the time taken."""
    against: bool
    """Whether the aim is about this contender."""
    aim: float | None
    rounds: int
    compiled: bool
    """Whether peftkit's side was compiled code."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this machine does at best, measured in the same run."""

    bytes_per_second: float
    """Of a copy far larger than the caches, read and written bytes counted."""
    flops_per_second: float
    """Of a large bfloat16 product, or float32 where that is faster."""


def limits(device: torch.device) -> Limits:
    """Measured rates of a device."""
    big = torch.empty(64 * 2**20, dtype=torch.float32, device=device).fill_(1.0)
    to = torch.empty_like(big)
    copies = _median(functools.partial(to.copy_, big), device)

    def rate(dtype: torch.dtype, size: int, rounds: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / _median(functools.partial(torch.mm, a, b), device, rounds)

    flops = rate(torch.float32, 2048, 7)
    # Where bfloat16 is multiplied one by one, a large product takes minutes.
    if device.type != "cpu" or rate(torch.bfloat16, 256, 3) > flops / 10:
        flops = max(flops, rate(torch.bfloat16, 2048, 7))
    return Limits(bytes_per_second=2 * big.nbytes / copies, flops_per_second=flops)


def _median(call: Callable[[], Any], device: torch.device, rounds: int = 7) -> float:
    return statistics.median(interleaved({"": _synchronised(call, device)}, rounds)[""])


def _synchronised(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        return call

    def waiting() -> None:
        call()
        torch.cuda.synchronize(device)

    return waiting


def measure(
    device: torch.device, progress: Callable[[str], None] = lambda text: None, only: Sequence[str] = ()
) -> list[Timing]:
    """All comparisons on a device.

    Args:
        progress: told what is timed next.
        only: operations by name; none: all.

    Raises:
        ValueError: a name that is none of them.
    """
    from peftkit_kernels import OPS

    unknown = [name for name in only if name not in FILES]
    if unknown:
        raise ValueError(f"no operation is named {unknown[0]!r}; choices: {', '.join(FILES)}")
    progress("the machine's rates")
    rates = limits(device)
    found: list[Timing] = []
    for name in FILES:
        if only and name not in only:
            continue
        module = importlib.import_module(f"peftkit_bench.ops.{name}")
        compiled = OPS[name].compiled_for(device.type)
        for comparison in module.comparisons():
            progress(f"{comparison.op}: {comparison.label}")
            found += _timed(comparison, device, rates, compiled)
    return found


def not_measured(device: str, why: str, only: Sequence[str] = ()) -> list[Timing]:
    """A row for each comparison on a device that is not here, which says so in place of a number."""
    found = []
    for name in FILES:
        if only and name not in only:
            continue
        for row in importlib.import_module(f"peftkit_bench.ops.{name}").comparisons():
            if device in row.devices:
                found.append(
                    Timing(
                        op=row.op,
                        label=row.label,
                        device=device,
                        contender=OURS,
                        median_seconds=None,
                        faster=None,
                        limit_share=None,
                        against=False,
                        aim=row.aim,
                        rounds=0,
                        compiled=False,
                        note=why,
                    )
                )
    return found


def file_for(folder: Path, device: torch.device) -> Path:
    """Where a run's records belong in a folder: <device's name>-<commit>.jsonl."""
    stamp = environment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(stamp.get("processor") or "cpu")
    plain = "-".join(re.findall(r"[a-z0-9]+", name.lower()))
    return folder / f"{plain}-{stamp.get('commit') or 'unknown'}.jsonl".replace("+", "")


def _timed(row: Comparison, device: torch.device, rates: Limits, compiled: bool) -> Iterator[Timing]:
    make = functools.partial(Timing, op=row.op, label=row.label, device=device.type, aim=row.aim, compiled=compiled)
    if device.type not in row.devices:
        return
    with _quiet():
        setting = row.setting(device)
        calls = {name: _synchronised(call, device) for name, call in setting.calls.items()}
        start = time.perf_counter()
        for call in calls.values():
            call()
        # A round of minutes, as some peers take on some processors, is not made dozens of times.
        rounds = max(1, min(row.rounds, int(LONGEST / (time.perf_counter() - start))))
        times = {n: statistics.median(s) for n, s in interleaved(calls, rounds, warm_up=1).items()}
    least = row.bytes / rates.bytes_per_second + 0.0
    least = max(least, row.flops / rates.flops_per_second)
    for name, seconds in times.items():
        yield make(
            contender=name,
            median_seconds=seconds,
            faster=seconds / times[OURS],
            limit_share=least / seconds if least else None,
            against=name == row.against,
            rounds=rounds,
            facts=dict(setting.facts) if name == OURS else {},
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Peers warn about things that are not compared here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def table(timings: Sequence[Timing]) -> str:
    """The timings as a Markdown table, one row a contender."""
    lines = [
        "| operation | what | device | peftkit | of the limit | against | faster | aim | met | besides |",
        "|---|---|---|---:|---:|---|---:|---:|---|---|",
    ]
    own = {(t.op, t.label, t.device): t for t in timings if t.contender == OURS}
    for timing in timings:
        ours = own[timing.op, timing.label, timing.device]
        if ours.median_seconds is None:
            lines.append(
                f"| {timing.op} | {timing.label} | {timing.device} | not measured: {timing.note} |" + " - |" * 6
            )
        if timing.contender == OURS or ours.median_seconds is None:
            continue
        faster = f"{timing.faster:.2f}x" if timing.faster is not None else "not measured"
        aimed = timing.against and timing.aim is not None
        met = ("yes" if (timing.faster or 0) >= (timing.aim or 0) else "no") if aimed else "-"
        facts = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in ours.facts.items())
        share = f"{100 * ours.limit_share:.0f} %" if ours.limit_share is not None else "-"
        how = "" if ours.compiled else " (plain torch)"
        lines.append(
            f"| {timing.op} | {timing.label} | {timing.device} | {1e3 * ours.median_seconds:.3g} ms{how} | {share} | "
            f"{timing.contender} | {faster} | {f'{timing.aim:g}x' if aimed else '-'} | {met} | {facts or '-'} |"
        )
    return "\n".join(lines)
