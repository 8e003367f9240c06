"""Prefix tuning: trained keys and values in front of those of every attention layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import backbones, targets
from peftkit.attention import (
    KeyValueAdapter,
    PositionOffset,
    RelativeKeyValueAdapter,
    joins_interface,
    position_argument,
    source_of,
)
from peftkit.errors import BackboneError, CheckpointError, TargetError
from peftkit.spec import METADATA_PREFIX, Adapter, Attach, Config, Knob, Method, Paper, PeftFormat, Site, State, config

PACKED = "prompt_embeddings"
"""The one tensor in which peft keeps all keys and values."""
START = 1.0
"""Standard deviation of the first keys and values, as in P-tuning v2."""


@config
class PrefixTuning(Config):
    """Length of the prefix, and how it is parametrised.

    `target_modules` names attention modules; None: the self-attention of every layer, and of the decoder's layers only
    where there is an encoder too, which is what Hugging Face peft trains and its folder holds. Li and Liang give the
    encoder and the cross-attention prefixes as well: on T5, `target_modules=("SelfAttention", "EncDecAttention")`; on
    BART, `("self_attn", "encoder_attn")`.
    """

    num_virtual_tokens: int = 20
    """Keys and values in front of each layer's own, at least 1."""
    prefix_projection: bool = False
    """Train an embedding and an MLP that gives the prefixes of all layers, instead of the prefixes themselves."""
    encoder_hidden_size: int | None = None
    """Hidden units of that MLP; None: the width of a layer's keys."""
    init_weights: Literal["zero"] | None = None
    """None: unit normal noise; "zero": keys and values start at zero."""
    num_layers: int | None = None
    """Read from folders that Hugging Face peft wrote for an encoder-decoder, see `unpack`; None otherwise."""
    inference_mode: bool = False
    """The prefixes come from a folder, which holds them computed; `prefix_projection` says how they were trained."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range."""
        self.require(
            self.num_virtual_tokens >= 1, f"num_virtual_tokens must be at least 1, found {self.num_virtual_tokens}"
        )
        self.require(
            self.encoder_hidden_size is None or self.encoder_hidden_size >= 1,
            f"encoder_hidden_size must be at least 1, found {self.encoder_hidden_size}",
        )
        self.require(
            self.init_weights in (None, "zero"), f"init_weights must be None or 'zero', found {self.init_weights!r}"
        )

    @property
    def projects(self) -> bool:
        """Whether an MLP is trained."""
        return self.prefix_projection and not self.inference_mode


class Projection(Adapter):
    """The prefixes of all layers: W₂ tanh(W₁ e + b₁) + b₂ of each virtual token's embedding e (paper, section 4.3)."""

    advises = False

    def __init__(self, length: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.empty(length, width))
        self.hidden_weight = nn.Parameter(torch.empty(hidden, width))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.output_weight = nn.Parameter(torch.empty(2 * layers * width, hidden))
        self.output_bias = nn.Parameter(torch.empty(2 * layers * width))

    def slice(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, each (length, width)."""
        rows = slice(2 * index * self.width, 2 * (index + 1) * self.width)
        hidden = torch.tanh(F.linear(self.embedding, self.hidden_weight, self.hidden_bias))
        key, value = F.linear(hidden, self.output_weight[rows], self.output_bias[rows]).chunk(2, dim=1)
        return key, value


class _Prefix(KeyValueAdapter):
    """One layer's prefix: its own keys and values, or a slice of the projection's."""

    def __init__(self, site: Site, cfg: PrefixTuning, shared: nn.Module | None) -> None:
        super().__init__(cfg.num_virtual_tokens, str(site.facts["source"]))
        self.index = int(site.facts["index"])
        self._cached: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self._shared: tuple[Projection, ...] = ()
        if isinstance(shared, Projection):
            self._shared = (shared,)
        else:
            shape = (cfg.num_virtual_tokens, int(site.facts["width"]))
            self.prefix_key = nn.Parameter(torch.empty(shape))
            self.prefix_value = nn.Parameter(torch.empty(shape))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (length, key-value heads · head width); evaluation remembers those of a projection."""
        if not self._shared:
            return self.prefix_key, self.prefix_value
        (projection,) = self._shared
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return projection.slice(self.index)
        key = tuple((p.data_ptr(), p._version, p.dtype) for p in projection.parameters())
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, projection.slice(self.index))
        return self._cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class Prefix(_Prefix):
    """Trained keys and values in front of an attention module's own."""


class RelativePrefix(_Prefix, RelativeKeyValueAdapter):
    """The same for T5's first layer, whose position bias serves all layers."""


# Sites --------------------------------------------------------------------------------------------------------------


def sites(model: nn.Module, cfg: PrefixTuning) -> list[Site]:
    """The attention modules, and the modules that turn positions into vectors, in this order.

    Raises:
        BackboneError: an attention module does not go through transformers' attention interface.
        TargetError: nothing is selected, or a part of the layers that share a relative position bias.
    """
    modules = dict(targets.modules(model))
    default = default_paths(model) if cfg.target_modules is None else list(modules)
    chosen = targets.narrow(model, cfg, default)
    refused = [p for p in chosen if not joins_interface(modules[p])]
    if refused and (cfg.target_modules is None or not isinstance(cfg.target_modules, str)):
        raise BackboneError(
            f"prefix tuning needs attention that goes through transformers' attention interface, and {refused[0]} "
            f"({type(modules[refused[0]]).__name__} of {type(model).__name__}) does not; "
            "choose another method, such as peftkit.PromptTuning or peftkit.LoRA"
        )
    chosen = [p for p in chosen if p not in set(refused)]
    if not chosen:
        raise TargetError("prefix: target_modules and layers_to_transform leave no attention; loosen one of them")
    _check_shared_bias(modules, chosen)
    shape = backbones.attention_shape(model)
    facts = {"width": shape.key_value_heads * shape.head_dim, "heads": shape.key_value_heads}
    complete = chosen == default_paths(model) if backbones.family(model) is not None else False
    found = [
        dataclasses.replace(
            targets.site_of(path, modules[path], role="attention"),
            facts={
                **facts,
                "index": index,
                "source": source_of(modules[path]),
                "relative": f"{path}.relative_attention_bias" in modules,
                "complete": complete,
                "submodules": 2 if backbones.is_encoder_decoder(model) else 1,
            },
        )
        for index, path in enumerate(chosen)
    ]
    shifted = backbones.position_modules(model, [p for p in chosen if not p.endswith(backbones.CROSS_ATTENTION)])
    return found + [
        dataclasses.replace(
            targets.site_of(path, modules[path], role="positions"),
            facts={"argument": position_argument(modules[path])},
        )
        for path in shifted
    ]


def default_paths(model: nn.Module) -> list[str]:
    """The self-attention of all layers; of the decoder's, where there is an encoder too."""
    known = backbones.family(model)
    slot = "attention.self" if known is not None and "attention.self" in known.slots else "attention"
    paths = backbones.slot_paths(model, slot)
    if not backbones.is_encoder_decoder(model):
        return paths
    decoder = backbones.stacks(model)[-1][0]
    return [p for p in paths if targets.inside(p, [decoder])]


def _check_shared_bias(modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> None:
    """Raises TargetError when layers that share the first layer's position bias are adapted in part."""
    for path in modules:
        owner, found, _ = path.rpartition(".relative_attention_bias")
        if not found:
            continue
        stack, _, kind = owner.partition(".0.")
        siblings = [p for p in modules if p.startswith(stack + ".") and p.endswith("." + kind)]
        missing = [p for p in siblings if p not in chosen]
        if missing and len(missing) < len(siblings):
            raise TargetError(
                f"the layers of {stack} share one relative position bias, which has to know of the prefix: "
                f"prefix all of them or none; {missing[0]} is left out"
            )


def parameter_count(site: Site, cfg: PrefixTuning) -> int:
    """2 n · width a layer; nothing with a projection, which is shared, and nothing where only positions move."""
    if site.role != "attention" or cfg.projects:
        return 0
    return 2 * cfg.num_virtual_tokens * int(site.facts["width"])


def _sizes(found: Sequence[Site], cfg: PrefixTuning) -> tuple[int, int, int, int]:
    """Length, width, hidden units and layers."""
    layers = [s for s in found if s.role == "attention"]
    width = int(layers[0].facts["width"])
    return cfg.num_virtual_tokens, width, cfg.encoder_hidden_size or width, len(layers)


def shared_count(found: Sequence[Site], cfg: PrefixTuning) -> int:
    """n · w + h (w + 1) + 2 L w (h + 1) for the projection, 0 without it."""
    if not cfg.projects:
        return 0
    length, width, hidden, layers = _sizes(found, cfg)
    return length * width + hidden * (width + 1) + 2 * layers * width * (hidden + 1)


def shared(found: Sequence[Site], cfg: PrefixTuning) -> Projection | None:
    """The projection, where one is trained."""
    return Projection(*_sizes(found, cfg)) if cfg.projects else None


def build(site: Site, cfg: PrefixTuning, shared: nn.Module | None) -> Adapter:
    """A prefix at an attention module, an offset at a module of positions."""
    if site.role == "positions":
        return PositionOffset(cfg.num_virtual_tokens, int(site.facts["argument"]))
    return RelativePrefix(site, cfg, shared) if site.facts["relative"] else Prefix(site, cfg, shared)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: PrefixTuning) -> None:
    """Unit noise, as in P-tuning v2, or zeros. Li and Liang start from the activations of real words."""
    for parameter in adapter.parameters():
        if cfg.init_weights == "zero":
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=START)


@torch.no_grad()
def initialise_shared(adapter: Adapter, model: nn.Module, found: Sequence[Site], cfg: PrefixTuning) -> None:
    """Unit noise as embedding, and layers whose outputs have about the scale of a prefix without projection."""
    assert isinstance(adapter, Projection)
    nn.init.normal_(adapter.embedding)
    nn.init.xavier_normal_(adapter.hidden_weight)
    nn.init.zeros_(adapter.hidden_bias)
    nn.init.normal_(adapter.output_weight, std=START / adapter.hidden_bias.numel() ** 0.5)
    if cfg.init_weights == "zero":
        nn.init.zeros_(adapter.output_weight)
    nn.init.zeros_(adapter.output_bias)


# Hugging Face peft's folder -----------------------------------------------------------------------------------------


def _key(path: str, name: str) -> str:
    return f"{METADATA_PREFIX}{path}.{name}"


def _layers(plan: Any) -> list[Site]:
    return [s for s in plan.sites if s.role == "attention"]


def pack(plan: Any, state: State) -> dict[str, Tensor]:
    """One tensor (n, layers · 2 · width), layer l's keys at 2 l and values at 2 l + 1.

    For an encoder-decoder peft reads four parts a layer from the tensor put behind itself: keys and values of the
    decoder's self-attention and two that it drops. With twice the layers written down, and the dropped parts zero, it
    reads each layer's own.

    Where other layers or modules than peft's are adapted, which its folder has no place for, each module's keys and
    values stand under its own path, and peft refuses the folder.
    """
    layers = _layers(plan)
    pairs = [(state[s.path]["prefix_key"], state[s.path]["prefix_value"]) for s in layers]
    if layers[0].facts["complete"]:
        parts = [part for pair in pairs for part in (*pair, *_dropped(plan, pair))]
        return {PACKED: torch.cat(parts, dim=1)}
    found = {}
    for site, (key, value) in zip(layers, pairs, strict=True):
        found[_key(site.path, "prefix_key")], found[_key(site.path, "prefix_value")] = key, value
    return found


def _dropped(plan: Any, pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What stands behind a layer's keys and values in the packed tensor and is not read."""
    doubled = plan.sites[0].facts["submodules"] == 2 and plan.config.num_layers is None
    return [torch.zeros_like(t) for t in pair] if doubled else []


def unpack(plan: Any, tensors: Mapping[str, Tensor]) -> State:
    """The inverse.

    In what peft itself writes for an encoder-decoder of L layers, layer l has the parts 4 l and 4 l + 1 modulo 2 L:
    with an even L the layers share half of the parts, and the other half is never read.
    """
    layers = _layers(plan)
    if not layers[0].facts["complete"]:
        names = ("prefix_key", "prefix_value")
        return {s.path: {n: tensors[_key(s.path, n)] for n in names if _key(s.path, n) in tensors} for s in layers}
    if PACKED not in tensors:
        return {}
    parts = tensors[PACKED].chunk(tensors[PACKED].shape[1] // int(layers[0].facts["width"]), dim=1)
    step = 2 * int(layers[0].facts["submodules"])
    starts = [step * i % len(parts) for i in range(len(layers))]
    return {s.path: {"prefix_key": parts[i], "prefix_value": parts[i + 1]} for s, i in zip(layers, starts, strict=True)}


@torch.no_grad()
def stored(cfg: PrefixTuning, adapters: Mapping[str, Adapter]) -> tuple[PrefixTuning, State]:
    """What a folder holds: the prefixes that the projection gives, computed. Peft's has no place for the projection."""
    if not cfg.projects:
        return dataclasses.replace(cfg, num_layers=None), {}
    changed: State = {"": {}}
    for path, adapter in adapters.items():
        if isinstance(adapter, _Prefix):
            changed[path] = dict(zip(("prefix_key", "prefix_value"), adapter.keys_values(), strict=True))
    return dataclasses.replace(cfg, inference_mode=True), changed


def write_config(plan: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the sizes that peft wants to know."""
    layers = _layers(plan)
    _, width, hidden, count = _sizes(layers, plan.config)
    submodules = int(layers[0].facts["submodules"])
    fields.update(
        num_layers=count * submodules,
        token_dim=width,
        num_attention_heads=int(layers[0].facts["heads"]),
        num_transformer_submodules=submodules,
        encoder_hidden_size=hidden,
        task_type=fields.get("task_type") or "FEATURE_EXTRACTION",
        inference_mode=True,
    )
    named = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    fields = {k: v for k, v in fields.items() if k not in named}
    if not layers[0].facts["complete"]:
        fields["target_modules"] = [s.path for s in layers]
    return fields


def read_config(fields: dict[str, Any], model: Any) -> dict[str, Any]:
    """The fields; whatever was trained, the folder holds computed prefixes."""
    fields = {**fields, "inference_mode": True}
    rows = fields.pop("num_layers", None)
    if fields.get("target_modules") is not None:
        return fields
    count, doubled = len(default_paths(model)), backbones.is_encoder_decoder(model)
    if rows is not None and rows != count and not (doubled and rows == 2 * count):
        raise CheckpointError(
            f"the folder holds prefixes for {rows} layers, {type(model).__name__} has {count} that take one; "
            "load the base model that it was trained on"
        )
    return {**fields, "num_layers": rows} if doubled and rows == count else fields


METHOD = Method(
    name="prefix",
    title="Prefix tuning",
    summary="Keys and values in front of those of the attention layers.",
    paper=Paper(
        title="Prefix-Tuning: Optimizing Continuous Prompts for Generation",
        authors="Li and Liang",
        year=2021,
        arxiv="2101.00190",
    ),
    config=PrefixTuning,
    attach=Attach.ATTENTION,
    default_targets=("attention",),
    sites=sites,
    parameter_count=parameter_count,
    shared=shared,
    shared_count=shared_count,
    initialise_shared=initialise_shared,
    adapter=build,
    initialise=initialise,
    stored=stored,
    mergeable=False,
    starts_as_identity=False,
    quantized_base=True,
    knob=Knob(field="num_virtual_tokens", high=512),
    peft=PeftFormat(
        peft_type="PREFIX_TUNING",
        prefix="base_model.",
        pack=pack,
        unpack=unpack,
        write_config=write_config,
        read_config=read_config,
        ignored=dict.fromkeys(("token_dim", "num_attention_heads", "num_transformer_submodules"), ()),
    ),
)
