"""Laws about plans, counts, configs and budgets."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import torch

from peftkit import fit_budget, plan, wrap
from peftkit.errors import ConfigError
from peftkit.methods import METHODS
from peftkit.testing.subject import (
    Subject,
    adapter_parameters,
    changed_fields,
    random_state,
    refusal,
    snapshot,
    trainable,
)
from peftkit.wrap import adapters_of


def check_declaration_is_complete(s: Subject) -> None:
    """The method is registered under its name, says what it trains, and its config is strict, frozen and plain."""
    method = s.method
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name), f"{method.name!r}: names are lower case, digits and _"
    assert METHODS[method.name] is method, f"peftkit.METHODS[{method.name!r}] is another method"
    assert method.summary.strip().endswith("."), f"{method.name}: `summary` must be one sentence that says what trains"
    assert method.config.__doc__, f"{method.config.__name__} has no docstring"
    assert type(s.config) is method.config, f"{type(s.config).__name__} is no config of {method.name}"
    method.config()
    strict = f"{method.config.__name__} accepts an unknown field; decorate it with peftkit.spec.config"
    with refusal(ConfigError, "no_such_field", strict):
        method.config(no_such_field=1)
    try:
        s.config.target_modules = ()
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{method.config.__name__} is not frozen; decorate it with peftkit.spec.config")
    again = method.config(**json.loads(json.dumps(s.config.to_dict())))
    assert again.to_dict() == s.config.to_dict(), f"{again} is not {s.config}: the config does not survive JSON"


def check_count_matches_plan(s: Subject) -> None:
    """The count formula gives the real number of trained elements, in total and at each site."""
    model = s.base()
    size = sum(p.numel() for p in model.parameters())
    found = s.plan(model)
    wrap(model, s.config)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable == real, f"{s}: the plan counts {found.trainable} trainable parameters, there are {real}"
    assert found.base == size, f"{s}: the plan counts {found.base} parameters of the backbone, there are {size}"
    assert found.trainable == found.adapter_parameters + found.extra_parameters
    counted = {site.path: site.count for site in (*found.sites, *found.extras)}
    seen: set[int] = set()
    for path, adapter in adapters_of(model, "default"):
        fresh = [p for _, p in adapter_parameters(adapter) if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        real = sum(p.numel() for p in fresh)
        expected = counted.get(path, found.shared)
        assert real == expected, f"{s}: {path or 'shared'} is counted as {expected}, there are {real}"
    real_total = sum(p.numel() for p in model.parameters())
    copies = sum(site.count for site in (*found.sites, *found.extras) if site.parameters)
    untrained = real_total - size - sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == real_total - copies - untrained, (
        f"{s}: the plan's total is {found.total}, the model has {real_total - copies - untrained}"
    )


def check_plan_touches_nothing(s: Subject) -> None:
    """Planning leaves every bit, flag, class, attribute and random state of the model as it was, and is repeatable."""
    model = s.base()
    before, state = snapshot(model), random_state()
    try:
        first, second = s.plan(model), s.plan(model)
    finally:
        before.require(snapshot(model), f"{s}: planning changed the model")
        assert random_state() == state, f"{s}: planning drew random numbers"
    assert first.sites == second.sites, f"{s}: planning twice gives different sites"
    assert first.trainable == second.trainable, f"{s}: planning twice gives different counts"
    wrap(model, s.config)
    third = plan(model, s.config)
    assert third.sites == first.sites, f"{s}: the plan of the wrapped model is not that of its backbone"
    assert third.base == first.base, f"{s}: the plan of the wrapped model counts adapters as backbone"


def check_meta_device_agrees(s: Subject) -> None:
    """Planning and wrapping on the meta device give the same sites, names, shapes, dtypes and counts."""
    real, meta = s.base(), s.backbone(device="meta")
    ours, theirs = s.plan(real), s.plan(meta)
    assert ours.sites == theirs.sites, f"{s}: sites differ on the meta device"
    assert ours.trainable == theirs.trainable, f"{s}: {ours.trainable} trainable, {theirs.trainable} on meta"
    wrap(real, s.config)
    wrap(meta, s.config)

    def described(parameters: dict[str, Any]) -> dict[str, Any]:
        return {k: (tuple(t.shape), t.dtype, t.requires_grad) for k, t in parameters.items()}

    assert described(trainable(real)) == described(trainable(meta)), f"{s}: adapter tensors differ on the meta device"
    assert list(real.state_dict()) == list(meta.state_dict()), f"{s}: the state dict's keys differ on the meta device"
    stray = [k for k, t in trainable(meta).items() if not t.is_meta]
    assert not stray, f"{s}: {stray[0]} is not on the meta device beside its module"
    untouched = [k for k, t in real.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    assert not untouched, f"{s}: {untouched[0]} holds values that are not finite after wrapping"


def check_budget_is_kept_and_used(s: Subject) -> None:
    """`fit_budget` never goes over a budget, and no other value of the knob comes closer."""
    model = s.base()
    s.plan(model)
    knob = s.method.knob
    assert knob is not None
    choices = list(knob.values(model) if knob.values else range(knob.low, min(knob.high, knob.low + 11) + 1))[:12]
    counts = [plan(model, knob.set(s.config, value)).trainable for value in choices]
    fields = {k: v for k, v in changed_fields(s.config).items() if k != knob.field}
    for budget in {counts[0], counts[len(counts) // 2], *(c - 1 for c in counts if c > counts[0])}:
        fitted = fit_budget(model, s.method.name, parameters=budget, **fields)
        got = plan(model, fitted).trainable
        best = max(c for c in counts if c <= budget)
        assert got == best, f"{s}: a budget of {budget} is filled with {got}, {best} fits"
    with refusal(ConfigError, s.method.name, f"{s}: a budget below the smallest size is accepted"):
        fit_budget(model, s.method.name, parameters=counts[0] - 1, **fields)
