"""Bottleneck adapters: a small two-layer network in or beside each block; Houlsby, Pfeiffer and parallel placement.

Where the code deviates from the papers: the up-projection starts at zero by default, which makes the start exactly the
backbone (`init_weights="bert"` starts near it, as Houlsby et al. do). A Houlsby adapter stands directly behind the
projection, so that the sub-layer's dropout falls on its output. Where norms precede the sub-layers, a parallel adapter
reads the normalised input, as the feed-forward does, and a Pfeiffer adapter the residual sum, which no norm follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.selective import parameter_total
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, Site, config
from peftkit.sublayers import (
    ACTIVATIONS,
    Carrier,
    InputAdapter,
    Placement,
    SublayerAdapter,
    norm_sites,
    sublayer_sites,
)
from peftkit.whole import WholeModule

PAPER_ACTIVATION = {"houlsby": "gelu", "pfeiffer": "relu", "parallel": "relu"}
PAPER_SCALING = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0}


@config
class BottleneckAdapter(Config):
    """Where the bottleneck goes, its size, and the choices in which the papers differ."""

    placement: Placement = "houlsby"
    """"houlsby": behind attention and feed-forward; "pfeiffer" (arXiv:2005.00247): once a block; "parallel"
    (arXiv:2110.04366): beside the feed-forward."""
    bottleneck_size: int = 64
    """Width of the bottleneck, at least 1."""
    non_linearity: str | None = None
    """relu, gelu, gelu_new, silu, swish, tanh, leakyrelu or linear; None: gelu for houlsby, relu for the others."""
    scaling: float | Literal["learned"] | None = None
    """Factor of what is added, or "learned": a trained one that starts at 1; None: 4 for parallel, 1 for the others."""
    init_weights: Literal["mam_adapter", "bert"] = "mam_adapter"
    """"mam_adapter": the up-projection starts at zero, so the model starts as it was; "bert": both from N(0, 0.02²)."""
    residual: bool = True
    """Whether the adapter's input is added to its output; False for houlsby only, and not the identity at the start."""
    layer_norm: Literal["before", "after"] | None = None
    """A trained LayerNorm inside the adapter: before the down-projection or after the up-projection; None: none."""
    train_layer_norm: bool = False
    """Whether the norms of the adapted blocks are trained too, as Houlsby et al. do; not with pfeiffer."""
    dropout: float = 0.0
    """Probability of dropping an element of the bottleneck in training, in [0, 1)."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range or contradicts another."""
        self.require(self.bottleneck_size >= 1, f"bottleneck_size must be at least 1, found {self.bottleneck_size}")
        self.require(
            self.non_linearity is None or self.non_linearity in ACTIVATIONS,
            f"non_linearity must be one of {', '.join(ACTIVATIONS)}, found {self.non_linearity!r}",
        )
        self.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), found {self.dropout}")
        self.require(
            self.residual or self.placement == "houlsby",
            f"residual=False is for placement='houlsby'; a {self.placement} adapter is a summand of the residual sum",
        )
        self.require(
            not (self.train_layer_norm and self.placement == "pfeiffer"),
            "train_layer_norm goes with placement 'houlsby' or 'parallel'; Pfeiffer et al. keep the norms frozen",
        )


class Bottleneck(SublayerAdapter):
    """A(x) = scaling * (W_up f(W_down x + b_down) + b_up), with W_down (m, in) and W_up (out, m)."""

    def __init__(self, site: Site, cfg: BottleneckAdapter, shared: nn.Module | None) -> None:
        super().__init__(site, shared)
        size = cfg.bottleneck_size
        self.skip = cfg.residual
        self.dropout = cfg.dropout
        self.norm_at = cfg.layer_norm
        self.activation = cfg.non_linearity or PAPER_ACTIVATION[cfg.placement]
        scaling = PAPER_SCALING[cfg.placement] if cfg.scaling is None else cfg.scaling
        self.scale = 1.0 if scaling == "learned" else float(scaling)
        self.down = nn.Parameter(torch.empty(size, site.in_features))
        self.down_bias = nn.Parameter(torch.empty(size))
        self.up = nn.Parameter(torch.empty(site.out_features, size))
        self.up_bias = nn.Parameter(torch.empty(site.out_features))
        self.learned_scale = nn.Parameter(torch.empty(())) if scaling == "learned" else None
        width = site.in_features if cfg.layer_norm == "before" else site.out_features
        self.norm = nn.Parameter(torch.empty(width)) if cfg.layer_norm else None
        self.norm_bias = nn.Parameter(torch.empty(width)) if cfg.layer_norm else None

    def update(self, x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        kind = x.dtype
        if self.norm_at == "before":
            x = self._normalise(x)
        inner = ACTIVATIONS[self.activation](F.linear(x, self.down.to(kind), self.down_bias.to(kind)))
        if self.dropout:
            inner = F.dropout(inner, self.dropout, self.training)
        out = F.linear(inner, self.up.to(kind), self.up_bias.to(kind))
        if self.norm_at == "after":
            out = self._normalise(out)
        if self.learned_scale is not None:
            return out * self.learned_scale.to(out.dtype)
        return out if self.scale == 1 else self.scale * out

    def _normalise(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        assert self.norm_bias is not None
        return F.layer_norm(x, self.norm.shape, self.norm.to(x.dtype), self.norm_bias.to(x.dtype))


def sites(model: nn.Module, cfg: BottleneckAdapter) -> list[Site]:
    """The places of the placement, and the norms beside them where those are trained."""
    found = sublayer_sites(model, METHOD, cfg, cfg.placement, with_norms=cfg.train_layer_norm)
    return found + (norm_sites(model, found) if cfg.train_layer_norm else [])


def parameter_count(site: Site, cfg: BottleneckAdapter) -> int:
    """m (in + out) + m + out, plus a scale, plus gain and bias of a LayerNorm."""
    if site.role == "parameters":
        return parameter_total(site, cfg)
    if site.role == "input":
        return 0
    size = cfg.bottleneck_size
    count = size * (site.in_features + site.out_features) + size + site.out_features
    norm = {None: 0, "before": site.in_features, "after": site.out_features}[cfg.layer_norm]
    return count + int(cfg.scaling == "learned") + 2 * norm


def build(site: Site, cfg: BottleneckAdapter, shared: nn.Module | None) -> Adapter:
    """The bottleneck, a copy of a norm, or what hands the input of a feed-forward on."""
    if site.role == "parameters":
        return WholeModule(site.parameters)
    return InputAdapter(site, shared) if site.role == "input" else Bottleneck(site, cfg, shared)


def shared(sites: Sequence[Site], cfg: BottleneckAdapter) -> Adapter | None:
    """What takes inputs from one projection to another, where a feed-forward is no module of its own."""
    return Carrier() if any(site.role == "input" for site in sites) else None


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: BottleneckAdapter) -> None:
    """Fills the projections as `init_weights` says; biases, norms and the learned scale start neutral."""
    if isinstance(adapter, WholeModule):
        adapter.copy_from(module)
    if not isinstance(adapter, Bottleneck):
        return
    if cfg.init_weights == "bert":
        nn.init.normal_(adapter.down, std=0.02)
        nn.init.normal_(adapter.up, std=0.02)
    else:
        nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5))
        nn.init.zeros_(adapter.up)
    nn.init.zeros_(adapter.down_bias)
    nn.init.zeros_(adapter.up_bias)
    for ones in (adapter.learned_scale, adapter.norm):
        if ones is not None:
            nn.init.ones_(ones)
    if adapter.norm_bias is not None:
        nn.init.zeros_(adapter.norm_bias)


METHOD = Method(
    name="bottleneck",
    title="Bottleneck adapter",
    summary="A small two-layer network behind or beside the sub-layers of each block.",
    paper=Paper(
        title="Parameter-Efficient Transfer Learning for NLP", authors="Houlsby et al.", year=2019, arxiv="1902.00751"
    ),
    config=BottleneckAdapter,
    attach=Attach.MODULE,
    default_targets=("attention.output", "ffn.down"),
    sites=sites,
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    shared=shared,
    mergeable=False,
    quantized_base=True,
    knob=Knob(field="bottleneck_size"),
)
