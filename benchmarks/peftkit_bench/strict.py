"""Values into dataclasses, strictly: no unknown key, no missing key, every value of the declared type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from peftkit.errors import nearest
from peftkit_bench.spec import SuiteError

T = TypeVar("T")


def values(path: Path) -> Any:
    """What a YAML file holds, as plain values.

    Raises:
        SuiteError: there is no such file, or it is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SuiteError(f"{path}: expected a suite, found {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: not YAML: {error}") from None


def strictly(cls: type[T], value: Any, where: str = "the suite") -> T:
    """A dataclass from a mapping: no unknown key, no missing key, every value of the declared type.

    Raises:
        SuiteError: names the place, what was expected and what was found.
    """
    if not isinstance(value, dict):
        raise SuiteError(f"{where}: expected keys and values, found {type(value).__name__} {value!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # called with dataclasses only
    for key in value:
        if key not in fields:
            raise SuiteError(f"{where}: unknown key {key!r}; {nearest(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    made = {}
    for name, each in fields.items():
        if name in value:
            made[name] = _convert(hints[name], value[name], f"{where}, {name}" if where != "the suite" else name)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise SuiteError(f"{where}: the key {name!r} is missing")
    return cls(**made)


def _convert(wanted: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise SuiteError(f"{where}: expected a list, found {value!r}")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise SuiteError(f"{where}: expected names and values, found {value!r}")
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(wanted):
        return strictly(typing.cast(type, wanted), value, where)
    if wanted is float and isinstance(value, str):
        # YAML 1.1 reads 5e-3 as text for want of a dot.
        try:
            return float(value)
        except ValueError:
            raise SuiteError(f"{where}: expected a number, found {value!r}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise SuiteError(f"{where}: expected {wanted.__name__}, found {value!r}")
    return value


def require(condition: bool, message: str) -> None:
    """Raises SuiteError with the message where the condition does not hold."""
    if not condition:
        raise SuiteError(message)
