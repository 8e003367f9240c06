"""What peftkit knows about architectures, checked on tiny random models by shape and by the order of their calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peftkit import backbones
from peftkit.errors import BackboneError
from peftkit.spec import is_weight_module

HIDDEN, INNER, VOCABULARY, LAYERS = 24, 40, 32, 2
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
DEBERTA = {
    **COMMON,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_hidden_size": HIDDEN,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    **{k: v for k, v in COMMON.items() if k.startswith(("hidden", "inter", "num"))},
    "image_size": 8,
    "patch_size": 4,
}

# name -> (model type, stem of the class names, fields)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "Bert", COMMON),
    "roberta": ("roberta", "Roberta", COMMON),
    "xlm-roberta": ("xlm-roberta", "XLMRoberta", COMMON),
    "camembert": ("camembert", "Camembert", COMMON),
    "electra": ("electra", "Electra", {**COMMON, "embedding_size": 16}),
    "deberta-v2": ("deberta-v2", "DebertaV2", DEBERTA),
    "vit": ("vit", "ViT", VIT),
    "gpt2": ("gpt2", "GPT2", GPT2),
    "llama": ("llama", "Llama", COMMON),
    "mistral": ("mistral", "Mistral", GROUPED),
    "qwen2": ("qwen2", "Qwen2", GROUPED),
    "qwen3": ("qwen3", "Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": ("gemma", "Gemma", {**GROUPED, "head_dim": 8}),
    "smollm3": ("smollm3", "SmolLM3", GROUPED),
    "t5": ("t5", "T5", {**T5, "feed_forward_proj": "relu"}),
    "t5-gated": ("t5", "T5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", "Bart", BART),
    "opt": ("opt", "OPT", OPT),
    "opt-post-norm": ("opt", "OPT", {**OPT, "do_layer_norm_before": False}),
}
TWO_STACKS = ("t5", "t5-gated", "bart")
each = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name: str, kind: str = "Model", **more: Any) -> nn.Module:
    _, stem, fields = ARCHITECTURES[name]
    config = getattr(transformers, f"{stem}Config")(**fields, **more)
    return getattr(transformers, f"{stem}{kind}")(config).eval()  # type: ignore[no-any-return]


def run(name: str, model: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        if name == "vit":
            model(pixel_values=torch.randn(1, 3, 8, 8))
        elif name in TWO_STACKS:
            model(input_ids=ids, decoder_input_ids=ids)
        else:
            model(input_ids=ids)


def paths(model: nn.Module, slot: str) -> list[str]:
    return backbones.slot_paths(model, slot)


def shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a projection, whichever way its weight is stored."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)  # type: ignore[return-value]


def attentions(name: str) -> int:
    """How many attention modules the whole model has."""
    return 3 * LAYERS if name in TWO_STACKS else LAYERS


def feed_forwards(name: str) -> int:
    return 2 * LAYERS if name in TWO_STACKS else LAYERS


def test_every_family_of_the_table_is_built_here() -> None:
    assert {kind for kind, _, _ in ARCHITECTURES.values()} == set(backbones.FAMILIES)


@each
def test_slots_have_the_shapes_of_their_roles(name: str) -> None:
    model = build(name)
    assert backbones.model_type(model) == ARCHITECTURES[name][0]
    modules = dict(model.named_modules())
    heads = backbones.attention_shape(model)
    query, key = heads.heads * heads.head_dim, heads.key_value_heads * heads.head_dim
    fused = name == "gpt2"
    wanted = {
        "attention.query": (HIDDEN, 3 * HIDDEN if fused else query),
        "attention.key": (HIDDEN, 3 * HIDDEN if fused else key),
        "attention.value": (HIDDEN, 3 * HIDDEN if fused else key),
        "attention.output": (query, HIDDEN),
        "ffn.up": (HIDDEN, INNER),
        "ffn.gate": (HIDDEN, INNER),
        "ffn.down": (INNER, HIDDEN),
    }
    gated = name in ("t5-gated", "llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")
    for slot, sizes in wanted.items():
        found = paths(model, slot)
        count = attentions(name) if slot.startswith("attention") else feed_forwards(name)
        assert len(found) == (count if slot != "ffn.gate" or gated else 0), (slot, found)
        assert len(set(found)) == len(found)
        for path in found:
            assert is_weight_module(modules[path]), path
            assert shape(modules[path]) == sizes, path
    assert len(paths(model, "attention")) == attentions(name)
    for slot in ("norm", "attention.norm", "ffn.norm"):
        for path in paths(model, slot):
            assert modules[path].weight.shape == (HIDDEN,), path


@each
def test_no_projection_of_a_block_is_without_a_slot(name: str) -> None:
    model = build(name)
    held = {p for slot in backbones.FAMILIES[backbones.model_type(model)].slots for p in paths(model, slot)}
    inside = [block + "." for block, _ in backbones.blocks(model)]
    for path, module in model.named_modules():
        if path.startswith(tuple(inside)) and is_weight_module(module):
            assert path in held, path


@each
def test_norm_slots_cover_the_norms_of_every_block(name: str) -> None:
    model = build(name)
    inside = tuple(block + "." for block, _ in backbones.blocks(model))
    norms = [
        path
        for path, module in model.named_modules()
        if path.startswith(inside) and "norm" in type(module).__name__.lower() and module.weight.shape == (HIDDEN,)  # type: ignore[union-attr]
    ]
    assert paths(model, "norm") == norms
    assert sorted(paths(model, "attention.norm") + paths(model, "ffn.norm")) == sorted(norms)


@each
def test_slots_run_in_the_order_of_their_roles(name: str) -> None:
    model = build(name)
    roles: dict[str, str] = {}
    for slot in ("attention.query", "attention.output", "ffn.up", "ffn.down", "attention.norm", "ffn.norm"):
        roles.update(dict.fromkeys(paths(model, slot), slot))
    calls: list[str] = []
    for path, module in model.named_modules():
        if path in roles:
            module.register_forward_hook(lambda module, args, out, role=roles[path]: calls.append(role))
    run(name, model)
    attention, feed = ["attention.query", "attention.output"], ["ffn.up", "ffn.down"]
    if backbones.post_norm(model):
        attention, feed = [*attention, "attention.norm"], [*feed, "ffn.norm"]
    else:
        attention, feed = ["attention.norm", *attention], ["ffn.norm", *feed]
    expected = (attention + feed) * LAYERS
    if name in TWO_STACKS:
        expected += (2 * attention + feed) * LAYERS
    assert calls == expected


@pytest.mark.parametrize(
    ("name", "post"),
    [("bert", True), ("bart", True), ("opt-post-norm", True), ("opt", False), ("llama", False), ("t5", False)],
)
def test_post_norm_says_where_the_norm_stands(name: str, post: bool) -> None:
    assert backbones.post_norm(build(name)) is post


def test_post_norm_is_false_for_an_unknown_architecture() -> None:
    assert not backbones.post_norm(nn.Linear(2, 2))


@each
def test_ffn_slot_spans_the_feed_forward_where_it_is_a_module(name: str) -> None:
    model = build(name)
    seen: dict[str, tuple[Any, Any]] = {}
    found = paths(model, "ffn")
    for path in found:

        def hook(module: nn.Module, args: Any, out: Any, path: str = path) -> None:
            seen[path] = (args[0].shape, out.shape)

        model.get_submodule(path).register_forward_hook(hook)
    run(name, model)
    assert len(found) in (0, feed_forwards(name))
    assert set(seen) == set(found)
    for inside, out in seen.values():
        assert inside == out
        assert inside[-1] == HIDDEN
    ups, downs = paths(model, "ffn.up"), paths(model, "ffn.down")
    for path, up, down in zip(found, ups, downs, strict=False):
        assert up.startswith(path + ".")
        assert down.startswith(path + ".")


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "deberta-v2"])
def test_residual_slots_add_their_second_argument(name: str) -> None:
    model = build(name)
    seen: dict[str, Any] = {}
    places = {"attention.residual": "attention.norm", "ffn.residual": "ffn.norm"}
    for residual, norm in places.items():
        for path, inner in zip(paths(model, residual), paths(model, norm), strict=True):
            assert inner.startswith(path + ".")
            model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path: seen.update({path: args[1]})
            )
            dense, total = model.get_submodule(path).dense, model.get_submodule(inner)
            dense.register_forward_hook(lambda m, a, out, path=path: seen.update({path + "!": out}))
            total.register_forward_pre_hook(lambda m, args, path=path: seen.update({path + "+": args[0]}))
    run(name, model)
    assert len(seen) == 3 * 2 * LAYERS
    for path in [p for slot in places for p in paths(model, slot)]:
        torch.testing.assert_close(seen[path + "+"], seen[path] + seen[path + "!"])


@each
def test_blocks_are_found_in_order_of_the_layers(name: str) -> None:
    model = build(name)
    found = backbones.blocks(model)
    assert [path for path, _ in found] == paths(model, "block")
    assert [backbones.layer_index(path) for path, _ in found] == list(range(LAYERS)) * (2 if name in TWO_STACKS else 1)
    assert all(model.get_submodule(path) is block for path, block in found)


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("bert.encoder.layer.11.output.dense", 11),
        ("transformer.h.0.attn.c_attn", 0),
        ("decoder.block.1.layer.2.DenseReluDense.wo", 1),
        ("model.decoder.layers.4.fc1", 4),
        ("vit.layers.2", 2),
        ("features.6.conv", 6),
        ("lm_head", None),
        ("classifier.dense", None),
        ("", None),
    ],
)
def test_layer_index_reads_the_block(path: str, index: int | None) -> None:
    assert backbones.layer_index(path) == index


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("bert", "ForSequenceClassification", ("classifier",)),
        ("bert", "ForTokenClassification", ("classifier",)),
        ("bert", "ForQuestionAnswering", ("qa_outputs",)),
        ("bert", "ForMultipleChoice", ("classifier",)),
        ("bert", "ForMaskedLM", ()),
        ("bert", "Model", ()),
        ("roberta", "ForSequenceClassification", ("classifier",)),
        ("electra", "ForSequenceClassification", ("classifier",)),
        ("electra", "ForMultipleChoice", ("sequence_summary", "classifier")),
        ("deberta-v2", "ForSequenceClassification", ("pooler", "classifier")),
        ("deberta-v2", "ForTokenClassification", ("classifier",)),
        ("vit", "ForImageClassification", ("classifier",)),
        ("gpt2", "ForSequenceClassification", ("score",)),
        ("gpt2", "ForTokenClassification", ("classifier",)),
        ("gpt2", "LMHeadModel", ()),
        ("llama", "ForSequenceClassification", ("score",)),
        ("llama", "ForTokenClassification", ("score",)),
        ("llama", "ForQuestionAnswering", ("qa_outputs",)),
        ("llama", "ForCausalLM", ()),
        ("t5", "ForSequenceClassification", ("classification_head",)),
        ("t5", "ForTokenClassification", ("classifier",)),
        ("t5", "ForQuestionAnswering", ("qa_outputs",)),
        ("bart", "ForSequenceClassification", ("classification_head",)),
        ("bart", "ForConditionalGeneration", ()),
        ("opt", "ForSequenceClassification", ("score",)),
    ],
)
def test_head_names_are_the_modules_that_start_untrained(name: str, kind: str, heads: tuple[str, ...]) -> None:
    model = build(name, kind)
    assert backbones.head_names(model) == heads
    linear = list(backbones.linear_paths(model))
    assert linear
    assert not any(path.split(".")[0] in heads for path in linear)


@pytest.mark.parametrize(
    ("name", "kind", "head"),
    [
        ("llama", "ForCausalLM", "lm_head"),
        ("gpt2", "LMHeadModel", "lm_head"),
        ("opt", "ForCausalLM", "lm_head"),
        ("t5", "ForConditionalGeneration", "lm_head"),
        ("bart", "ForConditionalGeneration", "lm_head"),
        ("bert", "ForMaskedLM", "cls.predictions.decoder"),
        ("roberta", "ForMaskedLM", "lm_head.decoder"),
        ("llama", "ForSequenceClassification", None),
        ("vit", "Model", None),
    ],
)
def test_output_head_is_the_language_model_head(name: str, kind: str, head: str | None) -> None:
    model = build(name, kind)
    assert backbones.output_head(model) == head
    assert head not in list(backbones.linear_paths(model))


@pytest.mark.parametrize(
    ("name", "kind", "groups"),
    [
        ("gpt2", "LMHeadModel", [["transformer.wte.weight", "lm_head.weight"]]),
        (
            "bart",
            "ForConditionalGeneration",
            [
                [
                    "model.shared.weight",
                    "model.encoder.embed_tokens.weight",
                    "model.decoder.embed_tokens.weight",
                    "lm_head.weight",
                ]
            ],
        ),
        ("llama", "ForCausalLM", []),
        ("vit", "ForImageClassification", []),
    ],
)
def test_tied_lists_the_parameters_that_modules_share(name: str, kind: str, groups: list[list[str]]) -> None:
    assert backbones.tied(build(name, kind)) == {names[0]: names for names in groups}


def test_tied_finds_embeddings_that_the_config_ties() -> None:
    model = build("llama", "ForCausalLM", tie_word_embeddings=True)
    assert backbones.tied(model) == {"model.embed_tokens.weight": ["model.embed_tokens.weight", "lm_head.weight"]}


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("llama", "ForCausalLM", ["model"]),
        ("llama", "Model", [""]),
        ("gpt2", "LMHeadModel", ["transformer"]),
        ("bert", "ForSequenceClassification", ["bert"]),
        ("bart", "ForConditionalGeneration", ["model.encoder", "model.decoder"]),
        ("t5", "ForConditionalGeneration", ["encoder", "decoder"]),
        ("t5", "EncoderModel", ["encoder"]),
        ("opt", "ForCausalLM", ["model.decoder"]),
    ],
)
def test_stacks_are_those_that_take_token_ids(name: str, kind: str, found: list[str]) -> None:
    model = build(name, kind)
    if kind == "EncoderModel":
        assert [path for path, _ in backbones.stacks(model)] in ([""], found)
    else:
        assert [path for path, _ in backbones.stacks(model)] == found


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bert", (4, 4, 6)),
        ("mistral", (4, 2, 6)),
        ("qwen3", (4, 2, 8)),
        ("t5", (4, 4, 8)),
        ("bart", (4, 4, 6)),
        ("gpt2", (4, 4, 6)),
        ("vit", (4, 4, 6)),
    ],
)
def test_attention_shape_reads_the_config(name: str, sizes: tuple[int, int, int]) -> None:
    found = backbones.attention_shape(build(name))
    assert (found.heads, found.key_value_heads, found.head_dim) == sizes
    assert (found.layers, found.hidden) == (LAYERS, HIDDEN)


@pytest.mark.parametrize(
    ("name", "kind", "causal"),
    [
        ("llama", "ForCausalLM", True),
        ("gpt2", "LMHeadModel", True),
        ("opt", "ForCausalLM", True),
        ("llama", "ForTokenClassification", False),
        ("t5", "ForConditionalGeneration", False),
        ("bert", "ForMaskedLM", False),
    ],
)
def test_causal_language_models_are_recognised(name: str, kind: str, causal: bool) -> None:
    assert backbones.is_causal_lm(build(name, kind)) is causal


def test_unknown_architecture_is_refused_by_name() -> None:
    model = transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
        )
    )
    assert backbones.family(model) is None
    for call in (backbones.blocks, lambda m: backbones.slot_paths(m, "ffn.down")):
        with pytest.raises(BackboneError, match=r"no slots are known for GPTNeoXModel \(model_type 'gpt_neox'\)"):
            call(model)
    assert list(backbones.linear_paths(model))


def test_a_plain_module_has_neither_stacks_nor_attention() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert backbones.model_type(model) == ""
    assert list(backbones.linear_paths(model)) == ["0"]
    assert backbones.head_names(model) == ()
    assert backbones.output_head(model) is None
    with pytest.raises(BackboneError, match="Sequential is not a transformers model"):
        backbones.stacks(model)
    with pytest.raises(BackboneError, match="Sequential has no transformers config"):
        backbones.attention_shape(model)


def test_a_slot_that_no_block_has_is_empty() -> None:
    assert backbones.slot_paths(build("gpt2"), "ffn.gate") == []
    assert backbones.slot_paths(build("llama"), "no.such.slot") == []
