"""Virtual tokens in front of the embedded input of a transformer stack: what prompt tuning and P-tuning share.

The adapter is advice around the stack's forward. It embeds the token ids, puts its vectors in front, widens mask, token
types and positions, and cuts the virtual positions off what the stack returns, so that heads, labels and `generate` see
the tokens they gave. With a key-value cache it does so while the cache is empty; later steps only widen mask and
positions. The keys and values of the virtual tokens stay in the cache.

Two places keep the virtual positions, as in Hugging Face peft. An encoder that a decoder attends to keeps them in its
output, so that the decoder attends to the prompt as well. And an encoder that classifies sequences by position 0 (BERT,
RoBERTa, DeBERTa) does so by the first virtual token.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import backbones, targets
from peftkit.errors import BackboneError
from peftkit.spec import Adapter, PeftFormat, Site, State

PACKED = "prompt_embeddings"
"""The one tensor in which peft keeps the vectors."""


class VirtualTokens(Adapter):
    """Vectors in front of the embedded input; subclasses say where they come from."""

    def __init__(self, length: int, site: Site) -> None:
        super().__init__()
        self.length = length
        self.names: tuple[str, ...] = tuple(site.facts["arguments"])
        self.keeps = bool(site.facts["keeps"])
        self.padding_position: int | None = site.facts["padding_position"]

    def vectors(self) -> Tensor:
        """The virtual tokens, (length, width of the embedding)."""
        raise NotImplementedError

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The stack's output for the given tokens behind the virtual ones.

        Raises:
            BackboneError: the attention mask is not one number a token.
        """
        kwargs.update(zip(self.names, args, strict=False))
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise BackboneError(
                f"virtual tokens need an attention mask of shape (batch, tokens), found {found}; "
                "pass that mask, and generate with the default dynamic cache"
            )
        cache = kwargs.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        if mask is not None:
            kwargs["attention_mask"] = mask = F.pad(mask, (self.length, 0), value=1)
        if not begins:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + self.length
            return call(**kwargs)
        self._put_in_front(module, kwargs, mask)
        if self.keeps:
            return call(**kwargs)
        as_object = kwargs.pop("return_dict", None)
        if as_object is None:
            as_object = getattr(module.config, "return_dict", True)
        output = _trimmed(call(**kwargs, return_dict=True), self.length)
        return output if as_object else output.to_tuple()

    def _put_in_front(self, module: nn.Module, kwargs: dict[str, Any], mask: Tensor | None) -> None:
        """Turns the arguments for the tokens into those for virtual tokens and tokens."""
        ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = module.get_input_embeddings()(ids)  # type: ignore[operator]  # a transformers stack
        kwargs["input_ids"] = None
        front = self.vectors().to(embedded.dtype)
        kwargs["inputs_embeds"] = torch.cat((front.expand(embedded.shape[0], -1, -1), embedded), dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (self.length, 0))
        positions = kwargs.get("position_ids")
        if positions is not None:
            first = torch.arange(self.length, device=positions.device, dtype=positions.dtype)
            first = first.expand(*positions.shape[:-1], -1)
            kwargs["position_ids"] = torch.cat((first, positions + self.length), dim=-1)
        elif self.padding_position is not None and mask is not None:
            kept = mask.long()
            kwargs["position_ids"] = kept.cumsum(1) * kept + self.padding_position


def _trimmed(output: Any, length: int) -> Any:
    """The stack's output without the virtual positions; attention maps without their rows."""
    output.last_hidden_state = output.last_hidden_state[:, length:]
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(h[:, length:] for h in output.hidden_states)
    for name in ("attentions", "cross_attentions"):
        if output.get(name) is not None:
            output[name] = tuple(a if a is None else a[:, :, length:] for a in output[name])
    return output


class Memory(Adapter):
    """Around a decoder: its mask over the encoder's output covers the virtual tokens that this output begins with."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.names: tuple[str, ...] = tuple(site.facts["arguments"])

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder's output."""
        kwargs.update(zip(self.names, args, strict=False))
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        # The output of an encoder that ran without the adapter is as long as its mask, and stays as it is.
        if states is not None and mask is not None and mask.dim() == 2 and states.shape[1] > mask.shape[1]:
            kwargs["encoder_attention_mask"] = F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
        return call(**kwargs)


def sites(model: nn.Module, cfg: Any) -> list[Site]:
    """The stack that takes the tokens; with an encoder and a decoder the encoder, and the decoder's view of it.

    Raises:
        BackboneError: the model does not take token ids or embedded tokens.
    """
    modules = dict(targets.modules(model))
    found = []
    paths = [p for p, _ in backbones.stacks(model)]
    for path, role in zip(paths, ("prompt", "memory"), strict=False):
        module = modules[path]
        names = tuple(n for n in inspect.signature(inspect.unwrap(type(module).forward)).parameters if n != "self")
        if "inputs_embeds" not in names or "input_ids" not in names:
            raise BackboneError(
                f"virtual tokens need a backbone that takes input_ids or inputs_embeds, and {path or 'the model'} "
                f"({type(module).__name__}) takes {', '.join(names[:3])}; choose another method, such as "
                "peftkit.PrefixTuning or peftkit.LoRA"
            )
        embedding = module.get_input_embeddings()  # type: ignore[operator]  # a transformers stack
        facts = {
            "arguments": names,
            "keeps": len(paths) > 1 or backbones.pools_first(model),
            "padding_position": backbones.padding_position(model),
            "width": int(embedding.weight.shape[1]),
            "shape": backbones.attention_shape(model),
        }
        found.append(dataclasses.replace(targets.site_of(path, module, role=role), facts=facts))
    return found


def embedding_of(module: nn.Module) -> Tensor:
    """The stack's table of token vectors, (vocabulary, width)."""
    weight: Tensor = module.get_input_embeddings().weight  # type: ignore[operator]
    return weight.detach()


# Hugging Face peft's folder -----------------------------------------------------------------------------------------


def pack(plan: Any, state: State) -> dict[str, Tensor]:
    """One tensor (n, width); rows that peft adds for a decoder and never uses follow, where a folder had them."""
    tensors = state[plan.sites[0].path]
    return {PACKED: torch.cat([tensors[n] for n in ("prompt", "unused") if n in tensors])}


def unpack(plan: Any, tensors: Mapping[str, Tensor]) -> State:
    """The inverse."""
    if PACKED not in tensors:
        return {}
    length = plan.config.num_virtual_tokens
    found = {"prompt": tensors[PACKED][:length]}
    if tensors[PACKED].shape[0] > length:
        found["unused"] = tensors[PACKED][length:]
    return {plan.sites[0].path: found}


def write_config(plan: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the sizes that peft wants to know, and the task by which it chooses its forward."""
    shape = plan.sites[0].facts["shape"]
    named = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    fields = {k: v for k, v in fields.items() if k not in named}
    fields.update(
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        token_dim=int(plan.sites[0].facts["width"]),
        num_transformer_submodules=plan.config.num_transformer_submodules or 1,
        task_type=fields.get("task_type") or "FEATURE_EXTRACTION",
        inference_mode=True,
    )
    return fields


def read_config(fields: dict[str, Any], model: Any) -> dict[str, Any]:
    """The fields; whatever was trained, the folder holds computed vectors."""
    return {**fields, "inference_mode": True}


def peft_format(peft_type: str) -> PeftFormat:
    """Peft's folder for vectors in front of the input."""
    return PeftFormat(
        peft_type=peft_type,
        prefix="base_model.",
        pack=pack,
        unpack=unpack,
        write_config=write_config,
        read_config=read_config,
        ignored=dict.fromkeys(("num_layers", "token_dim", "num_attention_heads"), ()),
    )


class Prompt(VirtualTokens):
    """The vectors themselves."""

    def __init__(self, length: int, site: Site, unused: int = 0) -> None:
        super().__init__(length, site)
        width = int(site.facts["width"])
        self.prompt = nn.Parameter(torch.empty(length, width))
        if unused:
            self.register_buffer("unused", torch.zeros(unused, width))

    def vectors(self) -> Tensor:
        """The virtual tokens, (length, width)."""
        return self.prompt


def unused_rows(cfg: Any) -> int:
    """Rows beyond the virtual tokens: peft doubles them for an encoder-decoder and uses the first half."""
    return int(cfg.num_virtual_tokens) if cfg.num_transformer_submodules == 2 else 0


def check_submodules(cfg: Any) -> None:
    """Raises ConfigError when the number of submodules is not one that the ecosystem writes."""
    cfg.require(cfg.num_virtual_tokens >= 1, f"num_virtual_tokens must be at least 1, found {cfg.num_virtual_tokens}")
    cfg.require(
        cfg.num_transformer_submodules in (None, 1, 2),
        f"num_transformer_submodules must be 1 or 2, found {cfg.num_transformer_submodules}",
    )


def no_targets(cfg: Any) -> None:
    """Raises ConfigError when modules are named for a method that acts on the input only."""
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        cfg.require(getattr(cfg, name) is None, f"{name} has no meaning for virtual tokens, which stand in the input")


def tokens_of(cfg: Any) -> Sequence[int]:
    """Token ids of `prompt_tuning_init_text`, repeated or cut to the number of virtual tokens."""
    from transformers import AutoTokenizer

    options = {k: v for k, v in (cfg.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    ids = AutoTokenizer.from_pretrained(cfg.tokenizer_name_or_path, **options)(cfg.prompt_tuning_init_text)["input_ids"]
    repeats = -(-cfg.num_virtual_tokens // max(len(ids), 1))
    return list(ids * repeats)[: cfg.num_virtual_tokens]
