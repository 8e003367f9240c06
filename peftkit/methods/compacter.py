"""Compacter: bottleneck adapters whose projections are sums of Kronecker products, half of whose factors are shared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import ConfigError
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, Site, config
from peftkit.sublayers import ACTIVATIONS, SublayerAdapter, sublayer_sites


@config
class Compacter(Config):
    """Where the adapters go, their size, and the shape of the Kronecker factors."""

    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """"houlsby": behind attention and feed-forward; "pfeiffer": once a block, behind the feed-forward."""
    bottleneck_size: int = 24
    """Width of the bottleneck, a multiple of phm_dim."""
    phm_dim: int = 4
    """Number of Kronecker products in a projection, and the side of their shared factors; divides the model's width."""
    phm_rank: int = 1
    """Rank of the factors that are not shared, at least 1."""
    non_linearity: str = "gelu_new"
    """relu, gelu, gelu_new, silu, swish, tanh, leakyrelu or linear."""
    dropout: float = 0.0
    """Probability of dropping an element of the bottleneck in training, in [0, 1)."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range or contradicts another."""
        self.require(self.phm_dim >= 1, f"phm_dim must be at least 1, found {self.phm_dim}")
        self.require(self.phm_rank >= 1, f"phm_rank must be at least 1, found {self.phm_rank}")
        self.require(
            self.bottleneck_size >= 1 and self.bottleneck_size % self.phm_dim == 0,
            f"bottleneck_size must be a positive multiple of phm_dim={self.phm_dim}, found {self.bottleneck_size}",
        )
        self.require(
            self.non_linearity in ACTIVATIONS,
            f"non_linearity must be one of {', '.join(ACTIVATIONS)}, found {self.non_linearity!r}",
        )
        self.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), found {self.dropout}")


class SharedFactors(Adapter):
    """A_1 ... A_n, each (n, n): the factors that every projection of every adapter uses."""

    advises = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.phm_rule = nn.Parameter(torch.empty(size, size, size))


def phm_matrix(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_i A_i ⊗ (s_i t_i), the matrix of a projection of row vectors: y = x W.

    Args:
        rule: (n, n, n), A_1 ... A_n.
        left: (n, in / n, r), s_1 ... s_n.
        right: (n, r, out / n), t_1 ... t_n.

    Returns:
        (in, out).

    Paper: Mahabadi et al. 2021, arXiv:2106.04647, equations 4 and 5.
    """
    n, size = rule.shape[0], left.shape[1]
    return torch.einsum("iab,ipq->apbq", rule, left @ right).reshape(n * size, n * right.shape[2])


class CompacterAdapter(SublayerAdapter):
    """A(x) = f(x W_down + b_down) W_up + b_up, each W a sum of Kronecker products."""

    def __init__(self, site: Site, cfg: Compacter, shared: nn.Module | None) -> None:
        super().__init__(site, shared)
        n, rank, size = cfg.phm_dim, cfg.phm_rank, cfg.bottleneck_size
        self.activation = cfg.non_linearity
        self.dropout = cfg.dropout
        self.down_left = nn.Parameter(torch.empty(n, site.in_features // n, rank))
        self.down_right = nn.Parameter(torch.empty(n, rank, size // n))
        self.down_bias = nn.Parameter(torch.empty(size))
        self.up_left = nn.Parameter(torch.empty(n, size // n, rank))
        self.up_right = nn.Parameter(torch.empty(n, rank, site.out_features // n))
        self.up_bias = nn.Parameter(torch.empty(site.out_features))

    def update(self, x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        shared = self._shared[0]
        assert isinstance(shared, SharedFactors)
        rule = shared.phm_rule.to(self.down_left.device)
        down = phm_matrix(rule, self.down_left, self.down_right).to(x.dtype)
        up = phm_matrix(rule, self.up_left, self.up_right).to(x.dtype)
        inner = ACTIVATIONS[self.activation](F.linear(x, down.t(), self.down_bias.to(x.dtype)))
        if self.dropout:
            inner = F.dropout(inner, self.dropout, self.training)
        return F.linear(inner, up.t(), self.up_bias.to(x.dtype))


def sites(model: nn.Module, cfg: Compacter) -> list[Site]:
    """The places of the placement.

    Raises:
        ConfigError: phm_dim does not divide the width of a named place.
    """
    found = sublayer_sites(model, METHOD, cfg, cfg.placement)
    wrong = [site for site in found if site.out_features % cfg.phm_dim]
    if wrong and (cfg.target_modules is not None or len(wrong) == len(found)):
        raise ConfigError(
            f"phm_dim={cfg.phm_dim} must divide the width {wrong[0].out_features} at {wrong[0].path}; choose a divisor "
            "of that width, or leave the module out of target_modules"
        )
    return [site for site in found if site not in wrong]


def parameter_count(site: Site, cfg: Compacter) -> int:
    """r (in + m) + m for the down-projection, r (m + out) + out for the up-projection."""
    size, rank = cfg.bottleneck_size, cfg.phm_rank
    return rank * (site.in_features + 2 * size + site.out_features) + size + site.out_features


def shared_count(sites: Sequence[Site], cfg: Compacter) -> int:
    """n³."""
    return int(cfg.phm_dim**3)


def shared(sites: Sequence[Site], cfg: Compacter) -> Adapter:
    """The factors that all adapters use."""
    return SharedFactors(cfg.phm_dim)


def with_units(cfg: Compacter, value: int) -> Compacter:
    """The config with a bottleneck of `value` times phm_dim, of which its size must be a multiple."""
    return dataclasses.replace(cfg, bottleneck_size=value * cfg.phm_dim)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: Compacter) -> None:
    """Down-projections of variance 1 / in, up-projections of zero, so that the model starts as it was.

    The authors draw every factor from N(0, 0.0001²), which starts near the identity, with gradients of that size.
    """
    assert isinstance(adapter, CompacterAdapter)
    nn.init.normal_(adapter.down_left, std=1 / math.sqrt(site.in_features))
    nn.init.normal_(adapter.down_right, std=1 / math.sqrt(cfg.phm_rank))
    nn.init.normal_(adapter.up_left, std=1 / math.sqrt(cfg.phm_rank))
    nn.init.zeros_(adapter.up_right)
    nn.init.zeros_(adapter.down_bias)
    nn.init.zeros_(adapter.up_bias)


@torch.no_grad()
def initialise_shared(adapter: Adapter, model: nn.Module, sites: Sequence[Site], cfg: Compacter) -> None:
    """Entries of variance 1 / n, so that a sum of n products keeps the variance of the other factors."""
    assert isinstance(adapter, SharedFactors)
    nn.init.normal_(adapter.phm_rule, std=1 / math.sqrt(cfg.phm_dim))


METHOD = Method(
    name="compacter",
    title="Compacter",
    summary="Bottleneck adapters made of Kronecker products, half of whose factors all blocks share.",
    paper=Paper(
        title="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        authors="Mahabadi et al.",
        year=2021,
        arxiv="2106.04647",
    ),
    config=Compacter,
    attach=Attach.MODULE,
    default_targets=("attention.output", "ffn.down"),
    sites=sites,
    parameter_count=parameter_count,
    adapter=CompacterAdapter,
    initialise=initialise,
    shared=shared,
    shared_count=shared_count,
    initialise_shared=initialise_shared,
    mergeable=False,
    quantized_base=True,
    knob=Knob(field="bottleneck_size", apply=with_units),
)
