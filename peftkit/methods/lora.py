"""LoRA: a low-rank update beside frozen projections; with rsLoRA scaling, DoRA and the usual initialisations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import functional
from peftkit.errors import ConfigError, MergeError
from peftkit.quantization import is_quantized, original_class, weights_of
from peftkit.spec import (
    Adapter,
    Attach,
    Config,
    Knob,
    Method,
    Paper,
    PeftFormat,
    Site,
    adapter_dtype,
    config,
)
from peftkit.targets import from_pattern

Init = Literal["gaussian", "orthogonal", "pissa", "olora"]


@config
class LoRA(Config):
    """Size, scale and start of the low-rank update."""

    r: int = 8
    """Rank of the update, at least 1."""
    lora_alpha: float = 8
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: float = 0.0
    """Probability of dropping an input element of the update in training, in [0, 1)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: bool | Init = True
    """True: B = 0; False: random B; "gaussian", "orthogonal", "pissa" (arXiv:2404.02948) or "olora" (2406.01775)."""
    lora_bias: bool = False
    """Whether B has a bias."""
    rank_pattern: Mapping[str, int] | None = None
    """Pattern for the end of a module path -> its rank instead of r."""
    alpha_pattern: Mapping[str, float] | None = None
    """Pattern for the end of a module path -> its lora_alpha."""

    def validate(self) -> None:
        """Raises ConfigError unless r, lora_dropout and init_lora_weights are in range and fit together."""
        self.require(self.r >= 1, f"r must be at least 1, found {self.r}")
        self.require(0 <= self.lora_dropout < 1, f"lora_dropout must lie in [0, 1), found {self.lora_dropout}")
        known = (True, False, "gaussian", "orthogonal", "pissa", "olora")
        self.require(
            self.init_lora_weights in known,
            f"init_lora_weights must be one of {known}, found {self.init_lora_weights!r}",
        )
        self.require(
            not (self.lora_bias and self.use_dora), "lora_bias and use_dora exclude each other, as in Hugging Face peft"
        )


_DISK = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


def _rank(site: Site, cfg: LoRA) -> int:
    return int(from_pattern(cfg.rank_pattern, site.path, cfg.r))


def _scale(site: Site, cfg: LoRA) -> float:
    alpha = float(from_pattern(cfg.alpha_pattern, site.path, cfg.lora_alpha))
    rank = _rank(site, cfg)
    return alpha / math.sqrt(rank) if cfg.use_rslora else alpha / rank


def _is_embedding(site: Site) -> bool:
    return site.role == "embedding"


class LoraAdapter(Adapter):
    """h = W x + scale * B A x, with A (r, in) and B (out, r)."""

    additive = True

    start_A: Tensor
    start_B: Tensor

    def __init__(self, site: Site, cfg: LoRA) -> None:
        super().__init__()
        rank = _rank(site, cfg)
        self.scale = _scale(site, cfg)
        self.dropout = cfg.lora_dropout
        self.moves_base = self.start_from_weight = cfg.init_lora_weights in ("pissa", "olora")
        self.lora_A = nn.Parameter(torch.empty(rank, site.in_features))
        self.lora_B = nn.Parameter(torch.empty(site.out_features, rank))
        self.lora_bias = nn.Parameter(torch.empty(site.out_features)) if cfg.lora_bias else None
        if self.moves_base:
            self.register_buffer("start_A", torch.empty(rank, site.in_features), persistent=False)
            self.register_buffer("start_B", torch.empty(site.out_features, rank), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B; for a start taken from the weight, with that start subtracted, at twice the rank."""
        if not self.moves_base:
            return self._parameters["lora_A"], self._parameters["lora_B"]  # type: ignore[return-value]  # set above
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, -self.start_B), dim=1)

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        down, up = self.factors()
        if self.dropout and self.training:
            out = functional.add_low_rank(call(x), F.dropout(x, self.dropout), down, up, self.scale)
        elif (layer := functional.quantized_layer(module, call)) is not None:
            out = layer.with_low_rank(x, down, up, self.scale)
        elif functional.plain_gradients(x) and (plain := functional.plain_linear(module, call, x)) is not None:
            out = functional.lora_linear(x, *plain, down, up, self.scale)
        elif (plain := functional.one_pass(module, call, x)) is not None:
            out = functional.in_one_pass(x, *plain, down, up, self.scale)
        else:
            out = functional.add_low_rank(call(x), x, down, up, self.scale)
        bias = self._parameters.get("lora_bias")
        return out if bias is None else out + self.scale * bias.to(out.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """A, B and what belongs to them, by the names that the folder uses."""
        return {_DISK.get(n, n): p for n, p in self._parameters.items() if p is not None}

    def delta(self) -> Tensor:
        """The update of the weight, (out, in), float32 or float64."""
        down, up = self.factors()
        wide = torch.float64 if down.dtype == torch.float64 else torch.float32
        return self.scale * (up.detach().to(wide) @ down.detach().to(wide))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A and scale * B; None with lora_bias, which is added to the output and not to the weight."""
        if self.lora_bias is not None:
            return None
        down, up = (f.detach().to(adapter_dtype(f.dtype)) for f in self.factors())
        return down, self.scale * up

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W + scale * B A, b' = b + scale * lora_bias."""
        weight = base["weight"]
        down, up = (f.detach().to(weight.dtype) for f in self.factors())
        out = {"weight": torch.addmm(weight, up, down, alpha=self.scale)}
        if self.lora_bias is not None:
            if "bias" not in base:
                raise MergeError("lora_bias cannot be merged into a module without a bias; train with lora_bias=False")
            out["bias"] = base["bias"] + self.scale * self.lora_bias.detach().to(base["bias"].dtype)
        return out

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Columns of A, or rows of B."""
        if side:
            names = ("lora_A", "start_A") if self.moves_base else ("lora_A",)
            return self._with(**{n: getattr(self, n)[:, start:stop] for n in names})
        found = {n: getattr(self, n)[start:stop] for n in ("lora_B", *(("start_B",) if self.moves_base else ()))}
        if self.lora_bias is not None:
            found["lora_bias"] = self.lora_bias[start:stop]
        return self._with(**found)


class EmbeddingAdapter(LoraAdapter):
    """The same update of an embedding: rows of (B A)ᵀ are looked up."""

    def tensors(self) -> dict[str, Tensor]:
        """A and B, by the names that the folder uses."""
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (...), token ids. Returns: (..., out)."""
        out: Tensor = call(x)
        down, up = self.factors()
        rows = F.linear(F.embedding(x, down.t()), up)
        return out + (self.scale * rows).to(out.dtype)


class DoraAdapter(LoraAdapter):
    """h = m (W + scale B A) x / ‖W + scale B A‖ by rows; the norm is not differentiated (section 4.3 of the paper)."""

    reads_weight = True
    additive = False

    def __init__(self, site: Site, cfg: LoRA) -> None:
        super().__init__(site, cfg)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(site.out_features))
        self._squares, self._factors = functional.Derived(), functional.Derived()

    def row_norms(self, module: nn.Module) -> Tensor:
        """‖W + scale B A‖ by rows, (out,), at least float32; of what a quantized weight stands for, too."""
        own: Any = module.weight
        down, up = (f.detach() for f in self.factors())
        if not is_quantized(module):
            weight = own.detach() if isinstance(module, nn.Linear) else own.detach().t()
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            squares = self._row_squares(own, wide, lambda: weight.to(wide).square().sum(1))
            return functional.row_norms(weight, squares, down, up, self.scale)
        squares = self._row_squares(own, torch.float32, lambda: weights_of(module).read()["weight"].square().sum(1))
        # What the layer gives for the rows of A, less its bias, is the product that the norms need.
        plain: Any = original_class(module).forward
        rows = plain(module, down.to(torch.float32)).to(torch.float32)
        bias = module._parameters.get("bias")
        product = rows if bias is None else rows - bias.detach().to(torch.float32)
        return functional.norms_from(squares, product.t(), down.to(torch.float32), up.to(torch.float32), self.scale)

    def row_factors(self, module: nn.Module) -> Tensor:
        """m / ‖W + scale B A‖, (out,); remembered in evaluation as long as no tensor changes."""
        own: Any = module.weight
        magnitude = self.lora_magnitude_vector

        def make() -> Tensor:
            # Under autocast the squares of the norm would be products of rounded factors.
            with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
                norms = self.row_norms(module)
            return magnitude / norms.to(magnitude.dtype)

        sources = (own, self.lora_A, self.lora_B, magnitude)
        made: Tensor = self._factors.get(self.training, magnitude.dtype, sources, make)
        return made

    def _row_squares(self, weight: Tensor, wide: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """‖W‖² by rows, (out,); the weight is frozen, so they are remembered in training too."""
        with torch.no_grad():
            made: Tensor = self._squares.get(False, wide, (weight,), make)
        return made

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        down, up = self.factors()
        factors = self.row_factors(module)
        dropping = self.dropout and self.training
        direct = not dropping and functional.plain_gradients(x)
        if direct and (plain := functional.plain_linear(module, call, x)) is not None:
            magnitude = self.lora_magnitude_vector
            return functional.dora_linear(x, *plain, down, up, magnitude, factors.detach(), self.scale)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        out = functional.add_low_rank(call(x), dropped, down, up, self.scale)
        factors = factors.to(out.dtype)
        bias = module.bias
        if not isinstance(bias, Tensor):
            return out * factors
        return torch.addcmul(bias.to(out.dtype) * (1 - factors), out, factors)

    def low_rank(self) -> None:
        """None: the rows of the weight itself are scaled too."""
        return

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = m (W + scale B A) / ‖W + scale B A‖ by rows."""
        weight = base["weight"] + self.delta().to(base["weight"].dtype)
        scale = self.lora_magnitude_vector.detach().to(weight.dtype) / weight.norm(dim=1)
        return {"weight": scale[:, None] * weight}

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Rows of B and of the magnitude; the norm of a row needs all its columns."""
        if side:
            return None
        return self._with(lora_B=self.lora_B[start:stop], lora_magnitude_vector=self.lora_magnitude_vector[start:stop])


def parameter_count(site: Site, cfg: LoRA) -> int:
    """r (in + out), plus one bias or magnitude an output."""
    count = _rank(site, cfg) * (site.in_features + site.out_features)
    return count + site.out_features * (int(cfg.lora_bias) + int(cfg.use_dora))


def build(site: Site, cfg: LoRA, shared: nn.Module | None) -> LoraAdapter:
    """An adapter for the kind of module at the site."""
    if _is_embedding(site):
        if cfg.use_dora or cfg.lora_bias or cfg.init_lora_weights in ("pissa", "olora", "orthogonal"):
            raise ConfigError(
                f"{site.path}: embeddings take LoRA with init_lora_weights True, False or 'gaussian', without use_dora "
                "and lora_bias; leave the embedding out of target_modules or change the config"
            )
        # Rows are looked up, so tokens are the input side: A is (r, tokens), B is (width, r).
        return EmbeddingAdapter(site, cfg)
    return DoraAdapter(site, cfg) if cfg.use_dora else LoraAdapter(site, cfg)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: LoRA) -> None:
    """Fills A and B as `init_lora_weights` says."""
    assert isinstance(adapter, LoraAdapter)
    down, up, rank = adapter.lora_A, adapter.lora_B, _rank(site, cfg)
    init = cfg.init_lora_weights
    if adapter.moves_base:
        _start_from_weight(adapter, weights_of(module).read()["weight"], rank, str(init))
    elif init == "orthogonal":
        _orthogonal(adapter, rank)
    else:
        if _is_embedding(site):
            nn.init.zeros_(down)
            nn.init.normal_(up)
        else:
            if init == "gaussian":
                nn.init.normal_(down, std=1 / rank)
            else:
                nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(up)
        if init is False:
            nn.init.kaiming_uniform_(down if _is_embedding(site) else up, a=math.sqrt(5))
    if adapter.lora_bias is not None:
        nn.init.zeros_(adapter.lora_bias)
    if isinstance(adapter, DoraAdapter):
        adapter.lora_magnitude_vector.copy_(adapter.row_norms(module))


def _orthogonal(adapter: LoraAdapter, rank: int) -> None:
    """A and B from complementary halves of an orthogonal basis, so that B A = 0 with both factors nonzero."""
    if rank % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, found {rank}")
    basis = torch.linalg.qr(torch.randn(rank, rank))[0].to(adapter.lora_A.device)
    half = rank // 2
    inside = torch.randn(adapter.lora_A.shape[1], half, device=adapter.lora_A.device)
    outside = torch.randn(adapter.lora_B.shape[0], half, device=adapter.lora_B.device)
    adapter.lora_A.copy_((inside @ basis[0::2] / 10).T)
    adapter.lora_B.copy_(outside @ basis[1::2] / 10)


def _start_from_weight(adapter: LoraAdapter, weight: Tensor, rank: int, init: str) -> None:
    """PiSSA: the leading singular triplets; OLoRA: the leading columns of a QR decomposition.

    The papers subtract the start from the base weight. Here the base stays as it is, and the start is subtracted from
    the update instead, which is the same function.
    """
    if rank > min(weight.shape):
        raise ConfigError(f"init_lora_weights={init!r}: rank {rank} is over the smaller side of {tuple(weight.shape)}")
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = (values[:rank] / adapter.scale).sqrt()
        adapter.lora_A.copy_(root[:, None] * right[:rank])
        adapter.lora_B.copy_(left[:, :rank] * root)
    else:
        q, r = torch.linalg.qr(weight)
        adapter.lora_A.copy_(r[:rank])
        adapter.lora_B.copy_(q[:, :rank])
    adapter.start_A.copy_(adapter.lora_A)
    adapter.start_B.copy_(adapter.lora_B)


def write_config(planned: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as peft writes them."""
    patterns = {k: dict(fields[k] or {}) for k in ("rank_pattern", "alpha_pattern")}
    return {**fields, **patterns, "bias": "none"}


def read_config(fields: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The fields of LoRA; initialisations that leave the base as it is read as the default one."""
    if fields.get("init_lora_weights") in ("eva", "lora_ga"):
        fields["init_lora_weights"] = True
    return fields


METHOD = Method(
    name="lora",
    title="LoRA",
    summary="Two low-rank factors beside each adapted projection.",
    paper=Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models", authors="Hu et al.", year=2021, arxiv="2106.09685"
    ),
    config=LoRA,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    quantized_base=True,
    per_row=True,
    embeddings=True,
    knob=Knob(field="r"),
    peft=PeftFormat(
        peft_type="LORA",
        write_config=write_config,
        read_config=read_config,
        ignored={
            "bias": ("none",),
            "fan_in_fan_out": (),
            "megatron_core": (),
            "qalora_group_size": (),
            "velora_config": (),
        },
    ),
)
