"""Prefix tuning, prompt tuning and P-tuning against formulas written out, real caches, and Hugging Face peft."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import checkpointed
from torch import Tensor, nn
from transformers import DynamicCache

import peftkit
from peftkit.errors import BackboneError, CheckpointError, ConfigError, TargetError
from peftkit.testing.backbones import BACKBONES, VOCABULARY

LENGTH = 3
PREFIX = peftkit.PrefixTuning(num_virtual_tokens=LENGTH)
PROJECTED = peftkit.PrefixTuning(num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=5)
PROMPT = peftkit.PromptTuning(num_virtual_tokens=LENGTH)
MLP = peftkit.PTuning(num_virtual_tokens=LENGTH, encoder_hidden_size=6)
LSTM = peftkit.PTuning(num_virtual_tokens=LENGTH, encoder_hidden_size=6, encoder_reparameterization_type="LSTM")
CONFIGS = {"prefix": PREFIX, "projected": PROJECTED, "prompt": PROMPT, "mlp": MLP, "lstm": LSTM}
DECODERS = ("llama", "gpt2", "opt")


def adapted(backbone: str, config: Any, seed: int = 0, std: float = 0.5, **kwargs: Any) -> Any:
    """A tiny model with an adapter whose tensors are large enough to be seen."""
    model = peftkit.wrap(BACKBONES[backbone](**kwargs), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".peftkit." in f".{name}." and parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    """Token ids without padding or end marks."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Six new tokens, and the logits that they were chosen by; the tokens alone of tiny models are often all one."""
    chosen = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **chosen
    )
    return found.sequences[:, -6:], torch.stack(found.logits, dim=1)


def output(model: Any, **inputs: Any) -> Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


# Prefix against its formula and against a filled cache --------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_attends_as_written_out_in_float64(implementation: str) -> None:
    model = adapted("llama", PREFIX, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    attention = model.model.layers[1].self_attn
    captured: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        captured.update(kwargs, out=out[0], args=args)

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    output(model, input_ids=tokens())
    handle.remove()

    x = captured["args"][0] if captured["args"] else captured["hidden_states"]
    cos, sin = captured["position_embeddings"]
    batch, length, _ = x.shape
    width = attention.head_dim

    def heads(projection: nn.Module) -> Tensor:
        return projection(x).view(batch, length, -1, width).transpose(1, 2)

    def rotated(t: Tensor) -> Tensor:
        first, second = t.chunk(2, dim=-1)
        return t * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    adapter = attention.peftkit["default"]
    query, key, value = rotated(heads(attention.q_proj)), rotated(heads(attention.k_proj)), heads(attention.v_proj)
    groups = query.shape[1] // key.shape[1]
    expected = torch.empty(batch, length, query.shape[1], width, dtype=torch.float64)
    for b in range(batch):
        for h in range(query.shape[1]):
            part = slice(h // groups * width, (h // groups + 1) * width)
            keys = torch.cat((adapter.prefix_key[:, part], key[b, h // groups]))
            values = torch.cat((adapter.prefix_value[:, part], value[b, h // groups]))
            for i in range(length):
                seen = LENGTH + i + 1
                weights = torch.softmax(keys[:seen] @ query[b, h, i] / math.sqrt(width), dim=0)
                expected[b, i, h] = weights @ values[:seen]
    expected = attention.o_proj(expected.flatten(2))
    tolerance = 1e-12 if implementation == "sdpa" else 1e-6  # eager takes its softmax in float32
    torch.testing.assert_close(captured["out"], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backbone", DECODERS)
@pytest.mark.parametrize("padded", [False, True])
def test_prefix_equals_a_filled_cache(backbone: str, padded: bool) -> None:
    model = adapted(backbone, PREFIX)
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 4:] = 0
    ours = output(model, input_ids=ids, attention_mask=mask)
    pairs = []
    for module in model.modules():
        if "peftkit" in module._modules and "prefix_key" in module._modules["peftkit"]["default"]._parameters:
            adapter = module._modules["peftkit"]["default"]
            width = module.head_dim
            pairs.append(
                tuple(
                    t.detach().view(LENGTH, -1, width).transpose(0, 1)[None].repeat(2, 1, 1, 1)
                    for t in (adapter.prefix_key, adapter.prefix_value)
                )
            )
    assert len(pairs) == model.config.num_hidden_layers
    with peftkit.disabled(model):
        filled = torch.cat((torch.ones(2, LENGTH, dtype=mask.dtype), mask), dim=1)
        cached = output(model, input_ids=ids, attention_mask=filled, past_key_values=DynamicCache(pairs))
    torch.testing.assert_close(ours[mask.bool()], cached[mask.bool()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backbone", ["bert", "roberta", "vit", "bart", "t5"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_changes_every_output_the_same_way_in_both_implementations(backbone: str, implementation: str) -> None:
    model = adapted(backbone, PREFIX)
    inputs = BACKBONES[backbone].inputs(model)
    inputs.pop("labels", None) if backbone not in ("t5", "bart") else None
    first = output(model, **inputs)
    with peftkit.disabled(model):
        assert not torch.allclose(first, output(model, **inputs), atol=1e-4)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(output(model, **inputs), first, rtol=1e-5, atol=1e-5)


def test_prefix_reaches_encoder_and_cross_attention_when_asked() -> None:
    config = peftkit.PrefixTuning(num_virtual_tokens=2, target_modules=("SelfAttention", "EncDecAttention"))
    model = adapted("t5", config)
    planned = peftkit.plan(BACKBONES["t5"](), config)
    kinds = {s.path.rsplit(".", 1)[-1] for s in planned.sites}
    assert kinds == {"SelfAttention", "EncDecAttention"}
    assert any(s.path.startswith("encoder.") for s in planned.sites)
    inputs = BACKBONES["t5"].inputs(model)
    model(**inputs).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_prefix_of_a_part_of_t5_is_refused() -> None:
    with pytest.raises(TargetError, match="share one relative position bias"):
        peftkit.plan(BACKBONES["t5"](), peftkit.PrefixTuning(layers_to_transform=0))


def test_prefix_of_deberta_is_refused_by_name() -> None:
    with pytest.raises(BackboneError, match=r"attention interface.*DebertaV2"):
        peftkit.plan(BACKBONES["deberta"](), PREFIX)


def test_prefix_names_the_way_out_when_the_implementation_takes_no_mask() -> None:
    model = adapted("llama", PREFIX)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(BackboneError, match=r"flex_attention.*set_attn_implementation\('sdpa'\)"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
        )


def test_prefix_says_when_positions_run_out() -> None:
    model = BACKBONES["gpt2"]()
    peftkit.wrap(model, peftkit.PrefixTuning(num_virtual_tokens=model.config.n_positions))
    with pytest.raises(BackboneError, match=r"2 tokens behind a prefix of \d+ need more positions"):
        model(input_ids=tokens(1, 2))


def test_two_prefixes_act_together() -> None:
    for backbone in ("llama", "t5", "gpt2"):
        model = adapted(backbone, PREFIX)
        inputs = BACKBONES[backbone].inputs(model)
        first = output(model, **inputs)
        peftkit.wrap(model, peftkit.PrefixTuning(num_virtual_tokens=2), name="second")
        peftkit.activate(model, "default", "second")
        assert not torch.allclose(first, output(model, **inputs))
        peftkit.activate(model, "default")
        assert torch.equal(first, output(model, **inputs))


def test_projection_gives_each_layer_its_slice() -> None:
    model = adapted("llama", PROJECTED)
    shared = model.peftkit["default"]
    hidden = torch.tanh(shared.embedding @ shared.hidden_weight.T + shared.hidden_bias)
    everything = hidden @ shared.output_weight.T + shared.output_bias
    width = everything.shape[1] // (2 * len(model.model.layers))
    for index, layer in enumerate(model.model.layers):
        key, value = layer.self_attn.peftkit["default"].keys_values()
        torch.testing.assert_close(key, everything[:, 2 * index * width : (2 * index + 1) * width])
        torch.testing.assert_close(value, everything[:, (2 * index + 1) * width : (2 * index + 2) * width])


def test_projection_remembered_in_evaluation_follows_its_tensors() -> None:
    model = adapted("llama", PROJECTED)
    before = output(model, input_ids=tokens())
    with torch.no_grad():
        model.peftkit["default"].output_bias.add_(1)
    after = output(model, input_ids=tokens())
    assert not torch.allclose(before, after)
    model(input_ids=tokens())
    torch.testing.assert_close(model(input_ids=tokens()).logits, after)


# Virtual tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PROMPT, MLP, LSTM], ids=["prompt", "mlp", "lstm"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "opt"])
def test_virtual_tokens_equal_embeddings_given_by_hand(config: Any, backbone: str) -> None:
    model = adapted(backbone, config)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    ours = output(model, input_ids=ids, attention_mask=mask)
    (adapter,) = [m["default"] for n, m in model.named_modules() if n.endswith("peftkit")]
    with torch.no_grad(), peftkit.disabled(model):
        front = adapter.vectors().expand(2, -1, -1)
        embedded = torch.cat((front, model.get_input_embeddings()(ids)), dim=1)
        filled = torch.cat((torch.ones(2, LENGTH, dtype=mask.dtype), mask), dim=1)
        expected = output(model, inputs_embeds=embedded, attention_mask=filled)
    torch.testing.assert_close(ours[mask.bool()], expected[:, LENGTH:][mask.bool()], rtol=0, atol=1e-6)
    assert ours.shape == (*ids.shape, VOCABULARY)


def test_virtual_tokens_leave_hidden_states_losses_and_tuples_as_long_as_the_input() -> None:
    model = adapted("llama", PROMPT)
    model.set_attn_implementation("eager")
    ids = tokens()
    found = model(input_ids=ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert {tuple(h.shape[:2]) for h in found.hidden_states} == {tuple(ids.shape)}
    assert {a.shape[2] for a in found.attentions} == {ids.shape[1]}
    logits = found.logits[:, :-1].reshape(-1, VOCABULARY)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(logits, ids[:, 1:].reshape(-1)))
    plain = model(input_ids=ids, return_dict=False)
    assert isinstance(plain, tuple)
    torch.testing.assert_close(plain[0], found.logits)


def test_virtual_tokens_are_seen_by_a_decoder_behind_an_encoder() -> None:
    for backbone in ("t5", "bart"):
        model = adapted(backbone, PROMPT)
        inputs = BACKBONES[backbone].inputs(model)
        with torch.no_grad():
            states = model(**inputs).encoder_last_hidden_state
        assert states.shape[1] == inputs["input_ids"].shape[1] + LENGTH
        moved = states.clone()
        moved[:, :LENGTH] += 1
        with torch.no_grad():
            first = model(encoder_outputs=(states,), **{k: v for k, v in inputs.items() if k != "input_ids"}).logits
            second = model(encoder_outputs=(moved,), **{k: v for k, v in inputs.items() if k != "input_ids"}).logits
        torch.testing.assert_close(first, output(model, **inputs), rtol=0, atol=1e-6)
        assert not torch.allclose(first, second, atol=1e-4)


def test_virtual_tokens_keep_padding_positions_of_roberta() -> None:
    model = adapted("roberta", PROMPT)
    ids = tokens(1, 5)
    pad = model.config.pad_token_id
    whole = torch.ones_like(ids)
    left = torch.cat((torch.full((1, 2), pad), ids), dim=1)
    right = torch.cat((ids, torch.full((1, 2), pad)), dim=1)
    none, some = torch.zeros(1, 2, dtype=torch.long), whole
    expected = output(model, input_ids=ids, attention_mask=whole)
    for row, mask in ((left, torch.cat((none, some), 1)), (right, torch.cat((some, none), 1))):
        found = output(model, input_ids=row, attention_mask=mask)[mask.bool()]
        # Sums of other lengths are taken in another order.
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)


def test_virtual_tokens_refuse_images_and_masks_by_pair() -> None:
    with pytest.raises(BackboneError, match="input_ids"):
        peftkit.plan(BACKBONES["vit"](), PROMPT)
    model = adapted("llama", PROMPT)
    with pytest.raises(BackboneError, match=r"\(batch, tokens\)"):
        model(input_ids=tokens(), attention_mask=torch.zeros(2, 1, 6, 6))


class _Tokenizer:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + len(word) for word in text.split()]}


def test_prompt_starts_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    table = BACKBONES["llama"]().get_input_embeddings().weight
    model = peftkit.wrap(BACKBONES["llama"](), peftkit.PromptTuning(num_virtual_tokens=4))
    rows = model.model.peftkit["default"].prompt
    assert all(any(torch.equal(row, known) for known in table) for row in rows)
    model = peftkit.wrap(
        BACKBONES["llama"](), peftkit.PromptTuning(num_virtual_tokens=400, prompt_tuning_init="RANDOM")
    )
    torch.testing.assert_close(model.model.peftkit["default"].prompt.std(), table.std(), rtol=0.1, atol=0)

    from transformers import AutoTokenizer

    asked: dict[str, Any] = {}

    def stand_in(name: str, **options: Any) -> _Tokenizer:
        asked.update(options, name=name)
        return _Tokenizer()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stand_in)
    config = peftkit.PromptTuning(
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="is it good",
        tokenizer_name_or_path="somewhere",
        tokenizer_kwargs={"trust_remote_code": True, "use_fast": False},
    )
    model = peftkit.wrap(BACKBONES["llama"](), config)
    assert asked == {"name": "somewhere", "use_fast": False}
    assert torch.equal(model.model.peftkit["default"].prompt, table[[7, 7, 9, 7, 7]])


def test_text_start_needs_no_tokenizer_when_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: _Tokenizer())
    config = peftkit.PromptTuning(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a b", tokenizer_name_or_path="x"
    )
    model = peftkit.wrap(BACKBONES["llama"](), config)
    peftkit.save(model, tmp_path)

    def refuse(name: str, **options: Any) -> None:
        raise AssertionError("a tokenizer was loaded")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    loaded = peftkit.load(BACKBONES["llama"](), tmp_path)
    assert torch.equal(output(loaded, input_ids=tokens()), output(model, input_ids=tokens()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: peftkit.PrefixTuning(num_virtual_tokens=0),
        lambda: peftkit.PromptTuning(num_virtual_tokens=0),
        lambda: peftkit.PromptTuning(prompt_tuning_init="TEXT"),
        lambda: peftkit.PromptTuning(prompt_tuning_init_text="left over"),
        lambda: peftkit.PromptTuning(target_modules=("q_proj",)),
        lambda: peftkit.PTuning(encoder_dropout=1.0),
        lambda: peftkit.PTuning(encoder_reparameterization_type="GRU"),  # type: ignore[arg-type]
        lambda: peftkit.PTuning(encoder_num_layers=0),
    ],
)
def test_configs_refuse_what_cannot_be_meant(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


# What every one of them has to stand --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", ["llama", "bert", "t5"])
def test_every_declared_parameter_gets_a_gradient(name: str, backbone: str) -> None:
    model = adapted(backbone, CONFIGS[name])
    planned = peftkit.plan(BACKBONES[backbone](), CONFIGS[name])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == planned.trainable
    model(**BACKBONES[backbone].inputs(model)).loss.backward()
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_adapter_trains_nothing(name: str) -> None:
    model = peftkit.wrap(BACKBONES["llama"](), CONFIGS[name], trainable=False)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradients(name: str, backbone: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(backbone, CONFIGS[name]).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        if checkpointing:
            checkpointed(model)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", [*DECODERS, "t5", "bart"])
def test_generation_is_the_same_with_and_without_a_cache(name: str, backbone: str) -> None:
    model = adapted(backbone, CONFIGS[name])
    found, logits = generated(model, tokens(), use_cache=True)
    again, expected = generated(model, tokens(), use_cache=False)
    assert torch.equal(found, again)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with peftkit.disabled(model):
        assert not torch.allclose(logits[:, 0], generated(model, tokens())[1][:, 0], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", DECODERS)
def test_generation_of_a_padded_row_equals_that_of_the_row_alone(name: str, backbone: str) -> None:
    model = adapted(backbone, CONFIGS[name])
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    found, logits = generated(model, ids, mask)
    alone, expected = generated(model, ids[1:, 2:])
    assert torch.equal(found[1:], alone)
    torch.testing.assert_close(logits[1:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_prefix_generates_with_a_static_cache_and_with_beams(backbone: str) -> None:
    model = adapted(backbone, PREFIX)
    expected = generated(model, tokens())[1]
    static = generated(model, tokens(), cache_implementation="static", disable_compile=True)[1]
    torch.testing.assert_close(static, expected, rtol=1e-5, atol=1e-5)
    beams = generated(model, tokens(), num_beams=3)[1]
    torch.testing.assert_close(beams, generated(model, tokens(), num_beams=3, use_cache=False)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_and_pickles_compute_the_same_and_share_nothing(name: str) -> None:
    model = adapted("t5", CONFIGS[name])
    inputs = BACKBONES["t5"].inputs(model)
    expected = output(model, **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, **inputs), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        assert not torch.allclose(output(twin, **inputs), expected)
        assert torch.equal(output(model, **inputs), expected)


@pytest.mark.parametrize("config", [PREFIX, PROJECTED], ids=["prefix", "projected"])
def test_prefixed_layer_compiles_without_graph_breaks(config: Any) -> None:
    model = adapted("llama", config)
    layer = model.model.layers[0]
    x = torch.randn(2, 6, 32)
    angles = model.model.rotary_emb(x, position_ids=torch.arange(6)[None])
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for given in (x, x[:, :1]):
        cut = tuple(a[:, : given.shape[1]] for a in angles)
        torch.testing.assert_close(
            compiled(given, position_embeddings=cut), layer(given, position_embeddings=cut), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_base_keeps_its_dtype(name: str) -> None:
    model = adapted("llama", CONFIGS[name], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert output(model, input_ids=tokens()).dtype == torch.bfloat16


# Hugging Face peft, both ways ---------------------------------------------------------------------------------------

FAMILIES = ("llama", "gpt2", "bert", "t5", "roberta", "bart", "opt")


def _peft_config(name: str, task: str) -> Any:
    import peft

    common = {"task_type": task, "num_virtual_tokens": LENGTH}
    if name == "prefix":
        return peft.PrefixTuningConfig(**common)
    if name == "projected":
        return peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=5)
    if name == "prompt":
        return peft.PromptTuningConfig(**common)
    kind = name.upper()
    return peft.PromptEncoderConfig(**common, encoder_hidden_size=6, encoder_reparameterization_type=kind)


def _same(theirs: Tensor, ours: Tensor) -> None:
    """Equal to 1e-6 where both have an output: peft gives the virtual positions, too."""
    if theirs.dim() == 3:
        theirs = theirs[:, theirs.shape[1] - ours.shape[1] :]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _inputs(backbone: str, model: Any) -> dict[str, Tensor]:
    ids = tokens()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "labels": tokens(seed=1)} if backbone in ("t5", "bart") else given


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_folder_of_peft_loads_and_computes_the_same(name: str, backbone: str, tmp_path: Path) -> None:
    import peft

    from peftkit import backbones

    make = BACKBONES[backbone]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), _peft_config(name, str(backbones.task_type(make()))))
        theirs.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    ours = peftkit.load(make(), tmp_path)
    inputs = _inputs(backbone, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _same(output(theirs, **inputs), output(ours, **inputs))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_folder_of_peftkit_loads_in_peft_and_computes_the_same(name: str, backbone: str, tmp_path: Path) -> None:
    import peft

    ours = adapted(backbone, CONFIGS[name])
    peftkit.save(ours, tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(BACKBONES[backbone](), str(tmp_path / "one")).eval()
        inputs = _inputs(backbone, ours)
        _same(output(theirs, **inputs), output(ours, **inputs))
    again = peftkit.load(BACKBONES[backbone](), tmp_path / "one")
    torch.testing.assert_close(output(again, **inputs), output(ours, **inputs), rtol=0, atol=1e-6)
    peftkit.save(again, tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DebertaV2"])
def test_classifier_by_position_0_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    import peft
    import transformers

    config = getattr(transformers, kind + "Config")(
        vocab_size=VOCABULARY,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    base = getattr(transformers, kind + "ForSequenceClassification")(config).eval()
    ours = peftkit.wrap(copy.deepcopy(base), PROMPT)
    peftkit.save(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = tokens()
    _same(output(theirs, input_ids=ids, attention_mask=torch.ones_like(ids)), output(ours, input_ids=ids))


def test_peft_shares_halves_of_an_encoder_decoders_prefix(tmp_path: Path) -> None:
    """What a folder of peft means for T5: layer l has the parts 4 l and 4 l + 1 modulo 2 L of one tensor."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
        peft.get_peft_model(BACKBONES["t5"](), config).save_pretrained(tmp_path)
    parts = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].chunk(4, dim=1)
    model = peftkit.load(BACKBONES["t5"](), tmp_path)
    for block in model.decoder.block:
        adapter = block.layer[0].SelfAttention.peftkit["default"]
        assert torch.equal(adapter.prefix_key, parts[0])
        assert torch.equal(adapter.prefix_value, parts[1])


def test_rows_that_peft_never_reads_are_kept(tmp_path: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
        peft.get_peft_model(BACKBONES["t5"](), config).save_pretrained(tmp_path / "peft")
    model = peftkit.load(BACKBONES["t5"](), tmp_path / "peft")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == LENGTH * model.config.d_model
    peftkit.save(model, tmp_path / "ours")
    first = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    second = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])


def test_folder_has_pefts_keys_and_fields(tmp_path: Path) -> None:
    expected = {
        "prefix": ("PREFIX_TUNING", {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2}),
        "prompt": ("PROMPT_TUNING", {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}),
        "mlp": ("P_TUNING", {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}),
    }
    for name, (kind, fields) in expected.items():
        peftkit.save(adapted("llama", CONFIGS[name]), tmp_path / name)
        assert set(load_file(tmp_path / name / "adapter_model.safetensors")) == {"prompt_embeddings"}
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert written["peft_type"] == kind
        assert written["task_type"] == "CAUSAL_LM"
        assert written["inference_mode"] is True
        assert written["num_transformer_submodules"] == 1
        assert {k: written[k] for k in fields} == fields
        assert "target_modules" not in written


def test_prefix_in_places_that_peft_lacks_is_saved_and_loaded(tmp_path: Path) -> None:
    for backbone, fields in (
        ("t5", {"target_modules": ("SelfAttention", "EncDecAttention")}),
        ("llama", {"layers_to_transform": 1}),
    ):
        model = adapted(backbone, peftkit.PrefixTuning(num_virtual_tokens=2, **fields))
        inputs = BACKBONES[backbone].inputs(model)
        peftkit.save(model, tmp_path / backbone)
        again = peftkit.load(BACKBONES[backbone](), tmp_path / backbone)
        assert torch.equal(output(again, **inputs), output(model, **inputs))


def test_folder_for_another_depth_is_refused(tmp_path: Path) -> None:
    peftkit.save(adapted("llama", PREFIX), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_layers": 2', '"num_layers": 5'))
    with pytest.raises(CheckpointError, match=r"5 layers.*has 2"):
        peftkit.load(BACKBONES["llama"](), tmp_path)
