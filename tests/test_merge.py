"""Merging: what is stored is what was meant, it is measured truthfully, and unmerging restores every bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny import bits, built, logits, picture, randomise
from torch import nn

import peftkit
from peftkit.errors import MergeError, StateError
from peftkit.swap import CHILD
from peftkit.wrap import adapters_of, is_wrapped

FAMILIES = ("llama", "gpt2", "bert", "t5", "mlp")
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
}


def adapted(name, dtype=torch.float32, **fields):
    """A tiny model with a random LoRA on every projection, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peftkit.LoRA(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **fields})
        return randomise(peftkit.wrap(built(name, dtype), config))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_model_computes_the_same_and_unmerge_restores_every_bit(name, variant):
    model = adapted(name, **VARIANTS[variant])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.view(-1)[0] = -0.0
    before = picture(model)
    expected = logits(name, model)
    report = peftkit.merge(model)
    found = logits(name, model)
    assert torch.allclose(found, expected, atol=2e-6 * max(1.0, float(expected.abs().max())))
    assert report.effect_kept == pytest.approx(1.0, abs=1e-4)
    peftkit.unmerge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    assert bits(logits(name, model)) == bits(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_rounds_once_to_the_stored_dtype(dtype, variant, name):
    model = adapted(name, dtype, **VARIANTS[variant])
    before = picture(model)
    meant = {}
    for path, adapter in adapters_of(model, "default"):
        stored = model.get_submodule(path)._parameters["weight"].detach()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        turned = stored.T if type(model.get_submodule(path)).__name__ == "Conv1D" else stored
        meant[path] = adapter.merged({"weight": turned.to(wide)})["weight"].to(dtype)
    peftkit.merge(model)
    for path, weight in meant.items():
        module = model.get_submodule(path)
        found = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        assert bits(found) == bits(weight), path
        assert found.dtype == dtype
    peftkit.unmerge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_merge_in_half_precision_is_as_close_as_one_rounding_of_each_weight(dtype, bound):
    """Against the same function in float64: the merged model errs by no more than a few roundings of its own dtype."""
    model = adapted("mlp", dtype)
    oracle = adapted("mlp", dtype).double()
    expected = logits("mlp", oracle)
    base = logits("mlp", built("mlp", dtype).double())
    peftkit.merge(model)
    error = float((logits("mlp", model).double() - expected).abs().max())
    assert error <= 8 * bound * float(expected.abs().max())
    assert error < 0.2 * float((expected - base).abs().max())


def test_merge_takes_all_code_off_the_path():
    model = adapted("llama")
    originals = {path: type(module) for path, module in built("llama").named_modules()}
    calls = []
    for _, adapter in adapters_of(model, "default"):
        adapter.register_forward_hook(lambda *_: calls.append(1))
        adapter.forward = lambda *_: calls.append(1)
    peftkit.merge(model)
    for path, module in model.named_modules():
        if path and CHILD not in path.split("."):
            assert type(module) is originals[path], path
    logits("llama", model)
    assert calls == []


def test_merge_and_unload_leaves_a_plain_model():
    model = adapted("llama")
    expected = logits("llama", model)
    result = peftkit.merge_and_unload(model)
    assert result is model
    plain = built("llama")
    assert not is_wrapped(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {path: type(m) for path, m in model.named_modules()} == {path: type(m) for path, m in plain.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("peftkit" in key for module in model.modules() for key in module.__dict__)
    assert torch.allclose(logits("llama", model), expected, atol=1e-5)
    loaded = built("llama")
    loaded.load_state_dict(model.state_dict())
    assert bits(logits("llama", loaded)) == bits(logits("llama", model))


def test_merge_and_unload_keeps_what_was_merged_before():
    model = adapted("llama")
    peftkit.merge(model)
    expected = logits("llama", model)
    peftkit.merge_and_unload(model)
    assert bits(logits("llama", model)) == bits(expected)


def test_unwrap_of_a_merged_model_restores_the_base():
    model = adapted("llama")
    peftkit.merge(model)
    peftkit.unwrap(model)
    assert {k: bits(v) for k, v in model.state_dict().items()} == {
        k: bits(v) for k, v in built("llama").state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_report_agrees_with_a_float64_recomputation(dtype):
    model = adapted("llama", dtype)
    work = {}
    for path, adapter in adapters_of(model, "default"):
        before = model.get_submodule(path)._parameters["weight"].detach().clone().double()
        work[path] = before, adapter.scale * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    report = peftkit.merge(model)
    assert [s.path for s in report.sites] == list(work)
    for site in report.sites:
        before, delta = work[site.path]
        reached = model.get_submodule(site.path).weight.detach().double() - before
        assert site.dtype == str(dtype).removeprefix("torch.")
        assert site.delta_relative == pytest.approx(float(delta.norm() / before.norm()), rel=1e-4)
        assert site.error_relative == pytest.approx(float((reached - delta).norm() / delta.norm()), rel=0.05, abs=3e-6)
        assert site.effect_kept == pytest.approx(float((reached * delta).sum() / delta.square().sum()), rel=1e-4)
        assert site.changed == pytest.approx(float((reached != 0).double().mean()))
    assert report.effect_kept == min(s.effect_kept for s in report.sites)
    assert report.error_relative == max(s.error_relative for s in report.sites)
    plain = json.loads(report.to_json())
    assert len(plain["sites"]) == len(work)
    assert "q_proj.weight" in str(report)
    assert f"least effect kept {report.effect_kept:.4f}" in str(report)


def test_report_shows_when_bfloat16_erases_a_small_adapter():
    model = adapted("llama", torch.bfloat16)
    with torch.no_grad():
        for _, adapter in adapters_of(model, "default"):
            adapter.lora_B.mul_(1e-4)
    before = picture(model)
    with pytest.raises(MergeError, match=r"only \d.* would be stored .* minimum_effect=0\.9; the model is left"):
        peftkit.merge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    report = peftkit.merge(model, minimum_effect=0)
    assert report.effect_kept < 0.9
    assert report.error_relative > 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_merge_refuses_values_that_are_not_finite_and_changes_nothing(value, where):
    model = adapted("llama")
    path, adapter = list(adapters_of(model, "default"))[-1]
    with torch.no_grad():
        tensor = adapter.lora_B if where == "adapter" else model.get_submodule(path)._parameters["weight"]
        tensor[0, 0] = value
    before = picture(model)
    with pytest.raises(MergeError, match=f"{path}.weight: the .* holds values that are not finite"):
        peftkit.merge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


def test_merge_refuses_overflow_of_the_stored_dtype_and_changes_nothing():
    model = adapted("llama", torch.float16)
    path, adapter = list(adapters_of(model, "default"))[-1]
    with torch.no_grad():
        adapter.lora_A.fill_(300.0)
        adapter.lora_B.fill_(300.0)
    before = picture(model)
    with pytest.raises(MergeError, match=rf"{path}.weight: the merged value overflows float16; .* bfloat16"):
        peftkit.merge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


def test_merge_refuses_a_tied_weight_by_name():
    model = adapted("gpt2", target_modules=["wte", "c_attn"])
    before = picture(model)
    with pytest.raises(
        MergeError, match=r"transformer\.wte\.weight is tied to lm_head\.weight: merging would change both"
    ):
        peftkit.merge(model)
    assert picture(model) == before


def test_merge_of_an_untied_embedding_computes_the_same():
    model = adapted("llama", target_modules=["embed_tokens", "q_proj"])
    expected = logits("llama", model)
    peftkit.merge(model)
    assert torch.allclose(logits("llama", model), expected, atol=1e-5)


def test_merge_folds_trained_heads_in_and_unmerge_takes_them_out():
    model = adapted("bert")
    before = bits(model.classifier._parameters["weight"])
    expected = logits("bert", model)
    peftkit.merge(model)
    assert torch.allclose(logits("bert", model), expected, atol=1e-5)
    assert bits(model.classifier._parameters["weight"]) != before
    peftkit.unmerge(model)
    assert bits(model.classifier._parameters["weight"]) == before


def test_merge_of_several_adapters_adds_them_up_and_names_choose():
    model = adapted("llama")
    peftkit.wrap(model, peftkit.LoRA(r=2, target_modules=["q_proj", "up_proj"]), name="second")
    randomise(model, "second", seed=4)
    second = logits("llama", model)
    peftkit.activate(model, "default", "second")
    both = logits("llama", model)
    report = peftkit.merge(model)
    assert report.adapters == ("default", "second")
    assert torch.allclose(logits("llama", model), both, atol=1e-5)
    peftkit.unmerge(model)
    assert bits(logits("llama", model)) == bits(both)
    report = peftkit.merge(model, "second")
    assert report.adapters == ("second",)
    assert {s.path.rsplit(".", 1)[1] for s in report.sites} == {"q_proj", "up_proj"}
    assert torch.allclose(logits("llama", model), second, atol=1e-5)


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_merge_of_dora_and_lora_keeps_the_order_in_which_they_act(order):
    model = adapted("mlp", target_modules=["second"], use_dora=True)
    peftkit.wrap(model, peftkit.LoRA(r=2, target_modules=["second"]), name="second")
    randomise(model, "second", seed=4)
    peftkit.activate(model, *order)
    expected = logits("mlp", model)
    if order[0] == "default":
        peftkit.merge(model)
    else:  # the norms of the outer DoRA are those of the module's own weight
        with pytest.raises(MergeError, match="second: DoraAdapter reads the weight beneath it"):
            peftkit.merge(model)
    assert torch.allclose(logits("mlp", model), expected, atol=1e-5)


def test_unmerge_restores_the_adapters_that_were_active():
    model = adapted("llama")
    peftkit.wrap(model, peftkit.LoRA(r=2), name="second")
    randomise(model, "second", seed=4)
    second = logits("llama", model)
    peftkit.merge(model, "default")
    peftkit.unmerge(model)
    assert bits(logits("llama", model)) == bits(second)


def test_merge_refuses_offloaded_weights():
    from accelerate import cpu_offload

    model = cpu_offload(adapted("mlp"), execution_device=torch.device("cpu"))
    with pytest.raises(MergeError, match="on the meta device: offloaded"):
        peftkit.merge(model)
    logits("mlp", model)


def test_merge_without_an_active_adapter_is_refused():
    model = adapted("mlp")
    peftkit.activate(model)
    with pytest.raises(StateError, match="no adapter is active; name one"):
        peftkit.merge(model)


def test_merge_refuses_lora_bias_where_there_is_no_bias_and_changes_nothing():
    model = adapted("llama", lora_bias=True)
    before = picture(model)
    with pytest.raises(MergeError, match=r"q_proj.*bias"):
        peftkit.merge(model)
    assert picture(model) == before


def test_merge_folds_lora_bias_into_the_bias():
    model = adapted("gpt2", lora_bias=True)
    expected = logits("gpt2", model)
    report = peftkit.merge(model)
    assert {s.parameter for s in report.sites} == {"weight", "bias"}
    assert torch.allclose(logits("gpt2", model), expected, atol=1e-5)


def test_merged_plain_linear_is_the_class_of_torch():
    model = adapted("mlp")
    peftkit.merge(model)
    assert type(model.first) is nn.Linear


def test_updates_of_both_of_two_tied_weights_are_refused():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    peftkit.wrap(model, peftkit.LoRA(r=2, target_modules=["wte", "lm_head"], init_lora_weights=False))
    before = picture(model)
    with pytest.raises(MergeError, match=r"is tied to .*: merging would change both"):
        peftkit.merge(model)
    assert picture(model)["bits"] == before["bits"]
