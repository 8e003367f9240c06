"""An adapter opened for export: from a wrapped model, or from its folder and as much of the base as is needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import backbones, certificate, checkpoint, fingerprint, folder
from peftkit.certificate import MergeReport
from peftkit.errors import BaseMismatchError, CheckpointError, ExportError, StateError
from peftkit.export.base import IN_MEMORY, BaseFolder, skeleton
from peftkit.plan import Plan
from peftkit.quantization import weights_of
from peftkit.spec import Adapter, Site, State, adapter_dtype
from peftkit.wrap import adapters_of, fill, onloaded, record_of, state_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an export reads: the plan, one adapter after another, and the base weights where they are needed."""

    planned: Plan
    model: nn.Module
    """The adapted model, or one on the meta device; read for names, shapes and its config."""
    place: str
    """Folder of the base, or its name on the hub; "" for a model in memory."""
    base_name: str
    """What the base model is called, for the configs that name it; "" when it is not known."""
    origin: Mapping[str, Any]
    """What is known of the adapter's origin: "base" (class and digests) and "about"."""
    extras: State
    """The modules trained whole."""
    report: MergeReport | None = None
    """The certificate of a merge that lay beside the adapter."""
    folder: Path | None = None
    """Where the adapter was read from; None for one in memory."""
    adapter: Callable[[Site], Adapter]
    """The adapter of a site, filled."""
    base: Callable[[Site], dict[str, Tensor]]
    """The parameters of a site's module in float32 (float64 stays), weights as (out, in).

    Raises ExportError where the base was not given or does not hold them.
    """


def opened(
    adapter: nn.Module | str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    name: str = "default",
    base_name: str | None = None,
) -> Source:
    """The adapter of a wrapped model, or of a folder, ready for export.

    Args:
        adapter: a model that holds adapters, or an adapter folder.
        base: folder of the base model or its name on the hub, for an adapter folder; None: what its config names.
        name: which adapter.
        base_name: what readers shall find as the name of the base; None: the name that it goes by.

    Raises:
        StateError: the model is not wrapped, holds no such adapter, or the adapter is merged.
        ExportError: the base model is not known, or its config cannot be read.
        CheckpointError: the folder cannot be read or does not fit the base.
        TrainingError: the adapter was trained without what its method needs.
    """
    if isinstance(adapter, nn.Module):
        if base is not None:
            raise ExportError("base is for adapter folders: a wrapped model brings its own base weights; leave it out")
        return _of_model(adapter, name, base_name)
    return _of_folder(Path(adapter), base, name, base_name)


def _of_model(model: nn.Module, name: str, base_name: str | None) -> Source:
    record = record_of(model)
    adapters = dict(adapters_of(model, name))
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged into the weights; call peftkit.unmerge(model) first")
    for found in adapters.values():
        found.check_trained()
    modules = dict(model.named_modules())
    planned = record.plans[name]
    left = {s.path for s in planned.extras}

    def base(site: Site) -> dict[str, Tensor]:
        with onloaded(modules[site.path]):
            return {n: t.cpu() for n, t in weights_of(modules[site.path]).read().items()}

    return Source(
        planned=planned,
        model=model,
        place="",
        base_name=backbones.name_of(model) if base_name is None else base_name,
        origin=checkpoint.origin_of(model, name),
        extras={p: tensors for p, tensors in state_of(model, name).items() if p in left},
        adapter=lambda site: adapters[site.path],
        base=base,
    )


def _of_folder(path: Path, base: str | os.PathLike[str] | None, name: str, base_name: str | None) -> Source:
    source = folder.located(path, name)
    fields = folder.read_json(source / folder.CONFIG)
    named = fields.get("base_model_name_or_path")
    named = named if isinstance(named, str) else ""
    place = os.fspath(base) if base is not None else named
    if not place:
        raise ExportError(
            f"{source / folder.CONFIG} names no base model; expected base_model_name_or_path. Give the folder of the "
            "base (or its name on the hub) with --base, or base=... in Python"
        )
    origin = _checked(checkpoint.provenance(source), source / folder.PROVENANCE)
    model = skeleton(place, fields, origin, folder.read_tensors(source))
    ignored: tuple[checkpoint.Ignorable, ...] = ("base",)
    planned, state = checkpoint.read(model, source, ignored)
    reader = _Reader(model=model, planned=planned, state=state, origin=origin, weights=BaseFolder(place, model))
    left = {s.path for s in planned.extras}
    report = source / certificate.FILE
    return Source(
        planned=planned,
        model=model,
        place=place,
        base_name=(named or place) if base_name is None else base_name,
        origin=origin,
        extras={p: tensors for p, tensors in state.items() if p in left},
        report=MergeReport.from_json(report.read_text()) if report.is_file() else None,
        folder=source,
        adapter=reader.adapter,
        base=reader.base,
    )


def _checked(origin: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """The origin, whose parts are objects.

    Raises:
        CheckpointError: they are something else.
    """
    base = origin.get("base", {})
    tensors = base.get("tensors", {}) if isinstance(base, dict) else None
    known = isinstance(tensors, dict) and all(isinstance(v, dict) for v in tensors.values())
    if not known or not isinstance(origin.get("about", {}), dict):
        raise CheckpointError(f"{file}: base, base.tensors or about is not an object; get the file again")
    return origin


@dataclass
class _Reader:
    """Builds the adapters of a folder one at a time, and reads base weights one module at a time."""

    model: nn.Module
    planned: Plan
    state: State
    origin: Mapping[str, Any]
    weights: BaseFolder
    shared: Adapter | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        method, config, sites = self.planned.method, self.planned.config, self.planned.sites
        if method.shared is not None:
            self.shared = method.shared(sites, config)
            if self.shared is not None:
                self._fill(self.shared, "")
                if method.initialise_shared is not None:
                    method.initialise_shared(self.shared, self.model, sites, config)
                self._fill(self.shared, "")

    def _fill(self, adapter: Adapter, path: str) -> None:
        values = self.state.get(path, {})
        if values:
            adapter.to(dtype=adapter_dtype(next(iter(values.values())).dtype))
        fill(adapter, values)

    def adapter(self, site: Site) -> Adapter:
        """The adapter of a site; where a part of it follows from the base weight, that is computed as in wrapping."""
        method, config = self.planned.method, self.planned.config
        made = method.adapter(site, config, self.shared)
        made.eval().requires_grad_(False)
        if any(module._non_persistent_buffers_set for module in made.modules()):
            with torch.random.fork_rng(devices=[]):
                method.initialise(made, self._module(site), site, config)
        self._fill(made, site.path)
        return made

    def base(self, site: Site) -> dict[str, Tensor]:
        return weights_of(self._module(site)).read()

    def _module(self, site: Site) -> nn.Module:
        """A copy of a site's module with its weights read from the base.

        Raises:
            BaseMismatchError: they are not those that the adapter was trained on.
        """
        module = copy.deepcopy(self.model.get_submodule(site.path))
        known = self.origin.get("base", {}).get("tensors", {})
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = f"{site.path}.{name}"
            value = self.weights.read(key, tuple(parameter.shape))
            if known and known.get(key, {}).get("dtype", fingerprint.CODES) == fingerprint.CODES:
                raise BaseMismatchError(
                    f"the adapter was trained on a base that stores {key} in another way (quantized), and what it adds "
                    f"depends on what that holds. Instead {IN_MEMORY}"
                )
            if key in known and fingerprint.differences({key: value}, {key: known[key]}):
                raise BaseMismatchError(
                    f"{key} of {self.weights.place} is not the weight that the adapter was trained on; give the base "
                    "that it was trained on with --base, or base=... in Python"
                )
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        return module
