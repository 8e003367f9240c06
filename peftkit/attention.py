"""Extra keys and values in an attention module, joined through transformers' attention interface.

The attention modules of transformers look up how to attend under a name in their config. While an adapter of this kind
is active, its module reads a view of that config that names the function below. It puts the extra keys and values in
front of those of the tokens, widens mask and position bias, and calls what the config really names. No cache is made or
changed, so that encoders, training, checkpointing and `generate` with any cache go the same way.

Decoding without gradients is the exception: where it takes less time, compiled code attends to the extra keys where
they are, instead of copying them and all keys of the cache for every token.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import BackboneError
from peftkit.spec import Adapter

INTERFACE = "peftkit_prefix"
"""The name under which the function below stands in transformers' table of attention functions."""
SUPPORTED = ("sdpa", "eager", None)
"""Implementations that take a mask per query and key; None is what a module without a model has, and means eager."""
UNREAD = frozenset({"position_ids", "cache_position", "use_cache", "is_causal"})
"""Arguments that transformers' sdpa does not read for one query, whatever they are."""
FEW_COPIES = {torch.bfloat16: 2**16, torch.float16: 2**16, torch.float32: 2**18}
"""Elements of keys below which copying them takes no longer than calling the compiled code, by dtype."""
FEW_COPIES_IN_GROUPS = 2**18
"""The same in any dtype for a key head of several queries and a mask, which transformers gives torch as one product."""


def joins_interface(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in transformers' table."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and "config" in module.__dict__


def source_of(module: nn.Module) -> str:
    """Name of the Python module that defines the module's forward, and its eager attention beside it."""
    return str(inspect.unwrap(type(module).forward).__module__)


class _ConfigView:
    """A config that names the function below as attention implementation, and is the original in everything else."""

    _attn_implementation = INTERFACE

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


class KeyValueAdapter(Adapter):
    """Extra keys and values in front of those of an attention module."""

    replaces = ("config",)
    advises = False

    def __init__(self, length: int, source: str) -> None:
        super().__init__()
        self.length = length
        self.source = source
        _register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register()  # an unpickled adapter may be the first in its process

    def replacement(self, name: str, value: Any) -> Any:
        """The view of the config that leads to `attend`."""
        return _ConfigView(value)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """The extra keys and values, each (length, key-value heads · head width)."""
        raise NotImplementedError


class RelativeKeyValueAdapter(KeyValueAdapter):
    """The same for attention with a relative position bias that the first layer computes for all (T5).

    The extra keys stand at the positions before the first token, as the entries of a filled cache would.
    """

    advises = True

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output, its position bias computed for the extra keys as well."""
        if kwargs.get("position_bias") is None and kwargs.get("key_value_states") is None:
            states = args[0] if args else kwargs["hidden_states"]
            cache, layer = kwargs.get("past_key_values"), module.layer_idx
            queries, extra = states.shape[1], sum(a.length for a in _active(module))
            past = cache.get_seq_length(layer) if cache is not None else 0
            keys = cache.get_mask_sizes(queries, layer)[0] if cache is not None else queries
            kwargs["position_bias"] = module.compute_bias(  # type: ignore[operator]  # T5's own method
                queries, extra + keys, device=states.device, past_seen_tokens=past + extra
            )
        return call(*args, **kwargs)


class PositionOffset(Adapter):
    """Around what turns positions into vectors: they begin behind the extra keys, as behind a filled cache."""

    def __init__(self, length: int, argument: int) -> None:
        super().__init__()
        self.length = length
        self.argument = argument

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The vectors of the positions behind the extra keys.

        Raises:
            BackboneError: the sequence and the extra keys are longer together than the table of positions.
        """
        values = list(args)
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
            kwargs["position_ids"] = positions + self.length
        elif len(values) > self.argument and values[self.argument] is not None:
            positions = values[self.argument]
            values[self.argument] = positions + self.length
        elif "past_key_values_length" in kwargs or len(values) > 1:
            positions = values[0]
            if len(values) > 1:
                values[1] = values[1] + self.length
            else:
                kwargs["past_key_values_length"] = kwargs["past_key_values_length"] + self.length
        else:
            positions = values[0]
            kwargs["past_key_values_length"] = self.length
        if isinstance(module, nn.Embedding) and positions.shape[-1] + self.length > module.num_embeddings:
            raise BackboneError(
                f"{positions.shape[-1]} tokens behind a prefix of {self.length} need more positions than the "
                f"{module.num_embeddings} of this backbone; shorten the input or lower num_virtual_tokens"
            )
        return call(*values, **kwargs)


def position_argument(module: nn.Module) -> int:
    """Which positional argument of the module's forward holds positions."""
    names = [n for n in inspect.signature(inspect.unwrap(type(module).forward)).parameters if n != "self"]
    return names.index("position_ids") if "position_ids" in names else 0


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, attend)


def _active(module: nn.Module) -> list[KeyValueAdapter]:
    return [a for a in module.__dict__["_peftkit_active"] if isinstance(a, KeyValueAdapter)]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The attention output over the extra keys and values of the active adapters and those of the tokens.

    Every query sees every extra key; among the tokens everything stays as it is.

    Args:
        query: (batch, heads, queries, head width).
        key: (batch, key-value heads, keys, head width); so is `value`.
        attention_mask: (batch or 1, heads or 1, queries or 1, keys), additive or boolean, or None.

    Raises:
        BackboneError: the implementation that the config names takes no such mask.
    """
    config = module.__dict__["config"]
    name = config._attn_implementation
    adapters = _active(module)
    if name not in SUPPORTED or (name == "eager" and getattr(module, "reorder_and_upcast_attn", False)):
        raise BackboneError(
            f"prefix tuning works with the attention implementations 'sdpa' and 'eager', found {name!r}"
            f"{'' if name != 'eager' else ' with reorder_and_upcast_attn'} in {type(module).__name__}; "
            "call model.set_attn_implementation('sdpa')"
        )
    if attention_mask is not None and attention_mask.dim() != 4:
        raise BackboneError(
            f"expected an attention mask of 4 dimensions or none, found {tuple(attention_mask.shape)} in "
            f"{type(module).__name__}; call model.set_attn_implementation('sdpa')"
        )
    if name == "sdpa" and len(adapters) == 1 and _same_in_place(adapters[0], query, key, value, attention_mask, kwargs):
        return _in_place(adapters[0], query, key, value, attention_mask, kwargs.get("scaling")), None
    queries, extra = query.shape[2], sum(a.length for a in adapters)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (extra, 0), value=attention_mask.dtype == torch.bool)
    elif name == "sdpa" and queries > 1 and _is_causal(module, kwargs):
        key, value = key[:, :, :queries], value[:, :, :queries]
        attention_mask = query.new_ones(queries, extra + queries, dtype=torch.bool).tril_(extra)[None, None]
    key, value = _joined(adapters, key, value)
    bias = kwargs.get("position_bias")
    if bias is not None and bias.shape[-1] != key.shape[2]:
        # Without a bias for the extra keys they count as being nowhere in particular, as in cross-attention.
        missing = key.shape[2] - bias.shape[-1]
        kwargs["position_bias"] = F.pad(bias, (missing, 0)) if missing > 0 else bias[..., : key.shape[2]]
    return _implementation(name, adapters[0].source)(module, query, key, value, attention_mask, **kwargs)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _joined(adapters: Sequence[KeyValueAdapter], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The extra keys and values, those of the outermost adapter first, and then the tokens'."""
    batch, heads = key.shape[:2]
    keys, values = [key], [value]
    for adapter in adapters:
        extra_key, extra_value = adapter.keys_values()
        for parts, extra, like in ((keys, extra_key, key), (values, extra_value, value)):
            parts.insert(0, _by_head(extra.to(like.dtype), heads)[None].expand(batch, -1, -1, -1))
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _by_head(extra: Tensor, heads: int) -> Tensor:
    """(length, heads · width) -> (heads, length, width)."""
    return extra.view(extra.shape[0], heads, -1).transpose(0, 1)


def _same_in_place(
    adapter: KeyValueAdapter,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether `_in_place` is the function that sdpa is over copied keys and values, in less time.

    False for whatever is not known: eager attention, for one, returns weights, and nothing here says who reads them.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch.jit is not typed
        return False
    if query.shape[2] != 1 or query.device.type != "cpu" or not _pays(adapter.length, query, key, mask):
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0:  # forward derivatives are taken without gradients too
        return False
    return _fits(query, key, value, mask) and _is_plain(kwargs)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether these are plain tensors of the shapes and dtypes of one query a row and a mask for each of its keys."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if any(type(t) is not Tensor or t.device.type != "cpu" for t in tensors):
        return False
    batch, heads, _, width = query.shape
    if (key.shape[0], key.shape[3], value.shape) != (batch, width, key.shape) or heads % key.shape[1]:
        return False
    if query.dtype not in FEW_COPIES or (key.dtype, value.dtype) != (query.dtype, query.dtype):
        return False
    if mask is None:
        return True
    shaped = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (1, key.shape[2])
    return shaped and mask.dtype in (torch.bool, query.dtype) and not mask.requires_grad


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments ask for nothing beside a scaled softmax."""
    scaling = kwargs.get("scaling")
    if scaling is not None and not (type(scaling) is float and math.isfinite(scaling)):
        return False
    rest = {name: given for name, given in kwargs.items() if name not in UNREAD and name != "scaling"}
    return rest.pop("dropout", 0.0) == 0.0 and all(given is None for given in rest.values())


def _pays(extra: int, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether compiled code takes the queries of a key head in one pass, and saves more than its call costs."""
    batch, heads, tokens, width = key.shape
    group = query.shape[1] // heads
    few = FEW_COPIES.get(query.dtype, math.inf)
    if mask is not None and group > 1:
        few = max(few, FEW_COPIES_IN_GROUPS)
    return batch * heads * (extra + tokens) * width >= few and group <= _group_in_one_pass()


@functools.cache
def _group_in_one_pass() -> int:
    """How many queries of a key head compiled code takes in one pass on a CPU; 0 where there is none."""
    import peftkit_kernels  # when it is needed: loading compiled code takes time that `import peftkit` has not
    from peftkit_kernels.prefix_attention import FEW

    return FEW if peftkit_kernels.OPS["prefix_attention"].compiled_for("cpu") else 0


def _in_place(
    adapter: KeyValueAdapter, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """The attention output, (batch, queries, heads, head width), from keys and values that are not copied."""
    from peftkit_kernels import prefix_attention

    extra_key, extra_value = (_by_head(extra, key.shape[1]) for extra in adapter.keys_values())
    out = prefix_attention(query, extra_key, extra_value, key, value, mask, scale=scaling)
    return out.transpose(1, 2)


def _implementation(name: str | None, source: str) -> Callable[..., Any]:
    """What the config names: transformers' sdpa, or the eager attention beside the module's own code."""
    if name == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward  # type: ignore[no-any-return]  # transformers is not typed here
    return sys.modules[source].eager_attention_forward  # type: ignore[no-any-return]
