"""What peftkit knows about architectures: canonical slots -> module paths. The one place that reads a model's config.

A slot is a role that many architectures share, such as "attention.query" or "ffn.down". Methods name slots, never
module paths, so that one declaration fits every backbone in the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peftkit.errors import BackboneError, nearest
from peftkit.spec import is_weight_module

HEAD_NAMES = (
    "classifier",
    "score",
    "classification_head",
    "qa_outputs",
    "pooler_head",
    "span_classifier",
    "sequence_summary",
)
"""Modules that a task adds on top of a pretrained stack and that start untrained."""
TASK_CLASSES = re.compile(r"For(Sequence|Token|Image|Audio|Video)?(Classification|QuestionAnswering|MultipleChoice)$")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Slots of one family of architectures, relative to a block."""

    blocks: tuple[str, ...]
    """Names of the lists that hold the blocks, as suffixes of module paths."""
    slots: Mapping[str, tuple[str, ...]]
    """Slot -> paths relative to a block; "a if b" stands for a in the blocks that hold b."""
    post_norm: bool = False
    """Whether a sub-layer's norm follows its residual sum, as in BERT; False: it precedes the sub-layer."""


_BERT_SLOTS = {
    "attention": ("attention.self",),
    "attention.query": ("attention.self.query",),
    "attention.key": ("attention.self.key",),
    "attention.value": ("attention.self.value",),
    "attention.output": ("attention.output.dense",),
    "attention.residual": ("attention.output",),
    "attention.norm": ("attention.output.LayerNorm",),
    "ffn.up": ("intermediate.dense",),
    "ffn.down": ("output.dense",),
    "ffn.residual": ("output",),
    "ffn.norm": ("output.LayerNorm",),
    "norm": ("attention.output.LayerNorm", "output.LayerNorm"),
}
_LLAMA_SLOTS = {
    "attention": ("self_attn",),
    "attention.query": ("self_attn.q_proj",),
    "attention.key": ("self_attn.k_proj",),
    "attention.value": ("self_attn.v_proj",),
    "attention.output": ("self_attn.o_proj",),
    "attention.norm": ("input_layernorm",),
    "ffn": ("mlp",),
    "ffn.gate": ("mlp.gate_proj",),
    "ffn.up": ("mlp.up_proj",),
    "ffn.down": ("mlp.down_proj",),
    "ffn.norm": ("post_attention_layernorm",),
    "norm": ("input_layernorm", "post_attention_layernorm"),
}
_BART_SLOTS = {
    "attention": ("self_attn", "encoder_attn"),
    "attention.self": ("self_attn",),
    "attention.query": ("self_attn.q_proj", "encoder_attn.q_proj"),
    "attention.key": ("self_attn.k_proj", "encoder_attn.k_proj"),
    "attention.value": ("self_attn.v_proj", "encoder_attn.v_proj"),
    "attention.output": ("self_attn.out_proj", "encoder_attn.out_proj"),
    "attention.norm": ("self_attn_layer_norm", "encoder_attn_layer_norm"),
    "ffn.up": ("fc1",),
    "ffn.down": ("fc2",),
    "ffn.norm": ("final_layer_norm",),
    "norm": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
_T5_SLOTS = {
    "attention": ("layer.0.SelfAttention", "layer.1.EncDecAttention"),
    "attention.self": ("layer.0.SelfAttention",),
    "attention.query": ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"),
    "attention.key": ("layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"),
    "attention.value": ("layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"),
    "attention.output": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
    "attention.norm": ("layer.0.layer_norm", "layer.1.layer_norm if layer.1.EncDecAttention"),
    "ffn": ("layer.1.DenseReluDense", "layer.2.DenseReluDense"),
    "ffn.gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
    "ffn.up": tuple(f"layer.{i}.DenseReluDense.{n}" for i in (1, 2) for n in ("wi", "wi_1")),
    "ffn.down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
    "ffn.norm": ("layer.1.layer_norm if layer.1.DenseReluDense", "layer.2.layer_norm"),
    "norm": ("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
}
_GPT2_SLOTS = {
    "attention": ("attn",),
    "attention.query": ("attn.c_attn",),
    "attention.key": ("attn.c_attn",),
    "attention.value": ("attn.c_attn",),
    "attention.output": ("attn.c_proj",),
    "attention.norm": ("ln_1",),
    "ffn": ("mlp",),
    "ffn.up": ("mlp.c_fc",),
    "ffn.down": ("mlp.c_proj",),
    "ffn.norm": ("ln_2",),
    "norm": ("ln_1", "ln_2"),
}
_VIT_SLOTS = {
    "attention": ("attention",),
    "attention.query": ("attention.q_proj",),
    "attention.key": ("attention.k_proj",),
    "attention.value": ("attention.v_proj",),
    "attention.output": ("attention.o_proj",),
    "attention.norm": ("layernorm_before",),
    "ffn": ("mlp",),
    "ffn.up": ("mlp.fc1",),
    "ffn.down": ("mlp.fc2",),
    "ffn.norm": ("layernorm_after",),
    "norm": ("layernorm_before", "layernorm_after"),
}
_DEBERTA_SLOTS = {
    **_BERT_SLOTS,
    "attention.query": ("attention.self.query_proj",),
    "attention.key": ("attention.self.key_proj",),
    "attention.value": ("attention.self.value_proj",),
    "attention.position": ("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
}

_BERT = Family(blocks=("encoder.layer",), slots=_BERT_SLOTS, post_norm=True)
_LLAMA = Family(blocks=("layers",), slots=_LLAMA_SLOTS)
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"), _LLAMA),
    "deberta-v2": Family(blocks=("encoder.layer",), slots=_DEBERTA_SLOTS, post_norm=True),
    "vit": Family(blocks=("vit.layers", "layers"), slots=_VIT_SLOTS),
    "gpt2": Family(blocks=("h",), slots=_GPT2_SLOTS),
    "t5": Family(blocks=("encoder.block", "decoder.block"), slots=_T5_SLOTS),
    "bart": Family(blocks=("encoder.layers", "decoder.layers"), slots=_BART_SLOTS, post_norm=True),
    "opt": Family(blocks=("decoder.layers",), slots=_BART_SLOTS),
}
"""Model type, as in a transformers config -> its family."""


def model_type(model: nn.Module) -> str:
    """The `model_type` of a transformers model's config; "" for any other module."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def family(model: nn.Module) -> Family | None:
    """The slots known for this model; None when its architecture is not in the table."""
    return FAMILIES.get(model_type(model))


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the transformer blocks, in order of execution as the table names them.

    Raises:
        BackboneError: the architecture is not in the table.
    """
    known = family(model)
    if known is None:
        raise BackboneError(
            f"no slots are known for {type(model).__name__} (model_type {model_type(model)!r}); "
            f"{nearest(model_type(model), FAMILIES)} Name the modules yourself with target_modules"
        )
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(name == b or name.endswith("." + b) for b in known.blocks):
            found += [(f"{name}.{i}", block) for i, block in enumerate(module)]
    return found


def slot_paths(model: nn.Module, slot: str) -> list[str]:
    """Module paths that fill a slot, block by block; empty when no block has the slot. "block" is the block itself.

    Raises:
        BackboneError: the architecture is not in the table.
    """
    found = blocks(model)
    if slot == "block":
        return [path for path, _ in found]
    known = family(model)
    relative = [r.partition(" if ") for r in known.slots.get(slot, ())] if known else []
    modules = dict(model.named_modules())
    return [
        f"{path}.{name}"
        for path, _ in found
        for name, _, condition in relative
        if f"{path}.{name}" in modules and f"{path}.{condition or name}" in modules
    ]


def post_norm(model: nn.Module) -> bool:
    """Whether the norm of a sub-layer follows its residual sum; False where the architecture is not in the table."""
    known = family(model)
    before = getattr(getattr(model, "config", None), "do_layer_norm_before", None)
    return known is not None and (known.post_norm if before is None else not before)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model is a decoder with a language-model head, whose labels mark what follows a prompt."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and family(model) is not None


def layer_index(path: str) -> int | None:
    """The index of the outermost numbered block in a module path: "model.layers.3.mlp" -> 3; None without one."""
    numbered = re.findall(r"(?:^|\.)(?:layers?|h|blocks?|encoder|decoder)\.(\d+)(?=\.|$)", path)
    if not numbered:
        numbered = re.findall(r"\.(\d+)(?=\.|$)", path)[:1]
    return int(numbered[0]) if numbered else None


def stacks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the transformer stacks that take `input_ids`: one, or encoder and decoder.

    Raises:
        BackboneError: the model is not a transformers model.
    """
    base = getattr(model, "base_model", None)
    if base is None or not model_type(model):
        raise BackboneError(f"{type(model).__name__} is not a transformers model, so it has no known input to adapt")
    names = {id(module): name for name, module in model.named_modules()}
    if getattr(model.config, "is_encoder_decoder", False):
        parts = (base.get_encoder(), base.get_decoder())
        return [(names[id(part)], part) for part in parts]
    inner = getattr(base, "decoder", None)
    if model_type(model) == "opt" and isinstance(inner, nn.Module):
        return [(names[id(inner)], inner)]
    return [(names[id(base)], base)]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention.self", "crossattention")
"""Names of the modules that attend to an encoder's output."""
POSITION_NAMES = ("rotary_emb", "position_embeddings", "wpe", "embed_positions")
"""Names of the modules that turn position numbers into vectors or angles."""


def position_modules(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Modules that turn the positions of the tokens into vectors, in the stacks that hold one of `paths`."""
    parents = [name for name, _ in stacks(model) if any(not name or p.startswith(name + ".") for p in paths)]
    found = []
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        known = last.startswith(POSITION_NAMES) and (
            isinstance(module, nn.Embedding) or "Rotary" in type(module).__name__
        )
        if known and any(not p or name.startswith(p + ".") for p in parents):
            found.append(name)
    return found


def pools_first(model: nn.Module) -> bool:
    """Whether the model classifies a sequence by what its encoder returns at position 0."""
    return type(model).__name__.endswith("ForSequenceClassification") and model_type(model) in (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "deberta-v2",
    )


def padding_position(model: nn.Module) -> int | None:
    """The position of padding in families that count from behind it (RoBERTa); None where positions start at 0."""
    if model_type(model) in ("roberta", "xlm-roberta", "camembert"):
        return int(model.config.pad_token_id)  # type: ignore[union-attr, arg-type]  # a transformers config
    return None


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that were added, untrained, for a classification or question-answering task."""
    if not TASK_CLASSES.search(type(model).__name__):
        return ()
    found = [name for name, _ in model.named_children() if name in HEAD_NAMES]
    if model_type(model) == "deberta-v2" and "pooler" in dict(model.named_children()):
        found.insert(0, "pooler")
    return tuple(found)


def output_head(model: nn.Module) -> str | None:
    """Path of the language-model head, which "all-linear" leaves alone; None when there is none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    for name, module in model.named_modules():
        if module is head and head is not None:
            return str(name)
    return None


def tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameters that several modules share: first name -> all names."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in seen.values() if len(names) > 1}


def linear_paths(model: nn.Module) -> Iterator[str]:
    """Paths of every projection except the output head and a task's new head."""
    head = output_head(model)
    skipped = tuple(n for n in (head, *head_names(model)) if n)
    for name, module in model.named_modules():
        if is_weight_module(module) and not any(name == s or name.startswith(s + ".") for s in skipped):
            yield name


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of a model's attention, from its config."""

    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int


def attention_shape(model: nn.Module) -> AttentionShape:
    """Numbers of layers and heads and the width of one head.

    Raises:
        BackboneError: the config names none of them.
    """
    cfg = getattr(model, "config", None)
    if cfg is None:
        raise BackboneError(f"{type(model).__name__} has no transformers config, which attention sizes are read from")
    getter = getattr(cfg, "get_text_config", None)
    cfg = getter() if callable(getter) else cfg

    def first(*names: str) -> int | None:
        for name in names:
            value = getattr(cfg, name, None)
            if value is not None:
                return int(value)
        return None

    hidden = first("hidden_size", "d_model", "n_embd")
    heads = first("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    layers = first("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
    if not (hidden and heads and layers):
        raise BackboneError(f"the config of {type(model).__name__} names no hidden size, heads or layers")
    head_dim = first("head_dim", "d_kv") or hidden // heads
    return AttentionShape(
        layers=layers,
        heads=heads,
        key_value_heads=first("num_key_value_heads") or heads,
        head_dim=head_dim,
        hidden=hidden,
    )


def device_of(module: nn.Module) -> torch.device:
    """Where new tensors beside the module's parameters belong, offloading hooks included."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    for parameter in module.parameters():
        return parameter.device
    return torch.device("cpu")


_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)


def task_type(model: nn.Module) -> str | None:
    """The task that a transformers class is made for, in peft's spelling; None for other classes."""
    return task_of(type(model).__name__)


def task_of(name: str) -> str | None:
    """The task that a transformers class of this name is made for, in peft's spelling; None for other names."""
    return next((task for suffix, task in _TASKS if name.endswith(suffix)), None)


def name_of(model: nn.Module) -> str:
    """The name that a transformers model was loaded by; "" for one that was not loaded."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
