"""Every method that declares a quantized base wraps, trains and unwraps one; what it cannot do there, it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peftkit
from peftkit.errors import BaseMismatchError
from peftkit.quantization import QuantizedLinear, exchange, is_quantized, weights_of
from peftkit.wrap import adapters_of

with warnings.catch_warnings():
    # On some processors bitsandbytes looks for a package of compiled code and warns when there is none.
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning"),
]


def four_bit(linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16
    )
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to("cpu")


def eight_bit(linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu")


def nested(linear: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="fp4",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="fp4", compress_statistics=True
    )
    made.bias = linear.bias
    return made.to("cpu")


def own(**settings: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach()
        return QuantizedLinear.of(linear.weight.detach(), bias, **settings)

    return make


STORAGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb nf4": four_bit,
    "bnb nested fp4": nested,
    "bnb int8": eight_bit,
    "nf4": own(kind="nf4"),
    "nested nf4": own(kind="nf4", nested=True),
    "fp4": own(kind="fp4"),
    "int8": own(kind="int8"),
    "dynamic int8": own(kind="int8", dynamic=True),
}


def plain() -> Any:
    """A tiny Qwen2, which has biases, with a classification head."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_labels=2,
        pad_token_id=0,
    )
    return transformers.Qwen2ForSequenceClassification(config).to(torch.bfloat16).eval()


def quantized(storage: str) -> nn.Module:
    """The same with the projections of its blocks quantized."""
    model: nn.Module = plain()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, STORAGES[storage](module))
    return model


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(1, 15).reshape(2, 7), "labels": torch.tensor([0, 1])}


def config_of(name: str) -> Any:
    fields = {"adalora": {"total_step": 10, "tinit": 1, "tfinal": 1}}
    return peftkit.METHODS[name].config(**fields.get(name, {}))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", [n for n, m in peftkit.METHODS.items() if m.quantized_base])
def test_method_trains_on_a_quantized_base_and_leaves_it_as_it_was(name: str, storage: str) -> None:
    model = quantized(storage)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        expected = model(**inputs()).logits
    peftkit.wrap(model, config_of(name))
    assert all(
        p.dtype == torch.float32 for n, p in model.named_parameters() if p.requires_grad and "score" not in n
    ) or (name in ("bitfit", "layernorm", "head")), (
        "adapters beside quantized weights train in float32; copies keep their dtype"
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(**inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] != losses[0]
    peftkit.unwrap(model)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_dora_takes_the_norms_of_what_the_codes_stand_for(storage: str) -> None:
    model = quantized(storage)
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if is_quantized(module):
            parameters = weights_of(module).read()
            fresh = nn.Linear(module.in_features, module.out_features, bias="bias" in parameters)
            fresh.load_state_dict(parameters)
            exchange(module, fresh.to(torch.bfloat16))
    torch.manual_seed(0)
    peftkit.wrap(model, peftkit.LoRA(use_dora=True))
    torch.manual_seed(0)
    peftkit.wrap(plain, peftkit.LoRA(use_dora=True))
    for (path, mine), (_, other) in zip(adapters_of(model, "default"), adapters_of(plain, "default"), strict=True):
        if not hasattr(mine, "lora_magnitude_vector"):
            continue
        assert torch.allclose(mine.lora_magnitude_vector, other.lora_magnitude_vector, rtol=2**-7), path
        with torch.no_grad():
            mine.lora_B.normal_(std=0.1)
            other.lora_B.copy_(mine.lora_B)
    with torch.no_grad():
        for (path, mine), (_, other) in zip(adapters_of(model, "default"), adapters_of(plain, "default"), strict=True):
            if hasattr(mine, "lora_magnitude_vector"):
                found = mine.row_norms(model.get_submodule(path))
                expected = other.row_norms(plain.get_submodule(path))
                assert torch.allclose(found, expected, rtol=2**-6), path


@pytest.mark.parametrize("storage", STORAGES)
def test_adapter_of_a_quantized_base_is_saved_and_loaded_on_it_and_on_the_original(storage: str, tmp_path: Any) -> None:
    model = peftkit.wrap(quantized(storage), peftkit.LoRA(init_lora_weights=False))
    peftkit.save(model, tmp_path)
    again = peftkit.load(quantized(storage), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    other = plain()
    peftkit.load(other, tmp_path)
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    peftkit.unwrap(other)
    with pytest.raises(BaseMismatchError, match=r"model\.embed_tokens\.weight"):
        peftkit.load(other, tmp_path)
