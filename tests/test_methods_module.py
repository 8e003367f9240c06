"""Bottleneck, Compacter and LoReFT against the papers' formulas, computed with hooks on the model without adapters."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import checkpointed
from torch import Tensor, nn

import peftkit
from peftkit.errors import ConfigError, TargetError
from peftkit.methods.compacter import phm_matrix
from peftkit.methods.loreft import prompt_tokens, real_tokens, selected
from peftkit.testing.backbones import BACKBONES, WIDTH

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class Block:
    """Where things are in one kind of block, written by hand."""

    path: str
    attention: tuple[str, ...]
    up: str
    down: str
    parallel: str
    post_norm: str | None = None
    layers: int = 2

    def each(self) -> Iterator[tuple[str, Block]]:
        return ((self.path.format(i), self) for i in range(self.layers))


LLAMA = Block("model.layers.{}", ("self_attn.o_proj",), "mlp.up_proj", "mlp.down_proj", "mlp")


def _bert(root: str) -> list[Block]:
    return [
        Block(
            root + ".encoder.layer.{}",
            ("attention.output.dense",),
            "intermediate.dense",
            "output.dense",
            "output",
            "output.LayerNorm",
        )
    ]


def _t5(kind: str) -> list[Block]:
    return [
        Block(
            "encoder.block.{}",
            ("layer.0.SelfAttention.o",),
            f"layer.1.DenseReluDense.{kind}",
            "layer.1.DenseReluDense.wo",
            "layer.1.DenseReluDense",
        ),
        Block(
            "decoder.block.{}",
            ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
            f"layer.2.DenseReluDense.{kind}",
            "layer.2.DenseReluDense.wo",
            "layer.2.DenseReluDense",
        ),
    ]


BLOCKS: dict[str, list[Block]] = {
    "llama": [LLAMA],
    "qwen2": [LLAMA],
    "mistral": [LLAMA],
    "gpt2": [Block("transformer.h.{}", ("attn.c_proj",), "mlp.c_fc", "mlp.c_proj", "mlp")],
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "deberta": _bert("deberta"),
    "vit": [Block("vit.layers.{}", ("attention.o_proj",), "mlp.fc1", "mlp.fc2", "mlp")],
    "t5": _t5("wi_1"),
    "t5-relu": _t5("wi"),
    "bart": [
        Block("model.encoder.layers.{}", ("self_attn.out_proj",), "fc1", "fc2", "fc2", "final_layer_norm"),
        Block(
            "model.decoder.layers.{}",
            ("self_attn.out_proj", "encoder_attn.out_proj"),
            "fc1",
            "fc2",
            "fc2",
            "final_layer_norm",
        ),
    ],
    "opt": [Block("model.decoder.layers.{}", ("self_attn.out_proj",), "fc1", "fc2", "fc2")],
    "opt-post": [Block("model.decoder.layers.{}", ("self_attn.out_proj",), "fc1", "fc2", "fc2", "final_layer_norm")],
}


def backbone(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model of that name; two more than the package's own."""
    if name not in ("t5-relu", "opt-post"):
        return BACKBONES[name](dtype)
    donor = BACKBONES["t5" if name == "t5-relu" else "opt"]()
    config = copy.deepcopy(donor.config)
    if name == "t5-relu":
        config.is_gated_act, config.dense_act_fn, config.feed_forward_proj = False, "relu", "relu"
    else:
        config.do_layer_norm_before = False
    torch.manual_seed(3)
    return type(donor)(config).to(dtype).eval()


def inputs_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    return BACKBONES[name.split("-")[0]].inputs(model)


def logits(name: str, model: nn.Module, **changes: Any) -> Tensor:
    inputs = {**inputs_of(name, model), **changes}
    found: Tensor = model(**{k: v for k, v in inputs.items() if v is not None}).logits
    return found


def randomise(model: nn.Module, scale: float = 0.4) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape))


def adapter_at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(f"{path}.peftkit.default")


@contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Function = Callable[[Tensor], Tensor]


def placed(base: nn.Module, blocks: list[Block], placement: str, function: Callable[[str], Function]) -> list[Any]:
    """Hooks that put an adapter's function where the paper puts it; `function` is asked by the adapter's path."""
    handles = []

    def behind(path: str, added: Function) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (out[0] + added(out[0]), *out[1:])
            return out + added(out)

        handles.append(base.get_submodule(path).register_forward_hook(hook))

    def around_norm(path: str, added: Function) -> None:
        norm = base.get_submodule(path)

        def hook(module: nn.Module, args: Any) -> Any:
            normed = F.layer_norm(args[0], (WIDTH,), norm.weight, norm.bias, getattr(norm, "eps", 1e-12))
            return (args[0] + added(normed),)

        handles.append(norm.register_forward_pre_hook(hook))

    def beside(first: str, last: str, added: Function) -> None:
        seen: list[Tensor] = []
        handles.append(base.get_submodule(first).register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        handles.append(
            base.get_submodule(last).register_forward_hook(lambda module, args, out: out + added(seen.pop()))
        )

    for kind in blocks:
        for path, block in kind.each():
            if placement == "houlsby":
                for name in (*block.attention, block.down):
                    behind(f"{path}.{name}", function(f"{path}.{name}"))
            elif placement == "pfeiffer" and block.post_norm:
                around_norm(f"{path}.{block.post_norm}", function(f"{path}.{block.post_norm}"))
            elif placement == "pfeiffer":
                behind(path, function(path))
            else:
                beside(f"{path}.{block.up}", f"{path}.{block.down}", function(f"{path}.{block.parallel}"))
    return handles


def dense(a: nn.Module, nonlinearity: Function, scale: float) -> Function:
    return lambda x: scale * (nonlinearity(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)


def kronecker(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(len(rule)))  # type: ignore[return-value]


def test_every_hand_written_table_is_for_a_tiny_backbone() -> None:
    assert {name.split("-")[0] for name in BLOCKS} == set(BACKBONES) - {"mlp"}


# Bottleneck ---------------------------------------------------------------------------------------------------------

PAPER = {"houlsby": (F.gelu, 1.0), "pfeiffer": (F.relu, 1.0), "parallel": (F.relu, 4.0)}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("placement", PAPER)
def test_bottleneck_matches_the_papers_formula(name: str, placement: str) -> None:
    base = backbone(name, F64)
    with torch.no_grad():
        before = logits(name, base)
        cfg = peftkit.BottleneckAdapter(placement=placement, bottleneck_size=5, modules_to_save=())
        model = peftkit.wrap(copy.deepcopy(base), cfg)
        assert torch.equal(logits(name, model), before), "identity at the start"
        randomise(model)
        nonlinearity, scale = PAPER[placement]
        made = placed(base, BLOCKS[name], placement, lambda p: dense(adapter_at(model, p), nonlinearity, scale))
        with hooks(made):
            expected = logits(name, base)
        assert not torch.allclose(expected, before, atol=1e-3), "the adapters matter"
        torch.testing.assert_close(logits(name, model), expected, rtol=1e-10, atol=1e-10)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sites = {"houlsby": sum(len(b.attention) + 1 for b in BLOCKS[name]) * 2}.get(placement, 2 * len(BLOCKS[name]))
    assert trainable == peftkit.plan(base, cfg).trainable == sites * (5 * 2 * WIDTH + 5 + WIDTH)


OPTIONS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Function], int]] = {
    "tanh": ({"non_linearity": "tanh"}, lambda a: dense(a, torch.tanh, 1.0), 0),
    "scaled": ({"scaling": 0.5}, lambda a: dense(a, F.gelu, 0.5), 0),
    "learned scale": (
        {"scaling": "learned"},
        lambda a: lambda x: a.learned_scale * dense(a, F.gelu, 1.0)(x),
        1,
    ),
    "norm before": (
        {"layer_norm": "before"},
        lambda a: lambda x: dense(a, F.gelu, 1.0)(F.layer_norm(x, (WIDTH,)) * a.norm + a.norm_bias),
        2 * WIDTH,
    ),
    "norm after": (
        {"layer_norm": "after"},
        lambda a: lambda x: F.layer_norm(dense(a, F.gelu, 1.0)(x), (WIDTH,)) * a.norm + a.norm_bias,
        2 * WIDTH,
    ),
    "no residual": ({"residual": False}, lambda a: lambda x: dense(a, F.gelu, 1.0)(x) - x, 0),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_bottleneck_option_matches_its_formula_and_count(option: str) -> None:
    fields, function, more = OPTIONS[option]
    base = backbone("bert", F64)
    cfg = peftkit.BottleneckAdapter(bottleneck_size=5, modules_to_save=(), **fields)
    with torch.no_grad():
        model = peftkit.wrap(copy.deepcopy(base), cfg)
        assert torch.equal(logits("bert", model), logits("bert", base)) == cfg.residual
        randomise(model)
        with hooks(placed(base, BLOCKS["bert"], "houlsby", lambda p: function(adapter_at(model, p)))):
            expected = logits("bert", base)
        torch.testing.assert_close(logits("bert", model), expected, rtol=1e-10, atol=1e-10)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == peftkit.plan(base, cfg).trainable == 4 * (5 * 2 * WIDTH + 5 + WIDTH + more)


def test_bottleneck_trains_the_blocks_norms_when_asked() -> None:
    base = backbone("bert", F64)
    cfg = peftkit.BottleneckAdapter(bottleneck_size=5, train_layer_norm=True, modules_to_save=())
    assert peftkit.plan(base, cfg).trainable == 4 * (5 * 2 * WIDTH + 5 + WIDTH) + 4 * 2 * WIDTH
    model = peftkit.wrap(copy.deepcopy(base), cfg)
    with torch.no_grad():
        assert torch.equal(logits("bert", model), logits("bert", base))
        randomise(model)
        expected = copy.deepcopy(base)
        made = placed(expected, BLOCKS["bert"], "houlsby", lambda p: dense(adapter_at(model, p), F.gelu, 1.0))
        for i in range(2):
            for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
                path = f"bert.encoder.layer.{i}.{norm}"
                expected.get_submodule(path).load_state_dict(adapter_at(model, path).state_dict())
        with hooks(made):
            torch.testing.assert_close(logits("bert", model), logits("bert", expected), rtol=1e-10, atol=1e-10)


def test_bottleneck_dropout_acts_in_training_only() -> None:
    model = peftkit.wrap(backbone("llama"), peftkit.BottleneckAdapter(bottleneck_size=8, dropout=0.5))
    randomise(model)
    assert torch.equal(logits("llama", model), logits("llama", model))
    model.train()
    assert not torch.equal(logits("llama", model), logits("llama", model))


def test_bottleneck_bert_start_draws_both_projections() -> None:
    torch.manual_seed(0)
    model = peftkit.wrap(backbone("llama"), peftkit.BottleneckAdapter(init_weights="bert"))
    adapter = adapter_at(model, "model.layers.0.mlp.down_proj")
    for tensor in (adapter.down, adapter.up):
        assert 0.018 < tensor.std().item() < 0.022
    assert not adapter.up_bias.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "houlsbi"}, "placement must be 'houlsby' or 'pfeiffer' or 'parallel', found 'houlsbi'"),
        ({"bottleneck_size": 0}, "bottleneck_size must be at least 1, found 0"),
        ({"non_linearity": "rely"}, "non_linearity must be one of .*, found 'rely'"),
        ({"placement": "pfeiffer", "residual": False}, "residual=False is for placement='houlsby'"),
        ({"placement": "pfeiffer", "train_layer_norm": True}, "train_layer_norm goes with"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"layer_norm": "middle"}, "layer_norm must be"),
        ({"init_weights": "zeros"}, "init_weights must be"),
        ({"scaling": "many"}, "scaling must be finite float or 'learned' or None"),
    ],
)
def test_bottleneck_config_refuses_what_does_not_exist(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peftkit.BottleneckAdapter(**fields)


def test_sublayer_targets_narrow_the_placement() -> None:
    model = backbone("bart")

    def paths(**fields: Any) -> list[str]:
        return [s.path for s in peftkit.plan(model, peftkit.BottleneckAdapter(**fields)).sites]

    assert paths(target_modules=["fc2"], layers_to_transform=1) == [
        "model.encoder.layers.1.fc2",
        "model.decoder.layers.1.fc2",
    ]
    assert paths(exclude_modules=r"model\.decoder.*", target_modules=["encoder_attn.out_proj", "fc2"]) == [
        "model.encoder.layers.0.fc2",
        "model.encoder.layers.1.fc2",
    ]
    found = paths(placement="parallel", target_modules=["fc1", "fc2"], layers_to_transform=0)
    assert found == [f"model.{s}.layers.0.fc2" for s in ("encoder", "decoder")] + [
        f"model.{s}.layers.0.fc1" for s in ("encoder", "decoder")
    ]


def test_sublayer_targets_refuse_a_module_that_no_adapter_can_join() -> None:
    with pytest.raises(TargetError, match=r"bottleneck with placement='houlsby' .*selects model.layers.0.self_attn"):
        peftkit.plan(backbone("llama"), peftkit.BottleneckAdapter(target_modules=["self_attn"]))
    with pytest.raises(TargetError, match=r"selects bert.embeddings.LayerNorm \(LayerNorm\)"):
        peftkit.plan(backbone("bert"), peftkit.BottleneckAdapter(target_modules=["output.dense", "LayerNorm"]))
    with pytest.raises(TargetError, match="modules_to_save leave no place"):
        peftkit.plan(backbone("llama"), peftkit.BottleneckAdapter(exclude_modules=["o_proj", "down_proj"]))


def test_a_projection_named_elsewhere_gets_an_adapter_of_its_width() -> None:
    for placement, widths in (("houlsby", (2 * WIDTH, 2 * WIDTH)), ("parallel", (WIDTH, 2 * WIDTH))):
        cfg = peftkit.BottleneckAdapter(placement=placement, bottleneck_size=3, target_modules=["up_proj"])
        model = backbone("llama")
        before = logits("llama", model)
        peftkit.wrap(model, cfg)
        adapter = adapter_at(model, "model.layers.0.mlp.up_proj")
        assert (adapter.down.shape[1], adapter.up.shape[0]) == widths
        assert torch.equal(logits("llama", model), before)


# Compacter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_phm_matrix_is_the_sum_of_kronecker_products(rank: int) -> None:
    torch.manual_seed(0)
    rule, left, right = torch.randn(4, 4, 4), torch.randn(4, 5, rank), torch.randn(4, rank, 3)
    torch.testing.assert_close(phm_matrix(rule, left, right), kronecker(rule, left, right))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_compacter_matches_the_papers_formula(name: str, placement: str) -> None:
    base = backbone(name, F64)
    cfg = peftkit.Compacter(placement=placement, bottleneck_size=8, phm_dim=2, phm_rank=2, modules_to_save=())
    with torch.no_grad():
        before = logits(name, base)
        model = peftkit.wrap(copy.deepcopy(base), cfg)
        assert torch.equal(logits(name, model), before), "identity at the start"
        randomise(model)
        rule = model.get_submodule("peftkit.default").phm_rule

        def function(path: str) -> Function:
            a = adapter_at(model, path)
            down, up = (kronecker(rule, getattr(a, f"{n}_left"), getattr(a, f"{n}_right")) for n in ("down", "up"))
            return lambda x: F.gelu(x @ down + a.down_bias, approximate="tanh") @ up + a.up_bias

        with hooks(placed(base, BLOCKS[name], placement, function)):
            expected = logits(name, base)
        assert not torch.allclose(expected, before, atol=1e-3), "the adapters matter"
        torch.testing.assert_close(logits(name, model), expected, rtol=1e-10, atol=1e-10)
    sites = {"houlsby": sum(len(b.attention) + 1 for b in BLOCKS[name]) * 2}.get(placement, 2 * len(BLOCKS[name]))
    planned = peftkit.plan(base, cfg)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.shared == 8
    assert trainable == planned.trainable == 8 + sites * (2 * (WIDTH + 8 + 8 + WIDTH) + 8 + WIDTH)


def test_compacter_starts_with_a_bottleneck_of_unit_variance() -> None:
    torch.manual_seed(0)
    model = peftkit.wrap(backbone("llama"), peftkit.Compacter(phm_rank=2, phm_dim=8))
    rule = model.get_submodule("peftkit.default").phm_rule
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        a = adapter_at(model, path)
        inner = torch.randn(4000, WIDTH) @ phm_matrix(rule, a.down_left, a.down_right)
        assert 0.6 < inner.std().item() < 1.7


def test_compacter_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="bottleneck_size must be a positive multiple of phm_dim=4, found 6"):
        peftkit.Compacter(bottleneck_size=6)
    with pytest.raises(ConfigError, match=r"phm_dim=5 must divide the width 32 at model.layers.0.self_attn.o_proj"):
        peftkit.plan(backbone("llama"), peftkit.Compacter(phm_dim=5, bottleneck_size=5))


@pytest.mark.parametrize("phm_dim", [2, 8])
def test_compacter_budget_is_met_with_a_size_that_divides(phm_dim: int) -> None:
    model = backbone("llama")
    cfg = peftkit.fit_budget(model, "compacter", parameters=2000, phm_dim=phm_dim)
    assert cfg.bottleneck_size % phm_dim == 0
    assert peftkit.plan(model, cfg).trainable <= 2000
    over = dataclasses.replace(cfg, bottleneck_size=cfg.bottleneck_size + phm_dim)
    assert peftkit.plan(model, over).trainable > 2000


# LoReFT -------------------------------------------------------------------------------------------------------------


def edited(adapter: nn.Module, hidden: Tensor, chosen: list[list[int]]) -> Tensor:
    """h + Rᵀ (W h + b - R h), position by position."""
    rows: list[Tensor] = []
    for row in adapter.R.detach():
        # Gram-Schmidt, the definition of what the QR decomposition computes.
        for done in rows:
            row = row - (row @ done) * done
        rows.append(row / row.norm())
    rotation = torch.stack(rows)
    out = hidden.clone()
    for i, positions in enumerate(chosen):
        for t in positions:
            h = hidden[i, t]
            out[i, t] = h + rotation.T @ (adapter.W @ h + adapter.b - rotation @ h)
    return out


def edits(base: nn.Module, model: nn.Module, paths: list[str], chosen: list[list[int]]) -> list[Any]:
    handles = []
    for path in paths:
        adapter = adapter_at(model, path)

        def hook(module: nn.Module, args: Any, out: Any, adapter: nn.Module = adapter) -> Any:
            if isinstance(out, tuple):
                return (edited(adapter, out[0], chosen), *out[1:])
            return edited(adapter, out, chosen)

        handles.append(base.get_submodule(path).register_forward_hook(hook))
    return handles


def loreft_paths(name: str) -> list[str]:
    return [path for path, _ in BLOCKS[name][0].each()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("positions", ["f2+l1", "all"])
def test_loreft_matches_the_papers_formula(name: str, positions: str) -> None:
    base = backbone(name, F64)
    cfg = peftkit.LoReFT(low_rank_dimension=3, positions=positions, modules_to_save=())
    with torch.no_grad():
        before = logits(name, base)
        model = peftkit.wrap(copy.deepcopy(base), cfg)
        assert torch.equal(logits(name, model), before), "identity at the start"
        randomise(model)
        length = 5 if name == "vit" else 7
        chosen = [[0, 1, length - 1] if positions == "f2+l1" else list(range(length))] * 2
        with hooks(edits(base, model, loreft_paths(name), chosen)):
            expected = logits(name, base)
        assert not torch.allclose(expected, before, atol=1e-3), "the adapters matter"
        torch.testing.assert_close(logits(name, model), expected, rtol=1e-10, atol=1e-10)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == peftkit.plan(base, cfg).trainable == 2 * (3 * WIDTH + 3 * WIDTH + 3)


TEXT = [name for name in BLOCKS if name != "vit"]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loreft_counts_real_tokens_when_padded(name: str, side: str, attention: str) -> None:
    # Eager attention adds the smallest number of the dtype to scores, which overflows in float64.
    base = backbone(name, F64 if attention == "sdpa" or name == "deberta" else torch.float32)
    tolerance = 1e-10 if base.dtype == F64 else 1e-4
    if name != "deberta":
        base.set_attn_implementation(attention)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[1, :4] = 1
    chosen = [[0, 1, 6], [3, 4, 6] if side == "left" else [0, 1, 3]]
    with torch.no_grad():
        model = peftkit.wrap(
            copy.deepcopy(base), peftkit.LoReFT(low_rank_dimension=3, positions="f2+l1", modules_to_save=())
        )
        randomise(model)
        with hooks(edits(base, model, loreft_paths(name), chosen)):
            expected = logits(name, base, attention_mask=mask)
        found = logits(name, model, attention_mask=mask)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


CAUSAL = ["llama", "gpt2", "opt", "qwen2", "mistral"]


@pytest.mark.parametrize("name", CAUSAL)
def test_loreft_edits_the_same_prompt_tokens_in_training_and_generation(name: str) -> None:
    base = backbone(name, F64)
    model = peftkit.wrap(copy.deepcopy(base), peftkit.LoReFT(low_rank_dimension=3, positions="f1+l2"))
    randomise(model)
    prompt = torch.tensor([[0, 0, 9, 8, 7, 11], [5, 6, 7, 8, 9, 10]])
    mask = (prompt != 0).long()
    chosen = [[2, 4, 5], [0, 4, 5]]
    with torch.no_grad():
        made = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
        longer = torch.cat((mask, torch.ones(2, 5, dtype=torch.long)), 1)
        places = (longer.cumsum(1) - 1).clamp_min(0)
        labels = made.clone()
        labels[:, :6] = -100
        trained = logits(name, model, input_ids=made, attention_mask=longer, position_ids=places, labels=labels)
        with hooks(edits(base, model, loreft_paths(name), chosen)):
            reference = made[:, :6]
            for step in range(5):
                now = {"attention_mask": longer[:, : 6 + step], "position_ids": places[:, : 6 + step]}
                out = logits(name, base, input_ids=reference, labels=None, **now)
                reference = torch.cat((reference, out[:, -1:].argmax(-1)), 1)
            expected = logits(name, base, input_ids=made, attention_mask=longer, position_ids=places, labels=None)
    assert made.tolist() == reference.tolist()
    torch.testing.assert_close(trained[:, 6:], expected[:, 6:], rtol=1e-9, atol=1e-9)


def test_loreft_leaves_decoded_tokens_alone_and_all_does_not() -> None:
    base = backbone("llama", F64)
    for positions, changes in (("l3", False), ("all", True)):
        model = peftkit.wrap(copy.deepcopy(base), peftkit.LoReFT(positions=positions))
        randomise(model)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            theirs = copy.deepcopy(cache)
            token = torch.tensor([[9]])
            found = model(input_ids=token, past_key_values=cache).logits
            plain = base(input_ids=token, past_key_values=theirs).logits
        assert torch.equal(found, plain) != changes


def test_loreft_generates_with_a_cache_of_fixed_size() -> None:
    model = peftkit.wrap(backbone("llama", F64), peftkit.LoReFT(positions="f1+l2"))
    randomise(model)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10]])
    plain = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    fixed = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    assert plain.tolist() == fixed.tolist()


def test_loreft_rotation_keeps_orthonormal_rows_after_training() -> None:
    model = peftkit.wrap(backbone("llama"), peftkit.LoReFT(low_rank_dimension=4))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    adapter = adapter_at(model, "model.layers.0")
    start = adapter.rotation().detach().clone()
    torch.testing.assert_close(adapter.R.detach(), start, rtol=0, atol=1e-6)
    for _ in range(5):
        model(**inputs_of("llama", model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rotation = adapter.rotation().detach()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-5)
    assert (rotation - start).abs().max() > 0.05


def test_loreft_random_start_is_that_of_a_linear() -> None:
    torch.manual_seed(0)
    model = peftkit.wrap(backbone("llama"), peftkit.LoReFT(low_rank_dimension=16, init_weights="random"))
    adapter = adapter_at(model, "model.layers.0")
    bound = WIDTH**-0.5
    assert 0.9 * bound < adapter.W.abs().max() <= bound
    assert adapter.b.any()


@pytest.mark.parametrize("positions", ["", "first", "f", "f1+", "+l1", "f0+l0", "f1l1", "l1+f1", "f-1"])
def test_loreft_config_refuses_positions_that_do_not_read(positions: str) -> None:
    with pytest.raises(ConfigError, match="positions must be 'all' or read like"):
        peftkit.LoReFT(positions=positions)


@pytest.mark.parametrize(
    ("positions", "numbers"), [("f3", (3, 0)), ("l2", (0, 2)), ("f5+l5", (5, 5)), ("f0+l2", (0, 2))]
)
def test_loreft_reads_positions(positions: str, numbers: tuple[int, int]) -> None:
    model = peftkit.wrap(backbone("llama"), peftkit.LoReFT(positions=positions))
    adapter = adapter_at(model, "model.layers.0")
    assert (adapter.first, adapter.last) == numbers


def test_loreft_refuses_what_it_cannot_attach_to() -> None:
    with pytest.raises(TargetError, match=r"loreft attaches to blocks .* selects model.layers.0.mlp"):
        peftkit.plan(backbone("llama"), peftkit.LoReFT(target_modules=["mlp"]))
    with pytest.raises(ConfigError, match=r"low_rank_dimension=33 is over the width 32 at model.layers.0"):
        peftkit.plan(backbone("llama"), peftkit.LoReFT(low_rank_dimension=33))


def test_prompt_tokens_are_those_before_the_first_label() -> None:
    labels = torch.tensor([[-100, -100, 4, -100, 5], [1, 2, 3, 4, 5], [-100, -100, -100, 4, 5], [-100] * 5])
    mask = torch.tensor([[1] * 5, [1] * 5, [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    expected = [[1, 1, 0, 0, 0], [1] * 5, [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert prompt_tokens(labels, mask).int().tolist() == expected
    assert prompt_tokens(labels, None)[2].tolist() == [True, True, True, False, False]


def test_real_tokens_reads_every_kind_of_mask() -> None:
    flat = torch.tensor([[0, 1, 1], [1, 1, 0]])
    visible = torch.tril(torch.ones(3, 3, dtype=torch.bool)) & flat[:, None, None, :].bool()
    assert real_tokens(None, 3) is None
    for mask in (flat, visible, visible.long(), torch.zeros(2, 1, 3, 3).masked_fill(~visible, -1e9)):
        found = real_tokens(mask, 3)
        assert found is not None
        assert found.int().tolist() == flat.tolist()


def test_selected_takes_all_of_a_short_prompt_once() -> None:
    cpu = torch.device("cpu")
    assert selected(None, 3, 7, 7, cpu).tolist() == [True] * 3
    assert selected(None, 4, 1, 0, cpu).tolist() == [True, False, False, False]
    real = torch.tensor([[False, True, True, True]])
    assert selected(real, 4, 0, 2, cpu).tolist() == [[False, False, True, True]]


# What all of them owe the model -------------------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "houlsby": peftkit.BottleneckAdapter(bottleneck_size=4),
    "houlsby-norms": peftkit.BottleneckAdapter(bottleneck_size=4, train_layer_norm=True, scaling="learned"),
    "pfeiffer": peftkit.BottleneckAdapter(bottleneck_size=4, placement="pfeiffer"),
    "parallel": peftkit.BottleneckAdapter(bottleneck_size=4, placement="parallel", layer_norm="before"),
    "compacter": peftkit.Compacter(bottleneck_size=8),
    "loreft": peftkit.LoReFT(low_rank_dimension=3, positions="f2+l2"),
}
cases = pytest.mark.parametrize("case", CONFIGS)


def wrapped(name: str, case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = backbone(name, dtype)
    torch.manual_seed(4)
    peftkit.wrap(model, CONFIGS[case])
    randomise(model, 0.2)
    return model


@cases
@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "opt", "gpt2", "deberta"])
def test_every_trained_tensor_gets_a_gradient_and_nothing_else(name: str, case: str) -> None:
    model = wrapped(name, case)
    model(**inputs_of(name, model)).loss.backward()
    for key, parameter in model.named_parameters():
        if ".peftkit." in f".{key}":
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
        else:
            assert parameter.grad is None, key


@cases
@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(name: str, case: str, reentrant: bool) -> None:
    model = wrapped(name, case, F64).train()
    inputs = inputs_of(name, model)
    if name == "llama":
        inputs["labels"][:, :3] = -100
    model(**inputs).loss.backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpointed(model, reentrant)
    if reentrant:
        model.enable_input_require_grads()
        if name in ("bart", "t5"):
            embedding = model.get_encoder().get_input_embeddings()
            embedding.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    loss = model(**inputs).loss
    # A second forward before the backward: what is recomputed must not depend on what ran last.
    model(**{k: v[:1].flip(-1) if v.dim() == 2 else v[:1] for k, v in inputs.items()})
    loss.backward()
    for key, grad in plain.items():
        found = model.get_parameter(key).grad
        assert found is not None, key
        torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in ("bert", "llama") for case in CONFIGS] + [("bart", "parallel")]
)
def test_block_compiles_without_a_graph_break(name: str, case: str) -> None:
    model = wrapped(name, case)
    block = model.get_submodule(BACKBONES[name].block)
    seen: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        logits(name, model)
    handle.remove()
    args, kwargs = seen[0]
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = block(*args, **kwargs)
    found = compiled(*args, **kwargs)
    first = expected[0] if isinstance(expected, tuple) else expected
    second = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    second.square().sum().backward()
    trained = [p for n, p in block.named_parameters() if ".peftkit." in f".{n}"]
    grads = [p.grad.clone() for p in trained if p.grad is not None]
    for parameter in trained:
        parameter.grad = None
    first.square().sum().backward()
    assert grads
    for grad, parameter in zip(grads, [p for p in trained if p.grad is not None], strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-4)


@cases
@pytest.mark.parametrize("name", ["bart", "llama"])
def test_copies_and_pickles_compute_the_same_and_are_their_own(name: str, case: str) -> None:
    model = wrapped(name, case)
    with torch.no_grad():
        expected = logits(name, model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(name, other), expected)
            for parameter in other.parameters():
                parameter.zero_()
            assert torch.equal(logits(name, model), expected)


@cases
@pytest.mark.parametrize("name", ["llama", "t5", "bart", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(name: str, case: str) -> None:
    # Positions counted from the end move along when the whole text is read at every step.
    cfg = dataclasses.replace(CONFIGS[case], positions="f2") if case == "loreft" else CONFIGS[case]
    model = peftkit.wrap(backbone(name, F64), cfg)
    randomise(model, 0.2)
    prompt = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
    with torch.no_grad():
        cached, plain = (
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, use_cache=c
            )
            for c in (True, False)
        )
    assert cached.tolist() == plain.tolist()


@cases
@pytest.mark.parametrize("name", ["llama", "bert", "bart", "t5"])
def test_half_precision_base_and_autocast_stay_close(name: str, case: str) -> None:
    model = wrapped(name, case)
    with torch.no_grad():
        exact = logits(name, model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = logits(name, model)
        half = wrapped(name, case, torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in adapter_parameters(half, case))
        low = logits(name, half)
    assert low.dtype == torch.bfloat16
    size = exact.abs().max()
    # A bf16 number carries 8 bits; a dozen roundings in a row stay within a few percent of the largest logit.
    assert (cast.float() - exact).abs().max() < 0.1 * size
    assert (low.float() - exact).abs().max() < 0.1 * size


def adapter_parameters(model: nn.Module, case: str) -> list[nn.Parameter]:
    norm = ("LayerNorm", "layernorm", "layer_norm", "classifier")
    return [p for n, p in model.named_parameters() if ".peftkit." in f".{n}" and not any(word in n for word in norm)]


@cases
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_meta_device_wraps_with_the_planned_count(name: str, case: str) -> None:
    model = BACKBONES[name](device="meta")
    planned = peftkit.plan(model, CONFIGS[case])
    peftkit.wrap(model, CONFIGS[case])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == planned.trainable
    assert all(p.is_meta for p in model.parameters())


@cases
@pytest.mark.parametrize("name", ["bart", "bert"])
def test_saved_adapters_load_to_equal_logits(name: str, case: str, tmp_path: Any) -> None:
    model = wrapped(name, case)
    peftkit.save(model, tmp_path / "adapter")
    other = backbone(name)
    peftkit.load(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(logits(name, other), logits(name, model))


@cases
def test_unwrap_restores_the_model_and_its_state(case: str) -> None:
    base = backbone("bart")
    model = wrapped("bart", case)
    assert [k for k in model.state_dict() if ".peftkit." not in f".{k}"] == list(base.state_dict())
    with torch.no_grad(), peftkit.disabled(model):
        assert torch.equal(logits("bart", model), logits("bart", base))
    peftkit.unwrap(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(type(a) is type(b) for a, b in zip(model.modules(), base.modules(), strict=True))


def test_parallel_leaves_nothing_held_behind() -> None:
    model = wrapped("bart", "parallel")
    logits("bart", model)
    assert model.get_submodule("peftkit.default").held == {}


def test_two_adapters_of_different_methods_add_up_in_order() -> None:
    model = peftkit.wrap(backbone("bart", F64), CONFIGS["parallel"], name="one")
    peftkit.wrap(model, CONFIGS["loreft"], name="two")
    randomise(model)
    peftkit.activate(model, "one", "two")
    with torch.no_grad():
        both = logits("bart", model)
        peftkit.activate(model, "one")
        one = logits("bart", model)
        peftkit.unwrap(model, "two")
        assert torch.equal(logits("bart", model), one)
    assert not torch.allclose(both, one)


def test_plan_names_the_places_of_the_placement() -> None:
    model = backbone("llama")
    notes = [peftkit.plan(model, peftkit.BottleneckAdapter(placement=p)).notes[0] for p in ("houlsby", "parallel")]
    assert notes == ["targets by default: attention.output, ffn.down", "targets by default: mlp"]


@pytest.mark.parametrize("cfg", [peftkit.BottleneckAdapter(), peftkit.Compacter(), peftkit.LoReFT()])
def test_plain_module_gets_adapters_on_its_projections(cfg: Any) -> None:
    model = BACKBONES["mlp"]()
    x = torch.randn(3, 16)
    before = model(x)
    peftkit.wrap(model, cfg)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_parallel_model_copies_after_a_forward_that_broke_off() -> None:
    model = wrapped("bart", "parallel")

    def fail(module: nn.Module, args: Any, out: Any) -> None:
        raise RuntimeError("broken off")

    handle = model.get_submodule("model.encoder.layers.0.fc1").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        logits("bart", model)
    handle.remove()
    assert model.get_submodule("peftkit.default").held
    assert copy.deepcopy(model).get_submodule("peftkit.default").held == {}
    with torch.no_grad():
        expected = logits("bart", wrapped("bart", "parallel"))
        assert torch.equal(logits("bart", model), expected)
