"""The fields of a peft config for a model: checked, with peftkit's own defaults where peftkit has the method too."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import peftkit
from peftkit import backbones, checkpoint, targets
from peftkit.errors import nearest
from peftkit.spec import Method, is_weight_module
from peftkit_bench.spec import SuiteError
from peftkit_bench.subjects.peft_methods import METHODS, PeftMethod, Shapes

RUNTIME = frozenset(
    {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
)
"""Fields that say where an adapter comes from; a suite sets none of them."""
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
UNTRAINED: Mapping[str, str] = {
    "kasa_config": "adds a loss of its own that peft leaves to the training loop",
    "monteclora_config": "adds a loss of its own that peft leaves to the training loop",
    "eva_config": "is initialised from data",
    "corda_config": "is initialised from data",
    "lora_ga_config": "is initialised from gradients",
    "arrow_config": "routes between adapters that were trained before",
    "alora_invocation_tokens": "needs tokens that the tasks do not have",
}
"""Fields whose feature a comparison cannot train as it is meant."""


def names() -> list[str]:
    """peft's methods by name: its types in lower case."""
    return sorted(str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def entry(name: str) -> PeftMethod:
    """What the suite knows of a method.

    Raises:
        SuiteError: peft has no such method, or it cannot be a contender.
    """
    known = names()
    if name not in known:
        raise SuiteError(f"peft has no method {name!r}; {nearest(name, known)}")
    # A method that a newer peft brings is taken as it comes, without a size to set.
    found = METHODS.get(name, PeftMethod())
    if found.refused:
        raise SuiteError(f"peft:{name} cannot be compared: {found.refused}")
    return found


def config_class(name: str) -> Any:
    """The config class of a method."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[name.upper()]


def tuner(name: str) -> Any:
    """The class that peft builds for a method."""
    return PEFT_TYPE_TO_TUNER_MAPPING[name.upper()]


def counterpart(name: str) -> Method | None:
    """peftkit's own method that peft stores as this one; None: peftkit has none."""
    kinds = {m.peft.peft_type: m for m in peftkit.METHODS.values() if m.peft is not None}
    return kinds.get(name.upper())


def resolved(model: nn.Module, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config of a method for a model, as plain values.

    Where peftkit has the method, its sites and defaults; elsewhere peft's, with the sites of peftkit's LoRA where peft
    knows none for the architecture. A task's head is trained whole, as peftkit does.

    Args:
        given: fields that the suite sets.

    Raises:
        SuiteError: no such method or field, or peft refuses the values.
        TargetError: a pattern matches nothing.
    """
    known = {field.name for field in dataclasses.fields(config_class(name))} - RUNTIME
    _check(name, given, known)
    twin = counterpart(name)
    if twin is not None:
        own = {field: given[field] for field in TARGETING if field in given}
        written = checkpoint.written_config(model, peftkit.plan(model, twin.config(**own)))
        # The targets are written out, so that the fields that narrowed them have done their work.
        rest = {field: value for field, value in given.items() if field not in own}
        found = {**{field: value for field, value in written.items() if field in known}, **rest}
        if twin.knob is not None and "total_step" in known:
            found["total_step"] = given.get("total_step")
    else:
        found = {**_placed(model, name, known, given), **given}
    found["task_type"] = backbones.task_type(model)
    found = {**entry(name).fitted(shapes(model, found.get("target_modules"))), **found}
    return {**plain(made(name, found).to_dict()), **{k: found[k] for k in ("total_step",) if k in found}}


def _check(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    for field, value in given.items():
        if field not in known:
            raise SuiteError(f"peft:{name} has no field {field!r}; {nearest(field, known)}")
        if field in UNTRAINED and value is not None:
            raise SuiteError(f"peft:{name} with {field} cannot be compared: it {UNTRAINED[field]}")
    for field, what in entry(name).needs.items():
        if not given.get(field):
            raise SuiteError(f"peft:{name} needs {field} in its config: {what}")


def _placed(model: nn.Module, name: str, known: set[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Where peft's own methods go when nothing is named, and what of the model is trained whole."""
    found: dict[str, Any] = {}
    mapping = getattr(tuner(name), "target_module_mapping", None)
    if "target_modules" in known and mapping:
        found["target_modules"] = mapping.get(backbones.model_type(model)) or lora_targets(model)
    if "modules_to_save" in known and "modules_to_save" not in given:
        found["modules_to_save"] = list(backbones.head_names(model)) or None
    if "fan_in_fan_out" in known:
        found["fan_in_fan_out"] = any(is_weight_module(m) and not isinstance(m, nn.Linear) for m in model.modules())
    return found


def lora_targets(model: nn.Module) -> list[str]:
    """What peftkit's LoRA would adapt, as suffixes of paths."""
    return sorted(peftkit.plan(model, peftkit.LoRA()).targets)


def shapes(model: nn.Module, wanted: Any) -> Shapes:
    """Sizes of the projections that `target_modules` selects; of all, where it selects none."""
    linear = {path: model.get_submodule(path) for path in backbones.linear_paths(model)}
    chosen = {
        path: module
        for path, module in linear.items()
        if wanted is None or wanted == "all-linear" or targets.matches(path, _patterns(wanted))
    } or linear
    pairs = [_features(module) for module in chosen.values()]
    blocks = {backbones.layer_index(path) for path in linear} - {None}
    return Shapes(
        common=math.gcd(*(size for pair in pairs for size in pair)),
        common_in=math.gcd(*(pair[0] for pair in pairs)),
        smallest=min(size for pair in pairs for size in pair),
        entries=min(a * b for a, b in pairs),
        layers=len(blocks),
    )


def _patterns(wanted: Any) -> Any:
    return wanted if isinstance(wanted, str) else tuple(wanted)


def _features(module: Any) -> tuple[int, int]:
    """Input and output features of a projection."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)


def made(name: str, fields: Mapping[str, Any]) -> Any:
    """The config object; where a schedule has no length yet, the shortest that peft accepts stands for it.

    Raises:
        SuiteError: peft refuses the values.
    """
    values = copy.deepcopy(dict(fields))
    if "total_step" in values and values["total_step"] is None:
        values["total_step"] = int(values.get("tinit") or 0) + int(values.get("tfinal") or 0) + 1
    try:
        return config_class(name)(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise SuiteError(f"peft:{name}: {error}") from None


def plain(value: Any) -> Any:
    """Plain values, sets in order; the fields of `RUNTIME` but for the task are left out."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in sorted(value.items()) if k not in RUNTIME - {"task_type"}}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
