"""Names in a checkpoint against names in the model, as transformers' own loading code maps them; never guessed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import BackboneError, CheckpointError, MergeError
from peftkit.shards.source import Entry, Source


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors of the checkpoint that become other tensors in the model: fused, split, transposed or permuted."""

    keys: tuple[str, ...]
    """In the checkpoint."""
    names: tuple[str, ...]
    """In the model."""
    first: str
    """The name under which transformers converts the group."""
    converter: Any = None
    patterns: tuple[str, ...] = ()
    """Which of the converter's patterns each key matched."""


@dataclass
class Names:
    """Where each tensor of a checkpoint is in a model."""

    direct: dict[str, str] = field(default_factory=dict)
    """Key -> name, for tensors that the model holds as they are stored."""
    groups: list[Group] = field(default_factory=list)
    unknown: tuple[str, ...] = ()
    """Keys that have no place in the model."""

    @property
    def provided(self) -> set[str]:
        """Names of the model's tensors that the checkpoint holds."""
        return {*self.direct.values(), *(n for g in self.groups for n in g.names)}


def names_of(model: nn.Module, source: Source) -> Names:
    """Where each tensor of a checkpoint is in the model.

    Args:
        model: on the meta device; a transformers model is told what was renamed, for `reverted`.

    Raises:
        CheckpointError: two tensors of the checkpoint would be the same one of the model, or a shape differs.
        BackboneError: the installed transformers does not say how it renames.
    """
    state = model.state_dict()
    if not hasattr(model, "base_model_prefix"):
        found = Names(direct={k: k for k in source.entries if k in state})
        found.unknown = tuple(k for k in source.entries if k not in state)
    else:
        found = _renamed(model, source, state)
    seen: dict[str, str] = {}
    for key, name in found.direct.items():
        if name in seen:
            raise CheckpointError(
                f"{source.path}: {seen[name]} and {key} are both {name} in {type(model).__name__}; remove one of them"
            )
        seen[name] = key
        shape, wanted = source.entries[key].shape, tuple(state[name].shape)
        if shape != wanted:
            raise CheckpointError(
                f"{source.path}: {key} has shape {shape}, and {name} in {type(model).__name__} has {wanted}; "
                "config.json "
                "belongs to another model, or the head to another task"
            )
    return found


def _renamed(model: Any, source: Source, state: Mapping[str, Tensor]) -> Names:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as error:
        import transformers

        raise BackboneError(
            f"transformers {transformers.__version__} does not say how it renames a checkpoint's tensors ({error}); "
            "install transformers 5.23"
        ) from None
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    found, unknown = Names(), []
    gathered: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(source.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unknown.append(key)
        elif pattern is None:
            found.direct[key] = name
        else:
            gathered.setdefault(name, []).append((key, pattern))
    model._weight_conversions = [m for m in mapping if m.was_used()]
    for first, pairs in gathered.items():
        keys, patterns = zip(*pairs, strict=True)
        group = Group(keys, (), first, by_pattern[patterns[0]], patterns)
        entries = [source.entries[k] for k in keys]
        sketch = {e.key: torch.empty(e.shape, dtype=e.torch_dtype, device="meta") for e in entries}
        made = converted(model, group, sketch)
        for name, tensor in made.items():
            if name not in state or tensor.shape != state[name].shape:
                wanted = tuple(state[name].shape) if name in state else "nothing of that name"
                raise CheckpointError(
                    f"{source.path}: {keys[0]} and {len(keys) - 1} more become {name} of shape {tuple(tensor.shape)}, "
                    f"and {type(model).__name__} has {wanted}; config.json belongs to another model"
                )
        found.groups.append(Group(keys, tuple(made), first, group.converter, patterns))
    found.unknown = tuple(unknown)
    return found


def converted(model: Any, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by name, from the checkpoint's by key.

    Raises:
        CheckpointError: transformers cannot convert them.
    """
    converter = copy.deepcopy(group.converter)
    for key, pattern in zip(group.keys, group.patterns, strict=True):
        converter.add_tensor(group.first, key, pattern, tensors[key])
    try:
        made = converter.convert(group.first, model=model, config=model.config)
    except Exception as error:  # whatever an operation of transformers meets
        raise CheckpointError(
            f"{group.keys[0]} and {len(group.keys) - 1} more cannot be converted to {group.first}: {error}"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def reverted(model: Any, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors by key, from the model's by name.

    Raises:
        MergeError: transformers' way back does not lead to the keys of the checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        made = revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # whatever an operation of transformers meets
        raise MergeError(
            f"{group.names[0]} is made of {len(group.keys)} tensors of the checkpoint, and transformers cannot "
            "write them "
            f"back ({error}); merge in memory with peftkit.merge and save_pretrained"
        ) from error
    prefix = f"{model.base_model_prefix}."
    found = {}
    for key in group.keys:
        other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
        value = made.get(key, made.get(other))
        if value is None or len(made) != len(group.keys):
            raise MergeError(
                f"{group.names[0]} is made of {', '.join(group.keys[:3])} in the checkpoint, and transformers "
                "would write "
                f"it as {', '.join(sorted(made)[:3])}; merge in memory with peftkit.merge and save_pretrained"
            )
        found[key] = value.contiguous()
    return found


def check_way_back(model: Any, group: Group, tensors: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
    """Raises MergeError unless converting and reverting gives the checkpoint's tensors to the bit."""
    back = reverted(model, group, made)
    for key in group.keys:
        ours, theirs = tensors[key].contiguous(), back[key]
        same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if not same or not torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)):
            raise MergeError(
                f"{key} does not come back to the bit when transformers converts it to {group.names[0]} and "
                "back; merge "
                "in memory with peftkit.merge and save_pretrained"
            )


def entries_of(source: Source, keys: Sequence[str]) -> list[Entry]:
    """The entries of keys."""
    return [source.entries[key] for key in keys]
