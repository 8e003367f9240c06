"""Folds adapters into the weights, and measures how much of their effect the stored weights keep."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit import targets
from peftkit.errors import MergeError, StateError
from peftkit.quantization import weights_of
from peftkit.spec import Adapter
from peftkit.swap import CHILD
from peftkit.wrap import Record, check_classes, check_known, detach_code, record_of, restore, sites_of, unwrap

if TYPE_CHECKING:
    from peftkit_kernels import Stored

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class SiteMerge:
    """What merging did to one module's parameter."""

    path: str
    parameter: str
    dtype: str
    """Stored dtype."""
    delta_relative: float
    """‖W' - W‖ / ‖W‖, with W' as it was meant."""
    error_relative: float
    """‖stored - W'‖ / ‖W' - W‖; 0 where nothing was to change."""
    changed: float
    """Share of stored elements that changed."""
    effect_kept: float
    """⟨stored - W, W' - W⟩ / ‖W' - W‖²: 1 means that the whole effect is stored, 0 none of it."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merging did, site by site."""

    adapters: tuple[str, ...]
    sites: tuple[SiteMerge, ...]

    @property
    def effect_kept(self) -> float:
        """The least effect kept at any site; 1.0 without sites."""
        return min((s.effect_kept for s in self.sites), default=1.0)

    @property
    def error_relative(self) -> float:
        """The largest relative error at any site."""
        return max((s.error_relative for s in self.sites), default=0.0)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    def __str__(self) -> str:
        rows = [("parameter", "dtype", "delta/weight", "error/delta", "changed", "effect kept")]
        rows += [
            (
                f"{s.path}.{s.parameter}".lstrip("."),
                s.dtype,
                f"{s.delta_relative:.2e}",
                f"{s.error_relative:.2e}",
                f"{100 * s.changed:.1f} %",
                f"{s.effect_kept:.4f}",
            )
            for s in self.sites
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(
            f"merged {', '.join(self.adapters)} into {len(self.sites)} parameters: "
            f"least effect kept {self.effect_kept:.4f}, largest error {self.error_relative:.2e} of the delta"
        )
        return "\n".join(lines)


def merge(model: nn.Module, *names: str) -> MergeReport:
    """Writes the active adapters into the weights, in place, and takes their code off the path.

    Each weight is computed in float32 (float64 stays) and rounded once to its stored dtype. The weights before are
    kept, so that `unmerge` restores every bit; this needs as much memory as the changed weights.

    Args:
        names: adapters to merge; none: the active ones.

    Returns:
        What was stored against what was meant, for each changed parameter.

    Raises:
        StateError: the model is not wrapped, something is merged already, or no adapter is active.
        MergeError: an adapter cannot be merged, a weight is tied to another module, or a value is not finite.
            The model is as it was.
        TrainingError: an adapter was trained without what its method needs.
    """
    record = record_of(model)
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged already; call peftkit.unmerge(model) first")
    for name in names:
        check_known(record, name)
    chosen = names or record.active
    if not chosen:
        raise StateError("no adapter is active; name one: peftkit.merge(model, 'default')")
    for name in chosen:
        method = record.plans[name].method
        if not method.mergeable:
            raise MergeError(
                f"{method.name} (adapter {name!r}) cannot be merged: it is no change of weights; "
                "use the wrapped model as it is"
            )
    check_classes(model)
    work = _work(model, chosen)
    _refuse_tied(model, work)
    record.merged, record.resumed = tuple(chosen), record.active
    sites: list[SiteMerge] = []
    kept: dict[int, Tensor] = {}
    try:
        for path, module, adapters in work:
            sites += _merge_site(record, path, module, adapters, kept)
    except BaseException:
        restore(model)
        raise
    detach_code(model)
    return MergeReport(adapters=tuple(chosen), sites=tuple(sites))


def unmerge(model: nn.Module) -> None:
    """Restores every bit of the weights before the merge; the adapters act unmerged again.

    Raises:
        StateError: nothing is merged.
    """
    if not record_of(model).merged:
        raise StateError("nothing is merged; call peftkit.merge(model) first")
    restore(model)


def merge_and_unload(model: M, *names: str) -> M:
    """The plain model with the adapters folded into its weights; nothing of peftkit is left on it.

    Raises:
        StateError, MergeError: as `merge`.
    """
    record = record_of(model)
    if not record.merged:
        merge(model, *names)
    record.backups, record.merged, record.active = {}, (), ()
    return unwrap(model)


def _work(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module, list[Adapter]]]:
    found = []
    for path, module in sites_of(model):
        children: Any = module._modules[CHILD]
        adapters = [children[n] for n in names if n in children]
        for adapter in adapters:
            adapter.check_trained()
        adapters = [a for a in adapters if a.advises or a.replaces]
        if adapters:
            found.append((path, module, adapters))
    return found


def _refuse_tied(model: nn.Module, work: list[tuple[str, nn.Module, list[Adapter]]]) -> None:
    """Raises MergeError when a weight to be changed is also the weight of a module that is not."""
    owners: dict[int, list[str]] = {}
    for path, module in targets.modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    changed = {
        f"{path}.{name}".lstrip(".")
        for path, module, adapters in work
        for name in module._parameters
        if name == "weight" or any(name in a.replaces for a in adapters)
    }
    for path, module, _ in work:
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}".lstrip(".")
            others = [o for o in owners.get(id(parameter), ()) if o != full and o not in changed]
            if parameter is not None and full in changed and others:
                raise MergeError(
                    f"{full} is tied to {', '.join(others)}: merging would change both. Use the adapter unmerged, or "
                    "untie the weights (config.tie_word_embeddings=False and a copy of the weight) before training"
                )


def _merge_site(
    record: Record, path: str, module: nn.Module, adapters: list[Adapter], kept: dict[int, Tensor]
) -> list[SiteMerge]:
    """Merges one module; `kept` holds what was backed up so far, so that a tied parameter is backed up once."""
    weights = weights_of(module)
    before = weights.read()
    meant = dict(before)
    for position, adapter in enumerate(adapters):
        if position and adapter.reads_weight:
            raise MergeError(
                f"{path}: {type(adapter).__name__} reads the weight beneath it, which another adapter would have "
                "changed; merge it first in the list of adapters, or alone"
            )
        shown = {n: weights.turn(n, v) for n, v in meant.items()} if adapter.raw else meant
        try:
            new = adapter.merged(shown)
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from None
        meant.update({n: weights.turn(n, v) for n, v in new.items()} if adapter.raw else new)
    changed = {n: v for n, v in meant.items() if v is not before[n]}
    stored = weights.stored()
    sites = []
    for name, value in changed.items():
        identity = id(module._parameters.get(name))
        if identity not in kept:
            kept[identity] = stored[name].clone()
        record.backups.setdefault(path, {})[name] = kept[identity]
        sites.append(_measured(path, name, stored[name].dtype, weights.store(name, value)))
    return sites


def _measured(path: str, name: str, dtype: torch.dtype, found: Stored) -> SiteMerge:
    for kind, count in (
        ("the weight before the merge", found.not_finite_before),
        ("the merged value", found.not_finite_meant),
    ):
        if count:
            raise MergeError(
                f"{path}.{name}: {kind} holds values that are not finite; the model is left as it was. "
                "Check the adapter for a diverged training run"
            )
    if found.not_finite_after:
        raise MergeError(
            f"{path}.{name}: the merged value overflows {dtype}; the model is left as it was. "
            "Load the base in bfloat16 or float32 to merge"
        )
    size, base = math.sqrt(found.delta_square), math.sqrt(found.weight_square)
    return SiteMerge(
        path=path,
        parameter=name,
        dtype=str(dtype).removeprefix("torch."),
        delta_relative=size / base if base else float(size > 0),
        error_relative=math.sqrt(found.error_square) / size if size else 0.0,
        changed=found.changed / found.elements if found.elements else 0.0,
        effect_kept=found.product / found.delta_square if size else 1.0,
    )
