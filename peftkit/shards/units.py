"""What has to be in memory together when adapters are folded: modules, the model's tensors and the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftkit import targets
from peftkit.errors import CheckpointError, MergeError
from peftkit.shards.names import Group, Names
from peftkit.shards.skeleton import Adapters, Given
from peftkit.shards.source import FOLDABLE, Source
from peftkit.spec import Adapter
from peftkit.swap import CHILD
from peftkit.whole import WholeModule
from peftkit.wrap import sites_of

WIDE_COPIES = 3
"""Copies in float32 that folding makes of a weight: read, merged, and one on the way."""
STRIPE = 64
"""Rows that are folded together at the least. Stripes that are multiples of it have been seen to give the bits of the
whole; a BLAS may round a thinner product otherwise."""


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


def weight_of(site: Site) -> str:
    """The name of the site's weight in the model."""
    return f"{site.path}.weight".lstrip(".")


def stripes(unit: Unit, source: Source, memory: int) -> list[tuple[int, int]]:
    """The rows that are folded together: as many as fit, a multiple of STRIPE, and no remainder thinner than that."""
    entry = source.entries[unit.keys[weight_of(unit.sites[0])][0]]
    rows, each = entry.shape[0], row_need(unit, source)
    at_once = max(STRIPE, memory // max(1, each) // STRIPE * STRIPE)
    starts = list(range(0, max(1, rows - STRIPE + 1), at_once)) or [0]
    return [(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]


def row_need(unit: Unit, source: Source) -> int:
    """Bytes that folding one row of the unit's matrix takes."""
    entry = source.entries[unit.keys[weight_of(unit.sites[0])][0]]
    wide = 8 if entry.dtype == "F64" else 4
    count = entry.count // max(1, entry.shape[0])
    return count * (entry.size // max(1, entry.count) + WIDE_COPIES * wide)
