"""(model, config) -> Plan: the sites, their shapes and the exact number of trainable parameters. Reads only."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftkit import backbones, targets
from peftkit.errors import ConfigError, TargetError, nearest
from peftkit.methods import METHODS, method_of
from peftkit.quantization import is_quantized
from peftkit.spec import Attach, Config, Method, Site


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What wrapping would do: where, in which shapes, and with how many trainable parameters."""

    method: Method
    config: Any
    sites: tuple[Site, ...]
    """Places that get an adapter of the method."""
    extras: tuple[Site, ...]
    """Modules trained whole besides (`modules_to_save`, or a task's new head)."""
    shared: int
    """Trainable parameters that all sites share."""
    base: int
    """Parameters of the backbone."""
    targets: tuple[str, ...]
    """The sites as the shortest list of module name suffixes that selects exactly them."""
    notes: tuple[str, ...] = ()
    """What was chosen by default, and what to watch for."""

    @property
    def adapter_parameters(self) -> int:
        """Trainable parameters of the method, without the extras."""
        return self.shared + sum(site.count for site in self.sites)

    @property
    def extra_parameters(self) -> int:
        """Trainable parameters of the modules trained whole."""
        return sum(site.count for site in self.extras)

    @property
    def trainable(self) -> int:
        """Exact number of trainable parameters, extras included."""
        return self.adapter_parameters + self.extra_parameters

    @property
    def total(self) -> int:
        """Parameters of the adapted model; a trained copy of a backbone parameter takes the place of its original."""
        return self.base + self.shared + sum(s.count for s in self.sites if not s.parameters)

    def __str__(self) -> str:
        return _table(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # By name, so that a method made of local functions can be pickled with the model that it adapts.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if METHODS.get(self.method.name) is self.method:
            fields["method"] = self.method.name
        return _restored, (fields,)


def _restored(fields: dict[str, Any]) -> Plan:
    """A plan from a pickle, its method looked up where it was registered."""
    if isinstance(fields["method"], str):
        if fields["method"] not in METHODS:
            raise ConfigError(
                f"the pickled model is adapted with {fields['method']!r}, which is not registered here; "
                f"install the package that brings it ({nearest(fields['method'], METHODS)})"
            )
        fields = {**fields, "method": METHODS[fields["method"]]}
    return Plan(**fields)


def plan(model: nn.Module, config: Any) -> Plan:
    """The sites, shapes and exact trainable-parameter count of `config` on `model`.

    Touches nothing and works on the meta device.

    Args:
        model: any module; a model that is already wrapped is planned as its backbone.
        config: a configuration such as `peftkit.LoRA(r=16)`.

    Raises:
        ConfigError: the object is not a configuration of a registered method, or does not fit the model.
        TargetError: a pattern matches nothing, or a module that the method cannot attach to.
        BackboneError: the method needs a fact about the architecture that is not known.
    """
    method = method_of(config)
    extras_paths = targets.extra_paths(model, config)
    found = list(method.sites(model, config)) if method.sites else targets.weight_sites(model, method, config)
    sites = tuple(dataclasses.replace(site, count=method.parameter_count(site, config)) for site in found)
    extras = tuple(_whole_module_sites(model, extras_paths, {s.path for s in sites if s.parameters}))
    if not sites and not extras:
        raise TargetError(
            f"{method.name} found nothing to train in {type(model).__name__}: "
            "name modules with target_modules or modules_to_save"
        )
    _refuse_codes(model, method, sites, extras)
    shared = method.shared_count(sites, config) if method.shared_count else 0
    base = sum(p.numel() for n, p in model.named_parameters() if ".peftkit." not in f".{n}.")
    return Plan(
        method=method,
        config=config,
        sites=sites,
        extras=extras,
        shared=shared,
        base=base,
        targets=targets.shortest_suffixes([s.path for s in sites], [n for n, _ in targets.modules(model)]),
        notes=tuple(_notes(model, method, config, sites, extras)),
    )


def _refuse_codes(model: nn.Module, method: Method, sites: Sequence[Site], extras: Sequence[Site]) -> None:
    """Raises TargetError when something is to be trained that is stored in 4 or 8 bits."""
    modules = dict(targets.modules(model))
    for site in (*sites, *extras):
        if not is_quantized(modules[site.path]):
            continue
        copied = "weight" in (name for name, _ in site.parameters)
        if copied or not (method.quantized_base or site.role == "extra"):
            does = f"trains a copy of {site.path}.weight" if copied else f"does not work on {site.path}"
            raise TargetError(
                f"{method.name} {does}, whose weight is stored in codes ({site.kind}): leave the module out, use a "
                "method that works on a quantized base (`peftkit methods` lists them), or load the base in bfloat16, "
                "float16 or float32"
            )


def _whole_module_sites(model: nn.Module, paths: Sequence[str], taken: set[str]) -> list[Site]:
    """Sites for every parameter below the given modules; a parameter that modules share counts once."""
    seen: set[int] = set()
    found = []
    for name, module in targets.modules(model):
        if not targets.inside(name, paths) or name in taken:
            continue
        site = targets.parameter_site(name, module)
        if site is None:
            continue
        fresh = [n for n, _ in site.parameters if id(module._parameters[n]) not in seen]
        seen |= {id(module._parameters[n]) for n in fresh}
        count = sum(math.prod(shape) for n, shape in site.parameters if n in fresh)
        found.append(dataclasses.replace(site, count=count, role="extra"))
    return found


def _notes(
    model: nn.Module, method: Method, config: Config, sites: Sequence[Site], extras: Sequence[Site]
) -> Iterable[str]:
    if config.target_modules is None and sites and method.default_targets:
        if backbones.family(model) is None:
            yield f"no slots are known for {type(model).__name__}: every Linear but the output head is a target"
        else:
            slots = {p for slot in method.default_targets for p in backbones.slot_paths(model, slot)}
            paths = [site.path for site in sites]
            # A config can move a method away from the slots that it declares, as an adapter's placement does.
            suffixes = targets.shortest_suffixes(paths, [n for n, _ in targets.modules(model)])
            yield f"targets by default: {', '.join(method.default_targets if slots.issuperset(paths) else suffixes)}"
    if config.modules_to_save is None and extras:
        names = sorted({s.path.split(".")[0] for s in extras})
        yield f"trained whole, as the task's new head: {', '.join(names)} (modules_to_save=() leaves it frozen)"
    shared_by = {n: names for names in backbones.tied(model).values() for n in names}
    for site in (*sites, *extras):
        if site.role in ("weight", "embedding") and method.attach is Attach.WEIGHT:
            others = [n for n in shared_by.get(f"{site.path}.weight", ()) if n != f"{site.path}.weight"]
            if others:
                yield (
                    f"{site.path}.weight is tied with {', '.join(others)}: "
                    "the adapter acts here only, and cannot be merged"
                )


def _table(found: Plan) -> str:
    """The plan as a table: one row for sites of the same shape and name."""
    rows: dict[tuple[str, str, str, int], int] = {}
    for site in (*found.sites, *found.extras):
        name = re.sub(r"\.\d+(?=\.|$)", ".*", site.path) or "(model)"
        key = (name, site.kind, site.shape, site.count)
        rows[key] = rows.get(key, 0) + 1
    lines = [("site", "module", "out x in", "sites", "trainable each", "trainable")]
    lines += [(n, k, s, str(c), f"{each:,}", f"{each * c:,}") for (n, k, s, each), c in rows.items()]
    if found.shared:
        lines.append(("(shared by all sites)", "", "-", "1", f"{found.shared:,}", f"{found.shared:,}"))
    widths = [max(len(row[i]) for row in lines) for i in range(6)]
    text = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in lines
    ]
    text.insert(1, "  ".join("-" * w for w in widths))
    share = 100 * found.trainable / found.total if found.total else 0.0
    head = f" ({found.extra_parameters:,} of them in modules trained whole)" if found.extras else ""
    text.append(
        f"{found.method.name}: {found.trainable:,} trainable of {found.total:,} parameters, {share:.3g} %{head}"
    )
    text += [f"note: {note}" for note in found.notes]
    return "\n".join(line.rstrip() for line in text)
