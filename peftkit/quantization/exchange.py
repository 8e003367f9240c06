"""A module's class and storage exchanged for another's, in place: it keeps its identity, hooks and children."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_STORAGE = ("_parameters", "_buffers", "_non_persistent_buffers_set")


@dataclass(frozen=True, kw_only=True)
class Former:
    """What a module was before an exchange. Its tensors are the module's own, not copies."""

    cls: type[nn.Module]
    storage: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the module had, by name."""
        return {n: p for n, p in self.storage["_parameters"].items() if p is not None}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has when no adapter is attached."""
    return getattr(type(module), "_peftkit_original", type(module))


def rebind(module: nn.Module, before: Any, after: Any) -> None:
    """Makes the bound forwards that accelerate's hooks leave on the instance those of another class."""
    for key in ("_old_forward", "forward"):
        bound = module.__dict__.get(key)
        if isinstance(bound, types.MethodType) and bound.__func__ is before.forward:
            module.__dict__[key] = types.MethodType(after.forward, module)


def exchange(module: nn.Module, fresh: nn.Module) -> Former:
    """Gives the module the class, parameters, buffers and settings of `fresh`, which is used up.

    Args:
        module: of a class of its own, without adapters' code on it.

    Returns:
        What `put_back` needs.
    """
    former = Former(
        cls=type(module),
        storage={key: module.__dict__[key] for key in _STORAGE},
        attributes={k: v for k, v in module.__dict__.items() if _is_setting(k)},
    )
    training = module.training
    _fill(module, type(fresh), {k: fresh.__dict__[k] for k in _STORAGE}, fresh.__dict__)
    module.training = training
    return former


def put_back(module: nn.Module, former: Former) -> None:
    """Undoes an exchange: the same class, the same tensors."""
    _fill(module, former.cls, former.storage, former.attributes)


def _is_setting(key: str) -> bool:
    return not key.startswith("_") and key not in ("training", "forward")


def _fill(module: nn.Module, cls: type[nn.Module], storage: dict[str, Any], attributes: dict[str, Any]) -> None:
    for key in [k for k in module.__dict__ if _is_setting(k)]:
        del module.__dict__[key]
    module.__dict__.update({k: v for k, v in attributes.items() if _is_setting(k)})
    module.__dict__.update(storage)
    rebind(module, type(module), cls)
    module.__class__ = cls
