"""Adapter folders, both ways between peftkit and the installed Hugging Face peft, on four architectures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import NOISE, batch, built, randomise
from torch import nn

import peftkit
from peftkit.errors import CheckpointError
from peftkit.testing.backbones import BACKBONES

pytestmark = [
    # peft's own use of transformers, which is not what is tested here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}
FEED_FORWARD = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["intermediate.dense"], "t5": ["wo"]}
NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "bert": ["LayerNorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

CASES = {
    "lora": {
        "plain": {"r": 4, "lora_alpha": 16},
        "dora": {"r": 4, "use_dora": True},
        "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
        "bias": {"r": 4, "lora_bias": True},
        "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"},
        "olora": {"r": 4, "lora_alpha": 4, "init_lora_weights": "olora"},
    },
    "adalora": {"plain": {"init_r": 6, "target_r": 4, "total_step": 10, "lora_alpha": 16}},
    "vera": {
        "plain": {"r": 8, "projection_prng_key": 3},
        "regenerated": {"r": 8, "projection_prng_key": 3, "save_projection": False},
    },
    "loha": {"plain": {"r": 4, "alpha": 6}},
    "lokr": {
        "plain": {"r": 2, "alpha": 6},
        "both": {"r": 2, "alpha": 6, "decompose_both": True},
        "factor": {"r": 2, "decompose_factor": 4},
        "whole": {"r": 64, "alpha": 6},
    },
    "oft": {
        "plain": {"oft_block_size": 8},
        "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
        "rank": {"r": 4, "oft_block_size": 0},
        "shared": {"oft_block_size": 8, "block_share": True},
    },
    "ia3": {"plain": {}},
    "prefix": {"plain": {"num_virtual_tokens": 5}, "projected": {
        "num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 12}},
    "prompt": {"plain": {"num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}},
    "ptuning": {
        "mlp": {"num_virtual_tokens": 5, "encoder_hidden_size": 12},
        "lstm": {"num_virtual_tokens": 5, "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    },
    "layernorm": {"plain": {}},
}  # fmt: skip
"""Fields by method and case; every method that declares a peft format must be here."""

CANNOT: dict[tuple[str, str], str] = {}
"""(method, backbone) -> what peft itself says when it is asked for that."""

PAIRS = [
    pytest.param(method, case, name, id=f"{method}-{case}-{name}")
    for method, cases in CASES.items()
    for case in cases
    for name in TARGETS
    if (method, name) not in CANNOT
]


def fields_for(method, case, name):
    """The fields of a case on a backbone, under the names that both libraries use."""
    fields = dict(CASES[method][case])
    if peftkit.METHODS[method].attach.value in ("weight",):
        fields["target_modules"] = TARGETS[name]
    if method == "ia3":
        fields["feedforward_modules"] = FEED_FORWARD[name]
    if method == "layernorm":
        fields["target_modules"] = NORMS[name]
    return fields


def their_config(method, fields, name):
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peftkit.METHODS[method].peft.peft_type]
    known = {f.name for f in kind.__dataclass_fields__.values()}
    extra = {"fan_in_fan_out": True} if name == "gpt2" and "fan_in_fan_out" in known else {}
    return kind(**fields, **extra, task_type=TASKS[name])


def theirs(method, fields, name, seed=1):
    """A tiny model that peft adapted, with random adapter weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(built(name), their_config(method, fields, name)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(NOISE * torch.randn_like(parameter))
    return model


def ours(method, fields, name, seed=1, **options):
    """A tiny model that peftkit adapted, with random adapter weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peftkit.wrap(built(name), peftkit.METHODS[method].config(**fields), **options)
        return randomise(model, options.get("name", "default"), seed)


def output(name, model):
    """Logits of the real tokens; soft prompts put others before them."""
    inputs = batch(name, model if isinstance(model, nn.Module) else None)
    with torch.no_grad():
        found = model(**inputs).logits
    return found[:, -inputs["labels"].shape[1] :] if TASKS[name] != "SEQ_CLS" else found


def assert_equal_logits(name, a, b):
    first, second = output(name, a), output(name, b)
    assert first.shape == second.shape
    # 1e-6 for logits of order one; the sums in a product are ordered differently, so larger logits err by more.
    bound = 1e-6 * max(1.0, float(first.abs().max()))
    assert float((first - second).abs().max()) <= bound
    assert float((first - output(name, built(name))).abs().max()) > 1e-3


def tensors_in(folder):
    return {key: tuple(value.shape) for key, value in load_file(folder / "adapter_model.safetensors").items()}


def test_every_method_with_a_peft_format_has_a_case():
    assert set(CASES) == {name for name, method in peftkit.METHODS.items() if method.peft is not None}


@pytest.mark.parametrize(("method", "case", "name"), PAIRS)
def test_folder_of_peft_loads_and_computes_the_same(method, case, name, tmp_path):
    model = theirs(method, fields_for(method, case, name), name)
    model.save_pretrained(tmp_path)
    loaded = peftkit.load(built(name), tmp_path)
    assert_equal_logits(name, model, loaded)


@pytest.mark.parametrize(("method", "case", "name"), PAIRS)
def test_folder_of_peftkit_loads_in_peft_and_computes_the_same(method, case, name, tmp_path):
    fields = fields_for(method, case, name)
    model = ours(method, fields, name)
    peftkit.save(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours").eval()
    assert_equal_logits(name, model, loaded)
    theirs(method, fields, name).save_pretrained(tmp_path / "theirs")
    assert tensors_in(tmp_path / "ours") == tensors_in(tmp_path / "theirs")
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    expected = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    for key in CASES[method][case]:
        assert written[key] == expected[key], key
    assert written["peft_type"] == expected["peft_type"]
    assert written["task_type"] == expected["task_type"]


@pytest.mark.parametrize(("method", "name"), sorted(CANNOT))
def test_peft_itself_cannot(method, name):
    case = next(iter(CASES[method]))
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError)) as caught:
        output(name, theirs(method, fields_for(method, case, name), name))
    assert CANNOT[method, name] in str(caught.value)
