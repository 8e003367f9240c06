"""A model with one of peft's methods in it: built the same way for counting and for training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peftkit_bench.spec import SuiteError
from peftkit_bench.subjects import peft_fields
from peftkit_bench.subjects.peft_methods import PeftMethod
from peftkit_bench.subjects.snapshot import Snapshot

ADAPTER = "default"
_LOGITS = ("logits", "start_logits", "end_logits")
_INPUTS = ("input_ids", "inputs_embeds")
_TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Where the length of the logits of an encoder and decoder is to be seen."""
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")


@dataclass
class Attached:
    """What is known of a model that peft adapts, kept on peft's model."""

    name: str
    method: PeftMethod
    base: nn.Module
    snapshot: Snapshot
    trained: tuple[str, ...]
    """Names of the parameters that were to be trained at the start."""
    head: frozenset[str]
    """Those of them that belong to modules trained whole."""
    scheduled: bool = True
    """False: the method has a schedule whose length nobody has told it yet."""


def attached(model: nn.Module) -> Attached:
    """What `attach` noted.

    Raises:
        SuiteError: the model was not adapted here.
    """
    found = model.__dict__.get("_peftkit_bench")
    if not isinstance(found, Attached):
        raise SuiteError(f"{type(model).__name__} holds no method of peft; attach one first")
    return found


def attach(model: nn.Module, name: str, fields: Mapping[str, Any]) -> nn.Module:
    """peft's model around this one, which is frozen and adapted in place.

    Its forward takes the arguments of the bare model and gives logits for the same positions.

    Raises:
        SuiteError: peft cannot put the method into the model.
    """
    method = peft_fields.entry(name)
    config = peft_fields.made(name, fields)
    snapshot = Snapshot(model)
    if method.rewrites or getattr(config, "init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        snapshot.keep_values(p for p in model.parameters() if p.is_floating_point() and not p.is_meta)
    try:
        found: Any = peft.get_peft_model(model, config)
    except Exception as error:  # peft refuses in many ways, and the suite names them all
        snapshot.restore(model)
        reason = str(error).strip().split("\n")[0]
        raise SuiteError(
            f"peft:{name} cannot be put into {type(model).__name__}: {reason or type(error).__name__}"
        ) from error
    found.train(model.training)
    for key, parameter in found.named_parameters():
        if not set(method.untrained).isdisjoint(key.split(".")):
            parameter.requires_grad_(False)
    trained = tuple(key for key, parameter in found.named_parameters() if parameter.requires_grad)
    found.__dict__["_peftkit_bench"] = Attached(
        name=name,
        method=method,
        base=model,
        snapshot=snapshot,
        trained=trained,
        head=_head(found) & set(trained),
        scheduled=fields.get("total_step", 1) is not None,
    )
    if method.task_ids:
        _add_task_ids(found)
    if config.is_prompt_learning:
        found.register_forward_hook(_without_virtual_tokens, with_kwargs=True)
    return found  # type: ignore[no-any-return]  # peft is untyped here


def _head(model: nn.Module) -> frozenset[str]:
    """Names of the trained copies of whole modules."""
    own = {
        id(p) for m in model.modules() if isinstance(m, ModulesToSaveWrapper) for p in m.modules_to_save.parameters()
    }
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)


def _add_task_ids(model: Any) -> None:
    """Tells methods for several tasks that every row is of the first."""

    def zeros(kwargs: dict[str, Any], args: tuple[Any, ...]) -> Tensor:
        rows = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not module._adapters_disabled:
            kwargs = {"task_ids": zeros(kwargs, args), **kwargs}
        return args, kwargs

    own = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if not model._adapters_disabled:
            kwargs = {"task_ids": zeros(kwargs, args), **kwargs}
        return own(*args, **kwargs)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.__dict__["generate"] = generate


def _without_virtual_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output with logits for the positions of the input alone, as without virtual tokens."""
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    first = None if two_stacks or not args else args[0]
    names = _TARGETS if two_stacks else _INPUTS
    inputs = next((kwargs[name] for name in names if kwargs.get(name) is not None), first)
    if inputs is None or model._adapters_disabled:
        return output
    length = inputs.shape[1]
    for name in _LOGITS:
        logits = getattr(output, name, None)
        if not isinstance(logits, Tensor) or logits.dim() != (3 if name == "logits" else 2):
            continue
        if logits.shape[1] > length:
            output[name] = logits[:, logits.shape[1] - length :]
    return output


# Counting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """Trained parameters of a method, and of the modules trained whole."""

    adapter: int
    head: int


def count(model: nn.Module, name: str, fields: Mapping[str, Any]) -> Counted:
    """What attaching would train, exactly; the model is left alone.

    On the meta device, but for methods that need values: they are put into random weights of the same shapes.

    Raises:
        SuiteError: peft cannot put the method into the model.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The same warnings come when the method is attached in earnest.
        warnings.simplefilter("ignore")
        twin = skeleton(model)
        if not peft_fields.entry(name).on_meta:
            twin = twin.to_empty(device="cpu")
            torch.manual_seed(0)
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    nn.init.normal_(parameter, std=0.02)
        found = attach(twin, name, fields)
        known = attached(found)
        sizes = {key: p.numel() for key, p in found.named_parameters()}
    return Counted(
        adapter=sum(sizes[key] for key in known.trained if key not in known.head),
        head=sum(sizes[key] for key in known.head),
    )


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
