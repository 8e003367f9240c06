"""A plan says exactly what wrapping will do, and touches nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import built, picture
from torch import nn

import peftkit
from peftkit.errors import ConfigError, PeftkitError
from peftkit.testing.backbones import BACKBONES
from peftkit.wrap import adapters_of

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(model):
    """Trainable parameters, shared ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters() if p.requires_grad}.values())


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("method", sorted(peftkit.METHODS))
def test_plan_touches_nothing_and_agrees_with_meta(name, method):
    config = peftkit.METHODS[method].config()
    model = built(name)
    before = picture(model)
    try:
        planned = peftkit.plan(model, config)
    except PeftkitError as error:
        assert picture(model) == before
        with pytest.raises(type(error)):
            peftkit.plan(BACKBONES[name](device="meta"), config)
        return
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    other = peftkit.plan(BACKBONES[name](device="meta"), config)
    assert (other.trainable, other.total, other.sites) == (planned.trainable, planned.total, planned.sites)
    assert planned.base == sum(p.numel() for p in model.parameters())
    assert planned.trainable == planned.adapter_parameters + planned.extra_parameters
    assert copy.deepcopy(planned) is planned


def test_plan_prints_a_table_with_exact_totals():
    text = str(peftkit.plan(built("llama"), peftkit.LoRA(r=4, target_modules=["q_proj", "down_proj"])))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "site module out x in sites trainable each trainable"
    assert "model.layers.*.self_attn.q_proj Linear 32x32 2 256 512" in lines
    assert "model.layers.*.mlp.down_proj Linear 32x64 2 384 768" in lines
    base = sum(p.numel() for p in built("llama").parameters())
    assert lines[-1].startswith(f"lora: 1,280 trainable of {base + 1280:,} parameters, ")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_plan_counts_a_new_head_and_says_so():
    planned = peftkit.plan(built("bert"), peftkit.LoRA(r=4, target_modules=["query"]))
    assert planned.extra_parameters == 32 * 3 + 3
    assert planned.trainable == 2 * 4 * 64 + 99
    # A trained copy takes the place of its original, so that the head is not counted twice.
    assert planned.total == planned.base + 2 * 4 * 64
    assert "(99 of them in modules trained whole)" in str(planned)
    assert "classifier (modules_to_save=() leaves it frozen)" in str(planned)
    frozen = peftkit.plan(built("bert"), peftkit.LoRA(r=4, target_modules=["query"], modules_to_save=()))
    assert frozen.extra_parameters == 0


def test_plan_counts_tied_modules_once_and_notes_the_tie():
    model = built("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    planned = peftkit.plan(model, peftkit.LoRA(r=4, target_modules=["wte"]))
    assert any("transformer.wte.weight is tied with lm_head.weight" in note for note in planned.notes)
    whole = peftkit.plan(
        built("gpt2"), peftkit.LoRA(r=4, target_modules=["c_attn"], modules_to_save=["lm_head", "wte"])
    )
    assert whole.extra_parameters == model.lm_head.weight.numel()
    wrapped = peftkit.wrap(built("gpt2"), whole.config)
    assert trained(wrapped) == whole.trainable


def test_plan_of_a_wrapped_model_is_that_of_its_backbone():
    config = peftkit.LoRA(r=4)
    model = built("llama")
    first = peftkit.plan(model, config)
    peftkit.wrap(model, config)
    again = peftkit.plan(model, config)
    assert (again.trainable, again.total, again.base) == (first.trainable, first.total, first.base)


def test_plan_refuses_what_is_no_config():
    with pytest.raises(ConfigError, match=r"expected a configuration such as peftkit\.LoRA\(r=16\), found str"):
        peftkit.plan(built("mlp"), "lora")


def test_plan_of_a_model_without_projections_is_refused():
    with pytest.raises(PeftkitError):
        peftkit.plan(nn.LayerNorm(3), peftkit.LoRA())


configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "target_modules": st.one_of(
            st.just("all-linear"),
            st.lists(
                st.sampled_from([*LEAVES, "embed_tokens", "lm_head", "layers.1.mlp.up_proj"]), min_size=1, unique=True
            ),
            st.sampled_from([r".*self_attn.*proj", r".*\.1\..*(up|down)_proj", r".*(q_proj|lm_head)"]),
        ),
        "exclude_modules": st.one_of(st.none(), st.lists(st.sampled_from(LEAVES), max_size=2, unique=True)),
        "layers_to_transform": st.sampled_from([None, 0, [1], [0, 1]]),
        "use_dora": st.booleans(),
        "use_rslora": st.booleans(),
        "lora_bias": st.booleans(),
        "modules_to_save": st.sampled_from([None, [], ["lm_head"], ["norm"], ["input_layernorm", "embed_tokens"]]),
        "rank_pattern": st.one_of(st.none(), st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 7), max_size=2)),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
    }
)


@given(fields=configs)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_planned_count_is_the_real_count_for_any_config(fields):
    model = BACKBONES["llama"](device="meta")
    try:
        planned = peftkit.plan(model, peftkit.LoRA(**fields))
    except PeftkitError:
        return
    if any(site.role == "embedding" for site in planned.sites) and (fields["use_dora"] or fields["lora_bias"]):
        with pytest.raises(ConfigError, match="embeddings take LoRA"):
            peftkit.wrap(model, planned.config)
        return
    peftkit.wrap(model, planned.config)
    assert trained(model) == planned.trainable
    assert [path for path, _ in adapters_of(model, "default")] != []
    for site in planned.sites:
        adapter = dict(adapters_of(model, "default"))[site.path]
        assert sum(p.numel() for p in adapter.parameters()) == site.count
    before = {key for key, _ in BACKBONES["llama"](device="meta").named_parameters()}
    peftkit.unwrap(model)
    assert {key for key, _ in model.named_parameters()} == before
    assert torch.device("meta") in {p.device for p in model.parameters()}


@pytest.mark.parametrize("method", [peftkit.BitFit, peftkit.LayerNormTuning, peftkit.FullFineTuning])
def test_plan_counts_a_trained_copy_in_place_of_its_original(method):
    planned = peftkit.plan(built("gpt2"), method())
    assert planned.trainable > 0
    assert planned.total == planned.base


def test_plan_is_pickled_by_the_name_of_its_method_and_says_when_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pickle
    import sys

    module = sys.modules["peftkit.plan"]

    local = dataclasses.replace(peftkit.METHODS["lora"], summary="local", adapter=lambda site, cfg, shared: None)
    planned = dataclasses.replace(peftkit.plan(built("mlp"), peftkit.LoRA()), method=local)
    monkeypatch.setattr(module, "METHODS", {"lora": local})
    data = pickle.dumps(planned)
    assert pickle.loads(data).method is local
    monkeypatch.setattr(module, "METHODS", {"another": local})
    with pytest.raises(ConfigError, match="'lora', which is not registered here"):
        pickle.loads(data)
