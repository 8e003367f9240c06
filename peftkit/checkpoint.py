"""Saves and loads adapters as Hugging Face peft's folders: strict in what is read, atomic in what is written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from peftkit import backbones, fingerprint, folder, targets
from peftkit.errors import BaseMismatchError, CheckpointError, ConfigError, PeftkitError, nearest
from peftkit.methods import METHODS
from peftkit.plan import Plan, plan
from peftkit.quantization import original_class
from peftkit.sharding import gathered
from peftkit.spec import METADATA_PREFIX, Method, PeftFormat, State
from peftkit.whole import WholeModule
from peftkit.wrap import adapters_of, attach, check_name, is_wrapped, record_of, replaced_by_merge, state_of, step_sites

M = TypeVar("M", bound=nn.Module)
Ignorable = Literal["missing", "unexpected", "base"]

DEFAULT_HEADS = ("classifier", "score", "qa_outputs")
"""Names that peft adds to modules_to_save for a task, whether the model has them or not."""
_ABOUT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "peftkit_method",
)
"""Keys of adapter_config.json that say nothing about the maths."""
PEFT_VERSION = "0.19.0"
"""The version of peft whose formulas the written folders follow; some of its methods computed otherwise before."""
OWN_PREFIX = "PEFTKIT_"
"""Marks the peft_type of methods that peft does not have."""


def save(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", about: Mapping[str, Any] | None = None
) -> Path:
    """Writes one adapter as a folder that peft and everything that reads peft's folders can load.

    The adapter named "default" goes into `path`, any other into the subfolder of its name. Killed at any moment, either
    the old folder or the new one is there.

    Args:
        about: what should be known of the adapter's origin (data, seed, metrics); plain values, kept in peftkit.json.

    Returns:
        The folder written.

    Raises:
        StateError: the model is not wrapped, or holds no adapter of that name.
        CheckpointError: the folder cannot be written, or `about` is not plain JSON.
        TrainingError: the adapter was trained without what its method needs.
    """
    planned, tensors_by_site = _stored(model, name)
    tensors = {k: gathered(t).detach().cpu().contiguous() for k, t in packed(planned, tensors_by_site).items()}
    destination = Path(path) if name == "default" else Path(path) / name
    origin = origin_of(model, name)
    if about is not None:
        origin["about"] = dict(about)
    try:
        files = {
            folder.CONFIG: _json(written_config(model, planned)),
            folder.PROVENANCE: _json({"format": 1, "method": planned.method.name, **origin}),
            folder.CARD: _card(model, planned).encode(),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"about must hold plain JSON values: {error}") from None
    folder.write(destination, files, tensors)
    return destination


def origin_of(model: nn.Module, name: str) -> dict[str, Any]:
    """What is known of an adapter's origin; a fingerprint of the base weights is made once and kept."""
    record = record_of(model)
    origin = dict(record.provenance.get(name, {}))
    if "base" not in origin:
        left_out = [s.path for s in record.plans[name].extras]
        origin["base"] = {
            "class": backbones_class(model),
            "tensors": fingerprint.fingerprint(fingerprint.base_tensors(model, replaced_by_merge(record), left_out)),
        }
        record.provenance[name] = origin
    return origin


def _stored(model: nn.Module, name: str) -> tuple[Plan, State]:
    """The plan and the tensors to write, as the method stores what was trained."""
    state = state_of(model, name)
    planned = record_of(model).plans[name]
    adapters = dict(adapters_of(model, name))
    for adapter in adapters.values():
        adapter.check_trained()
    method = planned.method
    if method.stored is None:
        return planned, state
    config, changed = method.stored(planned.config, adapters)
    sites = tuple(dataclasses.replace(site, count=method.parameter_count(site, config)) for site in planned.sites)
    shared = method.shared_count(sites, config) if method.shared_count else 0
    return dataclasses.replace(planned, config=config, sites=sites, shared=shared), {**state, **changed}


def load(
    model: M,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = True,
    ignore: Collection[Ignorable] = (),
    dtype: torch.dtype | None = None,
) -> M:
    """The same model with a saved adapter attached and active; the folder may be peft's or peftkit's.

    Everything is checked before anything changes.

    Args:
        name: the name to attach under; where `path` holds adapters in subfolders, the subfolder to read.
        trainable: False attaches the adapter frozen.
        ignore: what to accept: "missing" tensors (they keep a fresh start), "unexpected" tensors (they are dropped),
            a "base" whose weights are not those that the adapter was trained on.
        dtype: dtype of the adapter; None: that of the weights beside it, at least float32.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or tensors are missing, unexpected or of another shape.
        BaseMismatchError: the base weights are not those that the adapter was trained on.
        ConfigError: the name is taken, or the config does not fit.
        TargetError: the config names modules that the model does not have.
    """
    unknown = set(ignore) - {"missing", "unexpected", "base"}
    if unknown:
        raise ConfigError(
            f"ignore takes 'missing', 'unexpected' and 'base', found {', '.join(map(repr, sorted(unknown)))}"
        )
    check_name(name)
    if is_wrapped(model) and name in record_of(model).plans:
        raise ConfigError(f"an adapter named {name!r} is attached already; choose another name or unwrap it first")
    if is_wrapped(model) and record_of(model).merged:
        raise ConfigError("adapters are merged into the weights; call peftkit.unmerge(model) before loading another")
    source = folder.located(path, name)
    planned, state = read(model, source, ignore)
    found = provenance(source)
    if "base" not in ignore:
        _check_base(model, planned, found, source)
    attach(model, planned, name=name, dtype=dtype, trainable=trainable, state=state)
    record_of(model).provenance[name] = found
    return model


def read(model: nn.Module, source: Path, ignore: Collection[Ignorable] = ()) -> tuple[Plan, State]:
    """The plan and the tensors of a saved adapter for this model, which stays as it is and may be on the meta device.

    Args:
        source: the folder that holds the adapter's files, as `folder.located` finds it.
        ignore: as in `load`; a model on the meta device needs "base".

    Raises:
        CheckpointError, BaseMismatchError, TargetError: as `load`.
    """
    config = targets.without_idle(model, read_config(source, model))
    tensors = folder.read_tensors(source)
    planned = plan(model, config)
    tensors = _checked(planned, _without_base_copies(model, tensors, source, ignore), source, ignore)
    return planned, unpacked(planned, tensors)


# Config -------------------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike[str], model: nn.Module) -> Any:
    """The configuration in an adapter folder, for this model.

    Raises:
        CheckpointError: not an adapter config, a method that is not registered, or a field whose value the method
            does not implement.
    """
    file = Path(path) / folder.CONFIG
    fields = folder.read_json(file)
    method = _method_of(fields, file)
    known = {f.name for f in dataclasses.fields(method.config)}
    peft = method.peft or PeftFormat(peft_type=OWN_PREFIX + method.name.upper())
    if peft.read_config is not None:
        fields = peft.read_config(dict(fields), model)
    kept: dict[str, Any] = {}
    for key, value in fields.items():
        if key in known:
            kept[key] = tuple(value) if isinstance(value, list) else value
        elif key not in _ABOUT and not _inert(value) and not _accepted(peft, key, value):
            only = peft.ignored.get(key)
            hint = f"it reads {key}={' or '.join(map(repr, only))} only" if only else nearest(key, known)
            raise CheckpointError(f"{file}: {key}={value!r} is not implemented by peftkit's {method.name}; {hint}")
    if kept.get("modules_to_save"):
        paths = [p for p, _ in targets.modules(model)]
        kept["modules_to_save"] = tuple(
            n
            for n in kept["modules_to_save"]
            if n not in DEFAULT_HEADS or any(targets.suffix_match(p, n) for p in paths)
        )
    elif "modules_to_save" in kept:
        kept["modules_to_save"] = ()
    try:
        return method.config(**kept)
    except PeftkitError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: a field has a value of the wrong kind: {error}") from None


def _method_of(fields: Mapping[str, Any], file: Path) -> Method:
    kind = fields.get("peft_type")
    if kind is None and "config" in fields and ("hidden_size" in fields or "model_type" in fields):
        raise CheckpointError(
            f"{file} is an AdapterHub config, which has the same file name and another schema; "
            "load it with the adapters library and save it in peft's format"
        )
    by_kind = {_kind(m): m for m in METHODS.values()}
    if not isinstance(kind, str) or kind not in by_kind:
        raise CheckpointError(f"{file}: peft_type {kind!r} is not registered; {nearest(str(kind), by_kind)}")
    return by_kind[kind]


def _kind(method: Method) -> str:
    return method.peft.peft_type if method.peft else OWN_PREFIX + method.name.upper()


def _inert(value: Any) -> bool:
    """Whether a value switches nothing on: None, False, empty, or an object of such values."""
    if isinstance(value, dict):
        return all(_inert(v) for v in value.values())
    return value is None or value is False or value in ("", [], ())


def _accepted(peft: PeftFormat, key: str, value: Any) -> bool:
    return key in peft.ignored and (not peft.ignored[key] or value in peft.ignored[key])


def written_config(model: nn.Module, planned: Plan) -> dict[str, Any]:
    """The fields of adapter_config.json, targets written out."""
    method, config = planned.method, planned.config
    fields = config.to_dict()
    # An unset pattern is an empty object on disk: peft asks for its keys.
    fields.update({k: {} for k in ("rank_pattern", "alpha_pattern") if k in fields and fields[k] is None})
    if planned.targets or config.target_modules is not None:
        fields["target_modules"] = sorted(planned.targets)
        # The targets are written out, and some of peft's config classes do not know these fields.
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            del fields[key]
    fields["modules_to_save"] = sorted(targets.extra_paths(model, config)) or None
    fields["task_type"] = config.task_type or backbones.task_type(model)
    fields["peft_type"] = _kind(method)
    fields["peft_version"] = PEFT_VERSION
    fields["base_model_name_or_path"] = backbones.name_of(model)
    fields["inference_mode"] = True
    if method.peft and "fan_in_fan_out" in method.peft.ignored:
        fields["fan_in_fan_out"] = any(site.kind == "Conv1D" for site in planned.sites)
    if method.peft and method.peft.write_config is not None:
        fields = method.peft.write_config(planned, fields)
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in sorted(fields.items())}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _card(model: nn.Module, planned: Plan) -> str:
    """A model card: what the folder is and how to load it."""
    method = planned.method
    name = backbones.name_of(model) or original_class(model).__name__
    return (
        f"---\nlibrary_name: peftkit\ntags:\n- peft\n- {method.name}\n---\n\n# {method.title} for {name}\n\n"
        f"- method: {method.title}{f' ({method.paper})' if method.paper else ''}\n"
        f"- trainable parameters: {planned.trainable:,} of {planned.total:,}\n"
        f"- base model: {name} ({original_class(model).__name__}); "
        f"a fingerprint of its weights is in `{folder.PROVENANCE}`\n\n"
        '```python\nimport peftkit\n\npeftkit.load(model, "path/to/this/folder")\n```\n'
    )


# Tensors ------------------------------------------------------------------------------------------------------------


def packed(planned: Plan, state: State) -> dict[str, Tensor]:
    """The tensors by their keys on disk."""
    peft = planned.method.peft
    extras = {s.path for s in planned.extras}
    own = {p: t for p, t in state.items() if p not in extras}
    if peft is not None and peft.pack is not None:
        found = dict(peft.pack(planned, own))
    else:
        names = peft.names if peft else {}
        found = {_key(p, names.get(n, n)): t for p, tensors in own.items() for n, t in tensors.items()}
    prefix = peft.prefix if peft else METADATA_PREFIX
    found.update({_key(p, n, prefix): t for p in extras if p in state for n, t in state[p].items()})
    return found


def unpacked(planned: Plan, tensors: Mapping[str, Tensor]) -> State:
    """The tensors by site, from their keys on disk; keys without a home are not in it."""
    peft = planned.method.peft
    expected = expected_state(planned)
    extras = {s.path for s in planned.extras}
    names = peft.names if peft and peft.pack is None else {}
    state: State = {}
    if peft is not None and peft.unpack is not None:
        keys = {_key(p, n, peft.prefix) for p in extras if p in expected for n in expected[p]}
        state = {
            p: dict(t) for p, t in peft.unpack(planned, {k: t for k, t in tensors.items() if k not in keys}).items()
        }
    for path, found in expected.items():
        if path in extras or peft is None or peft.unpack is None:
            for name in found:
                prefix = peft.prefix if peft and path in extras else METADATA_PREFIX
                key = _key(path, name if path in extras else names.get(name, name), prefix)
                if key in tensors:
                    state.setdefault(path, {})[name] = tensors[key]
    return state


def expected_state(planned: Plan) -> State:
    """The tensors that an adapter of this plan has, on the meta device."""
    method, config = planned.method, planned.config
    state: State = {}
    with torch.device("meta"):
        shared = method.shared(planned.sites, config) if method.shared else None
        if shared is not None and shared.tensors():
            state[""] = shared.tensors()
        for site in step_sites(planned):
            if site.role == "extra":
                found: dict[str, Tensor] = WholeModule(site.parameters).tensors()
                if site.count == 0:
                    continue
            else:
                found = method.adapter(site, config, shared).tensors()
                counted = site.facts.get("counted")
                if counted is not None:
                    found = {n: t for n, t in found.items() if n in counted}
            if found:
                state[site.path] = {**state.get(site.path, {}), **found}
    return state


def _key(path: str, name: str, prefix: str = METADATA_PREFIX) -> str:
    return f"{prefix}{path}.{name}" if path else f"{prefix}{name}"


def _checked(
    planned: Plan, tensors: dict[str, Tensor], source: Path, ignore: Collection[Ignorable]
) -> dict[str, Tensor]:
    """The tensors that fit the plan.

    Raises:
        CheckpointError: some are missing, unexpected, or of another shape.
    """
    try:
        expected = packed(planned, expected_state(planned))
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{source}: the config asks for tensors that cannot be built: {reason}") from error
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected and "unexpected" not in ignore:
        raise CheckpointError(
            f"{source}: {len(unexpected)} tensors have no place in the model, first {unexpected[0]!r}"
            f"{' (' + nearest(unexpected[0], missing) + ')' if missing else ''}; the adapter belongs to another model, "
            "or its config was changed. ignore=('unexpected',) drops them"
        )
    if missing and "missing" not in ignore:
        raise CheckpointError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing, first {missing[0]!r}; "
            "ignore=('missing',) leaves them at a fresh start"
        )
    for key, tensor in tensors.items():
        if key in expected and tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(tensor.shape)}, the model and the config need "
                f"{tuple(expected[key].shape)}; the adapter belongs to another model, or its config was changed"
            )
        if key in expected and expected[key].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {key} holds {tensor.dtype}, expected floating-point numbers")
    return {k: t for k, t in tensors.items() if k in expected}


def _without_base_copies(
    model: nn.Module, tensors: dict[str, Tensor], source: Path, ignore: Collection[Ignorable]
) -> dict[str, Tensor]:
    """The tensors without the copies of base weights that peft adds for adapted embeddings.

    Raises:
        BaseMismatchError: such a copy is not the model's own weight.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for key, tensor in tensors.items():
        if not key.endswith(".base_layer.weight"):
            kept[key] = tensor
            continue
        name = key.removeprefix(METADATA_PREFIX).replace(".base_layer.", ".")
        if "base" in ignore:
            continue
        same = (
            name in own and own[name].shape == tensor.shape and torch.equal(own[name].cpu(), tensor.to(own[name].dtype))
        )
        if not same:
            raise BaseMismatchError(
                f"{source}: {key} is a copy of the base weight that the adapter was trained on, and the model's {name} "
                "is another. Load the base that it was trained on, or accept this one with ignore=('base',)"
            )
    return kept


# Provenance ---------------------------------------------------------------------------------------------------------


def provenance(source: Path) -> dict[str, Any]:
    """What a saved adapter's folder knows of its origin: "base" and "about", where they are there.

    Raises:
        CheckpointError: the file that says it cannot be read.
    """
    file = source / folder.PROVENANCE
    if not file.exists():
        return {}
    found = folder.read_json(file)
    return {k: v for k, v in found.items() if k in ("base", "about")}


def _check_base(model: nn.Module, planned: Plan, provenance: Mapping[str, Any], source: Path) -> None:
    base = provenance.get("base")
    if base is None:
        return
    stored = base.get("tensors") if isinstance(base, dict) else None
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise CheckpointError(
            f"{source / folder.PROVENANCE}: base.tensors is not an object of digests; get the file again"
        )
    backups = replaced_by_merge(record_of(model)) if is_wrapped(model) else {}
    tensors = fingerprint.base_tensors(model, backups, [s.path for s in planned.extras])
    wrong = fingerprint.differences(tensors, stored)
    if wrong:
        raise BaseMismatchError(
            f"{source}: the adapter was trained on other base weights: {len(wrong)} of {len(stored)} tensors differ, "
            f"first {wrong[0]!r}. Load the base model that it was trained on "
            f"({base.get('class') if isinstance(base, dict) else None}), or accept this one with ignore=('base',)"
        )
    check_start(planned, fingerprint.recoded(tensors, stored), source)


def check_start(planned: Plan, recoded: Sequence[str], source: Path) -> None:
    """Raises BaseMismatchError when an adapter starts from weights that are quantized on one side and not on the other.

    Args:
        recoded: names of such weights.
    """
    if recoded and _starts_from_weights(planned):
        raise BaseMismatchError(
            f"{source}: the adapter starts from its base, and {recoded[0]} is quantized on one side, when it was "
            "trained or now, and not on the other: another start would be computed. Load the base that it was trained "
            "on, or accept this one with ignore=('base',)"
        )


def _starts_from_weights(planned: Plan) -> bool:
    """Whether an adapter of the plan computes from the base what its folder does not hold."""
    method, config = planned.method, planned.config
    with torch.device("meta"):
        shared = method.shared(planned.sites, config) if method.shared else None
        return any(method.adapter(site, config, shared).start_from_weight for site in planned.sites)


def backbones_class(model: nn.Module) -> str:
    """The class and, for transformers models, the name of a model."""
    name = backbones.name_of(model)
    return original_class(model).__name__ + (f" {name}" if name else "")
