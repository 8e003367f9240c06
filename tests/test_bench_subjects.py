"""peftkit's own methods as contenders, and what all subjects share."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peftkit_bench import subjects
from peftkit_bench.spec import Contender, Subject, SuiteError
from peftkit_bench.subjects.schedule import allocation
from peftkit_bench.subjects.snapshot import Snapshot
from torch import Tensor, nn

import peftkit
from peftkit.errors import ConfigError, StateError, TrainingError
from peftkit.quantization import is_quantized, weights_of
from peftkit.testing.backbones import BACKBONES

NOTHING = (("llama", "head"), ("llama", "bitfit"))
"""Methods that have nothing to train there."""
CASES = [(b, name) for b in ("bert", "llama") for name in peftkit.METHODS if (b, name) not in NOTHING]
UNMERGED = frozenset(m.name for m in peftkit.METHODS.values() if not m.mergeable)


@pytest.fixture
def own() -> Subject:
    return subjects.subject("peftkit")


def attached(subject: Subject, model: nn.Module, method: str, **config: Any) -> Any:
    return subject.attach(model, method, subject.resolve(model, Contender(method=method, config=config), None).fields)


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return found


def train(subject: Subject, model: Any, inputs: Mapping[str, Tensor], steps: int, start: int = 0) -> set[int]:
    """Trains; gives the identities of the parameters that a gradient reached."""
    adapter, head = subject.parameters(model)
    optimizer = torch.optim.AdamW([*adapter, *head], lr=1e-2)
    reached: set[int] = set()
    model.train()
    for step in range(start, start + steps):
        optimizer.zero_grad()
        assert subject.penalty(model) is None
        model(**inputs).loss.backward()
        reached |= {id(p) for p in (*adapter, *head) if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        subject.stepped(model, step)
    return reached


@pytest.mark.parametrize(("backbone", "name"), CASES)
def test_method_trains_what_was_counted_and_goes_without_a_trace(
    backbone: str, name: str, own: Subject, tmp_path: Path
) -> None:
    resolved = own.resolve(BACKBONES[backbone](device="meta"), Contender(method=name), None)
    assert resolved.knob is None
    model = BACKBONES[backbone]()
    inputs = BACKBONES[backbone].inputs(model)
    expected = logits(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = own.attach(model, name, resolved.fields)
    adapter, head = own.parameters(made)
    assert sum(p.numel() for p in adapter) == resolved.adapter_parameters
    assert sum(p.numel() for p in head) == resolved.head_parameters
    own.begin(made, 20)
    own_parameters = {id(p) for p in (*adapter, *head)}
    reached = train(own, made, inputs, 3)
    # An attention's key bias moves all scores of a row alike: it has no gradient but rounding.
    assert reached == own_parameters or name in ("bitfit", "full")
    trained = logits(made, inputs)
    assert not torch.equal(trained, expected)
    with own.disabled(made):
        assert torch.equal(logits(made, inputs), expected)
    assert torch.equal(logits(made, inputs), trained)

    state = own.state(made)
    kept = {key: value.clone() for key, value in state.items()}
    train(own, made, inputs, 1, start=3)
    assert not torch.equal(logits(made, inputs), trained)
    own.restore(made, state)
    assert torch.equal(logits(made, inputs), trained)
    again = own.state(made)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[key], kept[key]) and torch.equal(state[key], kept[key]) for key in kept)

    stored = own.save(made, tmp_path / "adapter")
    # p-tuning keeps what its encoder computes; VeRA its projections besides, AdaLoRA fewer triplets.
    if name not in ("ptuning", "vera", "adalora"):
        assert stored == resolved.adapter_parameters + resolved.head_parameters
    assert own.merge(made) == (name not in UNMERGED)
    assert torch.allclose(logits(made, inputs), trained, atol=2e-5)
    detached = own.detach(made)
    assert torch.equal(logits(detached, inputs), expected)
    after = detached.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [m.name for m in peftkit.METHODS.values() if m.knob is not None])
def test_size_is_the_largest_within_the_budget_and_the_head_comes_on_top(name: str, own: Subject) -> None:
    model = BACKBONES["bert"](device="meta")
    method = peftkit.METHODS[name]
    assert method.knob is not None
    least = own.resolve(model, Contender(method=name), 0)
    assert least.knob == method.knob.field
    found = own.resolve(model, Contender(method=name), 3000)
    assert found.head_parameters == 99
    assert found.adapter_parameters <= 3000 or found == least
    assert least.adapter_parameters <= found.adapter_parameters
    value = found.fields[method.knob.field]
    if method.knob.values is None and value < method.knob.high:
        larger = method.knob.set(method.config(), value + 1)
        assert peftkit.plan(model, larger).adapter_parameters > 3000
    fixed = own.resolve(model, Contender(method=name, budget=False), 1)
    assert fixed.knob is None


def test_a_model_without_a_head_has_the_whole_budget(own: Subject) -> None:
    found = own.resolve(BACKBONES["llama"](device="meta"), Contender(method="lora"), 3000)
    assert (found.fields["r"], found.adapter_parameters, found.head_parameters) == (13, 13 * 224, 0)


@pytest.mark.parametrize("name", ["ia3", "bitfit", "layernorm", "head", "full"])
def test_a_method_without_a_size_has_its_own(name: str, own: Subject) -> None:
    found = own.resolve(BACKBONES["bert"](device="meta"), Contender(method=name), 1)
    assert found.knob is None
    assert (found.adapter_parameters == 0) == (name == "head")


def test_fit_budget_gives_the_smallest_only_where_it_is_asked_to() -> None:
    model = BACKBONES["bert"](device="meta")
    with pytest.raises(ConfigError, match="over the budget"):
        peftkit.fit_budget(model, "lora", parameters=1)
    assert peftkit.fit_budget(model, "lora", parameters=1, or_smallest=True).r == 1
    with pytest.raises(ConfigError, match="has no size to set"):
        peftkit.fit_budget(model, "ia3", parameters=1)
    assert peftkit.fit_budget(model, "ia3", parameters=1, or_smallest=True) == peftkit.IA3()
    assert peftkit.fit_budget(model, "lora", parameters=256 + 99).r == 1
    assert peftkit.fit_budget(model, "lora", parameters=512, adapter_only=True).r == 2
    assert peftkit.fit_budget(model, "oft", parameters=1, or_smallest=True).oft_block_size == 2


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        (Contender(method="lorra"), r"no method 'lorra'; did you mean 'lora'"),
        (Contender(method="lora", quantization="nf5"), r"no quantization 'nf5'; did you mean .*'nf4'"),
        (Contender(method="full", quantization="nf4"), r"full does not work with quantization 'nf4': it needs"),
    ],
)
def test_contender_that_cannot_be_meant_is_refused(contender: Contender, message: str, own: Subject) -> None:
    with pytest.raises(SuiteError, match=message):
        own.resolve(BACKBONES["bert"](device="meta"), contender, None)


def test_state_of_another_model_is_refused(own: Subject) -> None:
    made = attached(own, BACKBONES["llama"](), "ia3")
    with pytest.raises(StateError, match="only on one side"):
        own.restore(made, {"other": torch.zeros(1)})


def test_subjects_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert subjects.NAMES == ("peftkit", "peft")
    assert subjects.subject("peftkit") is subjects.subject("peftkit")
    with pytest.raises(SuiteError, match=r"no subject 'peftkitt'; did you mean 'peftkit'"):
        subjects.subject("peftkitt")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    subjects.subject.cache_clear()
    with pytest.raises(SuiteError, match=r"pip install 'peftkit\[compare\]'"):
        subjects.subject("peft")


# AdaLoRA ------------------------------------------------------------------------------------------------------------


def test_the_schedule_leaves_room_on_both_sides() -> None:
    assert allocation(400, 0, 0) == (50, 200)
    assert allocation(400, 3, 0) == (3, 0)
    for steps in range(1, 200):
        start, end = allocation(steps, 0, 0)
        assert start < steps - end


@pytest.mark.parametrize("steps", [20, 33])
def test_adalora_prunes_to_its_target_in_any_number_of_steps(steps: int, own: Subject, tmp_path: Path) -> None:
    made = attached(own, BACKBONES["bert"](), "adalora")
    inputs = BACKBONES["bert"].inputs(made)
    own.begin(made, steps)
    states = {}
    for step in range(steps):
        train(own, made, inputs, 1, start=step)
        kept = sum(int((p != 0).sum()) for n, p in made.named_parameters() if n.endswith(".lora_E"))
        assert kept == 48 or step >= steps // 8
        states[step] = (own.state(made), kept, logits(made, inputs))
    assert kept == 32
    state, kept, output = states[steps // 4]
    assert 32 < kept < 48
    own.restore(made, state)
    assert torch.equal(logits(made, inputs), output)
    own.save(made, tmp_path / "adapter")
    again = peftkit.load(BACKBONES["bert"](), tmp_path / "adapter")
    assert torch.allclose(logits(again, inputs), output, atol=1e-5)


def test_adalora_keeps_the_schedule_that_the_config_names(own: Subject) -> None:
    made = attached(own, BACKBONES["bert"](), "adalora", total_step=30, tinit=1)
    with pytest.raises(TrainingError, match="the budget is final after 30 optimizer steps"):
        own.begin(made, 20)
    own.begin(made, 30)


# Quantized backbones ------------------------------------------------------------------------------------------------


def bert(width: int = 64) -> Any:
    """A BERT wide enough for blocks of 64 weights, the same weights every time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).eval()


def dequantized(model: nn.Module) -> Any:
    """The same model with its weights as the codes say, in float32."""
    found = bert()
    with torch.no_grad():
        for path, module in model.named_modules():
            if is_quantized(module):
                access = weights_of(module)
                assert access is not None
                found.get_submodule(path).weight.copy_(access.read()["weight"])
    return found


INPUTS = {"input_ids": torch.arange(1, 29).reshape(4, 7), "labels": torch.tensor([0, 1, 2, 0])}
TOLERANCES = {"nf4": 2e-5, "int8": 2e-5, "bnb-nf4": 2e-5, "bnb-int8": 0.08}
"""Largest difference of logits; bitsandbytes' int8 rounds the inputs of its products too."""
bnb = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own


def quantized_subject(name: str) -> Subject:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if name == "peft":
            pytest.importorskip("peft", reason="peft is not installed")
        return subjects.subject(name)


@bnb
@pytest.mark.parametrize("quantization", TOLERANCES)
def test_quantized_backbone_computes_what_its_codes_say_and_heads_stay(quantization: str) -> None:
    own = quantized_subject("peftkit")
    model = own.quantize(bert(), quantization)
    codes = [path for path, module in model.named_modules() if is_quantized(module)]
    assert len(codes) == 7
    assert "classifier" not in codes
    tolerance = TOLERANCES[quantization]
    assert torch.allclose(logits(model, INPUTS), logits(dequantized(model), INPUTS), atol=tolerance)
    with pytest.raises(SuiteError, match="no quantization 'nf5'"):
        own.quantize(bert(), "nf5")


@bnb
def test_bitsandbytes_has_no_layer_for_conv1d() -> None:
    own = quantized_subject("peftkit")
    with pytest.raises(SuiteError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        own.quantize(BACKBONES["gpt2"](), "bnb-nf4")


@bnb
@pytest.mark.parametrize("quantization", TOLERANCES)
@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "bottleneck"])
def test_methods_train_merge_and_leave_a_quantized_backbone(name: str, quantization: str) -> None:
    own = quantized_subject("peftkit")
    model = own.quantize(bert(), quantization)
    expected = logits(model, INPUTS)
    made = attached(own, model, name)
    own.begin(made, 20)
    train(own, made, INPUTS, 2)
    trained = logits(made, INPUTS)
    train(own, made, INPUTS, 1, start=2)  # evaluation in between must not get in the way
    with own.disabled(made):
        assert torch.equal(logits(made, INPUTS), expected)
    last = logits(made, INPUTS)
    assert not torch.equal(last, trained)
    if own.merge(made):
        assert torch.allclose(logits(made, INPUTS), last, atol=10 * TOLERANCES[quantization])
    assert torch.equal(logits(own.detach(made), INPUTS), expected)


def peft_methods() -> dict[str, Mapping[str, str]]:
    """Methods that go into a BERT, with the quantizations that each is declared not to work with."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peftkit_bench.subjects.peft_methods import METHODS
    except ImportError:
        return {}
    usable = {n: m for n, m in METHODS.items() if not m.refused and not m.needs and n != "adaption_prompt"}
    return {name: method.not_with for name, method in usable.items()}


NOT_WITH = peft_methods()


@bnb
@pytest.mark.parametrize("quantization", ["bnb-nf4", "bnb-int8"])
@pytest.mark.parametrize("name", NOT_WITH)
def test_peft_method_beside_codes_computes_as_beside_what_they_say_or_is_refused(name: str, quantization: str) -> None:
    """A method that takes codes for weights trains without a word; only the same adapter beside floats shows it."""
    peft = quantized_subject("peft")
    contender = Contender(method=name, quantization=quantization)
    if quantization in NOT_WITH[name]:
        with pytest.raises(SuiteError, match=f"peft:{name} does not work with quantization {quantization!r}: "):
            peft.resolve(bert(), contender, None)
        return
    fields = peft.resolve(bert(), contender, None).fields
    model = peft.quantize(bert(), quantization)
    twin = dequantized(model)
    expected = logits(model, INPUTS)
    torch.manual_seed(1)
    made: Any = peft.attach(model, name, fields)
    torch.manual_seed(1)
    beside: Any = peft.attach(twin, name, fields)  # with the same frozen draws
    adapter, head = peft.parameters(made)
    for each in (made, beside):
        peft.begin(each, 20)
    optimizer = torch.optim.AdamW([*adapter, *head], lr=1e-2)
    made.train()
    reached: set[int] = set()
    for step in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(input_ids=INPUTS["input_ids"]).logits, INPUTS["labels"]).backward()
        reached |= {id(p) for p in adapter if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        peft.stepped(made, step)
    assert reached == {id(p) for p in adapter}
    peft.restore(beside, peft.state(made))
    trained = logits(made, INPUTS)
    assert torch.allclose(trained, logits(beside, INPUTS), atol=2 * TOLERANCES[quantization])
    with peft.disabled(made):
        assert torch.equal(logits(made, INPUTS), expected)
    peft.merge(made)
    assert logits(made, INPUTS).isfinite().all()
    assert torch.equal(logits(peft.detach(made), INPUTS), expected)


# Snapshots ----------------------------------------------------------------------------------------------------------


def test_snapshot_undoes_what_is_done_to_modules() -> None:
    model: Any = BACKBONES["bert"]()
    inputs = BACKBONES["bert"].inputs(model)
    expected = logits(model, inputs)
    found = Snapshot(model)
    assert found.tensors >= {id(p) for p in model.parameters()}
    query = model.bert.encoder.layer[0].attention.self.query
    found.keep_values([query.weight])
    with torch.no_grad():
        query.weight.zero_()
    query.register_forward_hook(lambda module, args, output: output + 1)
    query.forward = lambda x: x
    model.classifier = nn.Identity()
    model.bert.extra = nn.Linear(2, 2)
    model.requires_grad_(False)
    model.config.use_cache = not model.config.use_cache
    use_cache = model.config.use_cache
    model.train()
    found.restore(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.use_cache != use_cache
    assert "extra" not in dict(model.bert.named_children())
    assert torch.equal(logits(model, inputs), expected)
