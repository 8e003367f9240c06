"""What belongs together when adapters are folded: the modules, the model's tensors and the checkpoint's, one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkit import targets
from peftkit.certificate import SiteMerge, measured
from peftkit.errors import CheckpointError, MergeError
from peftkit.folding import folded
from peftkit.quantization import weights_of
from peftkit.shards.names import Group, Names, check_way_back, converted, reverted
from peftkit.shards.skeleton import Adapters, Given
from peftkit.shards.source import FOLDABLE, Source
from peftkit.spec import Adapter
from peftkit.swap import CHILD
from peftkit.whole import WholeModule
from peftkit.wrap import sites_of

if TYPE_CHECKING:
    from peftkit_kernels import Stored

WIDE_COPIES = 3
"""Copies in float32 that folding makes of a weight: read, merged, and one on the way."""
STRIPE = 64
"""Rows that are folded together at the least. Stripes that are multiples of it have been seen to give the bits of the
whole; a BLAS may round a thinner product otherwise."""
Write = Callable[[str, Tensor, int], None]
"""(key, values, row at which they begin)."""


@dataclass
class Site:
    """One module with the adapters that are folded into it, inner ones first."""

    path: str
    module: nn.Module
    adapters: list[Adapter]


@dataclass
class Unit:
    """Modules and tensors that have to be in memory together, because one depends on another."""

    sites: list[Site]
    names: list[str]
    """Tensors of the model that are read, each under one name."""
    keys: dict[str, tuple[str, ...]]
    """Name -> the keys that hold it, for tensors that are stored as they are; () for one that the base lacks."""
    groups: list[Group]
    need: int
    """Bytes that folding everything at once takes."""

    @property
    def all_keys(self) -> list[str]:
        """Every key of the checkpoint that is read, and written anew."""
        return [*(k for keys in self.keys.values() for k in keys), *(k for g in self.groups for k in g.keys)]


def units_of(model: nn.Module, given: Sequence[Given], source: Source, names: Names, adapters: Adapters) -> list[Unit]:
    """The units, in the order of the model.

    Raises:
        MergeError: adapters cannot be folded together, a weight is tied or stored in a way that cannot be folded into.
        CheckpointError: the checkpoint lacks a tensor that an adapter changes.
    """
    sites = list(_sites(model, given))
    for site in sites:
        _check_together(site, adapters)
    _check_tied(model, sites)
    provider = {name: key for key, name in names.direct.items()}
    group_of = {name: group for group in names.groups for name in group.names}
    aliases = aliases_of(model)
    found: list[Unit] = []
    for together in _connected(sites, aliases, group_of):
        unit = Unit(together, [], {}, [], 0)
        for site in together:
            for name, parameter in site.module._parameters.items():
                everyone = aliases[id(parameter)] if parameter is not None else []
                group = next((group_of[n] for n in everyone if n in group_of), None)
                if group is not None and group not in unit.groups:
                    unit.groups.append(group)
                    unit.names += group.names
                if not everyone or group is not None or any(n in unit.keys for n in everyone):
                    continue
                full = f"{site.path}.{name}".lstrip(".")
                unit.names.append(full)
                unit.keys[full] = tuple(provider[n] for n in everyone if n in provider)
                if not unit.keys[full] and not any(name in a.replaces for a in site.adapters):
                    raise CheckpointError(
                        f"{source.path} lacks {full}, which {type(model).__name__} has and an adapter changes; "
                        "give the "
                        "base that the adapter was trained on, complete"
                    )
        for key in unit.all_keys:
            if source.entries[key].dtype not in FOLDABLE:
                raise MergeError(
                    f"{key} is stored as {source.entries[key].dtype}; adapters are folded into {', '.join(FOLDABLE)}. "
                    "Give the folder of the original 16-bit weights as BASE"
                )
        unit.need = _need(unit, source)
        found.append(unit)
    return found


def _connected(
    sites: Sequence[Site], aliases: Mapping[int, Sequence[str]], group_of: Mapping[str, Group]
) -> list[list[Site]]:
    """The sites, those together that share a parameter or a group of tensors."""
    found: list[tuple[set[int], list[Site]]] = []
    for site in sites:
        marks: set[int] = set()
        for parameter in site.module._parameters.values():
            for name in aliases[id(parameter)] if parameter is not None else ():
                marks.add(id(group_of[name]) if name in group_of else id(parameter))
        joined = [entry for entry in found if entry[0] & marks]
        found = [entry for entry in found if not entry[0] & marks]
        members = [s for _, others in joined for s in others]
        found.append((marks.union(*(m for m, _ in joined)), [*members, site]))
    return [members for _, members in found]


def _sites(model: nn.Module, given: Sequence[Given]) -> Iterator[Site]:
    for path, module in sites_of(model):
        children: Any = module._modules[CHILD]
        held = [children[g.name] for g in given if g.name in children]
        held = [a for a in held if a.advises or a.replaces]
        if held:
            yield Site(path, module, held)


def aliases_of(model: nn.Module) -> dict[int, list[str]]:
    """Every name of a parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for path, module in targets.modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return found


def _check_together(site: Site, adapters: Adapters) -> None:
    """Raises MergeError when the adapters of one module have no common meaning."""
    replaced: dict[str, Adapter] = {}
    for position, adapter in enumerate(site.adapters):
        weight, path = adapters.weight(adapter), adapters.source(adapter).path
        if position and adapter.reads_weight:
            raise MergeError(
                f"{site.path}: {type(adapter).__name__} ({path}) reads the weight beneath it, which another "
                "adapter would "
                "have changed; give it first, or alone"
            )
        if weight != 1 and not adapter.additive:
            what = "is trained whole" if isinstance(adapter, WholeModule) else f"has a {type(adapter).__name__}"
            raise MergeError(
                f"{path} with weight {weight:g}: {site.path} {what}, whose effect is no sum that a weight could scale; "
                "give it the weight 1"
            )
        for name in adapter.replaces:
            if name in replaced:
                raise MergeError(
                    f"{site.path}.{name} is trained whole by {adapters.source(replaced[name]).path} and by "
                    f"{path}, and only "
                    "one of them can be kept; merge one of the two"
                )
            replaced[name] = adapter


def _check_tied(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises MergeError when a weight to be changed is also that of a module which does not get the same change."""
    aliases = aliases_of(model)
    whole = {
        f"{s.path}.{n}".lstrip(".") for s in sites for a in s.adapters if isinstance(a, WholeModule) for n in a.replaces
    }
    for site in sites:
        for name, parameter in site.module._parameters.items():
            full = f"{site.path}.{name}".lstrip(".")
            changed = name == "weight" or any(name in a.replaces for a in site.adapters)
            if parameter is None or not changed:
                continue
            others = [o for o in aliases[id(parameter)] if o != full]
            if others and not (full in whole and whole.issuperset(others)):
                raise MergeError(
                    f"{full} is tied to {', '.join(others)}: merging would change both. Use the adapter "
                    "unmerged, or untie "
                    "the weights (config.tie_word_embeddings=False and a copy of the weight) before training"
                )


def _need(unit: Unit, source: Source) -> int:
    """Bytes that are in memory when the whole unit is folded at once."""
    stored = sum(source.entries[k].size for k in unit.all_keys)
    grouped = sum(source.entries[k].size for g in unit.groups for k in g.keys)
    wide = 0
    for site in unit.sites:
        for parameter in site.module._parameters.values():
            if parameter is not None:
                size = 8 if parameter.dtype == torch.float64 else 4
                wide = max(wide, WIDE_COPIES * size * parameter.numel())
    return stored + 2 * grouped + wide


def by_rows(unit: Unit, adapters: Adapters) -> bool:
    """Whether the unit is one matrix whose adapters can be cut into stripes."""
    site = unit.sites[0]
    weight = site.module._parameters.get("weight")
    if len(unit.sites) != 1 or unit.groups or len(unit.keys.get(_weight(site), ())) != 1:
        return False
    if weight is None or weight.dim() != 2 or not all(unit.keys.values()):
        return False
    try:
        for adapter in site.adapters:
            adapters.fill(adapter)
        return all(adapter.part(_side(site.module), 0, 1) is not None for adapter in site.adapters)
    except MergeError:  # the start of an adapter needs the whole weight
        return False
    finally:
        for adapter in site.adapters:
            adapters.empty(adapter)


def _weight(site: Site) -> str:
    return f"{site.path}.weight".lstrip(".")


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
        merged.append(measured(site.path, name, storage, sums))
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
    name = _weight(site)
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
    return [measured(site.path, n, storage[n].removeprefix("torch."), sums) for n, sums in totals.items()]


def stripes(unit: Unit, source: Source, memory: int) -> list[tuple[int, int]]:
    """The rows that are folded together: as many as fit, a multiple of STRIPE, and no remainder thinner than that."""
    entry = source.entries[unit.keys[_weight(unit.sites[0])][0]]
    rows, each = entry.shape[0], row_need(unit, source)
    at_once = max(STRIPE, memory // max(1, each) // STRIPE * STRIPE)
    starts = list(range(0, max(1, rows - STRIPE + 1), at_once)) or [0]
    return [(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]


def row_need(unit: Unit, source: Source) -> int:
    """Bytes that folding one row of the unit's matrix takes."""
    entry = source.entries[unit.keys[_weight(unit.sites[0])][0]]
    wide = 8 if entry.dtype == "F64" else 4
    count = entry.count // max(1, entry.shape[0])
    return count * (entry.size // max(1, entry.count) + WIDE_COPIES * wide)


def _cast(tensor: Tensor, into: torch.dtype | None) -> Tensor:
    return tensor if into is None or not tensor.is_floating_point() else tensor.to(into)


def _sum(one: Stored, other: Stored) -> Stored:
    from peftkit_kernels import Stored

    return Stored(**{f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(Stored)})
