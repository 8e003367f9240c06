"""METHODS: every registered method by name. Third parties register through the entry point group `peftkit.methods`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from peftkit.errors import ConfigError
from peftkit.methods import (
    adalora,
    bitfit,
    bottleneck,
    compacter,
    full,
    head,
    ia3,
    layernorm,
    loha,
    lokr,
    lora,
    loreft,
    oft,
    prefix,
    prompt,
    ptuning,
    vera,
)
from peftkit.spec import Method

ENTRY_POINTS = "peftkit.methods"
BUILT_IN: tuple[Method, ...] = (
    lora.METHOD,
    adalora.METHOD,
    vera.METHOD,
    loha.METHOD,
    lokr.METHOD,
    oft.METHOD,
    ia3.METHOD,
    bottleneck.METHOD,
    compacter.METHOD,
    loreft.METHOD,
    prefix.METHOD,
    prompt.METHOD,
    ptuning.METHOD,
    bitfit.METHOD,
    layernorm.METHOD,
    full.METHOD,
    head.METHOD,
)


@functools.cache
def _all() -> dict[str, Method]:
    found = {method.name: method for method in BUILT_IN}
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        method = point.load()
        if not isinstance(method, Method):
            raise ConfigError(
                f"entry point {point.name!r} of group {ENTRY_POINTS!r} gives a {type(method).__name__}, "
                "expected a peftkit.spec.Method"
            )
        if method.name != point.name:
            raise ConfigError(f"entry point {point.name!r} gives a method named {method.name!r}; the names must agree")
        if method.name in found:
            raise ConfigError(f"two methods are named {method.name!r}; rename the one of {point.value}")
        found[method.name] = method
    return found


class _Methods(Mapping[str, Method]):
    """Read-only; third parties' entry points are loaded on first use."""

    def __getitem__(self, name: str) -> Method:
        return _all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_all())

    def __len__(self) -> int:
        return len(_all())

    def __repr__(self) -> str:
        return f"METHODS({', '.join(self)})"


METHODS: Mapping[str, Method] = _Methods()


def method_of(config: Any) -> Method:
    """The method whose configuration this is.

    Raises:
        ConfigError: the object is not a configuration of a registered method.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    raise ConfigError(
        f"expected a configuration such as peftkit.LoRA(r=16), found {type(config).__name__}; "
        f"registered: {', '.join(m.config.__name__ for m in METHODS.values())}"
    )
