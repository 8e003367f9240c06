"""Folding what belongs together: all at once, or one matrix some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit.certificate import SiteMerge, measured
from peftkit.errors import MergeError
from peftkit.folding import folded, trained_whole
from peftkit.quantization import weights_of
from peftkit.shards.names import check_way_back, converted, reverted
from peftkit.shards.skeleton import Adapters
from peftkit.shards.source import Source
from peftkit.shards.units import Site, Unit, stripes, weight_of
from peftkit.spec import Adapter

if TYPE_CHECKING:
    from peftkit_kernels import Stored

Write = Callable[[str, Tensor, int], None]
"""(key, values, row at which they begin)."""


def by_rows(unit: Unit, adapters: Adapters) -> bool:
    """Whether the unit is one matrix whose adapters can be cut into stripes."""
    site = unit.sites[0]
    weight = site.module._parameters.get("weight")
    if len(unit.sites) != 1 or unit.groups or len(unit.keys.get(weight_of(site), ())) != 1:
        return False
    if weight is None or weight.dim() != 2 or not all(unit.keys.values()):
        return False
    started = [a for a in site.adapters if not adapters.covered(a)]
    try:
        for adapter in started:
            adapters.fill(adapter)
        return all(adapter.part(_side(site.module), 0, 1) is not None for adapter in site.adapters)
    except MergeError:  # the start of an adapter needs the whole weight
        return False
    finally:
        for adapter in started:
            adapters.empty(adapter)


def _side(module: nn.Module) -> int:
    """The side of the weight as (out, in) whose stripes are rows in the file."""
    small = {n: torch.empty(tuple(range(1, p.dim() + 1))) for n, p in module._parameters.items() if p is not None}
    with _holding(module, small):
        return int(weights_of(module).turn("weight", small["weight"]).shape != small["weight"].shape)


@contextmanager
def _holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the module's parameters are these."""
    own = dict(module._parameters)
    try:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(own)


def fold_whole(
    model: nn.Module,
    unit: Unit,
    source: Source,
    adapters: Adapters,
    into: torch.dtype | None,
    check: Callable[[str, Tensor], None],
) -> tuple[dict[str, Tensor], list[SiteMerge]]:
    """The unit's tensors by key as they are to be written, and what was measured.

    Args:
        check: called with each tensor of the model by its name, before anything changes.

    Raises:
        MergeError: a value is not finite, or a group of tensors has no way back.
        BaseMismatchError: raised by `check`.
    """
    tensors: dict[str, Tensor] = {}
    for name, keys in unit.keys.items():
        if keys:
            tensors[name] = source.tensor(source.entries[keys[0]])
            _check_copies(source, keys, tensors[name])
            check(name, tensors[name])
    for group in unit.groups:
        stored = {key: source.tensor(source.entries[key]) for key in group.keys}
        made = {n: t.contiguous() for n, t in converted(model, group, stored).items()}
        check_way_back(model, group, stored, made)
        for name, tensor in made.items():
            check(name, tensor)
        tensors |= made
    by_identity = {id(_parameter(model, name)): name for name in unit.names}
    merged: list[SiteMerge] = []
    for site in unit.sites:
        values = {}
        for name, parameter in site.module._parameters.items():
            if parameter is not None:
                own = by_identity[id(parameter)]
                if own not in tensors:  # a head that the base does not have counts from zero
                    tensors[own] = torch.zeros(parameter.shape, dtype=parameter.dtype)
                values[name] = tensors[own]
        with _holding(site.module, values):
            changed, found = _fold(site, adapters, into)
        merged += found
        for name, value in changed.items():
            parameter = site.module._parameters[name]
            tensors[by_identity[id(parameter)]] = value
    if into is not None:
        tensors = {n: t.to(into) if t.is_floating_point() else t for n, t in tensors.items()}
    written = {key: tensors[name] for name, keys in unit.keys.items() for key in keys or (name,)}
    for group in unit.groups:
        written |= reverted(model, group, {n: tensors[n] for n in group.names})
    return written, merged


def _parameter(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters.get(last, module._buffers.get(last))


def _check_copies(source: Source, keys: Sequence[str], tensor: Tensor) -> None:
    """Raises MergeError when the copies of a tied weight in the file differ."""
    for key in keys[1:]:
        if not torch.equal(source.tensor(source.entries[key]), tensor):
            raise MergeError(
                f"{keys[0]} and {key} are one tied weight by config.json, and the checkpoint holds two "
                "different ones; set "
                "tie_word_embeddings to false in config.json if that is meant"
            )


def _fold(site: Site, adapters: Adapters, into: torch.dtype | None) -> tuple[dict[str, Tensor], list[SiteMerge]]:
    """What changes of a module that holds its parameters, rounded once, and what was measured."""
    stored = {n: p.data for n, p in site.module._parameters.items() if p is not None}
    try:
        for adapter in site.adapters:
            adapters.fill(adapter)
        found = _stored(site.path, site.module, site.adapters, [adapters.weight(a) for a in site.adapters], into)
    finally:
        for adapter in site.adapters:
            adapters.empty(adapter)
    merged = []
    for name, (value, sums) in found.items():
        storage = str(value.dtype).removeprefix("torch.")
        merged.append(measured(site.path, name, storage, sums, copied=trained_whole(name, site.adapters)))
        stored[name] = value
    return stored, merged


def _stored(
    path: str, module: nn.Module, adapters: Sequence[Adapter], scales: Sequence[float], into: torch.dtype | None
) -> dict[str, tuple[Tensor, Stored]]:
    """What changes of a module's parameters, rounded once to its dtype or `into`, and the sums that measure it."""
    weights = weights_of(module)
    before = weights.read()
    changed = _folded(path, adapters, scales, before, weights.turn)
    found = {}
    for name, value in changed.items():
        own = module._parameters[name]
        assert own is not None
        if into is None or into == own.dtype:
            found[name] = own.data, weights.store(name, value)
        else:
            found[name] = _stored_as(weights.turn(name, before[name]), weights.turn(name, value), into)
    return found


def _folded(
    path: str,
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    base: Mapping[str, Tensor],
    turn: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """As `folded`, with the effect of an adapter that adds scaled."""
    if all(scale == 1 for scale in scales):
        return folded(path, adapters, base, turn)
    meant = dict(base)
    for adapter, scale in zip(adapters, scales, strict=True):
        if scale == 1:
            meant.update(folded(path, [adapter], meant, turn))
            continue
        nothing = {n: torch.zeros_like(v) for n, v in meant.items()}
        for name, delta in folded(path, [adapter], nothing, turn).items():
            meant[name] = torch.add(meant[name], delta, alpha=scale)
    return {n: v for n, v in meant.items() if v is not base[n]}


def _stored_as(before: Tensor, meant: Tensor, dtype: torch.dtype) -> tuple[Tensor, Stored]:
    """`meant` rounded once to another dtype, and the sums against the weight before in its own."""
    from peftkit_kernels import Stored

    out = meant.contiguous().to(dtype)
    sums: dict[str, float] = dict.fromkeys((f.name for f in fields(Stored)), 0)
    parts = (t.contiguous().view(-1).split(1 << 16) for t in (before, meant, out))
    for old, want, new in zip(*parts, strict=True):
        was, goal, now = old.double(), want.double(), new.double()
        delta, reached = goal - was, now - was
        for name, value in (
            ("weight_square", was.square().sum()),
            ("delta_square", delta.square().sum()),
            ("error_square", (reached - delta).square().sum()),
            ("product", (reached * delta).sum()),
            ("changed", (now != was).sum()),
            ("not_finite_before", (~was.isfinite()).sum()),
            ("not_finite_meant", (~goal.isfinite()).sum()),
            ("not_finite_after", (~now.isfinite()).sum()),
        ):
            sums[name] += value.item()
    return out, Stored(**{**sums, "elements": out.numel()})  # type: ignore[arg-type]  # counts are integers


def fold_rows(
    unit: Unit,
    source: Source,
    adapters: Adapters,
    into: torch.dtype | None,
    check: Callable[[str, Tensor], None],
    begin: Callable[[str], Any],
    write: Write,
    memory: int,
) -> list[SiteMerge]:
    """Folds a unit of one matrix some rows at a time, and gives what was measured.

    Args:
        check: as for `fold_whole`, for the parameters besides the matrix.
        begin: (name) -> what takes in the matrix part by part and raises at its `finish` when it is not the right one.
        write: takes what is to be written.
        memory: bytes that the rows may take together.
    """
    (site,) = unit.sites
    name = weight_of(site)
    entry = source.entries[unit.keys[name][0]]
    side = _side(site.module)
    others = {n.removeprefix(f"{site.path}.").lstrip("."): keys for n, keys in unit.keys.items() if n != name}
    small = {n: source.tensor(source.entries[keys[0]]) for n, keys in others.items()}
    for other, tensor in small.items():
        check(f"{site.path}.{other}".lstrip("."), tensor)
    running = begin(name)
    totals: dict[str, Stored] = {}
    stored: dict[str, Tensor] = {}
    try:
        for adapter in site.adapters:
            adapters.fill(adapter)
        for start, stop in stripes(unit, source, memory):
            stripe = source.tensor(entry, (start, stop))
            running.add(stripe)
            values = {n: (t[start:stop] if side == 0 else t).clone() for n, t in small.items()}
            parts = [a.part(side, start, stop) for a in site.adapters]
            assert all(p is not None for p in parts)
            scales = [adapters.weight(a) for a in site.adapters]
            with _holding(site.module, {"weight": stripe, **values}):
                found = _stored(site.path, site.module, [p for p in parts if p is not None], scales, into)
            for own, (value, sums) in found.items():
                if own == "weight" or side == 0 or start == 0:
                    totals[own] = _sum(totals[own], sums) if own in totals else sums
                stored[own] = value
            write(entry.key, _cast(stored.pop("weight", stripe), into), start)
            for own in small:
                if side == 0 or start == 0:
                    write(others[own][0], _cast(stored.pop(own, values[own]), into), start if side == 0 else 0)
    finally:
        for adapter in site.adapters:
            adapters.empty(adapter)
    running.finish()
    storage = {n: str(into or source.entries[unit.keys[f"{site.path}.{n}".lstrip(".")][0]].torch_dtype) for n in totals}
    return [
        measured(site.path, n, storage[n].removeprefix("torch."), sums, copied=trained_whole(n, site.adapters))
        for n, sums in totals.items()
    ]


def _cast(tensor: Tensor, into: torch.dtype | None) -> Tensor:
    return tensor if into is None or not tensor.is_floating_point() else tensor.to(into)


def _sum(one: Stored, other: Stored) -> Stored:
    from peftkit_kernels import Stored

    return Stored(**{f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(Stored)})
