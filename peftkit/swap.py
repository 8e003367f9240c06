"""The class swap: a subclass made from a module's own class, whose forward and attributes go through its adapters.

The module keeps its identity, its parameters and its place in the tree; only `__class__` changes, and changes back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from peftkit.quantization.exchange import original_class as original_class
from peftkit.quantization.exchange import rebind
from peftkit.spec import Adapter

CHILD = "peftkit"
"""Name of the child that holds a module's adapters."""
ROOT_METHODS: dict[str, Callable[..., Any]] = {}
"""Methods that a wrapped model gets in place of its own of that name; each receives the original first."""


def _reader(name: str) -> property:
    """A property that reads the module's own attribute through the active adapters."""

    def get(self: nn.Module) -> Any:
        parameters = self._parameters
        value = parameters[name] if name in parameters else self.__dict__[name]
        for adapter in self.__dict__["_peftkit_active"]:
            if name in adapter.replaces:
                value = adapter.replacement(name, value)
        return value

    def put(self: nn.Module, value: Any) -> None:
        if name not in self._parameters:
            self.__dict__[name] = value

    return property(get, put)


def adapted(cls: type[nn.Module], replaced: frozenset[str], advised: bool, root: bool) -> type[nn.Module]:
    """The subclass of `cls` whose attributes and, where `advised`, forward go through the active adapters."""
    key: Any = (cls, replaced, advised, root)
    found: type[nn.Module] = _made(*key)
    return found


@functools.cache
def _made(cls: Any, replaced: frozenset[str], advised: bool, root: bool) -> type[nn.Module]:

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = functools.partial(cls.forward, self)
        for adapter in self.__dict__["_peftkit_active"]:
            if adapter.advises:
                call = functools.partial(adapter.forward, self, call)
        return call(*args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return (
            _rebuild,
            (cls, replaced, advised, root),
            self.__getstate__() if hasattr(cls, "__getstate__") else self.__dict__,
        )

    body: dict[str, Any] = {
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_peftkit_original": cls,
    }
    if advised:
        body["forward"] = forward
    body.update({name: _reader(name) for name in replaced})
    if issubclass(cls, nn.Sequential):
        # Such a module calls all its children in turn; the one that holds adapters is none of them.
        body["__iter__"] = lambda self: (m for n, m in self._modules.items() if n != CHILD)
        body["__len__"] = lambda self: len(self._modules) - (CHILD in self._modules)
    if root:
        for name, method in ROOT_METHODS.items():
            if hasattr(cls, name):
                body[name] = _overridden(getattr(cls, name), method)
    return type(cls.__name__, (cls,), body)


def _overridden(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(functools.partial(original, self), self, *args, **kwargs)

    return call


def _rebuild(cls: type[nn.Module], replaced: frozenset[str], advised: bool, root: bool) -> nn.Module:
    made = adapted(cls, replaced, advised, root)
    return made.__new__(made)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the module's class, and the bound forwards that accelerate's hooks leave on the instance."""
    current = type(module)
    if current is cls or (class_grew(module) and issubclass(current, cls) and "_peftkit_original" in cls.__dict__):
        return
    rebind(module, current, cls)
    module.__class__ = cls


def class_grew(module: nn.Module) -> bool:
    """Whether something derived another class from the adapted one after wrapping, as fully_shard does."""
    return "_peftkit_original" not in type(module).__dict__ and hasattr(type(module), "_peftkit_original")


def refresh(module: nn.Module, active: Sequence[str], *, root: bool) -> None:
    """Gives the module the class and the active adapters that fit its children; without children, its original class.

    Args:
        active: names of the adapters that take part, inner ones first.
        root: whether the module is the wrapped model itself.
    """
    children = module._modules.get(CHILD)
    attached: dict[str, Adapter] = dict(children.items()) if isinstance(children, nn.ModuleDict) else {}  # type: ignore[arg-type]  # holds adapters only
    cls = original_class(module)
    if not attached and not root:
        module._modules.pop(CHILD, None)
        module.__dict__.pop("_peftkit_active", None)
        set_class(module, cls)
        return
    module.__dict__["_peftkit_active"] = tuple(attached[name] for name in active if name in attached)
    replaced = frozenset(n for adapter in attached.values() for n in adapter.replaces if _has(module, n))
    advised = any(adapter.advises for adapter in attached.values())
    set_class(module, adapted(cls, replaced, advised, root))


def detach(module: nn.Module, *, root: bool) -> None:
    """Takes the adapters' code off the module and leaves their tensors where they are; `refresh` puts it back."""
    module.__dict__["_peftkit_active"] = ()
    cls = original_class(module)
    set_class(module, adapted(cls, frozenset(), False, True) if root else cls)


def _has(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None or name in module.__dict__
