"""Rows of one batch with different adapters: against each adapter alone, and against Hugging Face peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import randomise
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkit
from peftkit.errors import ConfigError, StateError

NAMES = ("wide", "thin", "pruned")


def decoder(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(model: Any) -> Any:
    """Three adapters: other ranks, other sites, another method whose first site is pruned to rank zero."""
    configs = (
        peftkit.LoRA(r=8, lora_alpha=24, target_modules=["q_proj", "v_proj", "down_proj"]),
        peftkit.LoRA(r=3, use_rslora=True, target_modules=["v_proj", "up_proj"]),
        peftkit.AdaLoRA(init_r=6, target_r=3, total_step=100, target_modules=["q_proj", "o_proj"]),
    )
    for seed, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        peftkit.wrap(model, config, name=name)
        randomise(model, name, seed)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.peftkit["pruned"].lora_E.zero_()
    return model


ROWS: list[str | None] = ["thin", None, "pruned", "wide", "thin"]
TOKENS = torch.randint(2, 64, (len(ROWS), 7), generator=torch.Generator().manual_seed(0))


def alone(model: Any, name: str | None) -> torch.Tensor:
    with torch.no_grad():
        if name is None:
            with peftkit.disabled(model):
                return model(TOKENS).logits
        peftkit.activate(model, name)
        return model(TOKENS).logits


def routed(model: Any) -> torch.Tensor:
    with peftkit.route(model, ROWS), torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_that_of_its_adapter_alone(dtype: torch.dtype) -> None:
    model = adapted(decoder(dtype))
    wanted = torch.stack([alone(model, name)[row] for row, name in enumerate(ROWS)])
    assert (wanted - alone(model, None)).abs().amax((1, 2))[[0, 2, 3, 4]].min() > 1e-3, "adapters without effect"
    # Sums in another order: some hundred roundings at the most.
    torch.testing.assert_close(routed(model), wanted, rtol=0, atol=500 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_float64_as_each_adapter_alone(dtype: torch.dtype) -> None:
    model, exact = adapted(decoder(dtype)), adapted(decoder(torch.float64))
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    rows = range(len(ROWS))
    wanted = torch.stack([alone(exact, ROWS[row])[row] for row in rows])
    single = torch.stack([alone(model, ROWS[row])[row] for row in rows]).double()
    assert (routed(model) - wanted).norm() <= 1.3 * (single - wanted).norm()


def test_generation_with_beams_keeps_each_rows_adapter() -> None:
    model = adapted(decoder())
    settings = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    mask = torch.ones_like(TOKENS)
    with peftkit.route(model, ROWS), torch.inference_mode():
        found = model.generate(TOKENS, attention_mask=mask, **settings)
    for row, name in enumerate(ROWS):
        one = slice(row, row + 1)
        with peftkit.route(model, [name]), torch.inference_mode():
            wanted = model.generate(TOKENS[one], attention_mask=mask[one], **settings)
        assert torch.equal(found[2 * row : 2 * row + 2], wanted), f"row {row}, {name}"


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_rows_on_quantized_weights(storage: str) -> None:
    model = adapted(peftkit.quantize(decoder(), storage))
    wanted = torch.stack([alone(model, name)[row] for row, name in enumerate(ROWS)])
    torch.testing.assert_close(routed(model), wanted, rtol=0, atol=1e-4)


def test_an_error_inside_leaves_everything_as_it_was() -> None:
    model = adapted(decoder())
    before = alone(model, "wide")

    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="midway"), peftkit.route(model, ROWS):
        model(TOKENS)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_blocks_nest() -> None:
    model = adapted(decoder())
    with peftkit.route(model, ROWS), torch.no_grad():
        outer = model(TOKENS).logits
        with peftkit.route(model, [None] * len(ROWS)):
            assert torch.equal(model(TOKENS).logits, alone_backbone(model))
        assert torch.equal(model(TOKENS).logits, outer)


def alone_backbone(model: Any) -> torch.Tensor:
    with peftkit.disabled(model), torch.no_grad():
        return model(TOKENS).logits


def test_gradients_reach_the_input() -> None:
    model = adapted(decoder())
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    with peftkit.route(model, ROWS):
        model(inputs_embeds=embedded).logits.sum().backward()
    peftkit.activate(model, "thin")
    apart = embedded.detach().clone().requires_grad_()
    model(inputs_embeds=apart).logits.sum().backward()
    torch.testing.assert_close(embedded.grad[0], apart.grad[0], rtol=0, atol=1e-4)


def test_the_wrong_number_of_rows_is_an_error_that_says_both() -> None:
    model = adapted(decoder())
    with peftkit.route(model, ["wide", None]), pytest.raises(ConfigError, match=r"2 rows are named, and .*q_proj.* 5"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ConfigError, "a name or None for each row"),
        ("wide", ConfigError, "a name or None for each row"),
        (["wide", "wdie"], StateError, "'wdie'.*'wide'"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), peftkit.route(adapted(decoder()), names):
        pass


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (peftkit.LoRA(r=2, use_dora=True), "DoraAdapter on Linear"),
        (peftkit.LoRA(r=2, modules_to_save=["lm_head"]), "lm_head .WholeModule"),
        (peftkit.LoRA(r=2, target_modules=["embed_tokens"]), "EmbeddingAdapter on Embedding"),
        (peftkit.BottleneckAdapter(bottleneck_size=2), "is no low-rank update"),
        (peftkit.PrefixTuning(num_virtual_tokens=2), "is no low-rank update"),
        (peftkit.IA3(), "is no low-rank update"),
    ],
)
def test_what_is_more_than_a_low_rank_update_is_refused_by_name(config: Any, where: str) -> None:
    model = peftkit.wrap(decoder(), config, name="other")
    with pytest.raises(StateError, match=f"'other' at .*{where}.*activate"), peftkit.route(model, ["other"]):
        pass


def test_training_mode_and_merges_are_refused() -> None:
    model = adapted(decoder())
    with pytest.raises(StateError, match=r"model\.eval"), peftkit.route(model.train(), ["wide"]):
        pass
    peftkit.activate(model.eval(), "wide")
    peftkit.merge(model)
    with pytest.raises(StateError, match="unmerge"), peftkit.route(model, ["wide"]):
        pass
    with pytest.raises(StateError, match="not wrapped"), peftkit.route(nn.Linear(2, 2), ["wide"]):
        pass


# peft asks transformers 5.23 for an attribute by its former name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_rows_agree_with_peft_and_its_adapter_names(tmp_path: Any) -> None:
    import peft

    ours = decoder()
    for seed, name in enumerate(("one", "two")):
        peftkit.wrap(ours, peftkit.LoRA(r=4 + seed, target_modules=["q_proj", "v_proj"]), name=name)
        randomise(ours, name, seed)
        peftkit.save(ours, tmp_path / name, name=name)
    theirs: Any = peft.PeftModel.from_pretrained(decoder(), str(tmp_path / "one" / "one"), adapter_name="one")
    theirs.load_adapter(str(tmp_path / "two" / "two"), adapter_name="two")
    names: list[str | None] = ["two", None, "one", "one", "two"]
    with torch.no_grad():
        wanted = theirs.eval()(TOKENS, adapter_names=["__base__" if name is None else name for name in names]).logits
        with peftkit.route(ours, names):
            found = ours(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_copy_of_a_model_with_an_inactive_adalora_can_be_made_and_trained() -> None:
    import copy

    model = copy.deepcopy(adapted(decoder()))
    peftkit.activate(model, "wide")
    copied = copy.deepcopy(model)
    peftkit.activate(copied, "pruned")
    copied.train()(TOKENS, labels=TOKENS).loss.backward()
    adapter = copied.model.layers[0].self_attn.o_proj.peftkit["pruned"]
    assert adapter._before_training is not None, "the copy does not notice its first gradient"
