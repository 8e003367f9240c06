"""The methods that attach to weights, against dense formulas in float64 and against the installed peft."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import peftkit
from peftkit import IA3, OFT, LoHa, LoKr, VeRA, functional
from peftkit.errors import ConfigError, TargetError
from peftkit.methods import loha, lokr, oft
from peftkit.spec import Site
from peftkit.wrap import state_of

IN, OUT = 24, 36


class Two(nn.Module):
    """Two projections of different sizes, so that what is shared between sites has to be cut to size."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first = Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT)
        self.second = Conv1D(IN, OUT) if transposed else nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def dense_skew(vector: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size, dtype=vector.dtype)
    position = 0
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j], q[j, i] = vector[position], -vector[position]
            position += 1
    return q


def dense_rotation(vector: Tensor, size: int, terms: int | None) -> Tensor:
    q = dense_skew(vector, size)
    eye = torch.eye(size, dtype=q.dtype)
    if terms is None:
        return (eye - q) @ torch.linalg.inv(eye + q)
    top = terms - 1 if terms <= 2 else max(terms - 1, 3)
    series = eye.clone()
    for power in range(1, top + 1):
        last = power == top and terms > 2
        series = series + (1.0 if last else 2.0) * torch.linalg.matrix_power(q, power)
    return series


def oracle_vera(weight: Tensor, bias: Tensor | None, t: dict[str, Tensor], cfg: VeRA) -> tuple[Tensor, Tensor | None]:
    out, inside = weight.shape
    up, down = t["vera_B"][:out], t["vera_A"][:, :inside]
    return weight + torch.diag(t["vera_lambda_b"]) @ up @ torch.diag(t["vera_lambda_d"]) @ down, bias


def oracle_loha(weight: Tensor, bias: Tensor | None, t: dict[str, Tensor], cfg: LoHa) -> tuple[Tensor, Tensor | None]:
    product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return weight + cfg.alpha / cfg.r * product, bias


def oracle_lokr(weight: Tensor, bias: Tensor | None, t: dict[str, Tensor], cfg: LoKr) -> tuple[Tensor, Tensor | None]:
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    rows = [torch.cat([a * second for a in row], dim=1) for row in first]
    return weight + cfg.alpha / cfg.r * torch.cat(rows), bias


def oracle_oft(weight: Tensor, bias: Tensor | None, t: dict[str, Tensor], cfg: OFT) -> tuple[Tensor, Tensor | None]:
    vectors = t["oft_R"]
    elements = vectors.shape[1]
    size = next(b for b in range(1, 1000) if b * (b - 1) // 2 == elements and b > 1)
    terms = cfg.num_cayley_neumann_terms if cfg.use_cayley_neumann else None
    blocks = [dense_rotation(v, size, terms) for v in vectors]
    if cfg.block_share:
        blocks = blocks * (weight.shape[1] // size)
    return weight @ torch.block_diag(*blocks).T, bias


def oracle_ia3(weight: Tensor, bias: Tensor | None, t: dict[str, Tensor], cfg: IA3) -> tuple[Tensor, Tensor | None]:
    scale = t["ia3_l"]
    if scale.shape[0] == 1:
        return weight @ torch.diag(scale[0]), bias
    return torch.diag(scale[:, 0]) @ weight, None if bias is None else bias * scale[:, 0]


CASES: dict[str, tuple[Any, Callable[..., tuple[Tensor, Tensor | None]]]] = {
    "vera": (VeRA(r=5), oracle_vera),
    "loha_thin": (LoHa(r=2, alpha=3), oracle_loha),
    "loha_dense": (LoHa(r=5, alpha=3), oracle_loha),
    "lokr": (LoKr(r=2, alpha=3), oracle_lokr),
    "lokr_whole": (LoKr(r=8, alpha=3), oracle_lokr),
    "lokr_both": (LoKr(r=1, alpha=3, decompose_both=True), oracle_lokr),
    "lokr_factor": (LoKr(r=2, decompose_factor=3), oracle_lokr),
    "oft": (OFT(oft_block_size=4), oracle_oft),
    "oft_adjusted": (OFT(oft_block_size=5), oracle_oft),
    "oft_blocks": (OFT(r=2, oft_block_size=0), oracle_oft),
    "oft_exact": (OFT(oft_block_size=6, use_cayley_neumann=False), oracle_oft),
    "oft_shared": (OFT(oft_block_size=4, block_share=True), oracle_oft),
    **{f"oft_terms_{n}": (OFT(oft_block_size=4, num_cayley_neumann_terms=n), oracle_oft) for n in (2, 3, 4, 6, 7)},
    "ia3": (IA3(feedforward_modules=("second",)), oracle_ia3),
}


def config_of(case: str) -> Any:
    return peftkit.plan(Two(False), CASES[case][0]).config


def wrapped(case: str, transposed: bool, dtype: torch.dtype = torch.float64) -> Two:
    torch.manual_seed(3)
    model = Two(transposed).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    peftkit.wrap(model, CASES[case][0])
    randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensors in state_of(model, "default").values():
            for name, tensor in tensors.items():
                start = 1.0 if name == "ia3_l" else 0.0
                if name not in ("vera_A", "vera_B"):
                    tensor.copy_(start + 0.2 * torch.randn(tensor.shape, generator=generator))


def dense(model: Two, case: str) -> Callable[[Tensor], Tensor]:
    """The wrapped model as two plain products with the oracle's weights."""
    state = state_of(model, "default")
    cfg, oracle = CASES[case]

    def run(x: Tensor) -> Tensor:
        for path in ("first", "second"):
            module = getattr(model, path)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            weight, bias = oracle(weight, module.bias, {**state.get("", {}), **state[path]}, cfg)
            x = F.linear(x, weight, bias)
            x = torch.tanh(x) if path == "first" else x
        return x

    return run


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_dense_formula(case: str, transposed: bool, grad: bool) -> None:
    model = wrapped(case, transposed)
    for shape in ((1, IN), (2, 3, IN), (IN,)):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            found = model(x)
        expected = dense(model, case)(x)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        with peftkit.disabled(model):
            assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("case", CASES)
def test_merged_equals_unmerged(case: str, transposed: bool) -> None:
    model = wrapped(case, transposed)
    x = torch.randn(4, IN, dtype=torch.float64)
    before = model(x)
    peftkit.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-11, atol=1e-11)
    peftkit.unmerge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_the_dense_formula(case: str) -> None:
    model = wrapped(case, False).train()
    x = torch.randn(4, 2, IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 2, IN, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(F.mse_loss(model(x), target), [x, *parameters])
    state = state_of(model, "default")
    leaves = {
        f"{path}.peftkit.default.{name}": tensor.clone().requires_grad_()
        for path, tensors in state.items()
        for name, tensor in tensors.items()
    }
    cfg, oracle = CASES[case]
    hidden = x
    for path in ("first", "second"):
        module = getattr(model, path)
        own = {n.rpartition(".")[2]: t for n, t in leaves.items() if n.startswith((path, ".peftkit"))}
        weight, bias = oracle(module.weight, module.bias, own, cfg)
        hidden = F.linear(hidden, weight, bias)
        hidden = torch.tanh(hidden) if path == "first" else hidden
    expected = torch.autograd.grad(F.mse_loss(hidden, target), [x, *[leaves[n] for n in names]])
    for name, one, other in zip(["x", *names], found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        assert one.abs().max() > 0


@pytest.mark.parametrize("case", CASES)
def test_gradients_pass_gradcheck(case: str) -> None:
    model = wrapped(case, False).train()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_planned_count_is_the_real_count_and_the_formula_of_the_shapes(case: str) -> None:
    planned = peftkit.plan(Two(False), CASES[case][0])
    model = peftkit.wrap(Two(False), CASES[case][0])
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.device("meta"):
        assert peftkit.plan(Two(True), CASES[case][0]).trainable == planned.trainable


def test_counts_are_those_of_the_papers() -> None:
    def count(cfg: Any) -> list[int]:
        return [site.count for site in peftkit.plan(Two(False), cfg).sites]

    assert count(VeRA(r=5)) == [OUT + 5, IN + 5]
    assert count(LoHa(r=3)) == [2 * 3 * (IN + OUT)] * 2
    assert count(LoKr(r=1)) == [6 * 4 + 1 * (6 + 6), 4 * 6 + 1 * (6 + 6)]
    assert count(OFT(oft_block_size=4)) == [6 * 6, 9 * 6]
    assert count(OFT(oft_block_size=4, block_share=True)) == [6, 6]
    assert count(OFT(r=3, oft_block_size=0)) == [3 * 28, 3 * 66]
    assert count(IA3(feedforward_modules="second")) == [OUT, OUT]
    assert count(IA3()) == [OUT, IN]


@pytest.mark.parametrize("case", CASES)
def test_start_is_the_identity_to_the_bit(case: str) -> None:
    model = Two(False).eval()
    x = torch.randn(5, IN)
    before = model(x)
    peftkit.wrap(model, CASES[case][0])
    assert torch.equal(model(x), before)
    with torch.no_grad():
        assert torch.equal(model(x), before)


NOISY = [
    VeRA(r=4, init_weights=False),
    LoHa(r=2, init_weights=False),
    LoKr(r=2, init_weights=False),
    OFT(oft_block_size=4, init_weights=False),
    IA3(init_ia3_weights=False),
]


@pytest.mark.parametrize("cfg", NOISY, ids=lambda cfg: type(cfg).__name__)
def test_start_is_not_the_identity_when_the_config_says_so(cfg: Any) -> None:
    model = Two(False).eval()
    x = torch.randn(5, IN)
    before = model(x)
    peftkit.wrap(model, cfg)
    assert (model(x) - before).abs().max() > 1e-4


def test_lokr_lycoris_start_zeroes_the_second_matrix() -> None:
    model = Two(False)
    peftkit.wrap(model, LoKr(r=2, init_weights="lycoris"))
    state = state_of(model, "default")["first"]
    assert state["lokr_w2_b"].abs().max() == 0
    assert state["lokr_w1"].abs().max() > 0


# What is remembered in evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_remembered_values_follow_a_change_of_the_tensors(case: str) -> None:
    model = wrapped(case, False)
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        second = model(x)
    torch.testing.assert_close(second, dense(model, case)(x), rtol=1e-11, atol=1e-11)
    assert (second - first).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_remembered_values_follow_a_change_of_dtype(case: str) -> None:
    model = wrapped(case, False)
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        model.float()
        torch.testing.assert_close(model(x.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_derived_is_computed_again_only_when_a_source_changes() -> None:
    source = torch.ones(2)
    calls: list[int] = []
    derived = functional.Derived()

    def make() -> Tensor:
        calls.append(1)
        return source * 2

    with torch.no_grad():
        derived.get(False, torch.float32, (source,), make)
        derived.get(False, torch.float32, (source,), make)
        assert len(calls) == 1
        source.add_(1)
        assert torch.equal(derived.get(False, torch.float32, (source,), make), source * 2)
        derived.get(True, torch.float32, (source,), make)
        assert len(calls) == 3
    derived.get(False, torch.float32, (source,), make)
    assert len(calls) == 4
    assert derived.key is None
    with torch.no_grad():
        derived.get(False, torch.float32, (source,), make)
    assert derived.key is not None
    assert copy.deepcopy(derived).key is None
    assert pickle.loads(pickle.dumps(derived)).value is None


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles_compute_the_same_and_stand_alone(case: str) -> None:
    model = wrapped(case, False)
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        for parameter in model.parameters():
            parameter.zero_()
        for buffer in model.buffers():
            buffer.zero_()
        assert torch.equal(twin(x), expected)
        assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", ["vera", "loha_thin", "loha_dense", "lokr", "oft", "oft_exact", "oft_shared", "ia3"])
def test_compiles_without_a_graph_break(case: str, training: bool) -> None:
    model = wrapped(case, False).train(training)
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_runs_in_the_dtype_of_the_base(case: str) -> None:
    exact = wrapped(case, False)
    model = peftkit.wrap(Two(False).bfloat16(), CASES[case][0])
    model.load_state_dict(exact.state_dict())
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = exact(x)
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            found = model(x.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).abs().max() < 0.05 * expected.abs().max()
    model.train()
    model(x.bfloat16()).float().square().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_autocast_agrees_with_full_precision(case: str) -> None:
    model = wrapped(case, False, torch.float32)
    x = torch.randn(3, IN)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
        assert torch.equal(model(x), expected)
        fresh = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            fresh(x)
        torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.train()(x).float() - expected).abs().max() < 0.05 * expected.abs().max()


# Dropout ------------------------------------------------------------------------------------------------------------


def updates(cfg: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Updates of one projection in training and in evaluation for the same inputs, (rows, out)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    peftkit.wrap(model, cfg)
    randomise(model)
    x = torch.randn(rows, IN, dtype=torch.float64)
    base = F.linear(x, model[0].weight, model[0].bias)
    return model.train()(x) - base, model.eval()(x) - base


@pytest.mark.parametrize("r", [2, 6])
def test_loha_rank_dropout_drops_rows_and_rescales_the_others(r: int) -> None:
    trained, plain = updates(LoHa(r=r, rank_dropout=0.5), 4)
    kept = trained.abs().amax(0) > 0
    assert 0 < kept.sum() < OUT
    torch.testing.assert_close(trained[:, kept], plain[:, kept] * OUT / kept.sum())


@pytest.mark.parametrize("rescale", [False, True])
def test_lokr_rank_dropout_drops_rows(rescale: bool) -> None:
    trained, plain = updates(LoKr(r=2, rank_dropout=0.5, rank_dropout_scale=rescale), 4)
    kept = trained.abs().amax(0) > 1e-12
    assert 0 < kept.sum() < OUT
    torch.testing.assert_close(trained[:, kept], plain[:, kept] * (OUT / kept.sum() if rescale else 1))


@pytest.mark.parametrize("make", [LoHa, LoKr])
def test_module_dropout_drops_the_whole_update_at_its_rate(make: Any) -> None:
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    peftkit.wrap(model, make(r=2, module_dropout=0.3, init_weights=False)).train()
    x = torch.randn(2, IN, dtype=torch.float64)
    base = F.linear(x, model[0].weight, model[0].bias)
    torch.manual_seed(1)
    dropped = sum(torch.allclose(model(x), base, atol=1e-14) for _ in range(300))
    assert 60 < dropped < 120
    assert not torch.allclose(model.eval()(x), base, atol=1e-14)


def test_vera_dropout_acts_on_the_update_only() -> None:
    trained, plain = updates(VeRA(r=4, vera_dropout=0.5), 4)
    assert (trained - plain).abs().max() > 1e-3
    torch.manual_seed(0)
    model = peftkit.wrap(nn.Sequential(nn.Linear(IN, OUT)), VeRA(r=4, vera_dropout=0.5)).train()
    x = torch.randn(2, IN)
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))


def test_oft_module_dropout_leaves_whole_blocks_unrotated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN, bias=False)).double()
    nn.init.eye_(model[0].weight)
    peftkit.wrap(model, OFT(oft_block_size=4, module_dropout=0.5, init_weights=False))
    x = torch.randn(3, IN, dtype=torch.float64)
    turned = model.eval()(x).view(3, -1, 4)
    trained = model.train()(x).view(3, -1, 4)
    same_as_turned = (trained - turned).abs().amax((0, 2)) < 1e-12
    same_as_input = (trained - x.view(3, -1, 4)).abs().amax((0, 2)) < 1e-12
    assert torch.equal(same_as_turned, ~same_as_input)
    assert 0 < same_as_input.sum() < 6


# Facts of single methods --------------------------------------------------------------------------------------------


def test_oft_exact_rotation_is_orthogonal_and_merging_keeps_row_norms() -> None:
    model = wrapped("oft_exact", False)
    before = model.first.weight.norm(dim=1)
    peftkit.merge(model)
    torch.testing.assert_close(model.first.weight.norm(dim=1), before)


def test_oft_series_approaches_the_inverse_of_the_exact_rotation() -> None:
    q = oft.skew(0.05 * torch.randn(2, 6, dtype=torch.float64), 4)
    eye = torch.eye(4, dtype=torch.float64)
    exact = eye + oft.rotation_less_identity(q, None)
    series = eye + oft.rotation_less_identity(q, 12)
    torch.testing.assert_close(series @ exact, eye.expand(2, 4, 4), rtol=0, atol=1e-8)


def test_oft_with_one_term_rotates_nothing() -> None:
    model = peftkit.wrap(Two(False), OFT(oft_block_size=4, num_cayley_neumann_terms=1, init_weights=False)).eval()
    x = torch.randn(2, IN)
    found = model(x)
    with peftkit.disabled(model):
        assert torch.equal(found, model(x))


def test_coft_keeps_blocks_in_the_ball_in_the_forward_and_after_a_step() -> None:
    cfg = OFT(oft_block_size=4, coft=True, eps=0.1)
    model = peftkit.wrap(nn.Sequential(nn.Linear(IN, OUT)).double(), cfg)
    randomise(model)
    adapter = model[0].peftkit["default"]
    radius = 0.1 / 6**0.5
    assert (oft.skew(adapter.oft_R, 4).norm(dim=(1, 2)) > radius).any()
    x = torch.randn(2, IN, dtype=torch.float64)
    before = model(x)
    adapter.after_step()
    norms = oft.skew(adapter.oft_R, 4).norm(dim=(1, 2))
    assert norms.max() <= radius * (1 + 1e-12)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_loha_uses_thin_factors_where_they_are_cheaper() -> None:
    def thin(r: int) -> bool:
        return loha.LohaAdapter(Site(path="x", in_features=512, out_features=512), LoHa(r=r)).thin

    assert thin(15)
    assert not thin(16)


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 6, 8, 100])
def test_lokr_split_equals_that_of_peft(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 70), 512, 768, 1376):
        assert lokr.split(size, factor) == factorization(size, factor), size


def test_oft_nearest_divisor_equals_that_of_peft() -> None:
    from peft.tuners.oft.layer import OFTLayer

    for size in range(1, 80):
        for wanted in range(1, 90):
            if size % wanted or wanted > size:
                expected = OFTLayer.adjust_oft_parameters(None, size, wanted)
                assert oft.nearest_divisor(size, wanted) == expected, (size, wanted)


def test_lokr_large_second_matrix_stays_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lokr, "SMALL", 1)
    model = wrapped("lokr", False)
    assert not model.first.peftkit["default"].whole
    x = torch.randn(3, IN, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), dense(model, "lokr")(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [LoHa, LoKr])
def test_rank_and_alpha_patterns_apply_to_the_sites_they_name(make: Any) -> None:
    cfg = make(r=1, alpha=4, rank_pattern={"second": 3}, alpha_pattern={"first": 8})
    model = peftkit.wrap(Two(False), cfg)
    assert model.first.peftkit["default"].scale == 8
    assert model.second.peftkit["default"].scale == pytest.approx(4 / 3)
    assert peftkit.plan(Two(False), cfg).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = {LoHa: ("hada_w1_b", (3, OUT)), LoKr: ("lokr_w2", (6, 6))}[make]
    assert state_of(model, "default")["second"][shape[0]].shape == shape[1]


WRONG = [
    (VeRA, {"r": 0}, "r must be at least 1, found 0"),
    (VeRA, {"vera_dropout": 1.0}, "vera_dropout"),
    (LoHa, {"r": 0}, "r must be at least 1"),
    (LoHa, {"rank_dropout": -0.1}, "rank_dropout"),
    (LoKr, {"r": 0}, "r must be at least 1"),
    (LoKr, {"decompose_factor": 0}, "decompose_factor"),
    (LoKr, {"init_weights": "zeros"}, "init_weights"),
    (LoKr, {"module_dropout": 2}, "module_dropout"),
    (OFT, {"r": 4}, "exactly one of r and oft_block_size"),
    (OFT, {"oft_block_size": 0}, "exactly one of r and oft_block_size"),
    (OFT, {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"),
    (OFT, {"eps": 0.0}, "eps"),
    (OFT, {"module_dropout": 1.0}, "module_dropout"),
]


@pytest.mark.parametrize(("make", "fields", "message"), WRONG)
def test_config_refuses_values_out_of_range(make: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**fields)


def test_ia3_refuses_feedforward_modules_that_are_no_targets() -> None:
    with pytest.raises(TargetError, match="feedforward_modules: 'third' matches no module"):
        peftkit.plan(Two(False), IA3(feedforward_modules=("third",)))


# Against the installed peft -----------------------------------------------------------------------------------------


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        )
    )


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5}
ATTENTION = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"], "gpt2": ["c_attn"]}
FEEDFORWARD = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("vera", {"r": 6}),
    "vera_key": ("vera", {"r": 6, "projection_prng_key": 255, "save_projection": False}),
    "loha": ("loha", {"r": 2, "alpha": 5, "rank_pattern": {"layers.1.self_attn.q_proj": 1}}),
    "loha_dense": ("loha", {"r": 8}),
    "lokr": ("lokr", {"r": 2, "alpha": 5}),
    "lokr_whole": ("lokr", {"r": 8}),
    "lokr_both": ("lokr", {"r": 1, "decompose_both": True}),
    "lokr_factor": ("lokr", {"r": 2, "decompose_factor": 4, "init_weights": "lycoris"}),
    "oft": ("oft", {"oft_block_size": 4}),
    "oft_adjusted": ("oft", {"oft_block_size": 7}),
    "oft_blocks": ("oft", {"r": 5, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft_shared": ("oft", {"oft_block_size": 6, "block_share": True, "num_cayley_neumann_terms": 3}),
    "oft_coft": ("oft", {"oft_block_size": 6, "coft": True, "eps": 0.3}),
    "ia3": ("ia3", {}),
}
OURS = {"vera": VeRA, "loha": LoHa, "lokr": LoKr, "oft": OFT, "ia3": IA3}
EVERYWHERE = ("vera", "loha_dense", "lokr", "oft", "ia3")
"""One case a method that runs on every architecture; the variants run on one."""
CONV1D = ("vera", "ia3")
"""Methods that peft attaches to GPT-2's transposed projections."""
PAIRS = [
    (case, model)
    for case, (method, _) in FIELDS.items()
    for model in MODELS
    if model == "llama" or (case in EVERYWHERE and (model != "gpt2" or method in CONV1D))
]


@pytest.fixture
def quiet() -> Iterator[None]:
    """peft warns about what it adjusts and regenerates; here that is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(1 if name == "t5" else 4)
    return model.eval()


def logits(model: nn.Module, name: str) -> Tensor:
    ids = torch.arange(2, 14).view(2, 6)
    more = {"decoder_input_ids": ids.flip(1)} if name == "t5" else {}
    return model(input_ids=ids, **more).logits


def fields_of(case: str, name: str) -> dict[str, Any]:
    method, fields = FIELDS[case]
    if method != "ia3":
        return {"target_modules": ATTENTION[name], **fields}
    return {"target_modules": FEEDFORWARD[name][0], "feedforward_modules": FEEDFORWARD[name][1]}


def in_peft(case: str, name: str) -> Any:
    import peft

    method, _ = FIELDS[case]
    makers = {"vera": "VeraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig", "oft": "OFTConfig", "ia3": "IA3Config"}
    model = peft.get_peft_model(build(name), getattr(peft, makers[method])(**fields_of(case, name)))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                start = 1.0 if "ia3_l" in key else 0.0
                parameter.copy_(start + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_same(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert (expected - plain).abs().max() > 3e-3 * scale, "the adapter does nothing, so the test says nothing"
    assert (found - expected).abs().max() <= 1e-6 * scale


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_a_folder_of_peft_loads_with_equal_logits(case: str, name: str, tmp_path: Path) -> None:
    reference = in_peft(case, name)
    reference.save_pretrained(tmp_path)
    model = peftkit.load(build(name), tmp_path).eval()
    with torch.no_grad():
        expected = logits(reference, name)
        assert_same(logits(model, name), expected, logits(build(name), name))
    peftkit.merge(model)
    assert (logits(model, name) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_a_folder_of_ours_loads_in_peft_with_equal_logits(case: str, name: str, tmp_path: Path) -> None:
    import peft

    model = peftkit.wrap(build(name), OURS[FIELDS[case][0]](**fields_of(case, name))).eval()
    randomise(model)
    peftkit.save(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        assert_same(logits(model, name), logits(reference, name), logits(build(name), name))
    reference.save_pretrained(tmp_path / "again")
    again = peftkit.load(build(name), tmp_path / "again").eval()
    with torch.no_grad():
        assert_same(logits(again, name), logits(model, name), logits(build(name), name))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("case", FIELDS)
def test_gradients_equal_those_of_peft(case: str, tmp_path: Path) -> None:
    reference = in_peft(case, "llama")
    reference.save_pretrained(tmp_path)
    model = peftkit.load(build("llama"), tmp_path).train()
    reference.train()
    target = torch.arange(3, 15).view(2, 6)
    for one in (model, reference):
        F.cross_entropy(logits(one, "llama").flatten(0, 1), target.flatten()).backward()
    expected = {
        k.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for k, p in reference.named_parameters()
        if p.grad is not None
    }
    found = {
        k.replace(".peftkit.default", "").replace("oft_R", "oft_R.weight"): p.grad
        for k, p in model.named_parameters()
        if p.grad is not None
    }
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()), msg=key)


@pytest.mark.usefixtures("quiet")
def test_vera_draws_the_projections_of_peft() -> None:
    reference = in_peft("vera_key", "llama")
    model = peftkit.wrap(build("llama"), VeRA(**fields_of("vera_key", "llama")))
    shared = model.peftkit["default"]
    assert torch.equal(shared.vera_A, reference.base_model.vera_A["default"])
    assert torch.equal(shared.vera_B, reference.base_model.vera_B["default"])
    assert not shared.tensors()


def test_vera_files_hold_the_projections_only_when_asked(tmp_path: Path) -> None:
    from safetensors import safe_open

    for kept in (True, False):
        model = peftkit.wrap(build("llama"), VeRA(r=4, save_projection=kept))
        peftkit.save(model, tmp_path / str(kept))
        with safe_open(tmp_path / str(kept) / "adapter_model.safetensors", "pt") as file:
            assert ("base_model.vera_A" in file.keys()) is kept  # noqa: SIM118  # not a mapping


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", MODELS)
def test_ia3_default_targets_scale_keys_values_and_the_feedforward_input(name: str, tmp_path: Path) -> None:
    import peft

    planned = peftkit.plan(build(name), IA3())
    inner = {s.path.rpartition(".")[2] for s in planned.sites if s.facts["feedforward"]}
    outer = {s.path.rpartition(".")[2] for s in planned.sites if not s.facts["feedforward"]}
    assert inner == {"llama": {"down_proj"}, "bert": {"dense"}, "gpt2": {"c_proj"}, "t5": {"wo"}}[name]
    assert (
        outer
        == {
            "llama": {"k_proj", "v_proj"},
            "bert": {"key", "value"},
            "gpt2": {"c_attn"},
            "t5": {"k", "v"},
        }[name]
    )
    model = peftkit.wrap(build(name), IA3()).eval()
    randomise(model)
    peftkit.save(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    with torch.no_grad():
        assert_same(logits(model, name), logits(reference, name), logits(build(name), name))


@pytest.mark.usefixtures("quiet")
def test_ia3_spells_out_targets_of_which_some_are_feedforward(tmp_path: Path) -> None:
    import peft

    cfg = IA3(target_modules=("dense",), feedforward_modules=r".*layer\.1\.output\.dense")
    model = peftkit.wrap(build("bert"), cfg).eval()
    randomise(model)
    peftkit.save(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    with torch.no_grad():
        assert_same(logits(model, "bert"), logits(reference, "bert"), logits(build("bert"), "bert"))


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vera", "loha", "lokr", "oft"])
def test_budget_is_met_from_below_as_closely_as_any_size_can(method: str) -> None:
    model = build("llama")
    knob = peftkit.METHODS[method].knob
    assert knob is not None
    for budget in (400, 2000):
        cfg = peftkit.fit_budget(model, method, parameters=budget)
        choices = list(knob.values(model)) if knob.values else list(range(1, 1000))
        counts = [peftkit.plan(model, knob.set(cfg, value)).trainable for value in choices]
        assert peftkit.plan(model, cfg).trainable == max(count for count in counts if count <= budget)


def test_oft_block_sizes_divide_every_input() -> None:
    assert list(oft.block_sizes(build("llama"))) == [2, 4, 8]
    assert peftkit.fit_budget(build("llama"), "oft", parameters=10**6, r=2, oft_block_size=0).oft_block_size == 8
    with pytest.raises(ConfigError, match="no block size divides"):
        oft.block_sizes(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))


def test_lokr_ranks_end_where_the_second_matrix_is_whole() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    last = list(lokr.ranks(model))[-1]
    assert last == 3
    counts = [peftkit.plan(model, LoKr(r=r)).trainable for r in (last - 1, last, last + 5)]
    assert counts[0] < counts[1] == counts[2]


# One product for many rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 400])
@pytest.mark.parametrize("bias", [False, True])
def test_loha_computes_the_same_for_few_and_many_rows(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40, bias=bias)).double()
    peftkit.wrap(model, peftkit.LoHa(r=4, init_weights=False, target_modules=["0"]))
    adapter = model[0].peftkit["default"]
    x = torch.randn(rows, 48, dtype=torch.float64)
    dense = model[0].weight + adapter.scale * (
        (adapter.hada_w1_a @ adapter.hada_w1_b) * (adapter.hada_w2_a @ adapter.hada_w2_b)
    )
    with torch.no_grad():
        assert adapter._one_product_is_cheaper(x) == (rows > 1)
        torch.testing.assert_close(model(x), nn.functional.linear(x, dense, model[0].bias), rtol=1e-12, atol=1e-12)
    assert not adapter._one_product_is_cheaper(x), "with gradients the factors are used"
    with torch.no_grad():
        assert not adapter._one_product_is_cheaper(x.bfloat16()), "the sum would round the update away"
