"""Names in the checkpoint against names in the model: renamed, fused, split, tied, missing and new tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_folders import LORA, adapter_folder, base_folder, loaded, merged_in_memory, rewritten, tensors, weights
from tiny import bits

import peftkit
from peftkit.errors import BaseMismatchError, CheckpointError, MergeError, StateError
from peftkit.shards import merge_shards, plan_shards
from peftkit.testing.subject import perturb


def same(found, expected):
    """Both hold the same names and bits."""
    return {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in expected.items()}


def test_a_base_without_the_prefix_of_its_class(tmp_path):
    """Saved by AutoModel, trained on with a head: names lack "bert.", and the head is new."""
    import transformers

    full = base_folder(tmp_path / "full", "bert")
    model = transformers.BertForSequenceClassification.from_pretrained(full)
    model.bert.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    headed = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peftkit.wrap(headed, peftkit.LoRA(r=2))
    perturb(headed)
    adapter = peftkit.save(headed, tmp_path / "adapter")
    plan = plan_shards(base, adapter, tmp_path / "out")
    assert plan.new == ("classifier.weight", "classifier.bias")
    merge_shards(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    out = loaded(tmp_path / "out")
    peftkit.merge_and_unload(headed)
    assert type(out) is transformers.BertForSequenceClassification
    assert same(out.state_dict(), headed.state_dict())
    assert set(tensors(base)) < set(tensors(tmp_path / "out"))


def test_a_language_model_that_got_a_head_for_a_task(tmp_path):
    import transformers

    base = base_folder(tmp_path, "llama")
    headed = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=5)
    peftkit.wrap(headed, peftkit.LoRA(r=2))
    perturb(headed)
    adapter = peftkit.save(headed, tmp_path / "adapter")
    plan = plan_shards(base, adapter, tmp_path / "out")
    assert plan.model == "LlamaForSequenceClassification"
    assert any("left out, having no place in it: lm_head.weight" in note for note in plan.notes)
    merge_shards(base, adapter, tmp_path / "out")
    peftkit.merge_and_unload(headed)
    out = loaded(tmp_path / "out")
    assert out.config.num_labels == 5
    assert same(out.state_dict(), headed.state_dict())


def test_tensors_that_the_model_does_not_know_are_copied_and_said(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    rewritten(base, lambda found: {**found, "model.mtp.weight": torch.arange(5)})
    plan = plan_shards(base, adapter, tmp_path / "out")
    assert any("copied, having no place in LlamaForCausalLM: model.mtp.weight" in note for note in plan.notes)
    merge_shards(base, adapter, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.mtp.weight"], torch.arange(5))


@pytest.fixture
def mixtral(tmp_path):
    """A mixture of experts: one tensor an expert in the file, one for all experts in the model."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
        transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    names = set(tensors(tmp_path / "base"))
    assert any(".experts.2.w1.weight" in name for name in names)
    assert not names >= set(loaded(tmp_path / "base").state_dict())
    return tmp_path / "base"


def test_experts_that_the_model_fuses_are_copied_and_checked(tmp_path, mixtral):
    adapter = adapter_folder(tmp_path, mixtral, peftkit.LoRA(r=4, target_modules=("q_proj", "o_proj")))
    memory, _ = merged_in_memory(tmp_path, mixtral, adapter)
    merge_shards(mixtral, adapter, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(memory))
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    rewritten(mixtral, lambda found: {**found, name: found[name] + 1})
    with pytest.raises(BaseMismatchError, match=r"other base weights: model.layers.1.*experts.gate_up_proj differs"):
        merge_shards(mixtral, adapter, tmp_path / "other")


def test_experts_that_are_trained_whole_are_written_back_one_by_one(tmp_path, mixtral):
    adapter = adapter_folder(tmp_path, mixtral, peftkit.FullFineTuning(target_modules=("experts",)))
    memory, expected = merged_in_memory(tmp_path, mixtral, adapter)
    report = merge_shards(mixtral, adapter, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(memory))
    assert not same(tensors(tmp_path / "out"), tensors(mixtral))
    assert [s.name for s in report.sites] == [s.name for s in expected.sites]


def test_a_conversion_without_a_way_back_is_refused(tmp_path, mixtral, monkeypatch):
    from peftkit.shards import names

    adapter = adapter_folder(tmp_path, mixtral, peftkit.FullFineTuning(target_modules=("experts",)))
    original = names.reverted

    def lossy(model, group, held):
        return {k: t + (k == group.keys[1]) for k, t in original(model, group, held).items()}

    monkeypatch.setattr(names, "reverted", lossy)
    with pytest.raises(MergeError, match=r"does not come back to the bit when transformers converts it.*in memory"):
        merge_shards(mixtral, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Tied weights -------------------------------------------------------------------------------------------------------


def test_tied_weights_trained_whole_are_stored_as_the_base_stores_them(tmp_path):
    base = base_folder(tmp_path, "gpt2")
    adapter = adapter_folder(tmp_path, base, peftkit.FullFineTuning())
    memory, _ = merged_in_memory(tmp_path, base, adapter)
    merge_shards(base, adapter, tmp_path / "once")
    assert weights(tmp_path / "once") == weights(memory)
    rewritten(base, lambda found: {**found, "lm_head.weight": found["transformer.wte.weight"].clone()})
    merge_shards(base, adapter, tmp_path / "twice")
    found = tensors(tmp_path / "twice")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert torch.equal(found["lm_head.weight"], tensors(memory)["transformer.wte.weight"])


def test_copies_of_a_tied_weight_that_differ_are_refused_where_they_change(tmp_path):
    base = base_folder(tmp_path, "gpt2")
    adapter = adapter_folder(tmp_path, base, peftkit.FullFineTuning())
    rewritten(base, lambda found: {**found, "lm_head.weight": found["transformer.wte.weight"] + 1})
    with pytest.raises(MergeError, match=r"are one tied weight by config.json, and the checkpoint holds two different"):
        merge_shards(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("names", [("wte",), ("wte", "lm_head")], ids=["one", "both"])
def test_an_update_of_a_tied_weight_is_refused(tmp_path, names):
    base = base_folder(tmp_path, "gpt2")
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(r=2, target_modules=names))
    with pytest.raises(
        MergeError, match=r"transformer.wte.weight is tied to lm_head.weight: merging would change both"
    ):
        merge_shards(base, adapter, tmp_path / "out")


# The base that was trained on ---------------------------------------------------------------------------------------


def test_another_base_is_refused_before_out_is_there(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    for key in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        rewritten(base, lambda found, key=key: {**found, key: found[key] * 1.5})
        with pytest.raises(BaseMismatchError, match=rf"trained on other base weights: {key} differs.*--ignore base"):
            merge_shards(base, adapter, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
        rewritten(base, lambda found, key=key: {**found, key: found[key] / 1.5})
    rewritten(base, lambda found: {**found, "model.norm.weight": found["model.norm.weight"] * 1.5})
    merge_shards(base, adapter, tmp_path / "out", ignore=("base",))


@pytest.mark.parametrize("bound", [None, "2MB"])
def test_a_base_in_another_precision_is_recognised(tmp_path, bound):
    base = base_folder(tmp_path, "llama", torch.float32)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    rounded = base_folder(tmp_path / "rounded", "llama", torch.bfloat16)
    merge_shards(rounded, adapter, tmp_path / "out", max_memory=bound)
    assert next(iter(tensors(tmp_path / "out").values())).dtype == torch.bfloat16


def test_a_base_that_lacks_a_tensor_is_refused(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    gone = "model.layers.0.self_attn.q_proj.weight"
    rewritten(base, lambda found: {k: v for k, v in found.items() if k != gone})
    with pytest.raises(BaseMismatchError, match=rf"trained on another base: 1 tensors are in one.*first '{gone}'"):
        merge_shards(base, adapter, tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"lacks {gone}, which LlamaForCausalLM has and an adapter changes"):
        merge_shards(base, adapter, tmp_path / "out", ignore=("base",))


def test_copies_of_base_weights_in_a_folder_of_peft_are_compared(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(r=2, target_modules=("embed_tokens", "q_proj")))
    (adapter / "peftkit.json").unlink()
    file = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    copy = tensors(base)["model.embed_tokens.weight"]
    save_file({**load_file(file), key: copy}, file)
    merge_shards(base, adapter, tmp_path / "out")
    save_file({**load_file(file), key: copy + 1}, file)
    with pytest.raises(BaseMismatchError, match=r"model.embed_tokens.weight differs"):
        merge_shards(base, adapter, tmp_path / "other")


# Folders of peft, and modules of one's own --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("kind", ["lora", "dora", "orthogonal"])
def test_a_folder_of_peft(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base = base_folder(tmp_path)
    extra = {"lora": {}, "dora": {"use_dora": True}, "orthogonal": {"init_lora_weights": "orthogonal"}}[kind]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **extra)
    model = peft.get_peft_model(loaded(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge_shards(base, tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload()
    for key, value in loaded(tmp_path / "out").state_dict().items():
        assert torch.allclose(value, merged.state_dict()[key], atol=1e-5), key


def test_a_module_of_ones_own_is_given_on_the_meta_device(tmp_path):
    from peftkit.testing.backbones import BACKBONES

    model = BACKBONES["mlp"]()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    peftkit.wrap(model, peftkit.LoRA(**LORA))
    perturb(model)
    adapter = peftkit.save(model, tmp_path / "adapter")
    with pytest.raises(StateError, match=r"model= holds weights; build it under torch.device\('meta'\)"):
        merge_shards(tmp_path / "base", adapter, tmp_path / "out", model=BACKBONES["mlp"]())
    merge_shards(tmp_path / "base", adapter, tmp_path / "out", model=BACKBONES["mlp"](device="meta"))
    peftkit.merge_and_unload(model)
    assert same(tensors(tmp_path / "out"), model.state_dict())
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        merge_shards(tmp_path / "base", adapter, tmp_path / "more")
