"""Decoding with prefixes: compiled code over keys that are not copied, against copied ones and against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peftkit_kernels
import pytest
import torch
from peftkit_kernels._op import Op
from peftkit_kernels.prefix_attention import FEW
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftkit
from peftkit import attention
from peftkit.testing.backbones import BACKBONES, VOCABULARY

LENGTH = 3
PREFIX = peftkit.PrefixTuning(num_virtual_tokens=LENGTH)
PROJECTED = peftkit.PrefixTuning(num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=5)
ROOM = 64 * torch.finfo(torch.float32).eps
"""Beside the largest number: the two ways add in another order, which is some eps at each of two layers."""
STEPS = 5
BATCH, HEADS, HEADS_KV, WIDTH, TOKENS = 3, 4, 2, 8, 9


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that the operation was given, which is taken to pay at any size."""
    found: list[tuple[int, ...]] = []
    operation = peftkit_kernels.prefix_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(tuple(query.shape))
        return operation(query, *args, **kwargs)

    monkeypatch.setattr(peftkit_kernels, "prefix_attention", counted)
    monkeypatch.setattr(attention, "_pays", lambda *sizes: True)
    return found


def adapted(backbone: str, config: Any = PREFIX, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in evaluation mode, its prefixes large enough to be seen."""
    model = peftkit.wrap(BACKBONES[backbone](dtype), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows of token ids, and their mask: one row is padded on the left by two, one by none, one by five."""
    ids = torch.randint(4, VOCABULARY, (BATCH, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :5] = 0
    return ids, mask


@torch.no_grad()
def decoded(model: Any, padded: bool = True) -> Tensor:
    """The logits of given tokens one by one behind a prompt, (batch, STEPS, vocabulary)."""
    ids, mask = prompts()
    mask = mask if padded else torch.ones_like(mask)
    following = torch.randint(4, VOCABULARY, (BATCH, STEPS), generator=torch.Generator().manual_seed(2))
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    logits = []
    for token in following.split(1, dim=1):
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        positions = mask.cumsum(1)[:, -1:] - 1
        out = model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def copying(run: Callable[[], Any]) -> Any:
    """What the same gives when keys are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_same_in_place", lambda *inputs: False)
        return run()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums, and not the same bits, which would be the same way twice."""
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROOM * expected.abs().max().item())


# Models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [PREFIX, PROJECTED], ids=["prefix", "projected"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "opt"])
def test_decoding_equals_copied_keys(backbone: str, config: Any, padded: bool, calls: list[tuple[int, ...]]) -> None:
    model = adapted(backbone, config)
    found = decoded(model, padded)
    assert len(calls) == STEPS * model.config.num_hidden_layers
    assert {(shape[0], shape[2]) for shape in calls} == {(BATCH, 1)}
    assert_same(found, copying(lambda: decoded(model, padded)))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static"],
)
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "opt", "bart"])
def test_generate_equals_copied_keys(backbone: str, options: dict[str, Any], calls: list[tuple[int, ...]]) -> None:
    model = adapted(backbone)
    ids, mask = prompts()
    if backbone == "bart" and "cache_implementation" in options:
        pytest.skip("transformers has no static cache for an encoder-decoder")

    def run() -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=True,
            **options,
        )

    found = run()
    assert calls
    expected = copying(run)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_decoding_in_bfloat16_is_as_close_to_float64_as_copied_keys(
    backbone: str, calls: list[tuple[int, ...]]
) -> None:
    model = adapted(backbone, dtype=torch.bfloat16)
    found, copied = decoded(model), copying(lambda: decoded(model))
    exact = decoded(model.to(torch.float64))
    assert len(calls) == STEPS * model.config.num_hidden_layers
    apart = [(logits.double() - exact).square().mean().sqrt().item() for logits in (found, copied)]
    # Both round to bfloat16 everywhere else; over 1200 logits their mean errors differ by chance by less than this.
    assert apart[0] <= 1.25 * apart[1]


def test_training_and_prompts_copy_keys(calls: list[tuple[int, ...]]) -> None:
    model = adapted("llama")
    ids, mask = prompts()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    model(input_ids=ids[:, -1:]).logits.sum().backward()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert not calls


def test_eager_attention_copies_keys_and_gives_weights(calls: list[tuple[int, ...]]) -> None:
    model = adapted("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=prompts()[0][:, -1:], output_attentions=True)
    assert {tuple(weights.shape) for weights in out.attentions} == {(BATCH, HEADS, 1, LENGTH + 1)}
    assert not calls


# The attention function ---------------------------------------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float32, queries: int = 1) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """An attention module of a tiny Llama with a prefix, and a query, keys and values."""
    module = adapted("llama").model.layers[0].self_attn
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, queries), (HEADS_KV, TOKENS), (HEADS_KV, TOKENS))
    return module, *(torch.randn(BATCH, *shape, WIDTH, generator=generator).to(dtype) for shape in shapes)


def _seen() -> Tensor:
    seen = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
    seen[0, ..., :4] = seen[2] = False
    return seen


MASKS = {
    "none": None,
    "padding": _seen(),
    "shared": _seen()[:1],
    "lowest": torch.zeros(BATCH, 1, 1, TOKENS).masked_fill(~_seen(), torch.finfo(torch.float32).min),
    "infinite": torch.zeros(BATCH, 1, 1, TOKENS).masked_fill(~_seen(), -torch.inf),
    "by head": torch.randn(1, HEADS, 1, TOKENS, generator=torch.Generator().manual_seed(4)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attend_equals_copied_keys(mask: Tensor | None, scaling: float | None, calls: list[tuple[int, ...]]) -> None:
    inputs = problem()

    def run() -> Any:
        return attention.attend(*inputs, mask, dropout=0.0, scaling=scaling, sliding_window=None, use_cache=True)

    with torch.no_grad():
        (found, weights), (expected, _) = run(), copying(run)
    assert len(calls) == 1
    assert weights is None
    assert found.is_contiguous() == expected.is_contiguous()
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_rounds_no_more_than_copied_keys(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    module, *tensors = problem(dtype)
    with torch.no_grad():
        found = attention.attend(module, *tensors, None)[0]
        copied = copying(lambda: attention.attend(module, *tensors, None))[0]
        assert len(calls) == 1
        # The prefix is rounded to the dtype of the keys either way.
        module.peftkit["default"].to(dtype)
        exact = attention.attend(module, *(t.double() for t in tensors), None)[0]
    apart = [(out.double() - exact).abs().max().item() for out in (found, copied)]
    assert apart[0] <= apart[1] + torch.finfo(dtype).eps * exact.abs().max().item() / 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 0.5},
        {"sliding_window": 4},
        {"position_bias": torch.zeros(1, HEADS, 1, TOKENS)},
        {"scaling": torch.tensor(0.3)},
        {"new_in_transformers": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_attend_copies_keys_when_an_argument_is_not_known(
    arguments: dict[str, Any], calls: list[tuple[int, ...]]
) -> None:
    with torch.no_grad():
        attention.attend(*problem(), None)
        assert len(calls) == 1
        attention.attend(*problem(), None, **arguments)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["queries", "float64", "mask of another dtype", "mask with gradient", "two", "eager"])
def test_attend_copies_keys_when_the_problem_is_another(kind: str, calls: list[tuple[int, ...]]) -> None:
    dtype = {"float64": torch.float64, "mask of another dtype": torch.bfloat16}.get(kind, torch.float32)
    module, query, key, value = problem(dtype, queries=2 if kind == "queries" else 1)
    mask = torch.zeros(BATCH, 1, 1, TOKENS, requires_grad=True) if "mask" in kind else None
    if kind == "two":
        model = adapted("llama")
        peftkit.wrap(model, PREFIX, name="second")
        peftkit.activate(model, "default", "second")
        module = model.model.layers[0].self_attn
    if kind == "eager":
        module.__dict__["config"]._attn_implementation = "eager"
    with torch.no_grad():
        attention.attend(module, query, key, value, mask.detach() if "dtype" in kind else mask, scaling=0.3)
    assert not calls


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's attention under vmap
def test_attend_copies_keys_under_autocast_and_transforms(calls: list[tuple[int, ...]]) -> None:
    module, query, key, value = problem()

    def attended(q: Tensor) -> Tensor:
        out: Tensor = attention.attend(module, q, key, value, None)[0]
        return out

    with torch.no_grad():
        expected = copying(lambda: attended(query))
        with torch.autocast("cpu", torch.bfloat16):
            attended(query)
        torch.testing.assert_close(torch.func.vmap(attended)(query[None])[0], expected)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            assert forward_ad.unpack_dual(attended(forward_ad.make_dual(query, query))).tangent is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.jit, "is_tracing", lambda: True)
            assert torch.equal(attended(query), expected)
        torch.testing.assert_close(torch.compile(attended, backend="eager", fullgraph=True)(query), expected)
        assert not calls
        attended(query)
    assert len(calls) == 1


# Where it pays ------------------------------------------------------------------------------------------------------


def _paying(batch: int, heads: int, tokens: int, dtype: torch.dtype, mask: bool) -> bool:
    query, key = torch.empty(batch, heads, 1, 64, dtype=dtype), torch.empty(batch, 8, tokens, 64, dtype=dtype)
    return attention._pays(20, query, key, torch.ones(batch, 1, 1, tokens, dtype=torch.bool) if mask else None)


def test_keys_are_copied_where_that_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_group_in_one_pass", lambda: FEW)
    # 8 key heads of width 64: 512 elements a key, and 148 keys a row at 128 tokens.
    assert _paying(1, 8, 128, torch.bfloat16, mask=True)
    assert not _paying(1, 8, 100, torch.bfloat16, mask=False)
    assert not _paying(1, 8, 128, torch.float32, mask=False)
    assert _paying(8, 8, 128, torch.float32, mask=False)
    assert _paying(1, 32, 128, torch.bfloat16, mask=False)
    assert not _paying(1, 32, 128, torch.bfloat16, mask=True)
    assert _paying(8, 128, 128, torch.float32, mask=False)
    assert not _paying(8, 136, 128, torch.float32, mask=False)  # 17 queries of a key head


def test_keys_are_copied_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "compiled_for", lambda op, device: True)
    assert attention._group_in_one_pass.__wrapped__() == FEW
    monkeypatch.setattr(Op, "compiled_for", lambda op, device: False)
    monkeypatch.setattr(attention, "_group_in_one_pass", attention._group_in_one_pass.__wrapped__)
    assert not _paying(8, 8, 128, torch.float32, mask=False)
