"""A suite: what is compared with what, on what, with which seeds and learning rates. YAML, read strictly."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from peftkit.errors import nearest
from peftkit_bench import subjects
from peftkit_bench.spec import Contender, SuiteError

T = TypeVar("T")

RUNNERS = {"comparison": "engine", "merge": "merging"}
"""Modules of this package with `run` and `dry_run`, by the `kind` of the suites that they take."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The frozen model: exactly one of the two."""

    package: str | None = None
    """Import name of an installed package that carries a model in its folder `model`."""
    path: str | None = None
    """Folder of a model, or its name on a hub."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Docstring origin: classes and sizes of the splits."""

    origins: tuple[str, ...]
    train: int
    validation: int
    test: int
    max_tokens: int = 64
    """Texts are cut to this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The same for every method; the learning rate alone is each method's own."""

    steps: int
    batch_size: int = 32
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from zero; it then falls linearly to zero."""
    weight_decay: float = 0.0
    head_learning_rate: float = 1e-2
    """Of the classification head, the same for every method."""
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Tune:
    """A search for learning rates: every contender is run at every rate, and predicts the validation split."""

    learning_rates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is compared with what."""

    name: str
    title: str
    backbone: Backbone
    data: Data
    training: Training
    seeds: tuple[int, ...]
    contenders: Mapping[str, Contender]
    """Rows by the name that the report shows."""
    kind: str = "comparison"
    task: str = "seq-cls"
    budget: int | None = None
    """Trainable parameters that sizes are solved for, the head left out; None: sizes stand in the configs."""
    tune: Tune | None = None
    """None: the contenders' own learning rates, and the test split."""

    @property
    def split(self) -> str:
        """The split that the suite predicts."""
        return "test" if self.tune is None else "validation"


def load(path: Path) -> Suite:
    """The suite that a YAML file describes.

    Raises:
        SuiteError: a key is unknown, missing or of the wrong type, or values contradict each other.
    """
    found = values(path)
    try:
        return parse(found)
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None


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


def runner(path: Path) -> str:
    """The name of the module of this package that runs the suite in a file; see RUNNERS.

    Raises:
        SuiteError: the file holds no suite, or one of an unknown kind.
    """
    found = values(path)
    kind = found.get("kind", "comparison") if isinstance(found, dict) else "comparison"
    if kind not in RUNNERS:
        raise SuiteError(f"{path}: kind: {nearest(str(kind), RUNNERS)}")
    return RUNNERS[kind]


def parse(found: Any) -> Suite:
    """The suite that plain values describe.

    Raises:
        SuiteError: see `load`.
    """
    suite = strictly(Suite, found)
    _check(suite)
    return suite


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
    if wanted is Any:
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


def _check(suite: Suite) -> None:
    backbone, data, training = suite.backbone, suite.data, suite.training
    require((backbone.package is None) != (backbone.path is None), "backbone: give either package or path")
    require(len(suite.seeds) > 0 and len(set(suite.seeds)) == len(suite.seeds), "seeds: expected different numbers")
    require(len(suite.contenders) > 0, "contenders: expected at least one")
    require(suite.kind == "comparison", f"kind: expected 'comparison', found {suite.kind!r}")
    require(suite.task == "seq-cls", f"task: expected 'seq-cls', found {suite.task!r}")
    for name, contender in suite.contenders.items():
        where = f"contenders, {name}"
        require(contender.subject in subjects.NAMES, f"{where}, subject: {nearest(contender.subject, subjects.NAMES)}")
    require(data.max_tokens >= 8, f"data, max_tokens: expected at least 8, found {data.max_tokens}")
    require(training.steps >= 1, f"training, steps: expected at least 1, found {training.steps}")
    require(training.batch_size >= 1, f"training, batch_size: expected at least 1, found {training.batch_size}")
    require(0 <= training.warmup < 1, f"training, warmup: expected a share in [0, 1), found {training.warmup}")
    require(suite.budget is None or suite.budget > 0, f"budget: expected a positive count, found {suite.budget}")
    rates = suite.tune.learning_rates if suite.tune else ()
    require(suite.tune is None or len(rates) > 0, "tune, learning_rates: expected at least one")
    given = [c.learning_rate for c in suite.contenders.values() if c.learning_rate is not None]
    require(all(rate > 0 for rate in (*rates, *given, training.head_learning_rate)), "learning rates are positive")
