"""LoHa: an update that is the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import functional
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, PeftFormat, Site, adapter_dtype, config
from peftkit.targets import from_pattern


@config
class LoHa(Config):
    """Size, scale and start of the update."""

    r: int = 8
    """Rank of each of the two matrices, at least 1; their product reaches rank r²."""
    alpha: float = 8
    """The update is scaled by alpha / r."""
    rank_dropout: float = 0.0
    """Probability of dropping an output row of the update in training, in [0, 1)."""
    module_dropout: float = 0.0
    """Probability of dropping the whole update in training, in [0, 1)."""
    init_weights: bool = True
    """Start the update at zero; False: all factors random."""
    rank_pattern: Mapping[str, int] | None = None
    """Pattern for the end of a module path -> its rank instead of r."""
    alpha_pattern: Mapping[str, float] | None = None
    """Pattern for the end of a module path -> its alpha."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range."""
        self.require(self.r >= 1, f"r must be at least 1, found {self.r}")
        for name in ("rank_dropout", "module_dropout"):
            self.require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), found {getattr(self, name)}")


def _rank(site: Site, cfg: LoHa) -> int:
    return int(from_pattern(cfg.rank_pattern, site.path, cfg.r))


class LohaAdapter(Adapter):
    """h = W x + scale * ((A₁ B₁) ∘ (A₂ B₂)) x, with A (out, r) and B (r, in).

    The product has rank r²: row o of its left factor is A₁[o] ⊗ A₂[o], column i of its right one B₁[:, i] ⊗ B₂[:, i].
    The two thin products are used while they are cheaper than the matrix itself, r² (in + out) < in out.
    """

    additive = True

    def __init__(self, site: Site, cfg: LoHa) -> None:
        super().__init__()
        rank = _rank(site, cfg)
        self.scale = float(from_pattern(cfg.alpha_pattern, site.path, cfg.alpha)) / rank
        self.rank_dropout, self.module_dropout = cfg.rank_dropout, cfg.module_dropout
        self.thin = rank * rank * (site.in_features + site.out_features) < site.in_features * site.out_features
        self.hada_w1_a = nn.Parameter(torch.empty(site.out_features, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, site.in_features))
        self.hada_w2_a = nn.Parameter(torch.empty(site.out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, site.in_features))
        self._derived = functional.Derived()

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = self._parameters
        return own["hada_w1_a"], own["hada_w1_b"], own["hada_w2_a"], own["hada_w2_b"]  # type: ignore[return-value]

    def thin_factors(self) -> tuple[Tensor, Tensor]:
        """Right (r², in) and left (out, r²) factor of the unscaled update."""
        left_1, right_1, left_2, right_2 = self._factors()
        down = (right_1[:, None, :] * right_2[None, :, :]).flatten(0, 1)
        up = (left_1[:, :, None] * left_2[:, None, :]).flatten(1)
        return down, up

    def matrix(self) -> Tensor:
        """The scaled update, (out, in)."""
        left_1, right_1, left_2, right_2 = self._factors()
        return self.scale * ((left_1 @ right_1) * (left_2 @ right_2))

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        if self._one_product_is_cheaper(x) and (plain := functional.plain_linear(module, call, x)) is not None:
            weight, bias = plain
            return F.linear(x, weight + self.matrix().to(x.dtype), bias)
        out: Tensor = call(x)
        dtype = x.dtype
        make = self._cast_factors if self.thin else self._cast_matrix
        derived = self._derived.get(self.training, dtype, self._factors(), lambda: make(dtype))
        if self.training and (self.rank_dropout or self.module_dropout):
            kept = functional.kept_rows(out.shape[-1], out, self.rank_dropout, self.module_dropout, True)[:, None]
            derived = (derived[0], derived[1] * kept) if self.thin else derived * kept
        if self.thin:
            return functional.add_low_rank(out, x, derived[0], derived[1], self.scale)
        return out + F.linear(x, derived).to(out.dtype)

    def _one_product_is_cheaper(self, x: Tensor) -> bool:
        """Whether to add the update to the weight for this call: many rows, no gradients, and nothing lost in rounding.

        By multiplications: r² (in + out) a row for the thin factors, against 2 r in * out, and some passes over the
        weight, for the sum.
        """
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if not exact or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        rank, inside = self.hada_w1_b.shape
        outside = self.hada_w1_a.shape[0]
        rows = x.numel() // inside
        dropping = self.training and (self.rank_dropout or self.module_dropout)
        return not dropping and rows * rank * rank * (inside + outside) > (2 * rank + 8) * inside * outside

    def _cast_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        down, up = self.thin_factors()
        return down.to(dtype), up.to(dtype)

    def _cast_matrix(self, dtype: torch.dtype) -> Tensor:
        return self.matrix().to(dtype)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The factors of rank r²; None where r² is no less than a side of the weight."""
        rank, inside = self.hada_w1_b.shape
        if rank * rank >= min(inside, self.hada_w1_a.shape[0]):
            return None
        down, up = (f.detach() for f in self.thin_factors())
        return down.to(adapter_dtype(down.dtype)), self.scale * up.to(adapter_dtype(up.dtype))

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W + scale * (A₁ B₁) ∘ (A₂ B₂)."""
        wide = base["weight"].dtype
        left_1, right_1, left_2, right_2 = (t.detach().to(wide) for t in self._factors())
        return {"weight": base["weight"] + self.scale * ((left_1 @ right_1) * (left_2 @ right_2))}

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Columns of both right factors, or rows of both left ones."""
        if side:
            return self._with(hada_w1_b=self.hada_w1_b[:, start:stop], hada_w2_b=self.hada_w2_b[:, start:stop])
        return self._with(hada_w1_a=self.hada_w1_a[start:stop], hada_w2_a=self.hada_w2_a[start:stop])


def parameter_count(site: Site, cfg: LoHa) -> int:
    """2 r (in + out)."""
    return 2 * _rank(site, cfg) * (site.in_features + site.out_features)


def build(site: Site, cfg: LoHa, shared: nn.Module | None) -> LohaAdapter:
    """The adapter of one projection."""
    return LohaAdapter(site, cfg)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: LoHa) -> None:
    """Kaiming-uniform factors, the last one zero unless init_weights is False."""
    assert isinstance(adapter, LohaAdapter)
    for factor in adapter._factors():
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    if cfg.init_weights:
        nn.init.zeros_(adapter.hada_w2_b)


METHOD = Method(
    name="loha",
    title="LoHa",
    summary="The elementwise product of two low-rank matrices beside each adapted projection.",
    paper=Paper(
        title="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        authors="Hyeon-Woo et al.",
        year=2021,
        arxiv="2108.06098",
    ),
    config=LoHa,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    quantized_base=True,
    knob=Knob(field="r"),
    # Effective convolutions concern kernels only; projections have none.
    peft=PeftFormat(peft_type="LOHA", ignored={"use_effective_conv2d": ()}),
)
