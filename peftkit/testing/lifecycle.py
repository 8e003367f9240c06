"""Laws about training, copying, saving, switching and taking off."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit import activate, unwrap, wrap
from peftkit.checkpoint import load, save
from peftkit.testing.subject import Subject, bits, distance, perturb, snapshot, trainable

NAN_WITH_PAYLOAD = 0x7FC0BEEF


def _backbone_bits(model: nn.Module) -> dict[str, bytes]:
    return {k: bits(t) for k, t in model.state_dict().items() if ".peftkit." not in f".{k}."}


def check_only_declared_parameters_train(s: Subject) -> None:
    """Away from the start every declared parameter gets a finite gradient, not all zero, and no other gets one."""
    model = s.base()
    s.attach(model)
    model.train()
    declared = trainable(model)
    wanted = {id(p) for p in declared.values()}
    stray = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in wanted]
    assert not stray, f"{s}: {stray[0]} requires a gradient and is not declared as trained"
    frozen = [k for k, p in declared.items() if not p.requires_grad]
    assert not frozen, f"{s}: {frozen[0]} is declared as trained and does not require a gradient"
    s.loss(model).backward()
    stray = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in wanted]
    assert not stray, f"{s}: {stray[0]} got a gradient and is not declared as trained"
    without = [k for k, p in declared.items() if p.grad is None]
    assert not without, f"{s}: {without[0]} and {len(without) - 1} more got no gradient"
    wild = [k for k, p in declared.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    assert not wild, f"{s}: the gradient at {wild[0]} is not finite"
    zero = [k for k, p in declared.items() if p.grad is not None and not bool(p.grad.any())]
    assert not zero, f"{s}: the gradient at {zero[0]} and {len(zero) - 1} more is zero everywhere"


def check_training_step(s: Subject) -> None:
    """A step against the gradient lowers the loss, changes adapter tensors, and leaves the backbone's bits alone."""
    model = s.base()
    s.plan(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wrap(model, s.config)
    base = _backbone_bits(model)
    start, last = _descend(s, model)
    assert last < start, f"{s}: no step against the gradient lowers the loss of {start:.6g}"
    assert _backbone_bits(model) == base, f"{s}: a training step changed the backbone"


def _descend(s: Subject, model: nn.Module, name: str = "default") -> tuple[float, float]:
    """Loss before and after one step along the gradient, its length halved until the loss falls."""
    model.zero_grad(set_to_none=True)
    parameters = [p for p in trainable(model, name).values() if p.requires_grad]
    loss = s.loss(model)
    loss.backward()
    start = float(loss.detach())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    norm = float(torch.stack([g.double().norm() for g in gradients]).norm())
    if norm == 0:
        return start, start
    values = [p.detach().clone() for p in parameters]
    length, last = 0.5, start
    for _ in range(12):
        with torch.no_grad():
            for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
                parameter.copy_(value - (length / norm) * gradient)
            last = float(s.loss(model))
        if last < start:
            break
        length /= 4
    model.zero_grad(set_to_none=True)
    return start, last


def check_unwrap_restores_every_bit(s: Subject) -> None:
    """Wrapping, training and unwrapping leave every bit, flag, class, attribute, hook and config as it was."""
    model = s.base()
    s.plan(model)
    payload = torch.tensor([NAN_WITH_PAYLOAD, 0], dtype=torch.int32).view(torch.float32)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).register_buffer("nan_with_payload", payload)
    odd = next(model.parameters())
    odd.requires_grad_(False)
    ours, before = s.logits(model), snapshot(model)
    s.attach(model)
    _descend(s, model)
    unwrap(model)
    for parameter in model.parameters():
        parameter.grad = None
    before.require(snapshot(model), f"{s}: wrapping and unwrapping changed the model")
    assert distance(s.logits(model), ours) == 0, f"{s}: unwrapping does not give the outputs back"


def check_state_dict_keeps_base(s: Subject) -> None:
    """The wrapped model's state dict holds every key and every bit of the backbone's, and loads its checkpoint."""
    model = s.base()
    s.plan(model)
    before = {k: bits(t) for k, t in model.state_dict().items()}
    saved = {k: t.clone() for k, t in model.state_dict().items()}
    s.attach(model)
    after = model.state_dict()
    for key, value in before.items():
        assert key in after, f"{s}: {key} is missing from the wrapped model's state dict"
        assert bits(after[key]) == value, f"{s}: {key} of the wrapped model's state dict differs from the backbone's"
    strange = [k for k in after if k not in before and ".peftkit." not in f".{k}"]
    assert not strange, f"{s}: {strange[0]} of the state dict is neither the backbone's nor an adapter's"
    answer = model.load_state_dict(saved, strict=False)
    assert not answer.unexpected_keys, f"{s}: the backbone's checkpoint does not load: {answer.unexpected_keys[0]}"


def check_save_and_load(s: Subject) -> None:
    """A saved adapter loads into a fresh backbone with the same logits, and saves again to the same bytes."""
    model = s.base()
    s.attach(model)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        save(model, first)
        state = torch.get_rng_state()
        other = s.base()
        load(other, first)
        assert bits(torch.get_rng_state()) == bits(state), f"{s}: loading draws from the global random generator"
        apart = distance(s.logits(other), s.logits(model))
        assert apart == 0, f"{s}: logits differ by {apart:.2g} after saving and loading"
        save(other, second)
        names = sorted(p.name for p in first.iterdir())
        assert names == sorted(p.name for p in second.iterdir()), f"{s}: saving again writes other files"
        changed = [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()]
        assert not changed, f"{s}: saving what was loaded writes other bytes in {', '.join(changed)}"


def check_copies_are_independent(s: Subject) -> None:
    """A deep copy and a pickled copy compute the same bits, and training or unwrapping either leaves the other."""
    model = s.base()
    s.attach(model)
    ours, before = s.logits(model), snapshot(model)
    for how, made in (("deep", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model)))):
        assert distance(s.logits(made), ours) == 0, f"{s}: a {how} copy computes something else"
        _descend(s, made)
        assert distance(s.logits(made), ours) > 0, f"{s}: training a {how} copy does not change the copy"
        unwrap(made)
        before.require(snapshot(model), f"{s}: training and unwrapping a {how} copy changed the original")
        assert distance(s.logits(model), ours) == 0, f"{s}: training a {how} copy changed the original's outputs"


def check_two_adapters_are_independent(s: Subject) -> None:
    """Two adapters on one model act exactly as each does alone, and training one leaves the other's bits."""
    model: Any = s.base()
    s.plan(model)
    alone = {}
    for name, seed in (("one", 5), ("two", 6)):
        single = s.attach(s.base(), name=name, seed=seed)
        alone[name] = s.logits(single)
        s.attach(model, name=name, seed=seed)
    for name in ("one", "two", "one"):
        activate(model, name)
        apart = distance(s.logits(model), alone[name])
        assert apart == 0, f"{s}: with {name!r} active, logits differ by {apart:.2g} from {name!r} alone"
    held = {k: bits(p) for k, p in trainable(model, "two").items()}
    ours = {k: bits(p) for k, p in trainable(model, "one").items()}
    _descend(s, model, "one")
    assert {k: bits(p) for k, p in trainable(model, "one").items()} != ours, f"{s}: training 'one' does not change it"
    assert {k: bits(p) for k, p in trainable(model, "two").items()} == held, f"{s}: training 'one' changed 'two'"
    unwrap(model, "one")
    activate(model, "two")
    assert distance(s.logits(model), alone["two"]) == 0, f"{s}: detaching 'one' changed 'two'"


def check_initialisation_is_seeded(s: Subject) -> None:
    """The same seed gives the same adapter bit for bit, whatever was attached before."""
    made = []
    for _ in range(2):
        model = s.attach(s.base(), noise=0.0)
        made.append({k: bits(p) for k, p in trainable(model).items()})
        perturb(model)
    assert made[0] == made[1], f"{s}: two adapters of one seed differ"
