"""The factors that adapters give: their product is what merging adds to the weight."""

from __future__ import annotations

import pytest
import torch
from tiny import built, randomise

import peftkit
from peftkit.plan import plan
from peftkit.quantization import weights_of
from peftkit.spec import Attach
from peftkit.wrap import adapters_of, record_of

CONFIGS = {
    "lora": peftkit.LoRA(r=3, lora_alpha=5),
    "lora-rslora": peftkit.LoRA(r=3, lora_alpha=5, use_rslora=True),
    "lora-patterns": peftkit.LoRA(r=3, rank_pattern={"q_proj|query": 5}, alpha_pattern={"v_proj|value": 7}),
    "lora-dora": peftkit.LoRA(r=3, use_dora=True),
    "lora-bias": peftkit.LoRA(r=3, lora_bias=True),
    "lora-pissa": peftkit.LoRA(r=3, lora_alpha=6, init_lora_weights="pissa"),
    "lora-olora": peftkit.LoRA(r=3, lora_alpha=3, init_lora_weights="olora"),
    "adalora": peftkit.AdaLoRA(init_r=4, target_r=2, total_step=10),
    "vera": peftkit.VeRA(r=6),
    "vera-wide": peftkit.VeRA(r=64),
    "loha": peftkit.LoHa(r=2, alpha=3),
    "loha-wide": peftkit.LoHa(r=8, alpha=3),
    "lokr": peftkit.LoKr(r=2, alpha=3, decompose_factor=2),
    "lokr-both": peftkit.LoKr(r=2, alpha=3, decompose_both=True, decompose_factor=2),
    "lokr-whole": peftkit.LoKr(r=64, alpha=3),
    "oft": peftkit.OFT(oft_block_size=8),
    "ia3": peftkit.IA3(),
}
EXACT = {
    "lora": 3, "lora-rslora": 3, "lora-pissa": 6, "lora-olora": 6, "adalora": 4, "vera": 6, "loha": 4, "lokr": 4,
    "lokr-both": 4,
}  # fmt: skip
"""Rank of the product, for the methods that are one."""


def wrapped(label: str, backbone: str = "llama"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(peftkit.wrap(built(backbone, torch.float64), CONFIGS[label]))


def sites(model):
    modules = dict(model.named_modules())
    adapters = dict(adapters_of(model, "default"))
    for site in record_of(model).plans["default"].sites:
        yield site, modules[site.path], adapters[site.path]


def test_every_method_that_changes_weights_is_tried() -> None:
    tried = {label.split("-")[0] for label in CONFIGS}
    assert tried == {n for n, m in peftkit.METHODS.items() if m.attach is Attach.WEIGHT}


@pytest.mark.parametrize("backbone", ["llama", "bert"])
@pytest.mark.parametrize("label", list(CONFIGS))
def test_product_of_the_factors_is_what_merging_adds(label: str, backbone: str) -> None:
    model = wrapped(label, backbone)
    given = 0
    for site, module, adapter in sites(model):
        pair = adapter.low_rank()
        if pair is None:
            continue
        given += 1
        down, up = pair
        assert down.shape[1] == site.in_features
        assert up.shape == (site.out_features, down.shape[0])
        assert not down.requires_grad
        base = weights_of(module).read()
        meant = adapter.merged(base)
        assert set(meant) == {"weight"}
        difference = (base["weight"] + up @ down - meant["weight"]).abs().max()
        # Sums of at most a few hundred products of numbers below 10, in another order.
        assert difference <= 1e-12, site.path
        change = (meant["weight"] - base["weight"]).norm()
        assert change > 1e-3 * base["weight"].norm(), "an adapter without effect shows nothing"
        if label in EXACT:
            assert down.shape[0] == EXACT[label]
    assert (given > 0) == (label in EXACT or label == "lora-patterns")


def test_whole_matrix_counts_by_its_smaller_side() -> None:
    model = built("llama", torch.float64)
    randomise(peftkit.wrap(model, peftkit.LoKr(r=2, target_modules=["gate_proj", "down_proj"])))
    for site, module, adapter in sites(model):
        # 64 splits into 8 and 8, 32 into 4 and 8: the first matrix is 8 x 4 or 4 x 8, the second 8 x 8 of rank 2.
        down, up = adapter.low_rank()
        base = weights_of(module).read()
        assert down.shape[0] == 4 * 2, site.path
        assert torch.allclose(base["weight"] + up @ down, adapter.merged(base)["weight"], rtol=0, atol=1e-12)


def test_embeddings_have_factors_too() -> None:
    model = built("llama", torch.float64)
    randomise(peftkit.wrap(model, peftkit.LoRA(r=2, target_modules=["embed_tokens"])))
    ((site, module, adapter),) = sites(model)
    down, up = adapter.low_rank()
    base = weights_of(module).read()
    assert down.shape == (2, site.in_features)
    assert torch.allclose(base["weight"] + up @ down, adapter.merged(base)["weight"], rtol=0, atol=1e-12)


def test_singular_values_that_training_cut_to_zero_are_left_out() -> None:
    model = wrapped("adalora")
    _, _, adapter = next(sites(model))
    with torch.no_grad():
        adapter.lora_E[1] = 0
    down, up = adapter.low_rank()
    assert down.shape[0] == up.shape[1] == 3
    assert torch.allclose(up @ down, adapter.scale * (adapter.lora_B * adapter.lora_E[:, 0]) @ adapter.lora_A)


def test_factors_of_half_precision_adapters_are_float32() -> None:
    model = peftkit.wrap(built("llama"), peftkit.LoRA(r=2), dtype=torch.bfloat16)
    for _, _, adapter in sites(model):
        down, up = adapter.low_rank()
        assert down.dtype == up.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n, m in peftkit.METHODS.items() if m.attach is not Attach.WEIGHT])
def test_methods_that_change_no_projection_give_no_factors(name: str) -> None:
    model = built("bert")
    planned = plan(model, peftkit.METHODS[name].config())
    peftkit.wrap(model, planned.config)
    for _, adapter in adapters_of(model, "default"):
        assert adapter.low_rank() is None
