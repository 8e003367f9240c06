"""LoKr: an update that is the Kronecker product of a small matrix and a larger, often low-rank one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import backbones, functional
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, PeftFormat, Site, adapter_dtype, config
from peftkit.targets import from_pattern

SMALL = 1 << 14
"""Elements up to which the product of the second matrix's factors is formed: one product then beats two."""


@config
class LoKr(Config):
    """Size, shape, scale and start of the update."""

    r: int = 8
    """Rank of the factored matrices, at least 1; a matrix whose larger side is at most 2 r is stored whole."""
    alpha: float = 8
    """The update is scaled by alpha / r."""
    decompose_both: bool = False
    """Whether the first matrix may be factored too."""
    decompose_factor: int = -1
    """Side of the first matrix, where it divides the features; -1: the divisor nearest to the square root."""
    rank_dropout: float = 0.0
    """Probability of dropping an output row of the update in training, in [0, 1)."""
    rank_dropout_scale: bool = False
    """Whether rows that are kept are scaled up by the share of kept rows."""
    module_dropout: float = 0.0
    """Probability of dropping the whole update in training, in [0, 1)."""
    init_weights: bool | Literal["lycoris"] = True
    """True: first matrix zero; "lycoris": second matrix zero; False: all random."""
    rank_pattern: Mapping[str, int] | None = None
    """Pattern for the end of a module path -> its rank instead of r."""
    alpha_pattern: Mapping[str, float] | None = None
    """Pattern for the end of a module path -> its alpha."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range."""
        self.require(self.r >= 1, f"r must be at least 1, found {self.r}")
        self.require(
            self.decompose_factor == -1 or self.decompose_factor >= 1,
            f"decompose_factor must be -1 or at least 1, found {self.decompose_factor}",
        )
        self.require(
            self.init_weights in (True, False, "lycoris"),
            f"init_weights must be True, False or 'lycoris', found {self.init_weights!r}",
        )
        for name in ("rank_dropout", "module_dropout"):
            self.require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), found {getattr(self, name)}")


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of `size`: `factor` first where it divides, else the largest divisor up to it and the square root.

    Only a `factor` that divides can be the larger of the two.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(d for d in range(limit, 0, -1) if size % d == 0)
    return small, size // small


def _rank(site: Site, cfg: LoKr) -> int:
    return int(from_pattern(cfg.rank_pattern, site.path, cfg.r))


def shapes(site: Site, cfg: LoKr) -> dict[str, tuple[int, int]]:
    """Names and shapes of the stored matrices."""
    rank = _rank(site, cfg)
    in_1, in_2 = split(site.in_features, cfg.decompose_factor)
    out_1, out_2 = split(site.out_features, cfg.decompose_factor)
    found: dict[str, tuple[int, int]] = {}
    for name, out, inside, may_factor in (("lokr_w1", out_1, in_1, cfg.decompose_both), ("lokr_w2", out_2, in_2, True)):
        if may_factor and rank < max(out, inside) / 2:
            found |= {f"{name}_a": (out, rank), f"{name}_b": (rank, inside)}
        else:
            found[name] = (out, inside)
    return found


class LokrAdapter(Adapter):
    """h = W x + scale * (W₁ ⊗ W₂) x, with W₁ (l, m), W₂ (k, n), l k = out, m n = in.

    With x as an (m, n) matrix X, (W₁ ⊗ W₂) x is W₁ X W₂ᵀ: two small products, and never an (out, in) matrix.
    """

    additive = True

    def __init__(self, site: Site, cfg: LoKr) -> None:
        super().__init__()
        self.scale = float(from_pattern(cfg.alpha_pattern, site.path, cfg.alpha)) / _rank(site, cfg)
        self.rank_dropout, self.module_dropout = cfg.rank_dropout, cfg.module_dropout
        self.rescale = cfg.rank_dropout_scale
        for name, shape in shapes(site, cfg).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.sides = *split(site.out_features, cfg.decompose_factor), *split(site.in_features, cfg.decompose_factor)
        self.whole = "lokr_w2" in self._parameters or self.sides[1] * self.sides[3] <= SMALL
        self._derived = functional.Derived()

    def _matrix(self, name: str) -> Tensor:
        own = self._parameters
        if name in own:
            return own[name]  # type: ignore[return-value]  # registered above
        return own[f"{name}_a"] @ own[f"{name}_b"]  # type: ignore[operator]  # registered above

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Scaled W₁, and W₂ or its two factors, in `dtype`."""
        first = (self.scale * self._matrix("lokr_w1")).to(dtype)
        if self.whole:
            return first, self._matrix("lokr_w2").to(dtype)
        own = self._parameters
        return first, own["lokr_w2_b"].to(dtype), own["lokr_w2_a"].to(dtype)  # type: ignore[union-attr]  # set above

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        out: Tensor = call(x)
        dtype = x.dtype
        sources: list[Tensor] = list(self._parameters.values())  # type: ignore[arg-type]  # none is None
        first, *second = self._derived.get(self.training, dtype, sources, lambda: self._matrices(dtype))
        left, k, m, n = self.sides
        inner = x.reshape(-1, m, n)
        for factor in second:
            inner = F.linear(inner, factor)
        if self.training and (self.rank_dropout or self.module_dropout):
            update = torch.matmul(first, inner).reshape(out.shape)
            kept = functional.kept_rows(left * k, out, self.rank_dropout, self.module_dropout, self.rescale)
            return out + update.to(out.dtype) * kept
        in_place = first.dtype == inner.dtype == out.dtype and out.is_contiguous()
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not in_place:
            return out + torch.matmul(first, inner).reshape(out.shape).to(out.dtype)
        rows = inner.shape[0]
        if rows == 1:
            out.view(left, k).addmm_(first, inner[0])
        else:
            out.view(rows, left, k).baddbmm_(first.expand(rows, left, m), inner)
        return out

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """R₁ ⊗ R₂ and scale * L₁ ⊗ L₂, as (L₁ R₁) ⊗ (L₂ R₂) is their product; None where their rank is no less than a
        side of the weight.
        """
        (left_1, right_1), (left_2, right_2) = (self._split(name) for name in ("lokr_w1", "lokr_w2"))
        up_1, up_2, down_1, down_2 = left_1.shape[0], left_2.shape[0], right_1.shape[1], right_2.shape[1]
        if right_1.shape[0] * right_2.shape[0] >= min(up_1 * up_2, down_1 * down_2):
            return None
        return torch.kron(right_1, right_2), self.scale * torch.kron(left_1, left_2)

    def _split(self, name: str) -> tuple[Tensor, Tensor]:
        """A left and a right factor of a matrix: its own, or itself and the identity of its smaller side."""
        own = {n: t.detach().to(adapter_dtype(t.dtype)) for n, t in self._parameters.items() if t is not None}
        if name not in own:
            return own[f"{name}_a"], own[f"{name}_b"]
        whole = own[name]
        identity = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
        return (whole, identity) if whole.shape[1] <= whole.shape[0] else (identity, whole)

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W + scale * W₁ ⊗ W₂."""
        wide = base["weight"].dtype
        own = {name: t.detach().to(wide) for name, t in self._parameters.items() if t is not None}
        first, second = (
            own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
        )
        return {"weight": base["weight"] + self.scale * torch.kron(first, second)}


def parameter_count(site: Site, cfg: LoKr) -> int:
    """l m or r (l + m), plus k n or r (k + n)."""
    return sum(rows * columns for rows, columns in shapes(site, cfg).values())


def build(site: Site, cfg: LoKr, shared: nn.Module | None) -> LokrAdapter:
    """The adapter of one projection."""
    return LokrAdapter(site, cfg)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: LoKr) -> None:
    """Kaiming-uniform matrices, one of the two zero unless init_weights is False."""
    own = adapter._parameters
    for tensor in own.values():
        assert tensor is not None
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    if cfg.init_weights is False:
        return
    names = ("lokr_w2", "lokr_w2_b") if cfg.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
    for name in names:
        if name in own:
            nn.init.zeros_(own[name])  # type: ignore[arg-type]  # none is None


def ranks(model: nn.Module) -> Sequence[int]:
    """Ranks up to that at which every second matrix is stored whole; larger ones add nothing."""
    sizes = {1}
    for path in backbones.linear_paths(model):
        weight = model.get_submodule(path).weight
        sizes |= {split(int(side), -1)[1] for side in weight.shape}  # type: ignore[union-attr]  # a projection has one
    return range(1, max(1, math.ceil(max(sizes) / 2)) + 1)


METHOD = Method(
    name="lokr",
    title="LoKr",
    summary="The Kronecker product of two small matrices, factored or whole, beside each adapted projection.",
    paper=Paper(
        title="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        authors="Yeh et al.",
        year=2023,
        arxiv="2309.14859",
    ),
    config=LoKr,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    quantized_base=True,
    knob=Knob(field="r", values=ranks),
    # Effective convolutions concern kernels only; projections have none.
    peft=PeftFormat(peft_type="LOKR", ignored={"use_effective_conv2d": ()}),
)
