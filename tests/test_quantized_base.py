"""Every method that declares a quantized base wraps, trains and unwraps one; what it cannot do there, it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import peftkit
from peftkit.errors import MergeError, TargetError

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


STORAGES: dict[str, Callable[[nn.Linear], nn.Module]] = {"nf4": four_bit, "int8": eight_bit}


def quantized(storage: str) -> nn.Module:
    """A tiny Qwen2, which has biases, with a classification head; the projections of its blocks quantized."""
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
    model = transformers.Qwen2ForSequenceClassification(config).to(torch.bfloat16).eval()
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
def test_merge_into_a_quantized_weight_is_refused_and_changes_nothing(storage: str) -> None:
    model = peftkit.wrap(quantized(storage), peftkit.LoRA(init_lora_weights=False))
    with torch.no_grad():
        expected = model(**inputs()).logits
        with pytest.raises(MergeError, match="load the base model in bfloat16"):
            peftkit.merge(model)
        assert torch.equal(model(**inputs()).logits, expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_dora_on_a_quantized_weight_is_refused_because_it_would_read_codes_as_numbers(storage: str) -> None:
    model = quantized(storage)
    with pytest.raises(TargetError, match="stores its weight quantized"):
        peftkit.wrap(model, peftkit.LoRA(use_dora=True))
    assert not any(p.endswith("peftkit") for p, _ in model.named_modules())
