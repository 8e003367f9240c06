"""Laws about what an adapted model computes: identity, merging, precision, modes, compilation, generation."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import disabled, wrap
from peftkit.errors import MergeError, StateError
from peftkit.merge import merge, unmerge
from peftkit.route import route
from peftkit.testing.subject import (
    NOISE,
    Subject,
    allowance,
    distance,
    perturb,
    refusal,
    snapshot,
    trainable,
    wide,
)
from peftkit.wrap import adapters_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_starts_as_identity(s: Subject) -> None:
    """A fresh adapter changes no logit by more than rounding, in evaluation and in training mode."""
    model = s.base()
    s.plan(model)
    before = s.logits(model)
    wrap(model, s.config)
    allowed = allowance(s, model)
    for mode in (False, True):
        moved = distance(s.logits(model.train(mode)), before)
        if mode and dropout_fields(s.config, positive=True):
            continue
        assert moved <= allowed, f"{s}: a fresh adapter moves the logits by {moved:.2g}, rounding allows {allowed:.2g}"


def check_adapter_has_effect(s: Subject) -> None:
    """An adapter away from its start changes the logits, and depends on each batch it sees."""
    model = s.adapted()
    with disabled(model):
        before = s.logits(model)
    moved, allowed = distance(s.logits(model), before), allowance(s, model)
    assert moved > 10 * allowed, f"{s}: the adapter moves the logits by {moved:.2g} only, rounding by {allowed:.2g}"


def check_new_values_are_seen(s: Subject) -> None:
    """Evaluation uses the tensors as they are now, whatever an earlier evaluation remembered."""
    model, fresh = s.base(), s.base()
    s.attach(model, noise=0.0)
    s.logits(model)
    perturb(model)
    apart = distance(s.logits(model), s.logits(s.attach(fresh)))
    assert apart == 0, f"{s}: evaluation after a change of the adapter gives stale logits, off by {apart:.2g}"


def check_merge_matches_forward(s: Subject) -> None:
    """Merged weights compute what base and adapter compute, in float64, float32, bfloat16 and float16.

    In float64 the two agree to 1e-9 of the largest logit: they are the same function. In the other dtypes merging
    rounds each weight once more, an error of the size that one forward pass makes anyway, which is measured.
    """
    for dtype in (torch.float64, *DTYPES):
        noise = NOISE
        for _ in range(3):
            model = s.adapted(dtype, noise=noise)
            ours = s.logits(model)
            exact = s.logits(wide(model))
            with disabled(model):
                plain, least = s.logits(model), allowance(s, model)
            allowed = 1e-9 * float(exact.abs().max()) if dtype == torch.float64 else max(allowance(s, model), least)
            effect = distance(exact, plain)
            if effect > allowed:
                break
            noise *= 2
        else:
            raise AssertionError(f"{s}: in {dtype} the adapter's effect {effect:.2g} drowns in rounding {allowed:.2g}")
        merge(model)
        apart = max(distance(s.logits(model), exact), distance(s.logits(model), ours) / 2)
        assert apart <= allowed, (
            f"{s}: in {dtype} merged and unmerged logits differ by {apart:.2g}, rounding allows {allowed:.2g}, "
            f"the whole effect is {effect:.2g}"
        )


def check_merge_restores_every_bit(s: Subject) -> None:
    """Merging and unmerging leave every bit, flag, class and hook as it was, and the outputs with them."""
    for dtype in DTYPES:
        model = s.adapted(dtype)
        ours, before = s.logits(model), snapshot(model)
        merge(model)
        unmerge(model)
        before.require(snapshot(model), f"{s}: merging and unmerging in {dtype} changed the model")
        assert distance(s.logits(model), ours) == 0, f"{s}: unmerging in {dtype} does not give the outputs back"


def check_merge_is_refused(s: Subject) -> None:
    """A method that cannot be merged says so by MergeError, and the model is as it was."""
    model = s.adapted()
    ours, before = s.logits(model), snapshot(model)
    with refusal(MergeError, s.method.name, f"{s}: declared as not mergeable, but merging succeeds; declare mergeable"):
        merge(model)
    before.require(snapshot(model), f"{s}: a refused merge changed the model")
    assert distance(s.logits(model), ours) == 0, f"{s}: a refused merge changed the outputs"


def check_disabled_equals_base(s: Subject) -> None:
    """Inside `disabled` every logit is bit for bit the backbone's; behind it the adapter acts again."""
    model = s.base()
    s.plan(model)
    base = {mode: s.logits(model.train(mode)) for mode in (True, False)}
    s.attach(model)
    ours = s.logits(model)
    for mode in (True, False):
        model.train(mode)
        with disabled(model):
            apart = distance(s.logits(model), base[mode])
        assert apart == 0, f"{s}: disabled, the logits differ from the backbone's by {apart:.2g} (training={mode})"
    assert distance(s.logits(model), ours) == 0, f"{s}: after `disabled` the adapter does not act as before"


def check_rows_match_their_adapters(s: Subject) -> None:
    """Each row of a routed batch computes what its adapter alone does; what is no low-rank update is refused."""
    config = dataclasses.replace(s.config, modules_to_save=())
    bare = dataclasses.replace(s, config=config)
    model = bare.base()
    alone: dict[str | None, Tensor] = {None: s.logits(model)}
    for name, seed in (("one", 5), ("two", 6)):
        bare.attach(model, name=name, seed=seed)
        alone[name] = s.logits(model)
    acting = [adapter for _, adapter in adapters_of(model, "two") if adapter.advises or adapter.replaces]
    if any(adapter.low_rank() is None for adapter in acting):
        with refusal(StateError, "two", f"{s}: routed, though it is no low-rank update"), route(model, ["two"]):
            pass
        return
    rows = alone[None].shape[0]
    names: list[str | None] = [("one", "two", None)[row % 3] for row in range(rows)]
    allowed = allowance(s, model)
    with route(model, names):
        found = s.logits(model)
    for row, own in enumerate(names):
        apart = distance(found[row], alone[own][row])
        assert apart <= allowed, f"{s}: row {row} is {apart:.2g} from {own!r} alone, rounding allows {allowed:.2g}"
    after = distance(s.logits(model), alone["two"])
    assert after == 0, f"{s}: after the block logits differ by {after:.2g} from those before it"


def check_low_precision_base(s: Subject) -> None:
    """On a bfloat16, float16 or float64 base the outputs keep that dtype, agree with float64, and gradients flow."""
    for dtype in (*DTYPES[1:], torch.float64):
        model = s.adapted(dtype)
        ours = s.logits(model)
        assert ours.dtype == dtype, f"{s}: on a {dtype} base the logits are {ours.dtype}"
        exact = s.logits(wide(model))
        with disabled(model):
            usual = allowance(s, model)
        apart = distance(ours, exact)
        assert apart <= usual, (
            f"{s}: in {dtype} the logits are off by {apart:.2g}, the base's rounding allows {usual:.2g}"
        )
        s.loss(model).backward()
        for key, parameter in trainable(model).items():
            grad = parameter.grad
            assert grad is None or bool(torch.isfinite(grad).all()), f"{s}: no finite gradient at {key} in {dtype}"


def check_autocast(s: Subject) -> None:
    """Under bfloat16 autocast outputs and gradients are finite, and as close to float32 as the backbone's are."""
    model = s.adapted()
    exact = s.logits(model)
    with disabled(model), torch.autocast("cpu", torch.bfloat16):
        lowered = s.logits(model)
    with disabled(model):
        usual = distance(lowered, s.logits(model))
    least = 4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        ours = s.logits(model)
        loss = s.loss(model)
    apart, allowed = distance(ours, exact), 8 * max(usual, least)
    assert apart <= allowed, (
        f"{s}: autocast moves the logits by {apart:.2g}, the backbone's rounding allows {allowed:.2g}"
    )
    loss.backward()
    for key, parameter in trainable(model).items():
        grad = parameter.grad
        assert grad is None or bool(torch.isfinite(grad).all()), f"{s}: no finite gradient at {key} under autocast"
        assert grad is None or grad.dtype == parameter.dtype, (
            f"{s}: the gradient at {key} is {grad.dtype}, not its dtype"
        )


def dropout_fields(config: Any, *, positive: bool = False) -> list[str]:
    """The config's dropout probabilities by name; with `positive` those that are not zero."""
    names = [f.name for f in dataclasses.fields(config) if f.name.endswith("dropout")]
    return [n for n in names if getattr(config, n)] if positive else names


def check_modes(s: Subject) -> None:
    """Evaluation is deterministic; adapters follow the model's mode; without dropout training computes the same."""
    model = s.base().train()
    s.attach(model)
    for mode in (True, False):
        model.train(mode)
        wrong = [p for p, a in adapters_of(model, "default") for m in a.modules() if m.training != mode]
        assert not wrong, f"{s}: the adapter at {wrong[0]} does not follow model.train({mode})"
    first, second = s.logits(model), s.logits(model)
    assert distance(first, second) == 0, f"{s}: two evaluations differ"
    if not dropout_fields(s.config, positive=True):
        apart, allowed = distance(s.logits(model.train()), first), allowance(s, model)
        assert apart <= allowed, f"{s}: training mode without dropout differs from evaluation by {apart:.2g}"


def check_dropout(s: Subject) -> None:
    """With dropout, two training passes differ, and evaluation computes what the method without dropout does."""
    names = dropout_fields(s.config)
    noisy = dataclasses.replace(s, config=dataclasses.replace(s.config, **dict.fromkeys(names, 0.5)))
    still = dataclasses.replace(s, config=dataclasses.replace(s.config, **dict.fromkeys(names, 0.0)))
    model, without = noisy.adapted(), still.adapted()
    apart = distance(s.logits(model), s.logits(without))
    assert apart == 0, f"{s}: in evaluation dropout still acts, by {apart:.2g}"
    model.train()
    torch.manual_seed(3)
    assert distance(s.logits(model), s.logits(model)) > 0, f"{s}: {', '.join(names)} = 0.5 drops nothing in training"
    s.loss(model).backward()


def check_compile(s: Subject) -> None:
    """A compiled block (fullgraph=True: one break is an error) gives the same logits and gradients."""
    model = s.adapted()
    s.loss(model).backward()
    exact = s.logits(model)
    wanted = {k: _gradient(p) for k, p in trainable(model).items()}
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    try:
        model.get_submodule(s.backbone.block).compile(backend="aot_eager", fullgraph=True)
        ours = s.logits(model)
        with warnings.catch_warnings():
            # torch's tracer reads .grad of a block's input, which is no leaf where something before it is trained.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            s.loss(model).backward()
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"{s}: the block does not compile: {str(error).strip().splitlines()[0]}") from error
    finally:
        torch._dynamo.reset()
    apart, allowed = distance(ours, exact), allowance(s, s.adapted())
    assert apart <= allowed, f"{s}: compiled logits differ by {apart:.2g}, rounding allows {allowed:.2g}"
    _same_gradients(s, wanted, model, "compiled")


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else parameter.grad.clone()


def _same_gradients(s: Subject, wanted: dict[str, Tensor | None], model: nn.Module, how: str) -> None:
    """Raises AssertionError unless gradients agree to 1e-4 of the largest: float32 sums in another order."""
    largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for key, parameter in trainable(model).items():
        grad, expected = parameter.grad, wanted[key]
        assert (grad is None) == (expected is None), f"{s}: {how}, {key} has {'no' if grad is None else 'a'} gradient"
        if grad is not None and expected is not None:
            apart = distance(grad, expected)
            assert apart <= 1e-4 * largest, f"{s}: {how}, the gradient at {key} differs by {apart:.2g} of {largest:.2g}"


def check_gradient_checkpointing(s: Subject) -> None:
    """With gradient checkpointing the loss and every gradient are the same."""
    model: Any = s.adapted().train()
    torch.manual_seed(4)
    loss = s.loss(model)
    loss.backward()
    wanted = {k: _gradient(p) for k, p in trainable(model).items()}
    model.zero_grad(set_to_none=True)
    # transformers 5.23 renamed the method and deprecates the older name, the only one that earlier versions have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    torch.manual_seed(4)
    again = s.loss(model)
    again.backward()
    assert distance(loss, again) <= 1e-5 * float(loss.detach().abs()), f"{s}: checkpointing changes the loss"
    _same_gradients(s, wanted, model, "with gradient checkpointing")


def check_generation_matches_forward(s: Subject) -> None:
    """`generate` with its key-value cache gives the logits that it gives without, and that the forward pass gives."""
    model: Any = s.adapted()
    given = {k: v for k, v in s.backbone.inputs(model).items() if k != "labels"}
    steps = []
    for cached in (True, False):
        out = model.generate(
            **given,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps.append(torch.stack(out.logits))
    allowed = allowance(s, model, factor=32)
    apart = distance(*steps)
    assert apart <= allowed, f"{s}: generation with a cache differs by {apart:.2g} from generation without"
    if "causal" in s.backbone.features:
        apart = distance(steps[0][0], s.logits(model)[:, -1])
        assert apart <= allowed, f"{s}: the first generated logits differ by {apart:.2g} from the forward pass"


def check_padding_is_invisible(s: Subject) -> None:
    """A row gives the same logits alone as in a batch where the mask hides padding behind it."""
    model = s.adapted()
    alone = {k: v[1:] for k, v in s.backbone.inputs(model).items()}
    short = 4
    padded = {k: v.clone() for k, v in s.backbone.inputs(model).items()}
    padded["input_ids"][1, short:] = 0
    padded["attention_mask"][1, short:] = 0
    for key in ("input_ids", "attention_mask"):
        alone[key] = alone[key][:, :short]
    if alone["labels"].dim() == 2 and "causal" not in s.backbone.features:
        same_length = alone["labels"].shape[1] == padded["input_ids"].shape[1]
        alone["labels"] = alone["labels"][:, :short] if same_length else alone["labels"]
    elif alone["labels"].dim() == 2:
        alone["labels"] = alone["labels"][:, :short]
    with torch.no_grad():
        batch = s.backbone.run(model, padded)[1][1:]
        single = s.backbone.run(model, alone)[1]
    if batch.dim() == 3:
        batch = batch[:, : single.shape[1]]
    apart, allowed = distance(batch, single), allowance(s, model, factor=32)
    assert apart <= allowed, f"{s}: padding behind a row moves its logits by {apart:.2g}, rounding allows {allowed:.2g}"


def check_generation_ignores_padding(s: Subject) -> None:
    """Padding before a prompt, hidden by the mask, changes no generated logit."""
    model: Any = s.adapted()
    ids = s.backbone.inputs(model)["input_ids"][:1]
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), dim=1)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    moved = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **options)
    apart = distance(torch.stack(plain.logits), torch.stack(moved.logits))
    allowed = allowance(s, model, factor=32)
    assert apart <= allowed, f"{s}: padding before the prompt moves generated logits by {apart:.2g}"


def check_inference_mode_leaves_no_trace(s: Subject) -> None:
    """After a pass under `torch.inference_mode` the model trains as if there had been none."""
    model = s.adapted()
    other = copy.deepcopy(model)
    with torch.inference_mode():
        s.backbone.run(model)
    s.loss(model).backward()
    s.loss(other).backward()
    _same_gradients(s, {k: _gradient(p) for k, p in trainable(other).items()}, model, "after inference mode")
