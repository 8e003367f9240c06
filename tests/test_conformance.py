"""Every method against every law that its declarations call for, on tiny backbones.

The cheap laws run on every backbone, the others on two fixed ones and a third that depends on method and law;
`pytest --all-backbones` runs everything on everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest

import peftkit
from peftkit.testing import BACKBONES, Check, Refused, checks

SMALL: dict[str, dict[str, Any]] = {
    "oft": {"oft_block_size": 8},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
    "ptuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "vera": {"r": 16},
}
"""What a method's default config needs to fit models of width 32."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "rslora": {"use_rslora": True, "lora_alpha": 16},
        "dora": {"use_dora": True, "r": 4},
        "bias": {"lora_bias": True, "target_modules": ("first", "out"), "r": 4},
        "gaussian": {"init_lora_weights": "gaussian"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "pissa": {"init_lora_weights": "pissa", "r": 3},
        "olora": {"init_lora_weights": "olora", "r": 3},
        "all-linear": {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.2},
        "patterns": {"target_modules": "all-linear", "rank_pattern": {r".*\.0\..*": 3}, "alpha_pattern": {".*": 5.0}},
    },
    "loreft": {"all": {"positions": "all"}},
}
"""Further configs worth checking, by method and label."""

ONLY_ON = {"lora[bias]": ("mlp",)}
"""Configs that name modules of certain backbones."""

REFUSED: dict[str, set[str]] = {
    "bitfit": {"llama", "mistral", "t5"},
    "head": {"llama", "gpt2", "t5", "bart", "opt", "qwen2", "mistral", "mlp"},
    "prefix": {"deberta", "mlp"},
    "prompt": {"vit", "mlp"},
    "ptuning": {"vit", "mlp"},
}
"""Backbones that a method refuses: no biases, no new head, no attention interface, no tokens."""

EXCEPTIONS = {
    "loreft-check_generation_matches_forward": "it edits the last tokens of the prompt, and without a cache the "
    "generated tokens look like prompt; its variant with positions='all' keeps the law",
}
"""Laws that a method breaks by what its paper says, each with the reason."""

EVERYWHERE = {
    "check_count_matches_plan",
    "check_plan_touches_nothing",
    "check_meta_device_agrees",
    "check_only_declared_parameters_train",
    "check_unwrap_restores_every_bit",
    "check_state_dict_keeps_base",
    "check_starts_as_identity",
    "check_disabled_equals_base",
}
ALWAYS = ("llama", "gpt2")


def cases() -> Iterator[tuple[str, Check]]:
    """Labels such as "lora" or "lora[dora]", and checks."""
    for name, method in peftkit.METHODS.items():
        small = SMALL.get(name, {})
        for check in checks(method, method.config(**small)):
            yield name, check
        for label, fields in VARIANTS.get(name, {}).items():
            for check in checks(method, method.config(**{**small, **fields})):
                yield f"{name}[{label}]", check


def chosen(label: str, check: Check, everything: bool) -> list[str]:
    """The backbones that a check runs on."""
    refused, allowed = REFUSED.get(check.method.name, set()), ONLY_ON.get(label, tuple(BACKBONES))
    fits = [n for n, b in BACKBONES.items() if check.applies(b) and n in allowed and n not in refused]
    if everything or (check.name in EVERYWHERE and "[" not in label):
        return fits
    fixed = [n for n in ALWAYS if n in fits]
    rest = [n for n in fits if n not in fixed]
    turn = rest[zlib.crc32(f"{label}-{check.name}".encode()) % len(rest)] if rest else None
    if check.name == "check_compile":
        return fixed[:1] or rest[:1]
    if "[" in label:
        fixed = fixed[:1]
    return [*fixed, turn] if turn else fixed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" not in metafunc.fixturenames:
        return
    everything = metafunc.config.getoption("--all-backbones")
    found = []
    for label, check in cases():
        for name in chosen(label, check, everything):
            identity = f"{label}-{check.name}-{name}"
            reason = EXCEPTIONS.get(f"{label}-{check.name}")
            marks = [pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)] if reason else []
            found.append(pytest.param(check, name, id=identity, marks=marks))
    metafunc.parametrize(("check", "backbone"), found)


def test_method_keeps_law(check: Check, backbone: str) -> None:
    check(BACKBONES[backbone])


@pytest.mark.parametrize(("method", "backbone"), [(m, b) for m, names in REFUSED.items() for b in sorted(names)])
def test_method_refuses_backbone_by_name(method: str, backbone: str) -> None:
    first = next(c for c in checks(peftkit.METHODS[method]) if c.name == "check_count_matches_plan")
    with pytest.raises(Refused, match=f"{method} refuses {backbone}: "):
        first(BACKBONES[backbone])


def test_checks_follow_the_declarations() -> None:
    def names(method: str) -> set[str]:
        return {c.name for c in checks(peftkit.METHODS[method])}

    assert {"check_merge_matches_forward", "check_dropout", "check_budget_is_kept_and_used"} <= names("lora")
    assert "check_merge_is_refused" not in names("lora")
    assert "check_budget_is_kept_and_used" not in names("bitfit")
    assert "check_dropout" not in names("bitfit")
    for method in peftkit.METHODS.values():
        found = names(method.name)
        assert ("check_merge_matches_forward" in found) == method.mergeable
        assert ("check_merge_is_refused" in found) != method.mergeable
        assert ("check_starts_as_identity" in found) == method.starts_as_identity


def test_check_says_what_it_states_and_refuses_a_backbone_it_cannot_be_seen_on() -> None:
    check = next(c for c in checks(peftkit.METHODS["lora"]) if c.name == "check_generation_matches_forward")
    assert str(check) == "lora-check_generation_matches_forward"
    assert check.states.startswith("`generate` with its key-value cache")
    assert not check.applies(BACKBONES["bert"])
    with pytest.raises(ValueError, match="needs a backbone with generate; bert has not"):
        check(BACKBONES["bert"])


@pytest.mark.parametrize("name", list(BACKBONES))
def test_backbone_is_the_same_every_time(name: str) -> None:
    import torch

    state = torch.get_rng_state()
    one, two = BACKBONES[name](), BACKBONES[name]()
    assert torch.equal(state, torch.get_rng_state())
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    assert list(one.state_dict()) == list(BACKBONES[name](device="meta").state_dict())
    loss, logits = BACKBONES[name].run(one)
    assert torch.isfinite(loss)
    assert torch.isfinite(logits).all()
