"""What a model is made of, kept so that whatever a library does to its modules can be undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, set, list)


class Snapshot:
    """The modules, parameters, hooks and attributes of a model as they were; values are kept only where asked for.

    Objects are kept by reference: where a library puts other modules in their places, `restore` puts them back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {path: (module, _attributes(module)) for path, module in model.named_modules()}
        self._flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        # bitsandbytes keeps codes and scales of a layer in an object beside its parameters, and changes it in place.
        self._states = [
            (state, dict(state.__dict__))
            for module, _ in self._modules.values()
            if hasattr(state := module.__dict__.get("state"), "__dict__")
        ]
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        config: Any = getattr(model, "config", None)
        self._config = None if config is None else (config, dict(config.__dict__))

    @property
    def tensors(self) -> set[int]:
        """Identities of the model's parameters and buffers."""
        return {
            id(tensor)
            for _, kept in self._modules.values()
            for name in ("_parameters", "_buffers")
            for tensor in kept[name].values()
            if tensor is not None
        }

    def keep_values(self, parameters: Iterable[Tensor]) -> None:
        """Copies the values of parameters that may be overwritten."""
        for parameter in parameters:
            self._values.setdefault(id(parameter), (parameter, parameter.detach().clone()))

    def restore(self, model: nn.Module) -> None:
        """Makes the model what it was, apart from its mode, its device and values that were not kept."""
        training = model.training
        for module, kept in self._modules.values():
            module.__dict__.clear()
            module.__dict__.update({name: _copied(value) for name, value in kept.items()})
        for parameter, value in self._values.values():
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parameter.data.copy_(value)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_floating_point():
                parameter.requires_grad_(self._flags[name])
        for state, was in self._states:
            state.__dict__.clear()
            state.__dict__.update(was)
        if self._config is not None:
            config, kept = self._config
            config.__dict__.clear()
            config.__dict__.update(kept)
        model.train(training)


def _copied(value: Any) -> Any:
    """A container of its own with the same members."""
    return value.copy() if isinstance(value, _CONTAINERS) else value


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in module.__dict__.items()}
