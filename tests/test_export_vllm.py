"""Folders for vLLM. vLLM is not installed here: it brings several gigabytes and a pinned torch of its own.

What it accepts is written down from the sources of version 0.33 (vllm/lora/peft_helper.py, lora_model.py, utils.py,
model_manager.py, vllm/config/lora.py and the model classes): `served` reads a folder as they do, and the tests of the
preflight say which of their rules each refusal stands for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from exported import deltas, load_base, save_base, trained
from safetensors.torch import load_file
from tiny import built
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import peftkit
from peftkit.errors import ConfigError, ExportError
from peftkit.export import export

EVERY = "all-linear"
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base") / "llama")


def served(folder: Path, runtime: set[str], max_lora_rank: int = 16) -> dict[str, torch.Tensor]:
    """What vLLM adds to each module's weight, by the module's path at run time.

    Raises ValueError where vLLM does, and leaves out what vLLM leaves out.
    """
    fields = json.loads((folder / "adapter_config.json").read_text())
    if {"r", "lora_alpha", "target_modules"} - set(fields):
        raise ValueError("Missing required configuration fields")
    if fields.get("use_dora") or fields.get("lora_bias") or fields.get("bias", "none") != "none":
        raise ValueError("not supported")
    if isinstance(fields.get("init_lora_weights"), str) and fields["init_lora_weights"] not in (
        "gaussian",
        "orthogonal",
    ):
        raise ValueError("does not support init_lora_weights")
    if set(fields.get("modules_to_save") or ()) - {"score", "classifier"}:
        raise ValueError("only supports modules_to_save")
    if max([fields["r"], *(fields.get("rank_pattern") or {}).values()]) > max_lora_rank:
        raise ValueError("is greater than max_lora_rank")
    assert not fields["rank_pattern"], "versions before the patterns were read would take r and lora_alpha for all"
    assert not fields["alpha_pattern"]
    scale = fields["lora_alpha"] / (math.sqrt(fields["r"]) if fields.get("use_rslora") else fields["r"])
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[-2:] in (["lora_A", "weight"], ["lora_B", "weight"]):
            path, kind = ".".join(parts[:-2]), parts[-2]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            path, kind = ".".join(parts[:-1]), parts[-1]
        elif parts[-2] in ("score", "classifier"):
            continue
        else:
            raise ValueError(f"{name} is unsupported LoRA weight")
        if path.rsplit(".", 1)[-1] not in {p.rsplit(".", 1)[-1] for p in runtime}:
            raise ValueError(f"expected target modules, received {path}")
        pairs.setdefault(path, {})[kind[-1]] = tensor.double()
    return {path: scale * pair["B"] @ pair["A"] for path, pair in pairs.items() if path in runtime}


def runtime_of(model) -> set[str]:
    """Module paths of a Llama in vLLM, before fusing."""
    layers = range(model.config.num_hidden_layers)
    inner = [f"self_attn.{n}" for n in LLAMA_LAYERS[:4]] + [f"mlp.{n}" for n in LLAMA_LAYERS[4:]]
    return {f"model.layers.{i}.{n}" for i in layers for n in inner} | {"model.embed_tokens", "lm_head"}


CONFIGS = {
    "lora": peftkit.LoRA(r=4, lora_alpha=16, target_modules=EVERY),
    "rslora": peftkit.LoRA(r=4, lora_alpha=16, use_rslora=True, target_modules=EVERY),
    "patterns": peftkit.LoRA(r=2, lora_alpha=3, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 9}),
    "pissa": peftkit.LoRA(r=4, lora_alpha=6, init_lora_weights="pissa"),
    "embedding": peftkit.LoRA(r=3, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "loha": peftkit.LoHa(r=2, alpha=3, target_modules=EVERY),
    "vera": peftkit.VeRA(r=6),
}


@pytest.mark.parametrize("label", list(CONFIGS))
def test_vllm_adds_what_the_adapter_adds(label, llama, tmp_path):
    model = trained(load_base("llama", llama), CONFIGS[label])
    peftkit.save(model, tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "out", to="vllm")
    assert (made.target, made.exact, made.notes) == ("vllm", True, ())
    meant, found = deltas(model), served(tmp_path / "out", runtime_of(model))
    assert found.keys() == meant.keys()
    for path, update in meant.items():
        assert torch.allclose(found[path], update, rtol=0, atol=1e-6 * float(update.abs().max())), path
    assert "library_name: vllm" in (tmp_path / "out/README.md").read_text()


def refused(model, tmp_path, *matches: str, **options) -> None:
    with pytest.raises(ExportError, match=r"vLLM 0.33 would not serve this adapter as it was trained: ") as caught:
        export(model, tmp_path / "out", to="vllm", **options)
    for match in matches:
        assert match in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning", "bottleneck", "loreft"])
def test_methods_that_vllm_has_not_are_refused(method, tmp_path):
    model = peftkit.wrap(built("llama"), peftkit.METHODS[method].config())
    refused(model, tmp_path, f"{method} is no change of projections, and vLLM serves LoRA only: serve it with peftkit")


def test_trained_parameters_are_refused(tmp_path):
    model = peftkit.wrap(built("llama"), peftkit.LayerNormTuning())
    refused(model, tmp_path, "layernorm is no change of projections", "merge it (--to merged)")


def test_modules_trained_whole_are_refused(tmp_path):
    # "vLLM only supports modules_to_save being either None or ["classifier", "score"]"
    model = trained(built("llama"), peftkit.LoRA(r=2, modules_to_save=["lm_head"]))
    refused(model, tmp_path, "lm_head was trained whole (modules_to_save)", "score or classifier only", "--to merged")
    model = trained(built("llama"), peftkit.LoRA(r=2, modules_to_save=["lm_head", "embed_tokens"]))
    refused(model, tmp_path, "lm_head, model.embed_tokens were trained whole")


def test_dora_is_refused_until_it_is_approximated(llama, tmp_path):
    # "vLLM does not yet support DoRA."
    model = trained(load_base("llama", llama), peftkit.LoRA(r=2, use_dora=True))
    with pytest.raises(ExportError, match=r"lora \(DoraAdapter\) at .* is not low-rank.*--rank 16"):
        export(model, tmp_path / "out", to="vllm")
    assert list(tmp_path.iterdir()) == []
    made = export(model, tmp_path / "out", to="vllm", rank=8)
    found, meant = served(tmp_path / "out", runtime_of(model)), deltas(model)
    for site in made.sites:
        truly = float((found[site.path] - meant[site.path]).norm() / meant[site.path].norm())
        assert truly == pytest.approx(site.error_relative, rel=1e-4)


def test_bias_is_refused(tmp_path):
    # "vLLM does not support LoRA bias (lora_bias)."
    model = trained(built("qwen2"), peftkit.LoRA(r=2, lora_bias=True))
    with pytest.raises(ExportError, match=r"lora changes model.layers.0.self_attn.q_proj.bias too"):
        export(model, tmp_path / "out", to="vllm", rank=2)


def wide(rank: int):
    """A model on which an adapter of the rank has an effect in every row."""
    return trained(built("llama"), peftkit.LoRA(r=rank, target_modules=["q_proj"]))


def test_rank_above_every_max_lora_rank_is_refused(tmp_path):
    # MaxLoRARanks ends with 512; "LoRA rank ... is greater than max_lora_rank ..."
    refused(wide(513), tmp_path, "its rank is 513", "which is 512 at most", "--rank 512")


def test_rank_above_that_of_the_server_is_refused(tmp_path):
    refused(wide(40), tmp_path, "its rank is 40", "here 32", "--rank 32", max_lora_rank=32)
    made = export(wide(40), tmp_path / "out", to="vllm", max_lora_rank=64)
    assert made.rank == 40


def test_max_lora_rank_that_vllm_does_not_take(tmp_path):
    with pytest.raises(ConfigError, match=r"vLLM takes max_lora_rank 1, 8, 16, 32, 64, 128, 256, 320, 512; found 24"):
        export(wide(2), tmp_path / "out", to="vllm", max_lora_rank=24)


@pytest.mark.parametrize(("rank", "flag"), [(4, None), (16, None), (17, 32), (300, 320)])
def test_flag_that_the_server_needs_is_said(rank, flag, tmp_path):
    made = export(wide(rank), tmp_path / "out", to="vllm")
    assert made.notes == (() if flag is None else (f"start vLLM with --enable-lora --max-lora-rank {flag}",))
    card = (tmp_path / "out/README.md").read_text()
    assert f"--max-lora-rank {flag or 16} --lora-modules" in card
    with pytest.raises(ValueError, match="max_lora_rank"):
        served(tmp_path / "out", runtime_of(built("llama")), max_lora_rank=rank - 1)


def test_paths_that_vllm_would_ignore_are_refused(tmp_path):
    # Names are checked by their last part when an adapter is loaded, and looked up by the whole path when it is used.
    inner = trained(built("llama").model, peftkit.LoRA(r=2))
    refused(inner, tmp_path, "it was trained on LlamaModel", "would load it and use the base")
    export(trained(built("llama").model, peftkit.LoRA(r=2)), tmp_path / "peft", to="peft")
    assert served(tmp_path / "peft", runtime_of(built("llama"))) == {}


def test_modules_at_other_paths_are_refused(tmp_path):
    model = built("llama")
    model.draft = torch.nn.Module()
    model.draft.q_proj = torch.nn.Linear(8, 8)
    wrapped = trained(model, peftkit.LoRA(r=2, target_modules=["q_proj"]))
    refused(wrapped, tmp_path, "draft.q_proj is no path of the model that vLLM serves", "ignore it there")


def test_modules_without_adapters_are_refused(tmp_path):
    # "expected target modules in ... but received ..."
    model = built("llama")
    model.model.layers[0].mlp.router = torch.nn.Linear(32, 4)
    wrapped = trained(model, peftkit.LoRA(r=2, target_modules=["q_proj", "router"]))
    refused(wrapped, tmp_path, "model.layers.0.mlp.router takes no adapter in vLLM (of llama models q_proj, k_proj")
    # MistralForCausalLM and Qwen2ForCausalLM declare no embedding_modules.
    for name in ("mistral", "qwen2"):
        wrapped = trained(built(name), peftkit.LoRA(r=2, target_modules=["lm_head"]))
        refused(wrapped, tmp_path, "lm_head takes no adapter in vLLM")


def test_tied_output_is_refused(tmp_path):
    config = built("llama").config
    config.tie_word_embeddings = True
    for target in ("lm_head", "embed_tokens"):
        model = LlamaForCausalLM(config)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        wrapped = trained(model, peftkit.LoRA(r=2, target_modules=[target]))
        refused(wrapped, tmp_path, f"{target} is tied to another module, and whether vLLM applies")


def test_output_head_of_a_large_vocabulary_is_refused(tmp_path):
    # "When using LoRA, vocab size must be <= 258048"
    config = LlamaConfig(
        vocab_size=260_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = trained(LlamaForCausalLM(config), peftkit.LoRA(r=1, target_modules=["lm_head"]))
    refused(model, tmp_path, "lm_head has 260,000 outputs", "up to 258,048 only")


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "mlp"])
def test_architectures_that_are_not_known_are_refused(name, tmp_path):
    # GPT2LMHeadModel has no SupportsLoRA in vLLM: "LoRA is not supported for ..."
    config = peftkit.LoRA(r=2, modules_to_save=(), target_modules=["first"] if name == "mlp" else None)
    refused(trained(built(name), config), tmp_path, "take adapters in vLLM is not known here", "--to peft")


def test_every_reason_is_given_at_once(tmp_path):
    model = built("llama")
    model.model.layers[0].mlp.router = torch.nn.Linear(32, 4)
    config = peftkit.LoRA(r=2, target_modules=["router"], modules_to_save=["lm_head"])
    refused(
        trained(model, config), tmp_path, "\n  - model.layers.0.mlp.router takes", "\n  - lm_head was trained whole"
    )


def test_classification_head_that_vllm_reads_is_kept(tmp_path):
    config = built("llama").config
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained(LlamaForSequenceClassification(config), peftkit.LoRA(r=2))
    made = export(model, tmp_path / "out", to="vllm")
    assert made.extras == ("score",)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.score.weight"], dict(model.named_modules())["score"].weight)
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (fields["modules_to_save"], fields["task_type"]) == (["score"], "SEQ_CLS")
    assert set(served(tmp_path / "out", runtime_of(model))) == {
        f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")
    }
