"""Saving and loading: strict about everything in a folder, and nothing of the model changes when something is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bits, built, logits, picture, randomise

import peftkit
from peftkit import fingerprint, folder
from peftkit.errors import BaseMismatchError, CheckpointError, ConfigError, TargetError
from peftkit.wrap import adapters_of, is_wrapped, record_of

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapted(name="llama", dtype=torch.float32, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peftkit.LoRA(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **fields})
        return randomise(peftkit.wrap(built(name, dtype), config))


@pytest.fixture
def saved(tmp_path):
    """A folder with a LoRA for the tiny Llama."""
    return peftkit.save(adapted(), tmp_path / "adapter")


def edit_tensors(path, change):
    tensors = load_file(path / folder.WEIGHTS)
    save_file(change(tensors), path / folder.WEIGHTS, metadata={"format": "pt"})


def edit_json(path, change, name=folder.CONFIG):
    file = path / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def refused(path, error=CheckpointError, match=None, model=None, **options):
    """Loading fails with this error, and neither the model nor torch's generator is changed."""
    model = built("llama") if model is None else model
    before = picture(model)
    with pytest.raises(error, match=match) as caught:
        peftkit.load(model, path, **options)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    return str(caught.value)


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 2}},
     {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "v_proj"]}],
    ids=["plain", "dora", "rslora", "pissa", "pattern", "whole", "embedding"],
)  # fmt: skip
def test_load_gives_equal_logits_and_a_second_save_equal_bytes(fields, tmp_path):
    model = adapted(**fields)
    peftkit.save(model, tmp_path / "a")
    loaded = peftkit.load(built("llama"), tmp_path / "a")
    assert bits(logits("llama", loaded)) == bits(logits("llama", model))
    peftkit.save(loaded, tmp_path / "b")
    for name in (folder.CONFIG, folder.WEIGHTS, folder.PROVENANCE, folder.CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_load_leaves_the_random_generator_alone(saved):
    torch.manual_seed(3)
    before = bits(torch.get_rng_state())
    peftkit.load(built("llama"), saved)
    assert bits(torch.get_rng_state()) == before


def test_load_of_a_frozen_adapter_trains_nothing(saved):
    model = peftkit.load(built("llama"), saved, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_load_beside_another_adapter_keeps_it(saved, tmp_path):
    model = peftkit.wrap(built("llama"), peftkit.LoRA(r=2))
    randomise(model, seed=8)
    first = logits("llama", model)
    shutil.copytree(saved, tmp_path / "all" / "second")
    peftkit.load(model, tmp_path / "all", name="second")
    assert bits(logits("llama", model)) == bits(logits("llama", peftkit.load(built("llama"), saved)))
    peftkit.activate(model, "default")
    assert bits(logits("llama", model)) == bits(first)


def test_save_while_merged_gives_the_same_folder(tmp_path):
    model = adapted()
    peftkit.save(model, tmp_path / "a")
    fresh = adapted()
    peftkit.merge(fresh)
    peftkit.save(fresh, tmp_path / "b")
    for name in (folder.CONFIG, folder.WEIGHTS, folder.PROVENANCE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_about_is_kept_through_load_and_save(tmp_path):
    peftkit.save(adapted(), tmp_path / "a", about={"seed": 3, "data": ["x"]})
    loaded = peftkit.load(built("llama"), tmp_path / "a")
    peftkit.save(loaded, tmp_path / "b")
    assert json.loads((tmp_path / "b" / folder.PROVENANCE).read_text())["about"] == {"seed": 3, "data": ["x"]}


@pytest.mark.parametrize("about", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_about_that_is_no_json_is_refused_and_writes_nothing(about, tmp_path):
    with pytest.raises(CheckpointError, match="about must hold plain JSON values"):
        peftkit.save(adapted(), tmp_path / "a", about=about)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_gives_the_adapter_the_dtype_asked_for(dtype, saved):
    model = peftkit.load(built("llama"), saved, dtype=dtype)
    assert {p.dtype for _, a in adapters_of(model, "default") for p in a.parameters()} == {dtype}


# Tensors --------------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named_and_can_be_accepted(saved):
    edit_tensors(saved, lambda t: {k: v for k, v in t.items() if k != KEY})
    message = refused(saved)
    assert str(saved) in message
    assert f"1 of 8 tensors are missing, first '{KEY}'" in message
    assert "ignore=('missing',)" in message
    model = peftkit.load(built("llama"), saved, ignore=("missing",))
    adapters = dict(adapters_of(model, "default"))
    assert adapters["model.layers.0.self_attn.q_proj"].lora_A.abs().sum() > 0


def test_unexpected_tensors_are_named_with_the_nearest_and_can_be_dropped(saved):
    other = KEY.replace("layers.0", "layers.7")
    edit_tensors(saved, lambda t: {**t, other: t[KEY].clone()})
    message = refused(saved)
    assert f"1 tensors have no place in the model, first '{other}'" in message
    assert "ignore=('unexpected',)" in message
    model = peftkit.load(built("llama"), saved, ignore=("unexpected",))
    assert bits(logits("llama", model)) == bits(logits("llama", adapted()))


def test_renamed_tensor_is_unexpected_and_missing(saved):
    edit_tensors(saved, lambda t: {k.replace("lora_A.weight", "lora_A.default.weight"): v for k, v in t.items()})
    message = refused(saved)
    assert "did you mean" in message
    refused(saved, match="tensors are missing", ignore=("unexpected",))
    refused(saved, match="have no place", ignore=("missing",))


def test_tensor_of_another_shape_is_refused_whatever_is_ignored(saved):
    edit_tensors(saved, lambda t: {**t, KEY: torch.zeros(4, 5)})
    message = refused(saved, ignore=("missing", "unexpected", "base"))
    assert f"{KEY} has shape (4, 5), the model and the config need (4, 32)" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensor_that_is_no_floating_point_is_refused(dtype, saved):
    edit_tensors(saved, lambda t: {**t, KEY: torch.zeros(4, 32, dtype=dtype)})
    refused(saved, match=rf"{KEY} holds torch\.\w+, expected floating-point")


def test_config_that_asks_for_another_rank_is_refused(saved):
    edit_json(saved, lambda c: {**c, "r": 8})
    refused(saved, match=r"has shape \(4, 32\), the model and the config need \(8, 32\)")


def test_folder_for_another_architecture_is_refused(saved):
    refused(saved, TargetError, "'q_proj' matches no module", model=built("gpt2"))


# The base -------------------------------------------------------------------------------------------------------------


def shifted(amount=1e-3, dtype=torch.float32):
    model = built("llama", dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += amount
    return model


def test_other_base_weights_are_refused_by_name_and_can_be_accepted(saved):
    message = refused(saved, BaseMismatchError, model=shifted())
    assert "1 of 21 tensors differ, first 'model.layers.1.mlp.down_proj.weight'" in message
    assert "LlamaForCausalLM" in message
    assert "ignore=('base',)" in message
    model = peftkit.load(shifted(), saved, ignore=("base",))
    assert is_wrapped(model)


def test_every_single_changed_element_of_the_base_is_noticed(saved):
    stored = json.loads((saved / folder.PROVENANCE).read_text())["base"]["tensors"]
    model = built("llama")
    for name, parameter in model.named_parameters():
        index = parameter.numel() // 3
        with torch.no_grad():
            before = parameter.view(-1)[index].clone()
            parameter.view(-1)[index] = before * 1.5 + 0.01
            tensors = fingerprint.base_tensors(model, {}, [])
            assert fingerprint.differences(tensors, stored) == [name]
            parameter.view(-1)[index] = before


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16])
def test_base_in_another_precision_is_the_same_base(trained, used, tmp_path):
    peftkit.save(adapted(dtype=trained), tmp_path / "a")
    peftkit.load(built("llama", trained).to(used), tmp_path / "a")
    # Rounded from a common float32 original to two different half precisions, nothing tells that they were the same.
    if torch.float32 in (trained, used) or trained == used:
        peftkit.load(built("llama", used), tmp_path / "a")
    # One part in four is a change of the weight in every one of these precisions.
    wrong = built("llama", trained).to(used)
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight[3, 4] *= 1.25
    refused(tmp_path / "a", BaseMismatchError, "down_proj", model=wrong)


def test_base_is_checked_under_other_adapters_and_merges(saved, tmp_path):
    model = adapted()
    peftkit.load(model, saved, name="again")
    peftkit.wrap(model, peftkit.LoRA(r=2), name="more")
    peftkit.save(model, tmp_path / "all", name="more")
    with_base = json.loads((tmp_path / "all/more" / folder.PROVENANCE).read_text())["base"]
    assert with_base == json.loads((saved / folder.PROVENANCE).read_text())["base"]


def test_head_that_is_trained_whole_is_no_part_of_the_base(tmp_path):
    model = adapted("bert", target_modules=["query"])
    peftkit.save(model, tmp_path / "a")
    other = built("bert")
    with torch.no_grad():
        other.classifier.weight.add_(1)
    loaded = peftkit.load(other, tmp_path / "a")
    assert bits(logits("bert", loaded)) == bits(logits("bert", model))


def test_folder_without_provenance_loads(saved):
    (saved / folder.PROVENANCE).unlink()
    peftkit.load(shifted(), saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: [],
        lambda p: {**p, "base": 3},
        lambda p: {**p, "base": {"tensors": []}},
        lambda p: {**p, "base": {"tensors": {"a": 3}}},
        lambda p: {**p, "base": {}},
        lambda p: {**p, "base": {"tensors": {"x": {"dtype": ["float32"], "float32": {}}}}},
    ],
)
def test_damaged_provenance_is_refused(change, saved):
    edit_json(saved, change, folder.PROVENANCE)
    refused(saved)


def test_provenance_with_hostile_dtypes_still_tells_bases_apart(saved):
    def change(found):
        for known in found["base"]["tensors"].values():
            known["dtype"] = ["float32", {}]
        return found

    edit_json(saved, change, folder.PROVENANCE)
    refused(saved, BaseMismatchError, model=shifted())
    peftkit.load(built("llama"), saved)


# Hostile configs ------------------------------------------------------------------------------------------------------

FIELDS = {
    "r": ["8", 0, -1, 1.5, True, None, [8], {}, 10**30, 10**12],
    "lora_alpha": ["x", None, [], True],
    "lora_dropout": [2, -1, "x", 1.0],
    "use_dora": ["yes", 3],
    "use_rslora": [1],
    "init_lora_weights": ["evil", 3, None, {}],
    "target_modules": [3, {"a": 1}, [[["q_proj"]]], ["q_proj", 3], ["q_proj", "nowhere"], "(", "(?P<x", [""], []],
    "layers_to_transform": [["0"], 99, [-1], True, 1.5],
    "modules_to_save": ["lm_head", [3], ["nowhere"]],
    "rank_pattern": [[], {"q_proj": "8"}, {"(": 4}, {"q_proj": -4}, 3],
    "alpha_pattern": [{"q_proj": None}, "x"],
    "peft_type": [None, 3, "EVIL", ["LORA"], {}, "lora"],
    "exclude_modules": [3, "["],
    "task_type": [3, ["x"]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in FIELDS.items() for v in values])
def test_config_field_of_a_wrong_value_is_refused(key, value, saved):
    edit_json(saved, lambda c: {**c, key: value})
    refused(saved, (CheckpointError, ConfigError, TargetError))


def test_unknown_field_that_switches_something_on_is_refused_with_the_nearest(saved):
    edit_json(saved, lambda c: {**c, "use_dorra": True})
    refused(saved, match=r"use_dorra=True is not implemented by peftkit's lora; did you mean 'use_dora'")
    edit_json(saved, lambda c: {**c, "use_dorra": {"deep": [None, False, {}]}})
    refused(saved, match="use_dorra=")
    edit_json(saved, lambda c: {**c, "use_dorra": None})
    peftkit.load(built("llama"), saved)


def test_config_of_adapterhub_is_recognised(saved):
    schema = {"config": {"r": 8, "architecture": "lora"}, "hidden_size": 32, "model_type": "llama", "name": "x"}
    (saved / folder.CONFIG).write_text(json.dumps(schema))
    refused(saved, match="is an AdapterHub config, which has the same file name and another schema")


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{", b"[" * 100_000, b'{"r": NaN}', b"\xff"])
def test_config_that_is_no_object_is_refused(content, saved):
    (saved / folder.CONFIG).write_bytes(content)
    refused(saved, match=r"adapter_config\.json")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -100])
def test_truncated_tensor_file_is_refused(keep, saved):
    file = saved / folder.WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    refused(saved, match="is not a complete safetensors file")


def test_folder_with_only_a_pickle_is_refused(saved):
    (saved / folder.WEIGHTS).rename(saved / "adapter_model.bin")
    refused(saved, match=r"holds its weights as a pickle \(adapter_model\.bin\), which can run code")


@pytest.mark.parametrize("name", [folder.CONFIG, folder.WEIGHTS])
@pytest.mark.parametrize("kind", ["missing", "folder", "loop"])
def test_file_that_is_missing_or_no_file_is_refused(name, kind, saved):
    (saved / name).unlink()
    if kind == "folder":
        (saved / name).mkdir()
    if kind == "loop":
        (saved / name).symlink_to(name)
    refused(saved)


def test_path_that_is_no_adapter_is_refused(tmp_path):
    refused(tmp_path / "nowhere", match="does not exist")
    refused(tmp_path, match=r"holds no adapter_config\.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")


# States ---------------------------------------------------------------------------------------------------------------


def test_load_under_a_taken_or_impossible_name_is_refused(saved):
    model = adapted()
    refused(saved, ConfigError, "an adapter named 'default' is attached already", model=model)
    refused(saved, ConfigError, "cannot be an adapter's name", name="a.b")
    refused(saved, ConfigError, "ignore takes 'missing', 'unexpected' and 'base', found 'all'", ignore=("all",))
    peftkit.merge(model)
    refused(saved, ConfigError, "merged into the weights", model=model, name="second")


def test_save_onto_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        peftkit.save(adapted(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_save_writes_targets_out_so_that_they_mean_the_same_everywhere(tmp_path):
    model = built("llama")
    peftkit.wrap(model, peftkit.LoRA(target_modules="all-linear", layers_to_transform=[1], exclude_modules=["o_proj"]))
    peftkit.save(model, tmp_path)
    found = json.loads((tmp_path / folder.CONFIG).read_text())
    assert all(target.startswith("1.") or ".1." in target for target in found["target_modules"])
    again = peftkit.load(built("llama"), tmp_path)
    assert {s.path for s in record_of(again).plans["default"].sites} == {
        s.path for s in record_of(model).plans["default"].sites
    }
