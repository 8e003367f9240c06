"""What an operation is: entry points with a schema, a reference in plain torch and a fake; compiled code overrides."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from peftkit_kernels import _build
from peftkit_kernels.errors import KernelError, NotBuilt

NAMESPACE = "peftkit"
KEYS = {"cpu": "CPU", "cuda": "CUDA"}
"""Device -> torch's dispatch key."""
Mode = Literal["off", "auto", "require"]


@dataclass(frozen=True, kw_only=True)
class Function:
    """One entry point of an operation, `torch.ops.peftkit.<name>`."""

    schema: str
    """In torch's schema language, such as "scale(Tensor x, float by) -> Tensor"."""
    reference: Callable[..., Any]
    """The definition: plain torch, on every device and in float64 too."""
    fake: Callable[..., Any]
    """The same shapes and dtypes without values, for compilers and the meta device."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Kinds of devices that the operation's compiled code covers, where there is any; plain torch on the others."""

    @property
    def name(self) -> str:
        """The name in the schema."""
        return self.schema.partition("(")[0]

    def __call__(self, *args: Any) -> Any:
        """Whatever implementation is there for the device of the arguments; the reference for float64."""
        if args[0].dtype is torch.float64:
            return self.reference(*args)
        return getattr(getattr(torch.ops, NAMESPACE), self.name)(*args)

    def compiled_for(self, device: str) -> bool:
        """Whether compiled code answers on that device."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{self.name}", KEYS[device]))


@dataclass(frozen=True, kw_only=True)
class Op:
    """An operation: a folder of this package."""

    name: str
    summary: str
    functions: tuple[Function, ...]
    sources: Mapping[str, str]
    """Device ("cpu", "cuda") -> the file in the operation's folder that implements it."""
    problems: dict[str, str] = field(default_factory=dict, compare=False)
    """Device -> why compiled code that is there could not be loaded."""

    @property
    def unit(self) -> _build.Unit:
        """What the builder has to know."""
        folder = Path(__file__).parent / self.name
        schemas = tuple(function.schema for function in self.functions)
        files = {device: folder / file for device, file in self.sources.items()}
        return _build.Unit(name=self.name, schemas=schemas, sources=files)

    def cases(self) -> Iterator[Any]:
        """The operation's cases, see `peftkit_kernels._case.Case`."""
        module = importlib.import_module(f"peftkit_kernels.{self.name}.cases")
        found: Iterator[Any] = module.cases()
        return found

    def compiled_for(self, device: str) -> bool:
        """Whether compiled code answers on that device for every entry point."""
        return device in self.sources and all(f.compiled_for(device) for f in self.functions if device in f.devices)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where one operation stands on one kind of device."""

    op: str
    device: str
    built: bool
    runnable: bool
    note: str
    """What is missing for what, or "" where all is well."""


_libraries: list[torch.library.Library] = []
"""Registrations last as long as these objects."""


def mode() -> Mode:
    """How compiled code is used, from the environment variable PEFTKIT_NATIVE.

    Raises:
        KernelError: it is none of off, auto (the default) and require.
    """
    found = os.environ.get("PEFTKIT_NATIVE", "auto")
    if found not in ("off", "auto", "require"):
        raise KernelError(f"PEFTKIT_NATIVE={found!r}: expected off, auto or require")
    return found  # type: ignore[return-value]  # one of the three


def declare(op: Op) -> Op:
    """The same operation, its schemas, references and fakes registered with torch, and what is built loaded."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _libraries.append(library)
    for function in op.functions:
        library.define(function.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(function.name, function.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{function.name}", function.fake, lib=library)
    if mode() != "off":
        for device in op.sources:
            _load(op, device)
    return op


def available(device: str) -> bool:
    """Whether this machine has the device."""
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def _load(op: Op, device: str) -> None:
    path = _build.library_of(op.unit, device)
    if path is not None and available(device):
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            op.problems[device] = str(error).splitlines()[0]
    if mode() == "require" and available(device) and not op.compiled_for(device):
        why = op.problems.get(device, "it is not built")
        raise NotBuilt(
            f"PEFTKIT_NATIVE=require, and {op.name} has no compiled code for {device}: {why}; "
            f"run `python -m peftkit_kernels build{' --cuda' if device == 'cuda' else ''}`"
        )


def status_of(op: Op, device: str) -> Status:
    """Whether the operation is built and runnable on a kind of device, and what is missing."""
    command = f"python -m peftkit_kernels build{' --cuda' if device == 'cuda' else ''}"
    if device not in op.sources:
        return Status(op=op.name, device=device, built=False, runnable=False, note="no code for it yet: plain torch")
    path = _build.library_of(op.unit, device)
    if path is None:
        return Status(op=op.name, device=device, built=False, runnable=False, note=f"run `{command}`")
    runnable, notes = op.compiled_for(device), []
    if not available(device):
        notes.append(f"no {device} device here")
    elif mode() == "off":
        notes.append("PEFTKIT_NATIVE=off")
    elif device in op.problems:
        notes.append(op.problems[device])
    if _build.is_stale(op.unit, device):
        notes.append(f"older than its sources; run `{command}`")
    return Status(op=op.name, device=device, built=True, runnable=runnable, note="; ".join(notes))
