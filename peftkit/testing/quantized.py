"""Laws about a backbone in 4 or 8 bits: a method trains beside the codes and leaves them alone, or refuses them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import get_args

import torch
from torch import nn

from peftkit.checkpoint import load, save
from peftkit.errors import BackboneError, TargetError
from peftkit.merge import merge, unmerge
from peftkit.quantization import Kind, is_quantized
from peftkit.quantize import quantize
from peftkit.testing.subject import Subject, allowance, distance, refusal, snapshot, trainable
from peftkit.wrap import adapters_of, unwrap, wrap


def _bases(s: Subject) -> Iterator[tuple[Kind, nn.Module]]:
    """The backbone in each kind of codes; nothing where it has no projection to quantize."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        model = s.base()
        try:
            quantize(model, kind)
        except BackboneError:
            return
        # The first loss makes some models note in their config which one it is.
        s.loss(model)
        yield kind, model


def check_quantized_base(s: Subject) -> None:
    """On a base in NF4, FP4 or int8 it trains, leaves codes alone, merges into what they stand for, saves and loads."""
    for kind, model in _bases(s):
        before, alone = snapshot(model), s.logits(model)
        s.attach(model)
        assert any(map(is_quantized, model.modules())), f"{s}: wrapping dequantized the {kind} base"
        for key, parameter in trainable(model).items():
            wanted = (torch.float32, torch.float64)
            assert parameter.dtype in wanted, f"{s}: {key} trains in {parameter.dtype} on a {kind} base"
        s.loss(model).backward()
        grads = {k: p.grad for k, p in trainable(model).items() if p.grad is not None}
        assert grads, f"{s}: no gradient arrives on a {kind} base"
        for key, grad in grads.items():
            assert bool(torch.isfinite(grad).all()), f"{s}: no finite gradient at {key} on a {kind} base"
        ours = s.logits(model)
        assert distance(ours, alone) > 0, f"{s}: the adapter has no effect on a {kind} base"
        _check_saved(s, kind, model, ours)
        if s.method.mergeable:
            _check_merged(s, kind, model)
        unwrap(model)
        before.require(snapshot(model), f"{s}: unwrapping does not restore a {kind} base")


def _check_saved(s: Subject, kind: Kind, model: nn.Module, ours: torch.Tensor) -> None:
    for _, adapter in adapters_of(model, "default"):
        adapter.__dict__["check_trained"] = lambda: None  # no optimizer moved the tensors
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        again = load(quantize(s.base(), kind), folder)
    assert distance(s.logits(again), ours) == 0, f"{s}: loaded on a {kind} base it computes something else"


def _check_merged(s: Subject, kind: Kind, model: nn.Module) -> None:
    # A merge computes with the weights that the codes stand for, as an unmerged model does up to rounding.
    ours, allowed = s.logits(model), 16 * allowance(s, model)
    merge(model, minimum_effect=0)
    assert not any(map(is_quantized, model.modules())), f"{s}: codes are left after a merge into a {kind} base"
    apart = distance(s.logits(model), ours)
    unmerge(model)
    assert apart <= allowed, f"{s}: merged into a {kind} base the logits are off by {apart:.2g}, allowed {allowed:.2g}"
    assert distance(s.logits(model), ours) == 0, f"{s}: unmerging a {kind} base does not bring the same logits back"


def check_quantized_base_is_refused(s: Subject) -> None:
    """A method that declares that it does not work on a quantized base refuses one, by name, and changes nothing."""
    for kind, model in _bases(s):
        before = snapshot(model)
        with refusal(TargetError, s.method.name, f"{s}: a {kind} base is accepted against what is declared"):
            wrap(model, s.config)
        before.require(snapshot(model), f"{s}: refusing a {kind} base changed it")
