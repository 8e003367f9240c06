"""Every method of the installed peft as a contender, over its own registry."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peftkit_bench import subjects
from peftkit_bench.report import pairs
from peftkit_bench.spec import Contender, SuiteError
from torch import Tensor, nn

import peftkit
from peftkit.errors import StateError
from peftkit.testing.backbones import BACKBONES

pytest.importorskip("peft", reason="peft is not installed")
with warnings.catch_warnings():
    # On some processors bitsandbytes, which peft imports, looks for a package of compiled code and warns.
    warnings.simplefilter("ignore")
    from peftkit_bench.subjects import peft_fields
    from peftkit_bench.subjects.peft import PeftSubject
    from peftkit_bench.subjects.peft_attached import attached, skeleton
    from peftkit_bench.subjects.peft_methods import METHODS, Shapes

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own, and those of what it imports

CONFIGS: Mapping[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": list(range(1, 48))},
    "cpt": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
}
REFUSED: Mapping[tuple[str, str], str] = {
    ("bert", "adaption_prompt"): "Unsupported model type for adaption prompt",
    ("bert", "cpt"): "CPTConfig only supports task_type = CAUSAL_LM",
    ("bert", "trainable_tokens"): "trains 0 of the 99 parameters of the new head",
    ("bert", "shadow"): "loss of its own",
    ("bert", "xlora"): "LoRA adapters that were trained before",
    ("llama", "shadow"): "loss of its own",
    ("llama", "xlora"): "LoRA adapters that were trained before",
}
UNMERGED = frozenset(
    {"adaption_prompt", "cartridge", "cpt", "lily", "multitask_prompt_tuning", "p_tuning", "poly", "prefix_tuning"}
    | {"prompt_tuning"}
)
"""Methods that cannot be folded into weights, or that peft does not fold."""
CASES = [(b, name) for b in ("bert", "llama") for name in peft_fields.names() if (b, name) not in REFUSED]


def test_methods_of_both_libraries_are_paired_whatever_their_names() -> None:
    shared = {m.peft.peft_type.lower(): m.name for m in peftkit.METHODS.values() if m.peft is not None}
    assert len(shared) > 10
    assert set(shared) <= set(peft_fields.names())
    assert {theirs: pairs.NAMES.get(theirs, theirs) for theirs in shared} == shared


@pytest.fixture(scope="module")
def peft() -> PeftSubject:
    found = subjects.subject("peft")
    assert isinstance(found, PeftSubject)
    return found


def inputs_of(backbone: str, model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in BACKBONES[backbone].inputs(model).items() if key != "labels"}


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def train(peft: PeftSubject, model: Any, inputs: Mapping[str, Tensor], steps: int, start: int = 0) -> set[int]:
    """Trains on a random target; gives the identities of the parameters that a gradient reached."""
    adapter, head = peft.parameters(model)
    optimizer = torch.optim.AdamW([*adapter, *head], lr=1e-2)
    reached: set[int] = set()
    model.train()
    for step in range(start, start + steps):
        optimizer.zero_grad()
        output = model(**inputs).logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        loss = (output - target).square().mean()
        penalty = peft.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        reached |= {id(p) for p in (*adapter, *head) if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        peft.stepped(model, step)
    return reached


@pytest.mark.parametrize(("backbone", "name"), CASES)
def test_peft_method_trains_what_was_counted_and_goes_without_a_trace(
    backbone: str, name: str, peft: PeftSubject, tmp_path: Path
) -> None:
    bare = BACKBONES[backbone](device="meta")
    resolved = peft.resolve(bare, Contender(method=name, config=CONFIGS.get(name, {})), None)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in bare.parameters())
    model = BACKBONES[backbone]()
    inputs = inputs_of(backbone, model)
    expected = logits(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]

    made = peft.attach(model, name, json.loads(json.dumps(resolved.fields)))
    adapter, head = peft.parameters(made)
    assert sum(p.numel() for p in adapter) == resolved.adapter_parameters > 0
    assert sum(p.numel() for p in head) == resolved.head_parameters == (99 if backbone == "bert" else 0)
    assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in (*adapter, *head)}

    # CPT projects its embeddings onto a ball in every forward pass, and rounds them each time.
    same = torch.equal if name != "cpt" else functools.partial(torch.allclose, atol=1e-5)
    peft.begin(made, 20)
    assert train(peft, made, inputs, 3) == {id(p) for p in (*adapter, *head)}
    trained = logits(made, inputs)
    assert trained.shape == expected.shape
    assert not torch.equal(trained, expected)
    wanted = [p.requires_grad for p in made.parameters()]
    with peft.disabled(made):
        assert torch.equal(logits(made, inputs), expected)
    assert same(logits(made, inputs), trained)
    assert [p.requires_grad for p in made.parameters()] == wanted

    state = peft.state(made)
    kept = {key: value.clone() for key, value in state.items()}
    train(peft, made, inputs, 1, start=3)
    assert not torch.equal(logits(made, inputs), trained)
    peft.restore(made, state)
    again = peft.state(made)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[key], kept[key]) and torch.equal(state[key], kept[key]) for key in kept)
    assert same(logits(made, inputs), trained)

    stored = peft.save(made, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    # p-tuning keeps what its encoder computes, AdaLoRA what it has not pruned; others all that is trained, or more.
    if name not in ("p_tuning", "adalora"):
        assert stored >= resolved.adapter_parameters + resolved.head_parameters

    merged = peft.merge(made)
    assert merged == (name not in UNMERGED and (backbone, name) != ("llama", "beft"))
    assert torch.allclose(logits(made, inputs), trained, atol=2e-5)
    detached = peft.detach(made)
    assert detached is model
    assert torch.equal(logits(detached, inputs), expected)
    after = detached.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in detached.parameters()] == flags


@pytest.mark.parametrize(("case", "reason"), REFUSED.items(), ids=lambda value: "-".join(value) if value else None)
def test_peft_method_that_cannot_be_a_contender_is_refused_with_the_reason(
    case: tuple[str, str], reason: str, peft: PeftSubject
) -> None:
    backbone, name = case
    model = BACKBONES[backbone](device="meta")
    with pytest.raises(SuiteError, match=reason):
        peft.resolve(model, Contender(method=name, config=CONFIGS.get(name, {})), None)


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_method_names_the_field_that_it_needs(name: str, peft: PeftSubject) -> None:
    with pytest.raises(SuiteError, match=rf"peft:{name} needs {next(iter(CONFIGS[name]))} in its config"):
        peft.resolve(BACKBONES["llama"](device="meta"), Contender(method=name), None)


def test_every_entry_is_a_method_of_the_installed_peft() -> None:
    assert set(METHODS) == set(peft_fields.names())


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.knob and ("bert", n) not in REFUSED])
def test_size_is_the_largest_within_the_budget(name: str, peft: PeftSubject) -> None:
    model = BACKBONES["bert"](device="meta")
    found = peft.resolve(model, Contender(method=name), 1000)
    knob = METHODS[name].knob
    assert found.knob == knob
    assert knob is not None
    least = peft.resolve(model, Contender(method=name), 0)
    assert least.adapter_parameters <= found.adapter_parameters
    assert found.adapter_parameters <= 1000 or found == least
    # Every other size near by is over the budget, or no better, or refused.
    value = found.fields[knob]
    around = [value * 2, value // 2, value + 1, value - 1] if isinstance(value, int) else [value - 0.001, value + 0.001]
    for other in around:
        config = {**METHODS[name].with_knob(other), knob: other}
        try:
            near = peft.resolve(model, Contender(method=name, config=config, budget=False), 1000)
        except SuiteError:
            continue
        assert near.knob is None
        assert near.fields[knob] == other
        assert not found.adapter_parameters < near.adapter_parameters <= 1000


def test_counts_are_kept_for_a_model(peft: PeftSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BACKBONES["bert"](device="meta")
    first = peft.resolve(model, Contender(method="lora"), 3000)
    monkeypatch.setattr("peftkit_bench.subjects.peft.count", lambda *_: pytest.fail("counted again"))
    assert peft.resolve(model, Contender(method="lora"), 3000) == first
    assert first.fields["r"] == 11
    assert first.total_parameters == sum(p.numel() for p in model.parameters()) + 11 * 64 * 4


def test_resolve_leaves_the_generator_and_a_real_model_alone(peft: PeftSubject) -> None:
    model = BACKBONES["bert"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    peft.resolve(model, Contender(method="adamss"), None)
    peft.resolve(model, Contender(method="lora"), 3000)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    twin = skeleton(model)
    assert [(n, p.shape) for n, p in twin.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert all(p.is_meta for p in twin.parameters())


def test_divisors_fit_every_projection() -> None:
    shapes = Shapes(common=24, common_in=48, smallest=24, entries=24 * 48, layers=2)
    assert shapes.divisors() == [1, 2, 3, 4, 6, 8, 12, 24]
    assert shapes.divisors(16, of=48) == [16, 24, 48]
    assert shapes.fitting(10) == 8


# Parity -------------------------------------------------------------------------------------------------------------

TWINS = {m.name: m.peft.peft_type.lower() for m in peftkit.METHODS.values() if m.peft is not None}
DIFFERS: Mapping[tuple[str, str], str] = {
    ("t5", "prefix"): "peft makes a second prefix for the decoder's cross-attention",
    ("bart", "prefix"): "peft makes a second prefix for the decoder's cross-attention",
    ("gpt2", "loha"): "peft's LoHa does not take Conv1D",
    ("gpt2", "lokr"): "peft's LoKr does not take Conv1D",
    ("gpt2", "oft"): "peft's OFT does not take Conv1D",
}


@pytest.mark.parametrize("backbone", ["bert", "llama", "roberta", "t5", "bart", "gpt2"])
@pytest.mark.parametrize("name", TWINS)
def test_both_libraries_come_to_the_same_size_at_the_same_sites(backbone: str, name: str, peft: PeftSubject) -> None:
    own = subjects.subject("peftkit")
    model = BACKBONES[backbone](device="meta")
    configs: list[dict[str, Any]] = [{}, {"use_dora": True}] if name == "lora" else [{}]
    for config in configs:
        for budget in (None, 3000):
            ours = own.resolve(model, Contender(method=name, config=config), budget)
            try:
                theirs = peft.resolve(model, Contender(method=TWINS[name], config=config), budget)
            except SuiteError:
                assert (backbone, name) in DIFFERS
                return
            same = (
                ours.adapter_parameters == theirs.adapter_parameters
                and ours.head_parameters == theirs.head_parameters
                and ours.total_parameters == theirs.total_parameters
                and ours.knob == theirs.knob
                and (ours.knob is None or ours.fields[ours.knob] == theirs.fields[ours.knob])
            )
            assert same != ((backbone, name) in DIFFERS), DIFFERS.get((backbone, name))


def test_peft_lora_adapts_the_modules_that_peftkit_does(peft: PeftSubject) -> None:
    for config in ({}, {"target_modules": "all-linear"}, {"target_modules": ["query", "dense"]}):
        model = BACKBONES["bert"]()
        planned = peftkit.plan(model, peftkit.LoRA(**config))
        fields = peft.resolve(model, Contender(method="lora", config=config), None).fields
        made = peft.attach(model, "lora", fields)
        paths = {
            key.split(".lora_A")[0].removeprefix("base_model.model.")
            for key in attached(made).trained
            if "lora_A" in key
        }
        assert paths == {site.path for site in planned.sites}


def test_peft_lora_and_peftkits_compute_and_learn_the_same(peft: PeftSubject) -> None:
    own = subjects.subject("peftkit")
    pairs = []
    for subject in (own, peft):
        model = BACKBONES["bert"]()
        fields = subject.resolve(model, Contender(method="lora"), None).fields
        pairs.append((subject, subject.attach(model, "lora", fields)))
    (_, ours), (_, theirs) = pairs
    values = {
        key.replace("base_model.model.", "").replace(".default.weight", ""): value
        for key, value in theirs.named_parameters()
        if "lora_" in key
    }
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if ".lora_" in key:
                path, _, tensor = key.partition(".peftkit.default.")
                parameter.copy_(values[f"{path}.{tensor}"])
    inputs = BACKBONES["bert"].inputs(ours)
    for subject, made in pairs:
        adapter, head = subject.parameters(made)
        optimizer = torch.optim.SGD([*adapter, *head], lr=0.1)
        made.train()
        for _ in range(3):
            optimizer.zero_grad()
            made(**inputs).loss.backward()
            optimizer.step()
    inputs.pop("labels")
    assert torch.allclose(logits(ours, inputs), logits(theirs, inputs), atol=1e-5)


# Configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        (Contender(method="lorra"), r"peft has no method 'lorra'; did you mean 'lora'"),
        (Contender(method="lora", config={"rank": 4}), r"peft:lora has no field 'rank'"),
        (Contender(method="lora", config={"lora_alphas": 4}), r"did you mean 'lora_alpha'"),
        (Contender(method="lora", config={"inference_mode": True}), r"peft:lora has no field 'inference_mode'"),
        (Contender(method="lora", config={"kasa_config": {}}), r"with kasa_config cannot be compared: it adds a loss"),
        (Contender(method="lora", config={"r": 0}), r"peft:lora cannot be put into BertFor.*positive integer"),
        (Contender(method="lora", config={"bias": 3}), r"peft:lora cannot be put into Bert"),
        (Contender(method="fourierft", config={"n_frequency": 5000}), r"peft:fourierft cannot be put into Bert.*5000"),
        (Contender(method="boft", config={"boft_block_size": 7}), r"peft:boft"),
        (Contender(method="lora", quantization="nf4"), r"peft has no quantization 'nf4'; .*bnb-nf4"),
        (Contender(method="psoft", quantization="bnb-nf4"), r"peft:psoft does not work with .*reads the weights"),
        (Contender(method="loha", quantization="bnb-nf4"), r"peft:loha does not work with quantization 'bnb-nf4'"),
    ],
)
def test_contender_that_cannot_be_meant_is_refused(contender: Contender, message: str, peft: PeftSubject) -> None:
    with pytest.raises(SuiteError, match=message):
        peft.resolve(BACKBONES["bert"](device="meta"), contender, None)


def test_a_model_that_peft_refuses_is_left_as_it_was(peft: PeftSubject) -> None:
    model = BACKBONES["bert"]()
    fields = peft.resolve(model, Contender(method="lora"), None).fields
    before = dict(model.named_modules())
    with pytest.raises(SuiteError, match="cannot be put into"):
        peft.attach(model, "lora", {**fields, "target_modules": ["nowhere"]})
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(SuiteError, match="holds no method of peft"):
        peft.parameters(model)


def test_state_of_another_model_is_refused(peft: PeftSubject) -> None:
    model = BACKBONES["llama"]()
    made = peft.attach(model, "ia3", peft.resolve(model, Contender(method="ia3"), None).fields)
    with pytest.raises(StateError, match="only on one side"):
        peft.restore(made, {"other": torch.zeros(1)})


# AdaLoRA ------------------------------------------------------------------------------------------------------------


def adalora(peft: PeftSubject, **config: Any) -> Any:
    model = BACKBONES["bert"]()
    return peft.attach(model, "adalora", peft.resolve(model, Contender(method="adalora", config=config), None).fields)


@pytest.mark.parametrize("steps", [20, 33])
def test_adalora_prunes_to_its_target_in_any_number_of_steps(steps: int, peft: PeftSubject) -> None:
    made = adalora(peft)
    peft.begin(made, steps)
    inputs = inputs_of("bert", made)
    state = None
    for step in range(steps):
        train(peft, made, inputs, 1, start=step)
        kept = sum(int((p != 0).sum()) for n, p in made.named_parameters() if ".lora_E." in n)
        assert kept == 48 or step >= steps // 8
        if step == steps // 4:
            state = peft.state(made)
            middle = kept
    assert kept == 32
    assert state is not None
    peft.restore(made, state)
    assert sum(int((p != 0).sum()) for n, p in made.named_parameters() if ".lora_E." in n) == middle > 32
    pattern = made.peft_config["default"].rank_pattern
    assert sum(sum(rows) for rows in pattern.values()) == middle


def test_adalora_adds_the_penalty_that_peft_adds_to_a_loss_of_its_own(peft: PeftSubject) -> None:
    made = adalora(peft)
    peft.begin(made, 20)
    inputs = BACKBONES["bert"].inputs(made)
    made.eval()
    theirs = made(**inputs).loss - nn.functional.cross_entropy(made(**inputs).logits, inputs["labels"])
    ours = peft.penalty(made)
    assert ours is not None
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert peft.penalty(adalora(peft, orth_reg_weight=0.0)) is None


def test_adalora_needs_to_know_its_length(peft: PeftSubject) -> None:
    with pytest.raises(StateError, match="call begin first"):
        peft.stepped(adalora(peft), 0)
    with pytest.raises(SuiteError, match=r"the budget is final after 30 steps, but training makes 20"):
        peft.begin(adalora(peft, total_step=30), 20)
    fixed = adalora(peft, total_step=20, tinit=3, tfinal=4)
    peft.begin(fixed, 20)
    config = fixed.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (3, 4, 20)


def test_adalora_with_nothing_to_prune_trains(peft: PeftSubject) -> None:
    made = adalora(peft, init_r=2, target_r=2)
    peft.begin(made, 20)
    assert train(peft, made, inputs_of("bert", made), 2)


# Outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "multitask_prompt_tuning", "poly"])
@pytest.mark.parametrize("backbone", ["roberta", "llama", "t5"])
def test_logits_are_for_the_positions_of_the_input(backbone: str, name: str, peft: PeftSubject) -> None:
    model = BACKBONES[backbone]()
    inputs = inputs_of(backbone, model)
    if backbone == "t5":
        inputs["labels"] = inputs["input_ids"][:, :5].clone()
    expected = logits(model, inputs).shape
    made: Any = peft.attach(model, name, peft.resolve(model, Contender(method=name), None).fields)
    assert logits(made, inputs).shape == expected
    if backbone == "llama":
        found = made.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert found.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_token_logits_are_those_that_belong_to_the_tokens(peft: PeftSubject) -> None:
    model = BACKBONES["llama"]()
    inputs = inputs_of("llama", model)
    made: Any = peft.attach(model, "prompt_tuning", peft.resolve(model, Contender(method="prompt_tuning"), None).fields)
    prompt = made.get_prompt(batch_size=2)
    embedded = torch.cat((prompt, made.word_embeddings(inputs["input_ids"])), dim=1)
    with torch.no_grad():
        whole = made.base_model(inputs_embeds=embedded).logits
    assert torch.allclose(logits(made, inputs), whole[:, prompt.shape[1] :], atol=1e-6)
