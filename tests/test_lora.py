"""LoRA against dense float64 arithmetic: outputs, gradients, starts, and what is kept for the backward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import bits, built, logits, loss
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

import peftkit
from peftkit import functional
from peftkit.errors import ConfigError
from peftkit.wrap import adapters_of

ROWS, INSIDE, OUT, RANK = 5, 6, 4, 2
ALPHA = 3.0


class One(nn.Module):
    """A model of one projection."""

    def __init__(self, kind="linear", bias=True, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        if kind == "conv1d":
            self.site = Conv1D(OUT, INSIDE)
            nn.init.normal_(self.site.weight)
            nn.init.normal_(self.site.bias)
        elif kind == "embedding":
            self.site = nn.Embedding(INSIDE, OUT)
        else:
            self.site = nn.Linear(INSIDE, OUT, bias=bias)
        self.to(dtype)

    def forward(self, x):
        return self.site(x)


def wrapped(kind="linear", bias=True, dtype=torch.float64, **fields):
    model = peftkit.wrap(
        One(kind, bias, dtype), peftkit.LoRA(r=RANK, lora_alpha=ALPHA, target_modules=["site"], **fields)
    )
    _, adapter = next(adapters_of(model, "default"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model, adapter


def dense(model, adapter, x, scale=ALPHA / RANK, norms=None):
    """The output by the definition, from the adapter's own tensors, as one differentiable expression."""
    site = model.site
    weight = site._parameters["weight"].detach()
    weight = weight.T if isinstance(site, Conv1D | nn.Embedding) else weight
    bias = site._parameters.get("bias")
    changed = weight + scale * adapter.lora_B @ adapter.lora_A
    if "lora_magnitude_vector" in adapter._parameters:
        changed = adapter.lora_magnitude_vector[:, None] * changed / changed.detach().norm(dim=1)[:, None]
    out = F.embedding(x, changed.T) if isinstance(site, nn.Embedding) else x @ changed.T
    if bias is not None:
        out = out + bias.detach()
    if adapter._parameters.get("lora_bias") is not None:
        out = out + scale * adapter.lora_bias
    return out


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}],
    ids=["plain", "dora", "bias", "rslora"],
)
@pytest.mark.parametrize("shape", [(ROWS, INSIDE), (2, 3, INSIDE), (INSIDE,)])
def test_lora_output_and_gradients_equal_dense_definition(kind, bias, fields, shape):
    model, adapter = wrapped(kind, bias, **fields)
    scale = ALPHA / math.sqrt(RANK) if fields.get("use_rslora") else ALPHA / RANK
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    wanted = [x, *adapter.parameters()]
    expected = dense(model, adapter, x, scale)
    slopes = torch.autograd.grad(expected, wanted, seed)
    found = model(x)
    assert torch.allclose(found, expected, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, wanted, seed), slopes, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-12)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-12)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-12)


def test_embedding_lora_output_and_gradients_equal_dense_definition():
    model, adapter = wrapped("embedding")
    x = torch.randint(0, INSIDE, (2, 3))
    seed = torch.randn(2, 3, OUT, dtype=torch.float64)
    expected, found = dense(model, adapter, x), model(x)
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = list(adapter.parameters())
    for a, b in zip(torch.autograd.grad(found, wanted, seed), torch.autograd.grad(expected, wanted, seed), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, INSIDE), (2, 3, INSIDE), (INSIDE,), (0, INSIDE)])
def test_lora_linear_passes_gradcheck(bias, shape):
    torch.manual_seed(0)
    weight = torch.randn(OUT, INSIDE, dtype=torch.float64)
    offset = torch.randn(OUT, dtype=torch.float64) if bias else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    down = torch.randn(RANK, INSIDE, dtype=torch.float64, requires_grad=True)
    up = torch.randn(OUT, RANK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: functional.lora_linear(x, weight, offset, a, b, 1.7), (x, down, up))


def test_add_low_rank_passes_gradcheck_on_every_input():
    torch.manual_seed(0)
    out = torch.randn(2, 3, OUT, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, INSIDE, dtype=torch.float64, requires_grad=True)
    down = torch.randn(RANK, INSIDE, dtype=torch.float64, requires_grad=True)
    up = torch.randn(OUT, RANK, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda o, x, a, b: functional.add_low_rank(o * 1.0, x, a, b, 1.7), (out, x, down, up)
    )


@pytest.mark.parametrize("frozen", ["x", "down", "up"])
def test_lora_linear_gives_no_gradient_to_what_needs_none(frozen):
    tensors = {
        "x": torch.randn(ROWS, INSIDE), "down": torch.randn(RANK, INSIDE), "up": torch.randn(OUT, RANK),
    }  # fmt: skip
    for key, tensor in tensors.items():
        tensor.requires_grad_(key != frozen)
    out = functional.lora_linear(tensors["x"], torch.randn(OUT, INSIDE), None, tensors["down"], tensors["up"], 1.0)
    out.sum().backward()
    assert {key for key, tensor in tensors.items() if tensor.grad is None} == {frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_keeps_nothing_but_its_input_for_the_backward_pass(dtype):
    model = peftkit.wrap(One(dtype=dtype), peftkit.LoRA(r=RANK, target_modules=["site"]))
    own = {p.data_ptr() for p in model.parameters()}
    x = torch.randn(64, INSIDE, dtype=dtype, requires_grad=True)
    kept = {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    assert kept == {x.data_ptr(): x.numel() * x.element_size()}


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_beside_a_half_precision_base_stays_float32_and_close(fields, dtype):
    model, adapter = wrapped(dtype=dtype, **fields)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    x = torch.randn(16, INSIDE, dtype=dtype, requires_grad=True)
    found = model(x)
    assert found.dtype == dtype
    found.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())
    oracle = copy.deepcopy(model).double()
    wide = x.detach().double()
    expected = dense(oracle, next(adapters_of(oracle, "default"))[1], wide)
    # Three roundings of values up to the largest one: the base product, the inner product, the sum.
    assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_lora_dropout_acts_on_the_input_of_the_update_in_training_only():
    model, adapter = wrapped(lora_dropout=0.5)
    x = torch.randn(200, INSIDE, dtype=torch.float64)
    model.eval()
    assert torch.allclose(model(x), dense(model, adapter, x), atol=1e-12)
    model.train()
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = (
        model.site.bias + x @ model.site.weight.T + ALPHA / RANK * (dropped @ adapter.lora_A.T) @ adapter.lora_B.T
    )
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(found, model(x))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_start_leaves_the_function_as_it_was(init, name):
    model = built(name)
    expected = logits(name, model)
    peftkit.wrap(model, peftkit.LoRA(r=4, target_modules="all-linear", init_lora_weights=init))
    assert torch.allclose(logits(name, model), expected, atol=1e-5)
    for _, adapter in adapters_of(model, "default"):
        zero = not bool(adapter.lora_B.any())
        assert zero == (init in (True, "gaussian"))


def test_random_start_changes_the_function():
    model = built("llama")
    expected = logits("llama", model)
    peftkit.wrap(model, peftkit.LoRA(r=4, init_lora_weights=False))
    assert not torch.allclose(logits("llama", model), expected, atol=1e-4)


def test_pissa_starts_from_the_leading_singular_triplets():
    model = One()
    weight = model.site.weight.detach().clone()
    left, values, right = torch.linalg.svd(weight)
    peftkit.wrap(model, peftkit.LoRA(r=RANK, lora_alpha=ALPHA, target_modules=["site"], init_lora_weights="pissa"))
    _, adapter = next(adapters_of(model, "default"))
    best = left[:, :RANK] @ values[:RANK].diag() @ right[:RANK]
    assert torch.allclose(ALPHA / RANK * adapter.lora_B @ adapter.lora_A, best, atol=1e-10)
    assert bits(model.site.weight) == bits(weight)


def test_olora_starts_from_the_leading_columns_of_qr():
    model = One()
    q, r = torch.linalg.qr(model.site.weight.detach())
    peftkit.wrap(model, peftkit.LoRA(r=RANK, lora_alpha=ALPHA, target_modules=["site"], init_lora_weights="olora"))
    _, adapter = next(adapters_of(model, "default"))
    assert torch.allclose(adapter.lora_B @ adapter.lora_A, q[:, :RANK] @ r[:RANK], atol=1e-10)


def test_orthogonal_start_has_two_nonzero_factors_with_zero_product():
    model = peftkit.wrap(built("llama"), peftkit.LoRA(r=4, init_lora_weights="orthogonal"))
    for _, adapter in adapters_of(model, "default"):
        assert adapter.lora_A.abs().sum() > 0
        assert torch.allclose(adapter.lora_B @ adapter.lora_A, torch.zeros(()), atol=1e-6)


def test_starts_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="'orthogonal' needs an even rank, found 3"):
        peftkit.wrap(built("llama"), peftkit.LoRA(r=3, init_lora_weights="orthogonal"))
    with pytest.raises(ConfigError, match="'pissa': rank 33 is over the smaller side"):
        peftkit.wrap(built("llama"), peftkit.LoRA(r=33, init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match="embeddings take LoRA with"):
        peftkit.wrap(built("llama"), peftkit.LoRA(target_modules=["embed_tokens"], use_dora=True))
    with pytest.raises(ConfigError, match="lora_bias and use_dora exclude each other"):
        peftkit.LoRA(lora_bias=True, use_dora=True)


@pytest.mark.parametrize("write", ["in place", "data", "state dict"])
@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("which", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_dora_remembers_its_norms_only_as_long_as_nothing_changes(write, init, which):
    model, adapter = wrapped(use_dora=True, init_lora_weights=init)
    model.eval()
    x = torch.randn(ROWS, INSIDE, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        assert bits(model(x)) == bits(before)
    tensor = getattr(adapter, which)
    other = tensor.detach() * 1.5 + 0.1
    with torch.no_grad():
        if write == "in place":
            tensor.copy_(other)
        elif write == "data":
            model.train()
            model(x)  # a step of training lies between two evaluations
            tensor.data.copy_(other)
            model.eval()
        else:
            model.load_state_dict({**model.state_dict(), f"site.peftkit.default.{which}": other})
        found = model(x)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.allclose(found, fresh(x), atol=1e-12)
        assert not torch.allclose(found, before)


def test_dora_norms_are_those_of_float32_under_autocast():
    model, adapter = wrapped(use_dora=True, dtype=torch.float32)
    expected = adapter.row_factors(model.site)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.row_factors(model.site)
    assert torch.equal(found, expected)


def test_row_norms_equal_those_of_the_dense_matrix():
    torch.manual_seed(0)
    weight, down, up = (torch.randn(s, dtype=torch.float64) for s in ((OUT, INSIDE), (RANK, INSIDE), (OUT, RANK)))
    found = functional.row_norms(weight, weight.square().sum(1), down, up, 1.7)
    assert torch.allclose(found, (weight + 1.7 * up @ down).norm(dim=1), atol=1e-12)


def test_rank_and_alpha_patterns_set_each_site():
    config = peftkit.LoRA(
        r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"up_proj": 3.0},
    )  # fmt: skip
    model = peftkit.wrap(built("llama"), config)
    found = {path: (adapter.lora_A.shape[0], adapter.scale) for path, adapter in adapters_of(model, "default")}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 4.0)
    assert found["model.layers.0.self_attn.k_proj"] == (4, 2.0)
    assert found["model.layers.0.mlp.up_proj"] == (4, 0.75)
    assert found["model.layers.1.mlp.up_proj"] == (6, 0.5)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=["lora", "dora", "dropout"])
def test_lora_trains_under_autocast(fields):
    model = peftkit.wrap(built("llama"), peftkit.LoRA(r=4, target_modules="all-linear", **fields)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss("llama", model).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_functional_transforms_see_through_lora():
    model, adapter = wrapped()
    x = torch.randn(ROWS, INSIDE, dtype=torch.float64)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = {n: p for n, p in model.named_parameters() if n in names}

    def total(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(total), (None, 0))(values, x)
    for index in range(ROWS):
        slopes = torch.autograd.grad(dense(model, adapter, x[index]).square().sum(), list(values.values()))
        for name, slope in zip(names, slopes, strict=True):
            assert torch.allclose(found[name][index], slope, atol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("order", [("default", "trained"), ("trained", "default")])
def test_lora_sees_the_bias_and_weight_that_another_active_adapter_trains(fields, order):
    model, adapter = wrapped(**fields)
    peftkit.wrap(model, peftkit.FullFineTuning(), name="trained")
    own = dict(adapters_of(model, "trained"))["site"]
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter))
    peftkit.activate(model, *order)
    x = torch.randn(ROWS, INSIDE, dtype=torch.float64)
    changed = own.weight + ALPHA / RANK * adapter.lora_B @ adapter.lora_A
    if fields:
        changed = adapter.lora_magnitude_vector[:, None] * changed / changed.detach().norm(dim=1)[:, None]
    expected = x @ changed.T + own.bias
    found = model(x)
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = [*own.parameters(), *adapter.parameters()]
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 32, 33])
def test_few_bfloat16_rows_compute_the_same_as_in_float64(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 80, bias=bias).to(torch.bfloat16)
    model = peftkit.wrap(
        torch.nn.Sequential(layer), peftkit.LoRA(r=4, target_modules=["0"], init_lora_weights=False)
    ).eval()
    x = torch.randn(rows, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        found = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        with peftkit.disabled(model):
            base = model(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert not torch.equal(found, base)
