"""A wrapped model is still the model: what takes a model takes a wrapped one, and unwrapping leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    adapted,
    alone,
    bits,
    built,
    checkpointed,
    ddp_worker,
    fitted,
    fsdp_worker,
    logits,
    lora,
    loss,
    picture,
    randomise,
)
from torch import nn

import peftkit
from peftkit.errors import ConfigError, StateError, TargetError
from peftkit.swap import CHILD
from peftkit.testing.backbones import BACKBONES
from peftkit.wrap import adapters_of, is_wrapped, record_of

FAMILIES = ("llama", "gpt2", "bert", "t5", "mlp")
TEXTS = ("llama", "gpt2", "bert", "t5")


# The same model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_wrapped_model_keeps_class_names_and_every_base_tensor(name):
    plain, model = built(name), built(name)
    before = {key: (value.data_ptr(), bits(value)) for key, value in model.state_dict().items()}
    modules = {path: type(module) for path, module in model.named_modules()}
    result = peftkit.wrap(model, lora())
    assert result is model
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    found = model.state_dict()
    assert {key: (found[key].data_ptr(), bits(found[key])) for key in before} == before
    assert all(f".{CHILD}." in f".{key}" for key in set(found) - set(before))
    now = dict(model.named_modules())
    for path, kind in modules.items():
        assert isinstance(now[path], kind)
        assert type(now[path]).__qualname__ == kind.__qualname__


@pytest.mark.parametrize("name", FAMILIES)
def test_base_checkpoint_loads_before_and_after_wrapping(name):
    other = built(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    checkpoint = other.state_dict()
    first, second = built(name), built(name)
    first.load_state_dict(checkpoint)
    fields = {"modules_to_save": ()}  # a head that is trained whole starts from the weights that it finds
    fitted(first, **fields), fitted(second, **fields)
    outcome = second.load_state_dict(checkpoint, strict=False)
    assert outcome.unexpected_keys == []
    assert all(f".{CHILD}." in f".{key}" for key in outcome.missing_keys)
    assert bits(logits(name, first)) == bits(logits(name, second))
    assert not torch.equal(logits(name, first), logits(name, other))


@pytest.mark.parametrize("name", FAMILIES)
def test_unwrap_restores_everything(name):
    model = built(name)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before = picture(model)
    torch.random.manual_seed(5)
    before["generator"] = bits(torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        peftkit.wrap(model, lora(use_dora=True))
        peftkit.wrap(model, peftkit.LayerNormTuning() if name != "mlp" else peftkit.BitFit(), name="second")
    loss(name, model).backward()
    peftkit.unwrap(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    assert not is_wrapped(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unwrap_one_adapter_keeps_the_others():
    model = built("llama")
    base = logits("llama", model)
    peftkit.wrap(model, lora())
    randomise(model)
    first = logits("llama", model)
    peftkit.wrap(model, lora(use_dora=True), name="second")
    randomise(model, "second")
    peftkit.activate(model, "default")
    peftkit.unwrap(model, "second")
    assert bits(logits("llama", model)) == bits(first)
    assert list(record_of(model).plans) == ["default"]
    peftkit.unwrap(model, "default")
    assert bits(logits("llama", model)) == bits(base)
    assert not is_wrapped(model)


@pytest.mark.parametrize("name", TEXTS)
def test_only_adapter_parameters_train(name):
    model = adapted(name)
    loss(name, model).backward()
    for key, parameter in model.named_parameters():
        trained = f".{CHILD}." in f".{key}"
        assert parameter.requires_grad == trained, key
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, key
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert own == record_of(model).plans["default"].trainable


@pytest.mark.parametrize("mode", [True, False])
def test_adapters_follow_train_and_eval(mode):
    model = built("bert").train(mode)
    peftkit.wrap(model, lora(lora_dropout=0.5))
    assert all(adapter.training == mode for _, adapter in adapters_of(model, "default"))
    model.train(not mode)
    assert all(adapter.training != mode for _, adapter in adapters_of(model, "default"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_wrapped_model_moves_to_another_dtype(dtype):
    model = adapted("llama").to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = logits("llama", adapted("llama"))
    found = logits("llama", model)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert torch.allclose(found.float(), expected, atol=tolerance * expected.abs().max().item())
    loss("llama", model).backward()


# transformers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_generate_agrees_with_merged_weights_and_uses_the_cache(name, fields):
    model = adapted(name, **fields)
    ids = BACKBONES[name].inputs(model)["input_ids"]

    def generated(which, use_cache=True):
        out = which.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=use_cache,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    cached = generated(model)
    assert cached.shape[0] == 6
    assert torch.allclose(cached, generated(model, use_cache=False), atol=1e-5)
    with peftkit.disabled(model):
        plain = generated(model)
    # torch multiplies in another order by a weight that requires gradients, so the base is frozen here too.
    assert bits(plain) == bits(generated(built(name).requires_grad_(False)))
    assert not torch.allclose(plain, cached, atol=1e-2)
    peftkit.merge_and_unload(model)
    assert torch.allclose(generated(model), cached, atol=1e-4)


def words():
    """A word-level tokenizer over the tiny vocabulary, built in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3} | {f"w{i}": i for i in range(4, 48)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def test_pipeline_classifies_with_the_adapter():
    model = adapted("bert")
    classify = transformers.pipeline("text-classification", model=model, tokenizer=words(), device="cpu")
    texts = ["w4 w9 w12", "w30 w7"]
    found = [[entry["score"] for entry in sorted(row, key=lambda e: e["label"])] for row in classify(texts, top_k=None)]
    for text, scores in zip(texts, found, strict=True):
        inputs = words()(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)[0]
        assert torch.allclose(torch.tensor(scores), expected, atol=1e-5)


def test_pipeline_generates_with_the_adapter():
    model = adapted("llama")
    write = transformers.pipeline("text-generation", model=model, tokenizer=words(), device="cpu")
    settings = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, bos_token_id=1)
    found = write("w4 w9 w12", generation_config=settings, return_full_text=False)[0]["generated_text"]
    inputs = words()("w4 w9 w12", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    assert found.split() == words().decode(ids, skip_special_tokens=True).split()


class Rows(torch.utils.data.Dataset):
    """A few rows of the tiny BERT's batch."""

    def __init__(self, model):
        self.inputs = BACKBONES["bert"].inputs(model)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.inputs.items()}


def test_stock_trainer_trains_the_adapter_and_nothing_else(tmp_path):
    model = peftkit.wrap(built("bert"), lora())
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=0.01, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=Rows(model)).train()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed
    assert all(f".{CHILD}." in f".{key}" for key in changed)


# Gradient checkpointing and compilation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["wrap", "checkpointing"])
def test_gradient_checkpointing_gives_equal_gradients(name, reentrant, first):
    plain = adapted(name, lora_dropout=0.3).train()
    torch.manual_seed(3)
    loss(name, plain).backward()
    model = built(name).train()
    if first == "checkpointing":
        checkpointed(model, reentrant)
    fitted(model, lora_dropout=0.3)
    if first == "wrap":
        checkpointed(model, reentrant)
    torch.manual_seed(3)
    loss(name, model).backward()
    expected = {key: parameter.grad for key, parameter in plain.named_parameters() if parameter.requires_grad}
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        assert gradient.abs().sum() > 0
        assert torch.allclose(found[key], gradient, atol=1e-6), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_layer_agrees_without_graph_breaks(name, fields, training):
    torch._dynamo.reset()
    layer = BACKBONES[name].block
    model = adapted(name, **fields).train(training)
    with torch.set_grad_enabled(training):
        expected = loss(name, model)
    block = model.get_submodule(layer)
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        found = loss(name, model)
    assert torch.allclose(found, expected, atol=1e-6)
    if training:
        expected.backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        found.backward()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.allclose(parameter.grad, gradients[key], atol=1e-6), key


# Copies ---------------------------------------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("name", FAMILIES)
def test_copy_is_equal_and_independent(copied, name):
    model = adapted(name, use_dora=True)
    expected = logits(name, model)
    twin = copied(model)
    assert bits(logits(name, twin)) == bits(expected)
    assert is_wrapped(twin)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert type(twin) is type(model)
    for path, module in twin.named_modules():
        for adapter in module.__dict__.get("_peftkit_active", ()):
            assert any(adapter is child for child in module._modules[CHILD].values()), path
    randomise(twin, seed=9)
    assert not torch.allclose(logits(name, twin), expected)
    assert bits(logits(name, model)) == bits(expected)
    peftkit.unwrap(twin)
    assert bits(logits(name, twin)) == bits(logits(name, built(name)))
    assert bits(logits(name, model)) == bits(expected)


def test_copy_made_in_a_disabled_block_can_be_activated():
    model = adapted("llama")
    expected = logits("llama", model)
    with peftkit.disabled(model):
        twin = copy.deepcopy(model)
    assert bits(logits("llama", model)) == bits(expected)
    peftkit.activate(twin, "default")
    assert bits(logits("llama", twin)) == bits(expected)


# Parallel training ----------------------------------------------------------------------------------------------------


def lone_process(tmp_path):
    """Makes this process a process group of one; for a function that `alone` runs."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)


def stepped(model, name="llama", runner=None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    value = loss(name, runner if runner is not None else model)
    value.backward()
    optimizer.step()
    return model


def test_ddp_trains_as_one_process_does(tmp_path):
    alone(train_with_ddp, tmp_path)


def train_with_ddp(tmp_path):
    expected = stepped(adapted("llama"))
    lone_process(tmp_path)
    model = adapted("llama")
    runner = nn.parallel.DistributedDataParallel(model)
    stepped(model, runner=runner)
    for (key, value), (other, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert key == other
        assert torch.allclose(value, wanted, atol=1e-6), key


@pytest.mark.slow
def test_ddp_on_two_processes_averages_adapter_gradients(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    expected = dict(stepped(adapted("mlp"), "mlp").named_parameters())
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert torch.allclose(value, expected[key], atol=1e-6), key


def test_fsdp2_trains_and_saves_whole_tensors(tmp_path):
    alone(train_with_fsdp2, tmp_path)


def train_with_fsdp2(folder):
    tmp_path = Path(folder)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    expected = stepped(adapted("llama"))
    peftkit.save(expected, tmp_path / "expected")
    lone_process(tmp_path)
    model = adapted("llama")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    stepped(model)
    peftkit.save(model, tmp_path / "sharded")
    with peftkit.disabled(model):
        plain = logits("llama", model)
    with pytest.raises(StateError, match=r"is sharded already; wrap the model .* before fully_shard"):
        peftkit.wrap(model, lora(), name="late")
    peftkit.activate(model)
    assert torch.equal(logits("llama", model), plain)
    peftkit.activate(model, "default")
    for verb in (peftkit.unwrap, peftkit.merge):
        with pytest.raises(StateError, match="became a FSDP"):
            verb(model)
    logits("llama", model)
    assert torch.allclose(plain, logits("llama", built("llama")), atol=1e-6)
    a = peftkit.load(built("llama"), tmp_path / "expected")
    b = peftkit.load(built("llama"), tmp_path / "sharded")
    assert torch.allclose(logits("llama", a), logits("llama", b), atol=1e-5)
    assert (tmp_path / "expected/peftkit.json").read_bytes() == (tmp_path / "sharded/peftkit.json").read_bytes()


@pytest.mark.slow
def test_fsdp2_on_two_processes_trains_as_one_does_and_saves_from_all_or_one(tmp_path):
    torch.multiprocessing.spawn(fsdp_worker, args=(str(tmp_path),), nprocs=2)
    expected = stepped(adapted("llama"))
    peftkit.save(expected, tmp_path / "expected")
    wanted = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    start = adapted("llama")
    moved = False
    for folder in ("rank0", "rank1", "trainer"):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert torch.allclose(tensor, wanted[key], atol=1e-6), (folder, key)
        provenance = (tmp_path / folder / "peftkit.json").read_bytes()
        assert provenance == (tmp_path / "expected" / "peftkit.json").read_bytes(), folder
        loaded = peftkit.load(built("llama"), tmp_path / folder)
        moved = moved or not torch.equal(logits("llama", loaded), logits("llama", start))
    assert moved, "a step that changes nothing would show nothing"
    training = load_file(tmp_path / "trainer" / "model.safetensors")
    assert training.keys() == {k for k in expected.state_dict() if "peftkit" in k.split(".")}


# accelerate's hooks ---------------------------------------------------------------------------------------------------


class Counting:
    """Made into a hook of accelerate that counts the forwards it sees."""

    @staticmethod
    def made():
        from accelerate.hooks import ModelHook

        class Hook(ModelHook):
            seen = 0

            def pre_forward(self, module, *args, **kwargs):
                self.seen += 1
                return args, kwargs

        return Hook()


@pytest.mark.parametrize("first", ["hook", "wrap"])
def test_accelerate_hook_and_adapter_both_run_whatever_comes_first(first):
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    expected, base = logits("llama", adapted("llama")), logits("llama", built("llama"))
    model, hook = built("llama"), Counting.made()
    site = model.model.layers[0].self_attn.q_proj
    if first == "hook":
        add_hook_to_module(site, hook)
    fitted(model)
    if first == "wrap":
        add_hook_to_module(site, hook)
    assert bits(logits("llama", model)) == bits(expected)
    assert hook.seen == 1
    with peftkit.disabled(model):
        assert bits(logits("llama", model)) == bits(base)
    twin = copy.deepcopy(model)
    assert bits(logits("llama", twin)) == bits(expected)
    peftkit.merge(model)
    assert torch.allclose(logits("llama", model), expected, atol=1e-5)
    peftkit.unmerge(model)
    assert bits(logits("llama", model)) == bits(expected)
    peftkit.unwrap(model)
    assert bits(logits("llama", model)) == bits(base)
    assert hook.seen == 5
    remove_hook_from_module(site)
    assert bits(logits("llama", model)) == bits(base)
    assert type(site) is nn.Linear


def test_module_whose_hook_was_removed_can_be_wrapped_and_unwrapped():
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model = built("llama")
    site = model.model.layers[0].self_attn.q_proj
    add_hook_to_module(site, Counting.made())
    remove_hook_from_module(site)
    assert "forward" in site.__dict__  # what the removal leaves behind, and what this test is about
    fitted(model)
    assert bits(logits("llama", model)) == bits(logits("llama", adapted("llama")))
    peftkit.unwrap(model)
    assert bits(logits("llama", model)) == bits(logits("llama", built("llama")))


@pytest.mark.parametrize("first", ["dispatch", "wrap"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dispatched_model_with_offloaded_weights_computes_the_same(first, fields):
    from accelerate import cpu_offload

    expected, base = logits("llama", adapted("llama", **fields)), logits("llama", built("llama"))
    model = built("llama")
    if first == "wrap":
        fitted(model, **fields)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    if first == "dispatch":
        assert model.model.layers[0].self_attn.q_proj.weight.is_meta
        fitted(model, **fields)
        assert not any(p.is_meta for _, a in adapters_of(model, "default") for p in a.parameters())
    assert torch.allclose(logits("llama", model), expected, atol=1e-6)
    with peftkit.disabled(model):
        assert bits(logits("llama", model)) == bits(base)


# disabled, activate ---------------------------------------------------------------------------------------------------


def test_disabled_nests_and_survives_exceptions():
    model = adapted("llama")
    base, expected = logits("llama", built("llama")), logits("llama", model)
    with peftkit.disabled(model):
        with peftkit.disabled(model):
            assert bits(logits("llama", model)) == bits(base)
        assert bits(logits("llama", model)) == bits(base)
    assert bits(logits("llama", model)) == bits(expected)
    with pytest.raises(KeyError), peftkit.disabled(model):
        raise KeyError
    assert bits(logits("llama", model)) == bits(expected)


def test_activate_in_a_disabled_block_lasts():
    model = adapted("llama")
    peftkit.wrap(model, lora(target_modules=["up_proj"]), name="second")
    randomise(model, "second", seed=4)
    expected = logits("llama", model)
    peftkit.activate(model, "default")
    with peftkit.disabled(model):
        peftkit.activate(model, "second")
        assert bits(logits("llama", model)) == bits(expected)
    assert bits(logits("llama", model)) == bits(expected)
    assert record_of(model).active == ("second",)


@pytest.mark.parametrize("verb", [peftkit.unwrap, peftkit.merge])
def test_verb_in_a_disabled_block_lasts(verb):
    model = adapted("llama")
    expected = logits("llama", built("llama") if verb is peftkit.unwrap else model)
    with peftkit.disabled(model):
        verb(model)
    assert torch.allclose(logits("llama", model), expected, atol=1e-5)


def test_exception_inside_forward_leaves_nothing_behind():
    model = adapted("llama")
    peftkit.wrap(model, lora(), name="second")
    randomise(model, "second", seed=4)
    second = logits("llama", model)
    before = picture(model)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError), peftkit.disabled(model):
        logits("llama", model)
    with pytest.raises(ZeroDivisionError):
        logits("llama", model)
    handle.remove()
    after = picture(model)
    assert after == before
    assert bits(logits("llama", model)) == bits(second)
    peftkit.activate(model, "default")
    assert bits(logits("llama", model)) == bits(logits("llama", adapted("llama")))


def test_activate_selects_adapters_and_their_gradients():
    model = adapted("llama")
    base, first = logits("llama", built("llama")), logits("llama", model)
    peftkit.wrap(model, lora(), name="second")
    randomise(model, "second", seed=4)
    second = logits("llama", model)
    peftkit.wrap(model, lora(), name="frozen", trainable=False)

    def training():
        return {key.split(f"{CHILD}.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad}

    assert training() == set()
    peftkit.activate(model, "default")
    assert bits(logits("llama", model)) == bits(first)
    assert training() == {"default"}
    peftkit.activate(model, "second", "frozen")
    assert training() == {"second"}
    peftkit.activate(model, "default", "second")
    assert training() == {"default", "second"}
    both = logits("llama", model)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    peftkit.activate(model)
    assert bits(logits("llama", model)) == bits(base)
    assert training() == set()


def test_two_active_linear_adapters_add_up():
    model = adapted("mlp", target_modules=["first"])
    peftkit.wrap(model, lora(target_modules=["first"], lora_alpha=2), name="second")
    randomise(model, "second", seed=4)
    peftkit.activate(model, "default", "second")
    x = BACKBONES["mlp"].inputs(model)["x"].double()
    children = dict(adapters_of(model, "default")), dict(adapters_of(model, "second"))
    weight = model.first._parameters["weight"].double()
    for found in children:
        weight = weight + found["first"].scale * found["first"].lora_B.double() @ found["first"].lora_A.double()
    expected = x @ weight.T + model.first.bias.double()
    with torch.no_grad():
        assert torch.allclose(model.first(x.float()).double(), expected, atol=1e-6)


# Errors ---------------------------------------------------------------------------------------------------------------


def refused(model, error, message, verb):
    before = picture(model)
    with pytest.raises(error, match=message):
        verb()
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


def test_wrap_twice_under_one_name_is_refused():
    model = adapted("llama")
    refused(
        model, ConfigError, "an adapter named 'default' is attached already; choose another name",
        lambda: peftkit.wrap(model, lora()),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "items", "forward", "..", "a\\b", "a\0b", " ", 3, None])
def test_wrap_refuses_a_name_that_cannot_be_one(name):
    model = built("mlp")
    refused(model, ConfigError, "cannot be an adapter's name", lambda: peftkit.wrap(model, lora(), name=name))


def test_unknown_adapter_names_are_refused_with_the_nearest():
    model = adapted("llama")
    message = "no adapter named 'defualt' is attached; did you mean 'default'"
    refused(model, StateError, message, lambda: peftkit.activate(model, "defualt"))
    refused(model, StateError, message, lambda: peftkit.unwrap(model, "defualt"))
    refused(model, StateError, message, lambda: peftkit.merge(model, "defualt"))
    refused(model, StateError, message, lambda: peftkit.save(model, "/nowhere", name="defualt"))


@pytest.mark.parametrize("verb", ["unwrap", "merge", "unmerge", "merge_and_unload", "activate", "save", "disabled"])
def test_verbs_refuse_a_model_that_is_not_wrapped(verb, tmp_path):
    model = built("mlp")

    def call():
        if verb == "disabled":
            with peftkit.disabled(model):
                pass
        else:
            getattr(peftkit, verb)(model, *([tmp_path / "x"] if verb == "save" else []))

    refused(model, StateError, r"Perceptron is not wrapped; call peftkit\.wrap", call)
    assert not (tmp_path / "x").exists()


def test_wrap_merge_activate_and_disabled_are_refused_while_merged():
    model = adapted("llama")
    peftkit.merge(model)
    refused(model, StateError, r"default is merged into the weights; call peftkit\.unmerge\(model\) first",
            lambda: peftkit.wrap(model, lora(), name="second"))  # fmt: skip
    refused(model, StateError, "default is merged already", lambda: peftkit.merge(model))
    refused(model, StateError, "is merged into the weights", lambda: peftkit.activate(model, "default"))
    refused(model, StateError, "is merged into the weights", lambda: peftkit.disabled(model).__enter__())
    peftkit.unmerge(model)
    refused(model, StateError, "nothing is merged", lambda: peftkit.unmerge(model))


def test_wrap_refuses_a_forward_replaced_on_the_instance():
    model = built("mlp")
    site = model.second
    site.forward = lambda x: x
    refused(model, TargetError, "second.forward was replaced on the instance", lambda: peftkit.wrap(model, lora()))


def test_wrap_draws_from_the_global_generator_only():
    torch.manual_seed(7)
    first = peftkit.wrap(built("llama"), lora())
    torch.manual_seed(7)
    second = peftkit.wrap(built("llama"), lora())
    for (_, a), (_, b) in zip(adapters_of(first, "default"), adapters_of(second, "default"), strict=True):
        assert bits(a.lora_A) == bits(b.lora_A)


def test_wrap_works_on_the_meta_device():
    model = peftkit.wrap(BACKBONES["llama"](device="meta"), lora(use_dora=True))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == record_of(model).plans["default"].trainable
    peftkit.unwrap(model)


def test_no_warning_escapes_from_the_main_verbs(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted("llama")
        peftkit.save(model, tmp_path / "a")
        peftkit.merge(model)
        peftkit.unmerge(model)
        peftkit.unwrap(model)
        peftkit.load(model, tmp_path / "a")
