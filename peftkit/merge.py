"""Folds adapters into the weights, and measures how much of their effect the stored weights keep."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from peftkit import targets
from peftkit.certificate import MergeReport, SiteMerge, measured
from peftkit.errors import MergeError, StateError
from peftkit.folding import folded
from peftkit.quantization import weights_of
from peftkit.spec import Adapter
from peftkit.swap import CHILD
from peftkit.wrap import Record, check_classes, check_known, detach_code, record_of, restore, sites_of, unwrap

M = TypeVar("M", bound=nn.Module)


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
    changed = folded(path, adapters, before, weights.turn)
    stored = weights.stored()
    sites = []
    for name, value in changed.items():
        identity = id(module._parameters.get(name))
        if identity not in kept:
            kept[identity] = stored[name].clone()
        record.backups.setdefault(path, {})[name] = kept[identity]
        storage = str(stored[name].dtype).removeprefix("torch.")
        sites.append(measured(path, name, storage, weights.store(name, value)))
    return sites
