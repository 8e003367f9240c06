"""What the laws work with: one method with one config on one backbone, bit-exact snapshots, and measured rounding."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from peftkit import methods, plan, wrap
from peftkit.errors import BackboneError, ConfigError, PeftkitError, TargetError
from peftkit.plan import Plan
from peftkit.spec import Adapter, Method
from peftkit.testing.backbones import Backbone
from peftkit.wrap import adapters_of

NOISE = 0.15
"""Standard deviation of what is added to adapter tensors to leave the start, where many gradients are zero."""


class Refused(AssertionError):
    """The method says, by TargetError or BackboneError, that it does not fit the backbone."""


@contextlib.contextmanager
def registered(method: Method) -> Iterator[None]:
    """Inside the block `peftkit.METHODS` also holds this method, as if a package had registered it."""
    if methods.METHODS.get(method.name) is method:
        yield
        return
    if method.name in methods.METHODS:
        raise ConfigError(f"another method is named {method.name!r}; choose another name")
    known = {**methods.METHODS, method.name: method}
    with mock.patch.object(methods, "_all", return_value=known):
        yield


@contextlib.contextmanager
def refusal(kind: type[PeftkitError], word: str, otherwise: str) -> Iterator[None]:
    """Raises AssertionError unless the block raises an error of this kind whose message holds `word`.

    Args:
        otherwise: what to say when nothing is raised.
    """
    try:
        yield
    except kind as error:
        if word not in str(error):
            raise AssertionError(f"the {kind.__name__} does not name {word!r}: {error}") from error
    else:
        raise AssertionError(otherwise)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One method, one config, one backbone: what a law is checked on."""

    method: Method
    config: Any
    backbone: Backbone

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The backbone alone; some weights are minus zero, which careless arithmetic loses."""
        model = self.backbone(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[:1] = -0.0
        return model

    def attach(self, model: nn.Module, *, name: str = "default", seed: int = 5, noise: float = NOISE) -> nn.Module:
        """The model with the method attached, its trainable tensors moved away from the start by noise."""
        self.plan(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrap(model, self.config, name=name)
        perturb(model, name=name, seed=seed, noise=noise)
        return model

    def adapted(self, dtype: torch.dtype = torch.float32, *, seed: int = 5, noise: float = NOISE) -> nn.Module:
        """The backbone with the method attached and moved away from its start, in evaluation mode."""
        return self.attach(self.base(dtype), seed=seed, noise=noise)

    def logits(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The model's logits on one batch, without gradients."""
        with torch.no_grad():
            return self.backbone.run(model, self.backbone.inputs(model, seed))[1].clone()

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The model's loss on one batch, with a graph."""
        return self.backbone.run(model, self.backbone.inputs(model, seed))[0]

    def plan(self, model: nn.Module) -> Plan:
        """The plan of the config on the model.

        Raises:
            Refused: the method refuses the backbone, and says so.
        """
        try:
            return plan(model, self.config)
        except (TargetError, BackboneError) as error:
            named = (self.method.name, type(model).__name__, self.backbone.name, _model_type(model))
            if not any(word and word in str(error) for word in named):
                raise AssertionError(
                    f"{self.method.name} refuses {self.backbone.name} without naming the method or the model: {error}"
                ) from error
            raise Refused(f"{self.method.name} refuses {self.backbone.name}: {error}") from error

    def __str__(self) -> str:
        return f"{self.method.name} on {self.backbone.name}"


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def trainable(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters that an adapter declares as trained, by site path and name; shared ones once."""
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for path, adapter in adapters_of(model, name):
        for key, parameter in adapter_parameters(adapter):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}:{key}"] = parameter
    return found


def adapter_parameters(adapter: Adapter) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of an adapter that are trained."""
    return [(k, p) for k, p in adapter.named_parameters() if k.split(".")[0] not in adapter.untrained]


def perturb(model: nn.Module, *, name: str = "default", seed: int = 5, noise: float = NOISE) -> None:
    """Adds Gaussian noise to every trained tensor of one adapter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model, name).values():
            parameter.add_((noise * torch.randn(parameter.shape, generator=generator)).to(parameter))


# Bits ---------------------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: minus zero, and what a NaN carries, included."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that wrapping must not change for good."""

    facts: Mapping[str, Any]

    def differences(self, later: Snapshot) -> list[str]:
        """What is not as it was, one phrase each."""
        found = []
        for key in sorted({*self.facts, *later.facts}):
            if key not in later.facts:
                found.append(f"{key} is gone")
            elif key not in self.facts:
                found.append(f"{key} is new")
            elif self.facts[key] != later.facts[key]:
                found.append(f"{key} changed")
        return found

    def require(self, later: Snapshot, what: str) -> None:
        """Raises AssertionError, naming what differs, unless nothing does."""
        found = self.differences(later)
        assert not found, f"{what}: {'; '.join(found[:5])}{f' and {len(found) - 5} more' if len(found) > 5 else ''}"


_PLAIN = (int, float, str, bool, type(None), tuple)


def snapshot(model: nn.Module) -> Snapshot:
    """Bits, identities, gradient flags, classes, tree, hooks, attributes and configs of a model."""
    facts: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts[f"bits of {name}"] = (parameter.dtype, tuple(parameter.shape), bits(parameter))
        facts[f"requires_grad of {name}"] = parameter.requires_grad
        facts[f"identity of {name}"] = id(parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        facts[f"bits of buffer {name}"] = (buffer.dtype, tuple(buffer.shape), bits(buffer))
    for name, module in model.named_modules(remove_duplicate=False):
        facts[f"class of module {name!r}"] = type(module)
        for key, value in module.__dict__.items():
            facts[f"attribute {key} of module {name!r}"] = value if isinstance(value, _PLAIN) else "present"
            if key.endswith("hooks"):
                facts[f"{key} of module {name!r}"] = tuple(id(hook) for hook in value.values())
    facts["keys of the state dict"] = tuple(model.state_dict())
    for key in ("config", "generation_config"):
        if hasattr(model, key):
            facts[key] = repr(sorted(vars(getattr(model, key)).items(), key=lambda item: item[0]))
    return Snapshot(facts)


def random_state() -> tuple[bytes, Any]:
    """The states of torch's and Python's global generators."""
    return bits(torch.get_rng_state()), random.getstate()


# Rounding -----------------------------------------------------------------------------------------------------------


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors' elements; infinite when a value is not finite."""
    difference = (one.detach().double() - other.detach().double()).abs()
    return float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")


def wide(model: nn.Module) -> nn.Module:
    """A copy that computes with the same values in float64: what the model would give without rounding."""
    return copy.deepcopy(model).double()


def allowance(subject: Subject, model: nn.Module, *, factor: float = 8) -> float:
    """How far two ways to compute the model's logits may lie apart, from measured rounding.

    The logits' distance from the same computation in float64 is what the roundings of one forward pass amount to in
    this architecture and dtype. Computing the same in another order, or rounding each weight once more, makes errors
    of that size; `factor` covers that both are maxima over few numbers. Four units in the last place of the largest
    logit are the least.
    """
    ours = subject.logits(model)
    exact = subject.logits(wide(model))
    least = 4 * torch.finfo(ours.dtype).eps * float(exact.abs().max())
    return factor * max(distance(ours, exact), least)


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from their defaults."""
    plain = type(config)()
    names = [f.name for f in dataclasses.fields(config)]
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(plain, n)}
