"""What the tests of exports share: tiny bases on disk, and adapters on them that change every output."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny import built, randomise
from torch import Tensor, nn
from transformers.utils import logging

import peftkit


def save_base(name: str, folder: Path, **config: Any) -> Path:
    """Writes a tiny backbone with its weights as transformers does."""
    logging.disable_progress_bar()
    model = built(name)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    return folder


def load_base(name: str, folder: Path) -> nn.Module:
    """The saved backbone, loaded as a user would: it knows where it came from."""
    logging.disable_progress_bar()
    return type(built(name)).from_pretrained(folder).eval()


def trained(model: nn.Module, config: Any, seed: int = 1) -> nn.Module:
    """The same model with an adapter that changes its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(peftkit.wrap(model, config), seed=seed)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """What merging adds to each weight, by path, (out, in), computed by merging a copy of the model in float64."""
    twin = copy.deepcopy(model).double()
    before = {n: p.detach().clone() for n, p in twin.named_parameters() if "peftkit" not in n.split(".")}
    peftkit.merge(twin)
    modules = dict(twin.named_modules())
    found = {}
    for name, start in before.items():
        path, _, last = name.rpartition(".")
        change = modules[path]._parameters[last].detach() - start
        if last == "weight" and change.any():
            turned = isinstance(modules[path], nn.Embedding) or "Conv1D" in str(type(modules[path]).__mro__)
            found[path] = change.T if turned else change
    return found


def converted(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a Llama by llama.cpp's names, as its converter writes them."""
    config = model.config

    def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    state = {n: p.detach().double() for n, p in model.named_parameters(remove_duplicate=False) if "peftkit" not in n}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"blk.{i}."
        for theirs, ours in (
            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ):  # fmt: skip
            weight = state[f"{old}{ours}.weight"]
            if theirs == "attn_q":
                weight = permute(weight, config.num_attention_heads)
            if theirs == "attn_k":
                weight = permute(weight, config.num_key_value_heads)
            found[f"{new}{theirs}.weight"] = weight
    return found
