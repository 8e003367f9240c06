"""Every method that declares a quantized base wraps, trains and unwraps one; what it cannot do there, it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import checkpointed
from torch import nn

import peftkit
from peftkit.errors import BackboneError, BaseMismatchError, ConfigError, MergeError, StateError, TargetError
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


class Packed(nn.Module):
    """Stands for a GPTQ layer: 4-bit codes in 32-bit words, a scale a column of outputs, no parameter named weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1) / 7
        codes = (weight / scales[:, None]).round().clamp(-8, 7).to(torch.int32) + 8
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        packed = (codes.view(len(codes), -1, 8) << shifts).sum(-1, dtype=torch.int32)
        self.register_buffer("qweight", packed.t().contiguous())
        self.register_buffer("scales", scales.to(linear.weight.dtype))
        self.bias = linear.bias
        self.codes = codes

    def expected(self) -> torch.Tensor:
        return (self.codes - 8) * self.scales.float()[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifts = 4 * torch.arange(8, dtype=torch.int32)
        codes = (self.qweight.t()[..., None] >> shifts) & 15
        weight = (codes.reshape(self.out_features, -1) - 8).to(x.dtype) * self.scales[:, None].to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def test_packed_layers_are_read_through_what_they_compute() -> None:
    layer = Packed(nn.Linear(32, 24).to(torch.float32).requires_grad_(False))
    read = weights_of(layer).read()
    assert torch.allclose(read["weight"], layer.expected(), atol=1e-6)
    assert torch.equal(read["bias"], layer.bias)
    assert is_quantized(layer)
    with pytest.raises(MergeError, match="stores weight in codes"):
        weights_of(layer).store("weight", read["weight"])


def test_a_layer_that_is_not_quantized_yet_is_refused_with_the_next_step() -> None:
    made = bitsandbytes.nn.Linear4bit(64, 64)
    with pytest.raises(MergeError, match=r"call model.to\(device\) first"):
        weights_of(made)
    assert is_quantized(made), "so that a plan on the meta device knows"


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights_train_and_merge(bits: int) -> None:
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    model = plain()
    config = Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=32)
    try:
        quantize_(model, config, lambda module, name: type(module) is nn.Linear and "layers" in name)
    except (ImportError, AssertionError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"torchao {torchao.__version__} has no int{bits} weights on this machine: {error}")
    peftkit.wrap(model, peftkit.LoRA(init_lora_weights=False))
    loss = model(**inputs()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.is_floating_point())
    with torch.no_grad():
        expected = model(**inputs()).logits
        peftkit.merge(model, minimum_effect=0)
        assert not any(map(is_quantized, model.modules()))
        assert (model(**inputs()).logits - expected).norm() < 0.05 * expected.norm()
        peftkit.unmerge(model)
        assert torch.equal(model(**inputs()).logits, expected)


def test_dtype_changes_leave_scales_as_they_are() -> None:
    layer = QuantizedLinear.of(torch.randn(8, 64), torch.randn(8), kind="nf4", nested=True)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    after = layer.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items() if k != "bias")
    assert after["bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "nf3"}, "no kind 'nf3'"),
        ({"kind": "int8", "nested": True}, "int8 has one scale a row"),
        ({"kind": "nf4", "dynamic": True}, "dynamic is for int8"),
        ({"kind": "nf4", "block": 48}, "block must be a power of two"),
    ],
)
def test_quantize_refuses_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    model = plain()
    with pytest.raises(ConfigError, match=message):
        peftkit.quantize(model, **settings)
    assert not any(map(is_quantized, model.modules()))


def test_quantize_refuses_a_wrapped_model_and_one_without_projections() -> None:
    with pytest.raises(StateError, match="quantize the base first, then wrap"):
        peftkit.quantize(peftkit.wrap(plain(), peftkit.LoRA()))
    with pytest.raises(BackboneError, match="no projection to quantize"):
        peftkit.quantize(nn.Sequential(nn.LayerNorm(4)))


def test_quantize_takes_what_the_patterns_select_and_leaves_the_head() -> None:
    model = peftkit.quantize(plain(), "int8", exclude_modules=["down_proj"])
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if is_quantized(m)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    model = peftkit.quantize(plain(), "nf4", target_modules=["up_proj"])
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if is_quantized(m)} == {"up_proj"}
    with pytest.raises(TargetError, match="matches no module"):
        peftkit.quantize(plain(), target_modules=["nothing"])


def test_loading_a_folder_that_was_not_quantized_here_is_refused(tmp_path: Any) -> None:
    plain().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="was not quantized by peftkit"):
        peftkit.load_quantized(tmp_path)
    with pytest.raises(BackboneError, match="cannot read the config"):
        peftkit.load_quantized(tmp_path / "nowhere")


def test_what_would_train_codes_is_refused() -> None:
    with pytest.raises(TargetError, match=r"trains a copy of model.layers.0.self_attn.q_proj.weight"):
        peftkit.wrap(quantized("nf4"), peftkit.LoRA(target_modules=["v_proj"], modules_to_save=["q_proj"]))


def test_trained_copies_are_float32_beside_codes_and_the_head_computes_in_the_models_dtype() -> None:
    model = peftkit.wrap(quantized("nf4"), peftkit.LoRA())
    copies = {n: p.dtype for n, p in model.named_parameters() if "score" in n and p.requires_grad}
    assert copies
    assert set(copies.values()) == {torch.float32}
    assert model(**inputs()).logits.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16, "what does not train is not made wider"


def test_an_adapter_that_starts_from_codes_is_refused_on_the_original_weights(tmp_path: Any) -> None:
    peftkit.save(peftkit.wrap(quantized("nf4"), peftkit.LoRA(init_lora_weights="pissa")), tmp_path)
    peftkit.load(quantized("nf4"), tmp_path)
    with pytest.raises(BaseMismatchError, match="another start would be computed"):
        peftkit.load(plain(), tmp_path)
    peftkit.load(plain(), tmp_path, ignore=("base",))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("storage", ["bnb nf4", "nf4", "int8"])
def test_gradients_arrive_under_checkpointing_without_a_further_call(storage: str, reentrant: bool) -> None:
    model = peftkit.wrap(quantized(storage), peftkit.LoRA(init_lora_weights=False)).train()
    model(**inputs()).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpointed(model, reentrant)(**inputs()).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], g, rtol=0.02, atol=0.02 * float(g.abs().max())) for n, g in expected.items())
