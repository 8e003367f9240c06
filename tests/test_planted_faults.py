"""The conformance kit sees each planted fault: exactly the laws that it breaks fail, and all others hold."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.methods import lora
from peftkit.methods.lora import LoRA, LoraAdapter
from peftkit.spec import Adapter, Method, Site, config
from peftkit.targets import weight_sites
from peftkit.testing import BACKBONES, checks


@config
class Planted(LoRA):
    """LoRA's fields, with a default at which a forgotten scale shows."""

    r: int = 4
    """Rank of the update, at least 1."""
    lora_alpha: float = 12
    """The update is scaled by lora_alpha / r."""
    target_modules: tuple[str, ...] | str | None = ("q_proj",)
    """A square projection, so that a transposed update fits."""


class Sound(LoraAdapter):
    """Written plainly, so that each fault is one changed line."""

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        down, up = self.factors()
        dropped = F.dropout(x, self.dropout, self.training)
        inner = F.linear(dropped, down.to(x.dtype))
        return call(x) + self.scale * F.linear(inner, up.to(x.dtype))


def build(adapter: type[LoraAdapter], site: Site, cfg: Any, shared: nn.Module | None) -> Adapter:
    return adapter(site, cfg)


def planted(adapter: type[LoraAdapter] = Sound, **changes: Any) -> Method:
    changes = {"adapter": functools.partial(build, adapter), **changes}
    return dataclasses.replace(lora.METHOD, name="planted", config=Planted, peft=None, **changes)


def broken(method: Method, backbone: str = "llama", *, compiled: bool = False) -> set[str]:
    """Names of the checks that fail, without "check_"; compiling, which is slow, only when asked for."""
    found = set()
    for check in checks(method):
        if not check.applies(BACKBONES[backbone]) or (check.name == "check_compile" and not compiled):
            continue
        try:
            check(BACKBONES[backbone])
        except Exception:
            found.add(check.name.removeprefix("check_"))
    return found


class ReadsCodes(Sound):
    """Adds the mean of the weight as it is stored, which is 0 for the weights of these models within rounding."""

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        out = super().forward(module, call, x)
        stored: Any = module.weight
        return out if stored.is_floating_point() else out + stored.float().mean().to(out.dtype)


# The faults ---------------------------------------------------------------------------------------------------------


class WrongSign(Sound):
    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": base["weight"] - self.delta().to(base["weight"].dtype)}


class WrongAxis(Sound):
    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": base["weight"] + self.delta().T.to(base["weight"].dtype)}


class ForgottenScale(Sound):
    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": base["weight"] + (self.delta() / self.scale).to(base["weight"].dtype)}


class RoundedMerge(Sound):
    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": base["weight"] + self.delta().bfloat16().to(base["weight"].dtype)}


class NoMerge(Sound):
    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class SecretTensor(Sound):
    def __init__(self, site: Site, cfg: Any) -> None:
        super().__init__(site, cfg)
        self.secret = nn.Parameter(torch.zeros(3))

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        return super().forward(module, call, x) + self.secret.sum().to(x.dtype) * 0.01

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class IdleTensor(Sound):
    def __init__(self, site: Site, cfg: Any) -> None:
        super().__init__(site, cfg)
        self.idle = nn.Parameter(torch.zeros(3))


class UnfrozenBase(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            module._parameters["weight"].requires_grad_(True)  # type: ignore[union-attr]
        return super().forward(module, call, x)


class AlwaysDrops(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        down, up = self.factors()
        inner = F.linear(F.dropout(x, self.dropout), down.to(x.dtype))
        return call(x) + self.scale * F.linear(inner, up.to(x.dtype))


class NeverDrops(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        down, up = self.factors()
        return call(x) + self.scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


class ForgetsWhenSaved(Sound):
    def tensors(self) -> dict[str, Tensor]:
        return {k: t for k, t in super().tensors().items() if not k.startswith("lora_A")}


class MovesBase(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        with torch.no_grad():
            module._parameters["weight"].mul_(1.001)  # type: ignore[union-attr]
        return super().forward(module, call, x)


class LeavesAttribute(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        module.last_rows = x.shape[0]  # type: ignore[assignment]
        return super().forward(module, call, x)


class LooksAtData(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        return super().forward(module, call, x) if x.sum().item() < 1e9 else call(x)


class KeepsFloat32(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        down, up = self.factors()
        dropped = F.dropout(x, self.dropout, self.training)
        return call(x) + self.scale * (dropped.to(down.dtype) @ down.T @ up.T)


class CannotCast(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        down, up = self.factors()
        out: Tensor = call(x)
        rows = F.dropout(x, self.dropout, self.training).reshape(-1, x.shape[-1])
        return torch.addmm(out.reshape(-1, out.shape[-1]), rows @ down.T, self.scale * up.T).view(out.shape)


class RemembersFirst(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().forward(module, call, x)
        if "delta_once" not in self.__dict__:
            self.__dict__["delta_once"] = self.delta()
        return call(x) + F.linear(x, self.__dict__["delta_once"].to(x.dtype))


class CopiesItself(Sound):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        return self


class MixesTokens(Sound):
    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        mixed = super().forward(module, lambda _: torch.zeros(()), x.mean(dim=1, keepdim=True))
        return super().forward(module, call, x) + mixed


class CountsOnRecompute(Sound):
    """Computes something else whenever a recomputed forward pass comes round."""

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        out = super().forward(module, call, x)
        if not (self.training and torch.is_grad_enabled()):
            return out
        calls = self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return out * (1.0 if calls % 2 else 1.5)


class SharesWithTwin(Sound):
    """Two adapters at one module share a tensor."""

    held: ClassVar[WeakKeyDictionary[nn.Module, nn.Parameter]] = WeakKeyDictionary()

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        self.lora_B = self.held.setdefault(module, self.lora_B)
        return super().forward(module, call, x)


def one_too_many(site: Site, cfg: Any) -> int:
    return lora.parameter_count(site, cfg) + 1


def with_secret(site: Site, cfg: Any) -> int:
    return lora.parameter_count(site, cfg) + 3


def drawing_sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    torch.rand(1)
    return weight_sites(model, lora.METHOD, cfg)


def writing_sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    model.last_plan = "made"  # type: ignore[assignment]
    return weight_sites(model, lora.METHOD, cfg)


def freezing_sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    model.requires_grad_(False)
    return weight_sites(model, lora.METHOD, cfg)


def random_start(adapter: Adapter, module: nn.Module, site: Site, cfg: Any) -> None:
    lora.initialise(adapter, module, site, cfg)
    with torch.no_grad():
        adapter.lora_B.fill_(0.1)  # type: ignore[operator, union-attr]


def unseeded_start(adapter: Adapter, module: nn.Module, site: Site, cfg: Any) -> None:
    lora.initialise(adapter, module, site, cfg)
    with torch.no_grad():
        adapter.lora_A.mul_(random.random())  # type: ignore[operator, union-attr]


def base_moving_start(adapter: Adapter, module: nn.Module, site: Site, cfg: Any) -> None:
    lora.initialise(adapter, module, site, cfg)
    with torch.no_grad():
        module.weight.mul_(1.1)  # type: ignore[operator, union-attr]


MERGE = {"merge_matches_forward"}
MERGES = {"merge_matches_forward", "merge_restores_every_bit"}

# What forward does beside the low-rank update is missing where rows are routed.
ROWS = "rows_match_their_adapters"
FAULTS: dict[str, tuple[Method, set[str]]] = {
    "wrong sign": (planted(WrongSign), MERGE),
    "wrong axis": (planted(WrongAxis), MERGE),
    "forgotten scale": (planted(ForgottenScale), MERGE),
    "update rounded before it is added": (planted(RoundedMerge), MERGE),
    "declared mergeable, is not": (planted(NoMerge), MERGES),
    "wrong count formula": (planted(parameter_count=one_too_many), {"count_matches_plan"}),
    "trained tensor not counted": (planted(SecretTensor, mergeable=False), {"count_matches_plan", ROWS}),
    "trained tensor not used": (
        planted(IdleTensor, parameter_count=with_secret),
        {"only_declared_parameters_train"},
    ),
    "unfrozen base": (planted(UnfrozenBase), {"only_declared_parameters_train"}),
    # What planning draws, loading draws too.
    "plan draws random numbers": (planted(sites=drawing_sites), {"plan_touches_nothing", "save_and_load"}),
    "plan writes on the model": (planted(sites=writing_sites), {"plan_touches_nothing"}),
    "plan freezes the model": (planted(sites=freezing_sites), {"plan_touches_nothing"}),
    "start is no identity": (planted(initialise=random_start), {"starts_as_identity"}),
    # The laws that compare two models of one seed see it as well.
    "start ignores the seed": (
        planted(initialise=unseeded_start),
        {"initialisation_is_seeded", "dropout", "new_values_are_seen", "two_adapters_are_independent"},
    ),
    "start moves the base": (
        planted(initialise=base_moving_start),
        {
            "starts_as_identity",
            "disabled_equals_base",
            "unwrap_restores_every_bit",
            "state_dict_keeps_base",
            "save_and_load",
            "two_adapters_are_independent",
            ROWS,
        },
    ),
    "dropout in evaluation": (planted(AlwaysDrops), {"dropout"}),
    "dropout never": (planted(NeverDrops), {"dropout"}),
    "saves too little": (planted(ForgetsWhenSaved), {"save_and_load"}),
    # No output is repeatable while the base moves; the laws named first are those that say so.
    "base changed in forward": (
        planted(MovesBase),
        {
            "disabled_equals_base",
            "training_step",
            "unwrap_restores_every_bit",
            "gradient_checkpointing",
            "inference_mode_leaves_no_trace",
            "low_precision_base",
            "modes",
            "new_values_are_seen",
            "two_adapters_are_independent",
            "copies_are_independent",
            ROWS,
        }
        | MERGES,
    ),
    "attribute left behind": (planted(LeavesAttribute), {"unwrap_restores_every_bit"}),
    # Merging is checked in bfloat16 too, where these two cannot run at all.
    "promotes to float32": (planted(KeepsFloat32), {"low_precision_base"} | MERGES),
    "does not cast": (planted(CannotCast), {"low_precision_base"} | MERGES),
    # Training a copy that remembers changes none of its outputs.
    "remembers stale values": (planted(RemembersFirst), {"new_values_are_seen", "copies_are_independent"}),
    "copies share tensors": (planted(CopiesItself), {"copies_are_independent"}),
    "adapters share tensors": (planted(SharesWithTwin), {"two_adapters_are_independent"}),
    # An update that depends on other rows is no change of the weight either.
    "mixes the tokens of a row": (
        planted(MixesTokens),
        {"padding_is_invisible", "generation_matches_forward", "generation_ignores_padding", ROWS} | MERGE,
    ),
    "reads codes as numbers": (planted(ReadsCodes), {"quantized_base"}),
    "recomputes something else": (planted(CountsOnRecompute), {"gradient_checkpointing"}),
}


def test_sound_method_keeps_every_law() -> None:
    assert broken(planted(), compiled=True) == set()


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_fault_breaks_the_laws_that_it_should_and_no_other(fault: str) -> None:
    method, expected = FAULTS[fault]
    # The law about quantized bases goes through every verb, and sees what the laws about one verb see.
    assert broken(method) - ({"quantized_base"} if expected != {"quantized_base"} else set()) == expected


def test_planted_graph_break_fails_the_compile_check() -> None:
    assert broken(planted(LooksAtData), compiled=True) == {"compile"}
