"""Folds adapters into the weights, and measures how much of their effect the stored weights keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit import targets
from peftkit.certificate import MergeReport, SiteMerge, kept_at, measured
from peftkit.conversion import anew, take_over
from peftkit.errors import ConfigError, MergeError, StateError
from peftkit.folding import folded, trained_whole
from peftkit.quantization import KINDS, weights_of
from peftkit.spec import Adapter
from peftkit.storing import form_of
from peftkit.swap import CHILD
from peftkit.wrap import Record, check_classes, check_known, detach_code, record_of, restore, sites_of, unwrap

M = TypeVar("M", bound=nn.Module)


def merge(
    model: nn.Module,
    *names: str,
    into: str | torch.dtype | None = None,
    inputs: Sequence[Any] | None = None,
    original: nn.Module | Mapping[str, Tensor] | None = None,
    residual_rank: int = 0,
    minimum_effect: float = 0.9,
) -> MergeReport:
    """Writes the active adapters into the weights, in place, and takes their code off the path.

    Each weight is computed in float32 (float64 stays) and rounded once. What was there before is kept, so that
    `unmerge` restores every bit; this needs as much memory as the weights that changed.

    Args:
        names: adapters to merge; none: the active ones.
        into: how the merged weights are stored.
            None: as they were; weights in codes (4 or 8 bits) are dequantized to what they were quantized from.
            "bf16", "fp16", "fp32", or such a dtype: codes are dequantized to it, in the whole model.
            "nf4", "fp4", "int8": the sum is put into codes again, chosen so that the update survives the rounding;
            projections that are in no codes yet go along.
            "fused": codes stay as they are, and the low-rank update beside them, as one operation: nothing is lost.
        inputs: batches as the model is used with (mappings of arguments, tuples or tensors), on which the report
            measures too, and by which codes are chosen.
        original: the model, or its state dict, before it was quantized; the report gives the error against it too.
        residual_rank: for codes, rank of what may stay beside them in 16 bits.
        minimum_effect: the least share of the change that has to be stored, in total and on `inputs` where there are
            some; 0 accepts anything.

    Returns:
        What was stored against what was meant, for each changed parameter.

    Raises:
        StateError: the model is not wrapped, something is merged already, or no adapter is active.
        ConfigError: an argument is out of range, or does not go with the others.
        MergeError: an adapter cannot be merged, a weight is tied to another module, a value is not finite, or too
            little of the change is kept. The model is as it was.
        TrainingError: an adapter was trained without what its method needs.
    """
    record = record_of(model)
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged already; call peftkit.unmerge(model) first")
    form = None if into is None else form_of(into, residual_rank)
    if form is None and residual_rank:
        raise ConfigError("residual_rank goes with into='nf4', 'fp4' or 'int8'")
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
    fresh, sites = anew(model, work, form, inputs, original)
    record.merged, record.resumed = tuple(chosen), record.active
    kept: dict[int, Tensor] = {}
    try:
        for path, module, adapters in work:
            if path not in fresh:
                sites += _merge_site(record, path, module, adapters, kept)
        report = MergeReport(adapters=tuple(chosen), sites=tuple(sites))
        _refuse_lost(report, minimum_effect)
    except BaseException:
        restore(model)
        raise
    detach_code(model)
    if fresh:
        record.conversion = take_over(model, fresh)
        detach_code(model)
    return report


def unmerge(model: nn.Module) -> None:
    """Restores every bit of the weights before the merge; the adapters act unmerged again.

    Raises:
        StateError: nothing is merged.
    """
    if not record_of(model).merged:
        raise StateError("nothing is merged; call peftkit.merge(model) first")
    restore(model)


def merge_and_unload(model: M, *names: str, **settings: Any) -> M:
    """The plain model with the adapters folded into its weights; nothing of peftkit is left on it.

    Where the report of the merge is wanted, call `merge` first: a merge that is in effect is kept.

    Args:
        names: adapters to merge; none: the active ones.
        settings: those of `merge`.

    Raises:
        StateError, MergeError: as `merge`.
    """
    record = record_of(model)
    if not record.merged:
        merge(model, *names, **settings)
    record.backups, record.conversion, record.merged, record.active = {}, None, (), ()
    return unwrap(model)


def _remedy(stored: str) -> str:
    """What keeps more of a change than a way of storing it."""
    if stored in KINDS:
        return "Give inputs= and residual_rank=, use into='fused', or merge into bf16"
    return "The steps of that dtype are too coarse for so small a change: load the base in float32, or do not merge"


def _refuse_lost(report: MergeReport, least: float) -> None:
    """Raises MergeError when less than a share of the whole change is stored."""
    if not 0 <= least <= 1:
        raise ConfigError(f"minimum_effect must lie in [0, 1], found {least}")
    kept = report.kept
    if kept < least:
        worst = min(report.sites, key=kept_at)
        raise MergeError(
            f"only {kept:.1%} of what the adapter changes would be stored (least at {worst.name}: "
            f"{kept_at(worst):.1%}, stored as {worst.dtype}), below minimum_effect={least}; the model is left "
            f"as it was. {_remedy(worst.dtype)}, or accept it with minimum_effect=0"
        )


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
    """Raises MergeError when a weight to be changed is also another module's, unless both read one trained copy."""
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
    copied = {
        f"{path}.{name}".lstrip(".")
        for path, module, adapters in work
        for name in module._parameters
        if trained_whole(name, adapters)
    }
    for path, module, _ in work:
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}".lstrip(".")
            others = [o for o in owners.get(id(parameter), ()) if o != full and not (o in copied and full in copied)]
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
        found = weights.store(name, value)
        sites.append(measured(path, name, storage, found, copied=trained_whole(name, adapters)))
    return sites
