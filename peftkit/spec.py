"""The vocabulary: Method, Config, Site, Adapter, Paper, PeftFormat. Types only; the verbs live elsewhere."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from peftkit.errors import ConfigError, nearest

C = TypeVar("C")
State = dict[str, dict[str, Tensor]]
"""The tensors of one adapter: site path -> tensor name -> tensor."""


class Attach(enum.Enum):
    """Where a method's adapters attach."""

    WEIGHT = "weight"  # a projection with a weight: Linear, Conv1D, Embedding
    MODULE = "module"  # the inputs and outputs of a sub-layer or block
    ATTENTION = "attention"  # the keys and values of an attention module
    INPUT = "input"  # the embedded input of a transformer stack
    PARAMETERS = "parameters"  # the backbone's own parameters, trained as copies


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str
    """arXiv identifier, such as "2106.09685"."""

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, arXiv:{self.arxiv}"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place in the backbone where one adapter attaches."""

    path: str
    """Module path; "" is the model itself."""
    role: str = "weight"
    """What the method does here; methods with one kind of site use one role."""
    kind: str = ""
    """Class name of the module."""
    in_features: int = 0
    out_features: int = 0
    bias: bool = False
    """Whether the module has a bias."""
    layer: int | None = None
    """Index of the block that holds the module, when there is one."""
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names and shapes of the backbone's own parameters that the adapter copies."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the method found out about the place (heads, head_dim, ...)."""
    count: int = 0
    """Exact number of trainable parameters that the adapter adds here."""

    @property
    def shape(self) -> str:
        """The shape as a person writes it: "out x in", or the shapes of the copied parameters."""
        if self.parameters:
            return ", ".join("x".join(map(str, shape)) for _, shape in self.parameters)
        return f"{self.out_features}x{self.in_features}" if self.out_features else "-"


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config(cls: type[C]) -> type[C]:
    """A frozen, keyword-only, strict configuration class: an unknown field raises ConfigError with a suggestion."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    names = [f.name for f in dataclasses.fields(made) if f.init]  # type: ignore[arg-type]  # made is a dataclass
    plain_init = made.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise ConfigError(f"{made.__name__} takes keyword arguments only, such as {made.__name__}({names[0]}=...)")
        for key in kwargs:
            if key not in names:
                raise ConfigError(f"{made.__name__} has no field {key!r}; {nearest(key, names)}")
        plain_init(self, **kwargs)

    __init__.__wrapped__ = plain_init  # type: ignore[attr-defined]  # keeps the signature readable
    made.__init__ = __init__  # type: ignore[method-assign]
    return made


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    """Lists, sets and ranges as tuples, mappings copied, so that a configuration shares nothing that can change."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=lambda v: (str(type(v)), str(v))))
    if isinstance(value, list | range):
        return tuple(value)
    return dict(value) if isinstance(value, Mapping) else value


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotated type. True is no number, an int is a float, and a float must be finite."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if wanted is None or wanted is types.NoneType:
        return value is None
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is Sequence or (origin is tuple and arguments[-1:] == (...,)):
        return isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_fits(v, a) for v, a in zip(value, arguments, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, item = arguments
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or wanted)


def _described(wanted: Any) -> str:
    """An annotated type as a person reads it in a message."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(a) for a in arguments)
    if origin in (tuple, Sequence):
        return "a list of " + " or ".join(_described(a) for a in arguments if a is not ...)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {_described(arguments[0])} to {_described(arguments[1])}"
    if wanted is types.NoneType:
        return "None"
    return "finite float" if wanted is float else getattr(wanted, "__name__", str(wanted))


@config
class Config:
    """What every method can be told. Fields carry the names that adapter_config.json uses."""

    target_modules: Sequence[str] | str | None = None
    """Module name suffixes, one regular expression, or "all-linear"; None: the method's default for the backbone."""
    exclude_modules: Sequence[str] | str | None = None
    """Suffixes or one regular expression of modules to leave out."""
    layers_to_transform: Sequence[int] | int | None = None
    """Indices of the blocks to adapt; None: all."""
    layers_pattern: Sequence[str] | str | None = None
    """Name of the list that holds the blocks, where it is not one of the usual names."""
    modules_to_save: Sequence[str] | None = None
    """Modules trained whole; None: a classification head that the model was given for its task; (): none."""
    task_type: str | None = None
    """SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM, SEQ_2_SEQ_LM or FEATURE_EXTRACTION; informative."""

    def __post_init__(self) -> None:
        hints = _annotations(type(self))  # type: ignore[arg-type]  # classes are hashable
        for f in dataclasses.fields(self):
            value = _plain(getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            wanted = hints[f.name]
            if not _fits(value, wanted):
                raise ConfigError(
                    f"{type(self).__name__}: {f.name} must be {_described(wanted)}, "
                    f"found {value!r:.200} ({type(value).__name__})"
                )
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError when the fields contradict each other or are out of range."""

    def require(self, condition: bool, message: str) -> None:
        """Raises ConfigError with the class's name before the message unless the condition holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, keys sorted."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(found.items())}


class Adapter(nn.Module):
    """The trainable module at one site.

    `forward` is advice around the module it is attached to: it receives that module, the call that computes what is
    underneath (the module itself or another adapter) and the call's arguments. `merged` says what the module's own
    parameters would have to be to compute the same without the adapter.
    """

    replaces: ClassVar[tuple[str, ...]] = ()
    """Attributes of the module that read through `replacement` while the adapter is active."""
    advises: ClassVar[bool] = True
    """False: the adapter only replaces attributes or only holds tensors, and its forward is never called."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Names of own parameters that stay frozen."""
    raw: ClassVar[bool] = False
    """True: `merged` reads and returns parameters as the module stores them; False: weights as (out, in)."""

    reads_weight: ClassVar[bool] = False
    """True: forward reads the module's own weight, so that only the innermost of several adapters can be merged."""
    additive: ClassVar[bool] = False
    """True: what `merged` adds to the parameters does not depend on them, so that it can be scaled."""

    start_from_weight: bool = False
    """True: what is not saved of the adapter is computed again from the module's weight when it is attached."""

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output with the adapter applied.

        Args:
            module: the module that the adapter is attached to.
            call: computes the output without this adapter from the same arguments.
        """
        return call(*args, **kwargs)

    def replacement(self, name: str, value: Any) -> Any:
        """What reading the attribute `name` of the module gives instead of `value`."""
        return value

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values of the module's parameters that compute base and adapter in one.

        Args:
            base: parameters by name in float32; "weight" as (out, in), "bias" as (out,), if the module has one.

        Returns:
            The changed entries, float32; the caller rounds once to the stored dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Factors (r, in) and (out, r), scale included, whose product is exactly what is added to the weight.

        None: the update is no such product, or depends on the weight.
        """
        return None

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """The adapter of a stripe of the weight: `merged` of the stripe alone is the stripe of what is merged.

        Args:
            side: 0: rows start to stop of the weight as (out, in), with their biases; 1: columns, with all biases.
                A `raw` adapter takes rows as they are stored, and the biases as the side says.

        Returns:
            An adapter that holds views, for merging only; None: a stripe depends on the rest of the weight.
        """
        return None

    def _with(self, **tensors: Tensor) -> Self:
        """A twin that shares everything but these tensors."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        for kind in ("_parameters", "_buffers"):
            own = self.__dict__[kind]
            twin.__dict__[kind] = {name: tensors.get(name, value) for name, value in own.items()}
        return twin

    def check_trained(self) -> None:
        """Called before the adapter is saved or merged.

        Raises:
            TrainingError: its tensors were trained without what the method needs.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What is saved of this adapter: its parameters and persistent buffers by name."""
        return dict(self.state_dict(keep_vars=True))


@dataclass(frozen=True, kw_only=True)
class PeftFormat:
    """How Hugging Face peft stores the method's adapter folder."""

    peft_type: str
    prefix: str = "base_model.model."
    """What precedes the paths of modules trained whole; "base_model." for methods that peft keeps outside the model."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensor name in the adapter -> tensor name on disk, where they differ."""
    pack: Callable[[Any, State], dict[str, Tensor]] | None = None
    """(plan, state) -> tensors by key on disk; None: `base_model.model.<path>.<name>`."""
    unpack: Callable[[Any, Mapping[str, Tensor]], State] | None = None
    """(plan, tensors by key) -> state; None: the inverse of the default."""
    write_config: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    """(plan, plain fields) -> the fields to write."""
    read_config: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    """(fields on disk, model) -> the fields of the config class."""
    ignored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that peft writes and the maths does not need -> accepted values; () accepts any value."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """The one field by which a method's size is set."""

    field: str
    low: int = 1
    high: int = 65536
    values: Callable[[Any], Sequence[int]] | None = None
    """(model) -> the values that are possible, ascending; None: every integer from low to high."""
    apply: Callable[[Any, int], Any] | None = None
    """(config, value) -> config; None: replace the field."""

    def set(self, cfg: Any, value: int) -> Any:
        """The config with the knob at `value`."""
        return self.apply(cfg, value) if self.apply else dataclasses.replace(cfg, **{self.field: value})


@dataclass(frozen=True, kw_only=True)
class Method:
    """One named PEFT technique: its maths as callables, its properties as declared facts."""

    name: str
    title: str
    paper: Paper | None
    config: type[Any]
    attach: Attach
    summary: str
    """One sentence: what is trained."""
    default_targets: tuple[str, ...] = ()
    """Slots of the backbone that are adapted when the config names no target."""
    sites: Callable[[nn.Module, Any], Sequence[Site]] | None = None
    """(model, config) -> sites without counts; None: the modules that `target_modules` selects."""
    parameter_count: Callable[[Site, Any], int]
    """Exact trainable parameters at one site."""
    adapter: Callable[[Site, Any, nn.Module | None], Adapter]
    """(site, config, shared) -> a new adapter whose tensors are on the default device, not yet initialised."""
    initialise: Callable[[Adapter, nn.Module, Site, Any], None]
    """(adapter, module it attaches to, site, config): fills the adapter's tensors."""
    shared: Callable[[Sequence[Site], Any], Adapter | None] | None = None
    """(sites, config) -> tensors that all sites share, held at the model; None: nothing is shared."""
    shared_count: Callable[[Sequence[Site], Any], int] | None = None
    """Exact trainable parameters of what is shared."""
    initialise_shared: Callable[[Adapter, nn.Module, Sequence[Site], Any], None] | None = None
    """(shared, model, sites, config): fills the shared tensors."""
    stored: Callable[[Any, Mapping[str, Adapter]], tuple[Any, State]] | None = None
    """(config, adapters by site path) -> config and tensors to save, where training changed them; None: as attached."""
    mergeable: bool = True
    starts_as_identity: bool = True
    quantized_base: bool = False
    """Whether it works on a base whose weights are stored quantized."""
    per_row: bool = False
    """Whether different rows of a batch can use different adapters."""
    embeddings: bool = False
    """Whether it attaches to nn.Embedding."""
    knob: Knob | None = None
    peft: PeftFormat | None = None


METADATA_PREFIX = "base_model.model."
"""What precedes a module path in an adapter file."""


def is_weight_module(module: nn.Module) -> bool:
    """Whether the module is a projection: a Linear, or a transposed one (transformers' Conv1D)."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    )


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which adapters beside weights of `dtype` are trained: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
