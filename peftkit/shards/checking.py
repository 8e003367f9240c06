"""Whether the base is the one that the adapters were trained on, seen while its tensors pass by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftkit.errors import BaseMismatchError
from peftkit.fingerprint import CODES, DTYPES, Running
from peftkit.shards.skeleton import Checks


class Passing:
    """One tensor of the base that is seen part by part."""

    def __init__(self, names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype, checks: Checks) -> None:
        own = str(dtype).removeprefix("torch.")
        self._wanted: list[tuple[str, tuple[str, ...], Mapping[str, str], Path]] = []
        self._copies = [(name, copy, path) for name in names for copy, path in checks.copies.get(name, ())]
        self._seen = 0
        if dtype.is_floating_point:
            for name in names:
                for known, path in checks.digests.get(name, ()):
                    if known.get("dtype") == CODES:  # trained beside a quantized form of the tensor
                        continue
                    asked = tuple(d for d in DTYPES if d in (own, known.get("dtype"))) or ("float32",)
                    self._wanted.append((name, asked, known, path))
        self._running = {d: Running(shape, DTYPES[d]) for _, asked, _, _ in self._wanted for d in asked}
        for name, copy, path in self._copies:
            if tuple(copy.shape) != shape:
                raise _mismatch(name, path)

    def add(self, part: Tensor) -> None:
        """Takes in the next elements.

        Raises:
            BaseMismatchError: a copy of the tensor, kept in an adapter's folder, has others there.
        """
        flat = part.contiguous().view(-1)
        for dtype, running in self._running.items():
            running.add(flat.to(DTYPES[dtype]))
        for name, copy, path in self._copies:
            same = copy.reshape(-1)[self._seen : self._seen + flat.numel()].to(flat.dtype)
            if not torch.equal(same, flat):
                raise _mismatch(name, path)
        self._seen += flat.numel()

    def finish(self) -> None:
        """Compares.

        Raises:
            BaseMismatchError: the tensor is not the one that an adapter was trained on.
        """
        found = {dtype: running.digest() for dtype, running in self._running.items()}
        for name, asked, known, path in self._wanted:
            if not any(found[d] == known.get(d) for d in asked):
                raise _mismatch(name, path)


def _mismatch(name: str, path: Path) -> BaseMismatchError:
    return BaseMismatchError(
        f"{path}: the adapter was trained on other base weights: {name} differs. Give the base that it was "
        "trained on, or "
        "accept this one with ignore=('base',), --ignore base"
    )


class Checker:
    """Gives each tensor of the base the names under which the adapters know it."""

    def __init__(self, checks: Checks, aliases: Mapping[str, Sequence[str]], provided: set[str]) -> None:
        self._checks = checks
        self._aliases = aliases
        self._provided = provided

    def names(self, name: str) -> list[str]:
        """The name, and those tied to it that the checkpoint holds under no key of their own, if anything is known."""
        everyone = [name, *(n for n in self._aliases.get(name, ()) if n != name and n not in self._provided)]
        return [n for n in everyone if self._checks.of(n)]

    def begin(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Passing:
        """What takes the tensor in part by part."""
        return Passing(self.names(name), shape, dtype, self._checks)

    def whole(self, name: str, tensor: Tensor) -> None:
        """Checks a tensor that is there as a whole.

        Raises:
            BaseMismatchError: it is not the one that an adapter was trained on.
        """
        if self.names(name):
            passing = self.begin(name, tuple(tensor.shape), tensor.dtype)
            for part in tensor.contiguous().view(-1).split(1 << 22):
                passing.add(part)
            passing.finish()
