"""What merged weights are stored as (dequantized, in codes again, fused), what is refused, and that it undoes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import picture
from torch import Tensor, nn

import peftkit
from peftkit.certificate import MergeReport
from peftkit.errors import BaseMismatchError, CheckpointError, ConfigError, MergeError
from peftkit.quantization import QuantizedLinear, is_quantized, weights_of
from peftkit.wrap import adapters_of

with warnings.catch_warnings():
    # On some processors bitsandbytes looks for a package of compiled code and warns when there is none.
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning"),
]

WIDTH = 64


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def in_bitsandbytes(make: Callable[[nn.Linear], Any]) -> Callable[[Any], Any]:
    def convert(model: Any) -> Any:
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and "layers" in name:
                parent, _, child = name.rpartition(".")
                made = make(module)
                made.bias = module.bias
                # In evaluation bitsandbytes lays 4-bit codes out anew for the CPU, and `state_dict` does so again: two
                # pictures of one model differ then.
                made.support_avx512bf16_for_cpu = False
                setattr(model.get_submodule(parent), child, made.to("cpu"))
        logits(model)
        return model

    return convert


def four_bit(linear: nn.Linear, kind: str = "nf4", nested: bool = False) -> Any:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type=kind,
        compress_statistics=nested,
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    return made


def eight_bit(linear: nn.Linear) -> Any:
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


BASES: dict[str, Callable[[Any], Any]] = {
    "bnb nf4": in_bitsandbytes(four_bit),
    "bnb nested fp4": in_bitsandbytes(lambda linear: four_bit(linear, "fp4", True)),
    "bnb int8": in_bitsandbytes(eight_bit),
    "nf4": lambda model: peftkit.quantize(model, "nf4"),
    "nested nf4": lambda model: peftkit.quantize(model, "nf4", nested=True),
    "fp4": lambda model: peftkit.quantize(model, "fp4"),
    "int8": lambda model: peftkit.quantize(model, "int8"),
}
CODED = ("nf4", "fp4", "int8")


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def logits(model: Any, seed: int = 0) -> Tensor:
    found: Tensor = model(**batch(seed)).logits
    return found


def trained(model: Any, size: float = 0.04, **fields: Any) -> Any:
    """The model with a LoRA whose update is `size` of each weight."""
    torch.manual_seed(1)
    config = peftkit.LoRA(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields})
    peftkit.wrap(model, config)
    with torch.no_grad():
        for path, adapter in adapters_of(model, "default"):
            weight = weights_of(model.get_submodule(path)).read()["weight"]
            adapter.lora_B.mul_(size * weight.norm() / adapter.delta().norm())
    return model


@pytest.mark.parametrize("base", BASES)
def test_a_quantized_base_is_dequantized_and_the_merge_computes_the_same(base: str) -> None:
    model = trained(BASES[base](llama()))
    expected, before = logits(model), picture(model)
    report = peftkit.merge(model)
    assert not any(map(is_quantized, model.modules()))
    assert {s.dtype for s in report.sites} == {"float32"}
    assert report.kept > 0.999
    # bitsandbytes rounds activations: to 8 bits beside int8, to bfloat16 on some processors beside 4 bits.
    assert (logits(model) - expected).norm() < (0.03 if base.startswith("bnb") else 1e-4) * expected.norm()
    peftkit.unmerge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("base", BASES)
def test_fused_loses_nothing_and_undoes(base: str) -> None:
    model = trained(BASES[base](llama()))
    expected, before = logits(model), picture(model)
    codes = {p: m.weight.data.clone() for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    report = peftkit.merge(model, into="fused")
    assert report.error_relative < 1e-5
    assert {s.residual_rank for s in report.sites} == {4}
    layers = {p: m for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    assert all(torch.equal(layers[p].weight.data, c) for p, c in codes.items())
    assert (logits(model) - expected).norm() < (0.03 if base.startswith("bnb") else 1e-5) * expected.norm()
    peftkit.unmerge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


@pytest.mark.parametrize("base", ["plain", *BASES])
@pytest.mark.parametrize("into", CODED)
def test_codes_keep_the_change_and_undo(base: str, into: str) -> None:
    model = trained(BASES.get(base, lambda m: m)(llama()), size=0.1)
    before = picture(model)
    inputs = [batch(seed) for seed in range(4)]
    report = peftkit.merge(model, into=into, inputs=inputs, minimum_effect=0.5)
    assert len(report.sites) == 14
    assert {s.dtype for s in report.sites} == {into}
    assert all(s.activation_effect is not None for s in report.sites)
    stored = {type(m) for p, m in model.named_modules() if is_quantized(m)}
    same = base.removeprefix("bnb ").removeprefix("nested ") == into
    assert len(stored) == 1
    assert (QuantizedLinear in stored) == (not (same and base.startswith("bnb")))
    for site in report.sites:
        held = weights_of(model.get_submodule(site.path)).read()["weight"]
        assert torch.isfinite(held).all()
    logits(model)
    peftkit.unmerge(model)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


def test_the_report_is_what_the_stored_weights_say() -> None:
    model = trained(peftkit.quantize(llama(), "nf4"), size=0.1)
    original = llama()
    before = {p: weights_of(model.get_submodule(p)).read()["weight"] for p, _ in adapters_of(model, "default")}
    delta = {p: a.delta() for p, a in adapters_of(model, "default")}
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(
            lambda module, args, p=p: seen.setdefault(p, []).append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for p in before
    ]
    for seed in range(3):
        logits(model, seed)
    for handle in handles:
        handle.remove()
    report = peftkit.merge(model, into="nf4", inputs=[batch(s) for s in range(3)], original=original, minimum_effect=0)
    for site in report.sites:
        held = weights_of(model.get_submodule(site.path)).read()["weight"].double()
        base, change, rows = before[site.path].double(), delta[site.path].double(), torch.cat(seen[site.path])
        kept = ((held - base) * change).sum() / change.square().sum()
        assert site.effect_kept == pytest.approx(kept.item(), abs=1e-4)
        assert site.error_relative == pytest.approx(((held - base - change).norm() / change.norm()).item(), rel=1e-4)
        assert site.delta_relative == pytest.approx((change.norm() / base.norm()).item(), rel=1e-4)
        moved, meant = rows @ (held - base).T, rows @ change.T
        assert site.activation_effect == pytest.approx(((moved * meant).sum() / meant.square().sum()).item(), abs=1e-3)
        assert site.activation_error == pytest.approx(((moved - meant).norm() / meant.norm()).item(), rel=1e-2)
        wanted = original.get_submodule(site.path).weight.double() + change
        assert site.original_error == pytest.approx(((held - wanted).norm() / change.norm()).item(), rel=1e-4)
        assert site.changed == pytest.approx((held != base).double().mean().item(), abs=1e-6)


def test_too_little_effect_is_refused_and_the_model_is_as_it_was() -> None:
    model = trained(peftkit.quantize(llama(), "nf4"), size=1e-3)
    before, expected = picture(model), logits(model)
    with pytest.raises(MergeError, match=r"would be stored .* below minimum_effect=1.* Give inputs="):
        peftkit.merge(model, into="nf4", minimum_effect=1.0)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect
    assert torch.equal(logits(model), expected)


def test_a_residual_of_the_adapters_rank_keeps_everything_and_is_saved_and_loaded(tmp_path: Any) -> None:
    model = trained(peftkit.quantize(llama(), "nf4"), size=0.03)
    expected = logits(model)
    report = peftkit.merge(model, into="nf4", residual_rank=4, inputs=[batch(1)])
    assert report.kept > 0.999
    assert (logits(model) - expected).norm() < 1e-3 * expected.norm()
    merged = logits(model)
    report.save(tmp_path)
    peftkit.merge_and_unload(model).save_pretrained(tmp_path)
    again = peftkit.load_quantized(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), merged)
    assert MergeReport.from_json((tmp_path / "merge_report.json").read_text()) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", [None, "fp32", "nf4", "fused"])
def test_values_that_are_not_finite_are_refused(value: float, into: str | None) -> None:
    model = trained(peftkit.quantize(llama(), "nf4"))
    with torch.no_grad():
        next(a for _, a in adapters_of(model, "default")).lora_A[0, 0] = value
    before = picture(model)
    with pytest.raises(MergeError, match="holds values that are not finite; the model is left as it was"):
        peftkit.merge(model, into=into)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


def refusals() -> list[tuple[str, Any, dict[str, Any], type[Exception], str]]:
    coded = lambda: trained(peftkit.quantize(llama(), "nf4"))  # noqa: E731  # one of several makers
    plain = lambda: trained(llama())  # noqa: E731
    scaling = lambda: peftkit.wrap(peftkit.quantize(llama(), "nf4"), peftkit.IA3())  # noqa: E731
    return [
        ("no such form", coded, {"into": "int3"}, ConfigError, "into='int3' is no form of weights"),
        ("another dtype", coded, {"into": "bf16"}, ConfigError, "leave `into` out, or name that dtype"),
        ("another dtype, plain", plain, {"into": torch.bfloat16}, ConfigError, "weights of another dtype"),
        ("fused on plain weights", plain, {"into": "fused"}, MergeError, "quantize the base first"),
        ("fused without factors", scaling, {"into": "fused"}, MergeError, "no product of two low-rank factors"),
        ("residual without codes", coded, {"residual_rank": 2}, ConfigError, "residual_rank goes with"),
        ("residual beside bf16", coded, {"into": "fp32", "residual_rank": 2}, ConfigError, "a residual of 0 or more"),
        ("no batches", coded, {"into": "nf4", "inputs": []}, ConfigError, "hold no batch"),
        ("effect out of range", coded, {"into": "nf4", "minimum_effect": 2.0}, ConfigError, r"must lie in \[0, 1\]"),
        ("original of another model", coded, {"original": {"x": torch.zeros(1)}}, ConfigError, "original holds no"),
    ]


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_refusal_says_why_and_changes_nothing(
    make: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = picture(model)
    with pytest.raises(error, match=message):
        peftkit.merge(model, **settings)
    after = picture(model)
    for aspect in before:
        assert after[aspect] == before[aspect], aspect


@pytest.mark.parametrize(
    "name", [n for n, m in peftkit.METHODS.items() if m.mergeable and m.quantized_base and n != "head"]
)
def test_every_mergeable_method_merges_into_what_codes_stand_for(name: str) -> None:
    fields = {"adalora": {"total_step": 10, "tinit": 1, "tfinal": 1}}
    model = peftkit.wrap(peftkit.quantize(llama(), "nf4"), peftkit.METHODS[name].config(**fields.get(name, {})))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    for _, adapter in adapters_of(model, "default"):
        adapter.check_trained = lambda: None  # type: ignore[method-assign]  # no optimizer made these steps
    expected, before = logits(model), picture(model)
    peftkit.merge(model, minimum_effect=0)
    assert not any(map(is_quantized, model.modules()))
    assert (logits(model) - expected).norm() < 1e-4 * expected.norm()
    peftkit.unmerge(model)
    assert picture(model)["bits"] == before["bits"]
    assert torch.equal(logits(model), expected)


def test_conv1d_comes_back_as_conv1d(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    classes, shapes = (
        {p: type(m) for p, m in model.named_modules()},
        {k: v.shape for k, v in model.state_dict().items()},
    )
    trained(peftkit.quantize(model, "nf4"))
    expected = logits(model)
    peftkit.merge_and_unload(model)
    assert {p: type(m) for p, m in model.named_modules()} == classes
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert (logits(model) - expected).norm() < 1e-4 * expected.norm()
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_model_loaded_by_transformers_with_bitsandbytes_is_exported_plain(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
    ).eval()
    assert any(map(is_quantized, model.modules()))
    logits(model)
    trained(model)
    said = copy.deepcopy(model.config.quantization_config.to_dict())
    peftkit.merge(model)
    assert not hasattr(model.config, "quantization_config")
    peftkit.unmerge(model)
    assert model.config.quantization_config.to_dict() == said
    assert model.is_loaded_in_4bit
    peftkit.merge_and_unload(model).save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_saved_while_merged_knows_its_quantized_base(tmp_path: Any) -> None:
    model = trained(peftkit.quantize(llama(), "nf4"))
    peftkit.merge(model)
    peftkit.save(model, tmp_path)
    fresh = peftkit.load(peftkit.quantize(llama(), "nf4"), tmp_path)
    peftkit.unmerge(model)
    assert torch.equal(logits(fresh), logits(model))


def test_totals_and_table_and_damaged_report() -> None:
    model = trained(peftkit.quantize(llama(), "nf4"))
    report = peftkit.merge(model, inputs=[batch()])
    weight = [s.delta_norm**2 for s in report.sites]
    expected = sum(s.effect_kept * w for s, w in zip(report.sites, weight, strict=True)) / sum(weight)
    assert report.total_effect == pytest.approx(expected)
    assert json.loads(report.to_json())["totals"]["total_effect_kept"] == pytest.approx(expected)
    assert MergeReport.from_json(report.to_json()) == report
    text = str(report)
    assert "effect kept on inputs" in text
    assert "in total" in text
    with pytest.raises(CheckpointError, match="no merge report"):
        MergeReport.from_json("[]")


def test_an_adapter_trained_beside_codes_merges_into_the_folder_of_the_original(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = trained(peftkit.quantize(llama(), "nf4"))
    peftkit.save(model, tmp_path / "adapter")
    peftkit.merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = peftkit.merge_and_unload(peftkit.load(llama(), tmp_path / "adapter"))
    assert torch.equal(logits(merged), logits(expected))


@pytest.mark.parametrize("into", ["nf4", "int8"])
def test_a_plain_model_leaves_in_codes_and_is_saved_and_loaded(into: str, tmp_path: Any) -> None:
    model = trained(llama(), size=0.2)
    peftkit.merge(model, into=into, inputs=[batch(s) for s in range(4)], minimum_effect=0)
    plain = peftkit.merge_and_unload(model)
    assert not any("peftkit" in key for key in plain.state_dict())
    plain.save_pretrained(tmp_path)
    again = peftkit.load_quantized(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(plain))


def test_a_head_that_was_trained_whole_does_not_hide_an_adapter_that_is_lost() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).to(torch.bfloat16)
    peftkit.wrap(model, peftkit.LoRA(r=2, init_lora_weights=False))
    with torch.no_grad():
        for _, adapter in adapters_of(model, "default"):
            if hasattr(adapter, "lora_B"):
                adapter.lora_B.mul_(1e-5)
            else:
                adapter.weight.mul_(3)
    with pytest.raises(MergeError, match="would be stored"):
        peftkit.merge(model)
    report = peftkit.merge(model, minimum_effect=0)
    assert [s.name for s in report.sites if s.copied] == ["score.weight"]
    assert report.kept < 0.5


def test_a_start_that_was_taken_from_codes_is_not_taken_from_the_original_folder(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    peftkit.save(
        peftkit.wrap(peftkit.quantize(llama(), "nf4"), peftkit.LoRA(init_lora_weights="pissa")), tmp_path / "adapter"
    )
    with pytest.raises(BaseMismatchError, match="another start would be computed"):
        peftkit.merge_shards(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_residual_makes_every_layer_of_another_package_ones_own_code_by_code(tmp_path: Any) -> None:
    model = BASES["bnb nested fp4"](llama())
    codes = {p: weights_of(m).layer() for p, m in model.named_modules() if is_quantized(m)}
    trained(model, target_modules=["q_proj"], size=0.05)
    peftkit.merge(model, into="fp4", residual_rank=2, minimum_effect=0)
    layers = {p: m for p, m in model.named_modules() if is_quantized(m)}
    assert {type(m) for m in layers.values()} == {QuantizedLinear}
    for path, layer in layers.items():
        if not path.endswith("q_proj"):
            before, after = codes[path].state_dict(), layer.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(after[k], v) for k, v in before.items())
    merged = logits(model)
    peftkit.merge_and_unload(model).save_pretrained(tmp_path)
    assert torch.equal(logits(peftkit.load_quantized(tmp_path, dtype=torch.float32).eval()), merged)
