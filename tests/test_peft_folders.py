"""Keys and shapes of folders that Hugging Face peft wrote, as recorded in data/peft_folders.json, on a tiny OPT.

The records are of another version of peft than the installed one, so that a change of its format shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftkit
from peftkit import targets
from peftkit.checkpoint import read_config
from peftkit.errors import CheckpointError, TargetError

FOLDERS = json.loads((Path(__file__).parent / "data" / "peft_folders.json").read_text(encoding="utf-8"))
"""Name -> {"config": adapter_config.json, "tensors": {key: shape}}; random weights, all float32."""
REFUSED = {
    "lora_alora": "alora_invocation_tokens",
    "lora_bias_all": "bias='all' is not implemented by peftkit's lora; it reads bias='none' only",
    "lora_trainable_tokens": "trainable_token_indices",
}
"""Folder -> what the error names."""
READ = sorted(set(FOLDERS) - set(REFUSED))
IDLE = ("megatron_core", "qalora_group_size", "auto_mapping", "peft_version", "base_model_name_or_path", "task_type")
"""Fields that say nothing about the maths of the methods that peftkit reads."""


def opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = transformers.OPTConfig(vocab_size=100, num_attention_heads=4, max_position_embeddings=64, **sizes)
    return transformers.OPTForCausalLM(config).eval()


def written(name, folder, **changes):
    """The recorded folder with random weights."""
    folder.mkdir()
    record = FOLDERS[name]
    (folder / "adapter_config.json").write_text(json.dumps({**record["config"], **changes}), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors = {key: 0.02 * torch.randn(shape, generator=generator) for key, shape in record["tensors"].items()}
    for key in tensors:
        if key.endswith("base_layer.weight"):  # peft adds a copy of an adapted embedding
            tensors[key] = opt().model.decoder.embed_tokens.weight.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def own(tensors):
    return {key: t for key, t in tensors.items() if not key.endswith("base_layer.weight")}


@pytest.mark.parametrize("name", READ)
def test_recorded_folder_loads_and_is_written_again_with_its_keys_shapes_and_values(name, tmp_path):
    folder, tensors = written(name, tmp_path / "theirs")
    model = peftkit.load(opt(), folder)
    saved = load_file(peftkit.save(model, tmp_path / "ours") / "adapter_model.safetensors")
    assert saved.keys() == own(tensors).keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("name", READ)
def test_recorded_config_is_written_again_field_by_field(name, tmp_path):
    folder, _ = written(name, tmp_path / "theirs")
    model = peftkit.load(opt(), folder)
    config = json.loads((peftkit.save(model, tmp_path / "ours") / "adapter_config.json").read_text(encoding="utf-8"))
    for field, value in FOLDERS[name]["config"].items():
        if field in IDLE or not value or (field == "bias" and value == "none") or (name, field) == ("adalora", "r"):
            continue
        if field in ("target_modules", "modules_to_save"):
            paths = [p for p, _ in opt().named_modules()]
            chosen = [{p for p in paths if any(p == n or p.endswith("." + n) for n in c[field])} for c in (
                config, FOLDERS[name]["config"])]  # fmt: skip
            assert chosen[0] == chosen[1], field
        elif field in ("rank_pattern", "alpha_pattern"):
            assert config[field] == {}, "its keys select k_proj, which has no adapter"
        else:
            assert config[field] == value, field


@pytest.mark.parametrize("name", READ)
def test_fresh_adapter_of_a_recorded_config_has_the_recorded_keys_and_shapes(name, tmp_path):
    folder, tensors = written(name, tmp_path / "theirs")
    model = opt()
    model = peftkit.wrap(model, targets.without_idle(model, read_config(folder, model)))
    saved = load_file(peftkit.save(model, tmp_path / "ours") / "adapter_model.safetensors")
    assert {k: list(t.shape) for k, t in saved.items()} == {k: list(t.shape) for k, t in own(tensors).items()}


@pytest.mark.parametrize(("name", "named"), REFUSED.items())
def test_folder_that_computes_something_else_is_refused_by_field(name, named, tmp_path):
    folder, _ = written(name, tmp_path / "theirs")
    model = opt()
    with pytest.raises(CheckpointError, match=named):
        peftkit.load(model, folder)
    assert not [n for n, _ in model.named_parameters() if "peftkit" in n]


def test_names_that_select_nothing_do_not_keep_a_folder_from_loading(tmp_path):
    changes = {"target_modules": ["q_proj", "v_proj", "gate_proj"], "exclude_modules": ["vision_tower"]}
    folder, tensors = written("lora", tmp_path / "theirs", **changes)
    model = peftkit.load(opt(), folder)
    assert load_file(peftkit.save(model, tmp_path / "ours") / "adapter_model.safetensors").keys() == tensors.keys()


def test_a_folder_none_of_whose_targets_exist_is_refused_by_name(tmp_path):
    folder, _ = written("lora", tmp_path / "theirs", target_modules=["query"])
    with pytest.raises(TargetError, match="'query' matches no module"):
        peftkit.load(opt(), folder)


def test_a_broken_pattern_in_a_folder_is_refused_by_name(tmp_path):
    folder, _ = written("lora", tmp_path / "theirs", rank_pattern={"(q_proj": 4})
    with pytest.raises(TargetError, match="not a regular expression"):
        peftkit.load(opt(), folder)
