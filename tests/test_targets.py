"""Which modules a config selects, in every form, and what is said when it selects nothing."""

from __future__ import annotations

import pytest
from tiny import built

import peftkit
from peftkit import backbones, targets
from peftkit.errors import BackboneError, ConfigError, PeftkitError, TargetError

ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"]
FEED_FORWARD = [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]


def selected(name="llama", method=peftkit.LoRA, **fields):
    return [site.path for site in peftkit.plan(built(name), method(**fields)).sites]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [p for p in ATTENTION if p[-6:] in ("q_proj", "v_proj")]),
        ({"target_modules": ["q_proj"]}, [ATTENTION[0], ATTENTION[4]]),
        ({"target_modules": ["self_attn.q_proj", "up_proj"]}, [*ATTENTION[::4], *FEED_FORWARD[1::3]]),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, [FEED_FORWARD[4]]),
        ({"target_modules": r".*\.0\..*\.(q|k)_proj"}, ATTENTION[:2]),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, [*ATTENTION[4:], *FEED_FORWARD[3:]]),
        ({"target_modules": "all-linear", "layers_to_transform": [0, 1], "exclude_modules": r".*mlp.*"}, ATTENTION),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, FEED_FORWARD),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
        ({"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["lm_head"]}, [ATTENTION[0], ATTENTION[4]]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [ATTENTION[4], ATTENTION[6]]),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, [ATTENTION[4], ATTENTION[6]]),
        ({"target_modules": ["embed_tokens"]}, ["model.embed_tokens"]),
    ],
)  # fmt: skip
def test_target_forms_select_exactly_these_modules(fields, expected):
    assert sorted(selected(**fields)) == sorted(expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "deberta", "vit", "t5", "bart", "mlp"])
def test_all_linear_takes_every_projection_but_the_heads(name):
    model = built(name)
    paths = set(selected(name, target_modules="all-linear"))
    skipped = {backbones.output_head(model), *backbones.head_names(model)} - {None}
    for path, module in model.named_modules():
        projection = targets.is_weight_module(module)
        head = any(path == s or path.startswith(f"{s}.") for s in skipped)
        assert (path in paths) == (projection and not head), path
    if name in ("llama", "gpt2", "t5", "bart"):
        assert "lm_head" in skipped


def test_part_of_a_name_is_no_suffix():
    with pytest.raises(TargetError, match="target_modules: 'proj' matches no module"):
        selected(target_modules=["proj"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj' matches no module; did you mean 'v_proj'"),
        ({"target_modules": ["q_proj", "layers.2.self_attn.q_proj"]}, "'layers.2.self_attn.q_proj' matches no module"),
        ({"target_modules": "nothing.*"}, "target_modules: 'nothing.*' matches no module"),
        ({"target_modules": "("}, "target_modules='(' is not a regular expression"),
        ({"target_modules": []}, "leave no projection to adapt"),
        ({"target_modules": ["mlp"]}, "target_modules selects model.layers.0.mlp (LlamaMLP); name the"),
        ({"exclude_modules": ["v_porj"]}, "exclude_modules: 'v_porj' matches no module; did you mean 'v_proj'"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "leave no projection to adapt"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: no target in layer 7; layers with targets: [0, 1]"),
        ({"layers_to_transform": -1}, "layers_to_transform: no target in layer -1"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "no target in layer 0; layers with targets: []"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module; did you mean 'lm_head'"),
        ({"modules_to_save": ["lm_head", "x"]}, "modules_to_save: 'x' matches no module"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: 'q_porj' matches no target; did you mean 'q_proj'"),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern: 'up_proj' matches no target"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is not a regular expression"),
        ({"alpha_pattern": {"q_porj": 2}}, "alpha_pattern: 'q_porj' matches no target; did you mean 'q_proj'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "leave no projection to adapt"),
    ],
)  # fmt: skip
def test_pattern_that_selects_nothing_is_named(fields, message):
    with pytest.raises(PeftkitError) as caught:
        selected(**fields)
    assert message in str(caught.value)


def test_rank_below_one_in_a_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"rank_pattern: the rank of 'q_proj' must be at least 1, found 0"):
        selected(rank_pattern={"q_proj": 0})


def test_pattern_matches_the_end_of_a_path_and_the_first_one_wins():
    assert targets.pattern_match("q_proj", "model.layers.0.self_attn.q_proj")
    assert targets.pattern_match(r"layers\.(0|2)\..*", "model.layers.0.mlp.up_proj")
    assert not targets.pattern_match("proj", "model.layers.0.self_attn.q_proj")
    assert not targets.pattern_match("q_proj", "q_proj.more")
    assert targets.from_pattern({"q_proj": 2, ".*q_proj": 3}, "a.q_proj", 9) == 2
    assert targets.from_pattern(None, "a.q_proj", 9) == 9


def test_default_on_an_unknown_architecture_is_every_linear_and_says_so():
    planned = peftkit.plan(built("mlp"), peftkit.LoRA())
    assert [s.path for s in planned.sites] == ["first", "second", "out"]
    assert planned.notes[0] == "no slots are known for Perceptron: every Linear but the output head is a target"


def test_default_that_the_architecture_lacks_is_refused():
    with pytest.raises((BackboneError, TargetError)):
        peftkit.plan(built("mlp"), peftkit.PrefixTuning())


def test_modules_inside_an_adapter_are_no_targets():
    model = peftkit.wrap(built("llama"), peftkit.LoRA(target_modules="all-linear"))
    again = peftkit.plan(model, peftkit.LoRA(target_modules="all-linear"))
    assert len(again.sites) == 14
    with pytest.raises(TargetError, match="matches no module"):
        peftkit.plan(model, peftkit.LoRA(target_modules=["default"]))


def test_shortest_suffixes_select_exactly_the_paths():
    model = built("llama")
    every = [path for path, _ in targets.modules(model)]
    for chosen in (ATTENTION, ATTENTION[:1], FEED_FORWARD[2:4], [ATTENTION[0], ATTENTION[5], "lm_head"]):
        suffixes = targets.shortest_suffixes(chosen, every)
        assert {path for path in every if targets.matches(path, suffixes)} == set(chosen)
    assert targets.shortest_suffixes([ATTENTION[0], ATTENTION[4]], every) == ("q_proj",)
