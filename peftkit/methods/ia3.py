"""(IA)³: vectors that scale keys, values and the hidden units of the feed-forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import backbones, targets
from peftkit.spec import Adapter, Attach, Config, Method, Paper, PeftFormat, Site, config

FEEDFORWARD_SLOT = "ffn.down"


@config
class IA3(Config):
    """Where the scaling vectors go."""

    feedforward_modules: Sequence[str] | str | None = None
    """Suffixes or one regular expression of the targets whose input is scaled; None: the feed-forward's last one."""
    init_ia3_weights: bool = True
    """Start from ones; False: start from normal noise."""


class IA3Adapter(Adapter):
    """h = l ∘ (W x + b), or W (l ∘ x) + b on a feed-forward module."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.feedforward = bool(site.facts["feedforward"])
        shape = (1, site.in_features) if self.feedforward else (site.out_features, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape))

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        scale = self._parameters["ia3_l"].view(-1)  # type: ignore[union-attr]  # set above
        if self.feedforward:
            return call(x * scale.to(x.dtype))  # type: ignore[no-any-return]  # a projection gives a tensor
        out: Tensor = call(x)
        scale = scale.to(out.dtype)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return out * scale
        return out.mul_(scale)

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = diag(l) W and b' = l ∘ b, or W' = W diag(l) on a feed-forward module."""
        scale = self.ia3_l.detach().to(base["weight"].dtype)
        out = {"weight": base["weight"] * scale}
        if "bias" in base and not self.feedforward:
            out["bias"] = base["bias"] * scale.view(-1)
        return out

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """The factors of the side that is scaled; the other side's stripes need them all."""
        if side != self.feedforward:
            return self
        return self._with(ia3_l=self.ia3_l[:, start:stop] if side else self.ia3_l[start:stop])


def sites(model: nn.Module, cfg: IA3) -> list[Site]:
    """The targets, each with the fact whether its input or its output is scaled.

    Raises:
        TargetError: a pattern matches nothing; for feedforward_modules, nothing among the targets.
    """
    found = targets.weight_sites(model, METHOD, cfg)
    paths = [site.path for site in found]
    chosen = cfg.feedforward_modules
    if chosen is None:
        known = backbones.family(model) is not None
        inner = set(backbones.slot_paths(model, FEEDFORWARD_SLOT)) if known else set()
    else:
        targets.check_each_matches(chosen, paths, "feedforward_modules")
        inner = {p for p in paths if targets.matches(p, chosen)}
    return [dataclasses.replace(site, facts={**site.facts, "feedforward": site.path in inner}) for site in found]


def parameter_count(site: Site, cfg: IA3) -> int:
    """One factor an output, or one an input on a feed-forward module."""
    return site.in_features if site.facts["feedforward"] else site.out_features


def build(site: Site, cfg: IA3, shared: nn.Module | None) -> IA3Adapter:
    """The adapter of one projection."""
    return IA3Adapter(site)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: IA3) -> None:
    """Ones, which change nothing, unless init_ia3_weights is False."""
    assert isinstance(adapter, IA3Adapter)
    if cfg.init_ia3_weights:
        nn.init.ones_(adapter.ia3_l)
    else:
        nn.init.normal_(adapter.ia3_l)


def write_config(plan: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields in which every feed-forward target stands in both lists, as peft demands."""
    feedforward = {site.path: bool(site.facts["feedforward"]) for site in plan.sites}
    names: list[str] = []
    inner: list[str] = []
    for suffix in plan.targets:
        hit = [path for path in feedforward if targets.suffix_match(path, suffix)]
        kinds = {feedforward[path] for path in hit}
        # One suffix for both kinds cannot say which is which: it is spelt out.
        spelt = [suffix] if len(kinds) == 1 else hit
        names += spelt
        inner += [s for s in spelt if feedforward.get(s, kinds == {True})]
    return {**fields, "target_modules": sorted(names), "feedforward_modules": sorted(inner)}


METHOD = Method(
    name="ia3",
    title="(IA)³",
    summary="One scaling vector for keys, for values and for the hidden units of each feed-forward.",
    paper=Paper(
        title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        authors="Liu et al.",
        year=2022,
        arxiv="2205.05638",
    ),
    config=IA3,
    attach=Attach.WEIGHT,
    default_targets=("attention.key", "attention.value", FEEDFORWARD_SLOT),
    sites=sites,
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    quantized_base=True,
    peft=PeftFormat(peft_type="IA3", write_config=write_config, ignored={"fan_in_fan_out": ()}),
)
