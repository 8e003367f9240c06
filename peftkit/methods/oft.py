"""OFT: the input of each adapted projection is rotated block by block, which keeps the angles between weight rows."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import backbones, functional
from peftkit.errors import ConfigError
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, PeftFormat, Site, config
from peftkit.stepping import Stepped


@config
class OFT(Config):
    """Number or size of the blocks, and how a block becomes a rotation."""

    r: int = 0
    """Number of blocks; 0: given by oft_block_size. The divisor of the input features nearest to it is used."""
    oft_block_size: int = 32
    """Input features in a block; 0: given by r. The divisor of the input features nearest to it is used."""
    use_cayley_neumann: bool = True
    """Truncate the Neumann series of the Cayley transform; False: solve it exactly."""
    num_cayley_neumann_terms: int = 5
    """Terms of that series, at least 1."""
    module_dropout: float = 0.0
    """Probability of leaving a block unrotated in training, in [0, 1)."""
    coft: bool = False
    """Keep every block near the identity (the paper's constrained variant)."""
    eps: float = 6e-5
    """Radius of that neighbourhood before division by the square root of the number of blocks."""
    block_share: bool = False
    """Whether all blocks of a projection share one rotation."""
    init_weights: bool = True
    """Start from the identity; False: start from normal noise of deviation 0.1."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range, or r and oft_block_size contradict each other."""
        self.require(
            min(self.r, self.oft_block_size) == 0 and max(self.r, self.oft_block_size) > 0,
            "exactly one of r and oft_block_size is positive and the other 0, as their product is the input size; "
            f"found r={self.r}, oft_block_size={self.oft_block_size}",
        )
        self.require(
            self.num_cayley_neumann_terms >= 1,
            f"num_cayley_neumann_terms must be at least 1, found {self.num_cayley_neumann_terms}",
        )
        self.require(0 <= self.module_dropout < 1, f"module_dropout must lie in [0, 1), found {self.module_dropout}")
        self.require(self.eps > 0, f"eps must be positive, found {self.eps}")


@functools.lru_cache(maxsize=4096)
def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller one of two."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - wanted), d))


def block_size(site: Site, cfg: OFT) -> int:
    """Input features in each block of the site."""
    if cfg.oft_block_size:
        return nearest_divisor(site.in_features, cfg.oft_block_size)
    return site.in_features // nearest_divisor(site.in_features, cfg.r)


def skew(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (blocks, size, size) from their upper triangles (blocks, size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    upper = vectors.new_zeros(vectors.shape[0], size, size)
    upper[:, rows, columns] = vectors
    return upper - upper.transpose(1, 2)


def rotation_less_identity(q: Tensor, terms: int | None) -> Tensor:
    """R - I for skew-symmetric Q.

        R = (I - Q) (I + Q)⁻¹ exactly, or R ≈ I + 2 Q + 2 Q² + ... + Q^p, which approaches (I + Q) (I - Q)⁻¹

    The two turn in opposite directions, and the last power, p = terms - 1 but at least 3 from three terms on, enters
    once only. Both are what adapter folders of the Hugging Face library mean.

    Args:
        q: (blocks, size, size).
        terms: length of the series; None: exact.
    """
    if terms is None:
        identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        # (I - Q) (I + Q)⁻¹ - I = -2 Q (I + Q)⁻¹, without the cancellation.
        turned: Tensor = torch.linalg.solve(identity + q, -2 * q, left=False)
        return turned
    if terms == 1:
        return torch.zeros_like(q)
    total = 2 * q
    if terms == 2:
        return total
    power = q
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


class OftAdapter(Stepped):
    """h = W (x R) + b, with R block-diagonal and orthogonal."""

    def __init__(self, site: Site, cfg: OFT) -> None:
        super().__init__()
        self.size = block_size(site, cfg)
        self.blocks = site.in_features // self.size
        self.terms = cfg.num_cayley_neumann_terms if cfg.use_cayley_neumann else None
        self.dropout = cfg.module_dropout
        self.oft_R = nn.Parameter(torch.empty(1 if cfg.block_share else self.blocks, self.size * (self.size - 1) // 2))
        self.radius = cfg.eps / math.sqrt(self.oft_R.shape[0]) if cfg.coft else None
        self._derived = functional.Derived()

    def _inside(self, vectors: Tensor) -> Tensor:
        """The vectors, those whose skew-symmetric matrix has a Frobenius norm above the radius scaled down to it."""
        assert self.radius is not None
        norms = math.sqrt(2) * vectors.norm(dim=1, keepdim=True)
        return torch.where(norms <= self.radius, vectors, vectors * (self.radius / norms))

    def turn(self, dtype: torch.dtype) -> Tensor:
        """R - I, (blocks or 1, size, size), computed in `dtype`."""
        vectors: Tensor = self._parameters["oft_R"]  # type: ignore[assignment]  # set above
        if self.radius is not None:
            # The projection is not differentiated: it stands for one that followed the last step.
            vectors = vectors + (self._inside(vectors.detach()) - vectors.detach())
        return rotation_less_identity(skew(vectors.to(dtype), self.size), self.terms)

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        dtype = x.dtype
        vectors: Tensor = self._parameters["oft_R"]  # type: ignore[assignment]  # set above
        turn: Tensor = self._derived.get(self.training, dtype, (vectors,), lambda: self._cast(dtype))
        if self.dropout and self.training and turn.shape[0] > 1:
            kept = torch.rand(turn.shape[0], 1, 1, device=x.device) >= self.dropout
            turn = turn * kept.to(dtype)
        # x R = x + x (R - I): small rotations survive in half precision, and the start is the identity to the bit.
        if turn.shape[0] == 1:
            flat = x.reshape(-1, self.size)
            turned = torch.addmm(flat, flat, turn[0])
        else:
            split = x.reshape(-1, self.blocks, self.size).transpose(0, 1)
            turned = torch.baddbmm(split, split, turn).transpose(0, 1)
        return call(turned.reshape(x.shape))  # type: ignore[no-any-return]  # a projection gives a tensor

    def _cast(self, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.turn(wide).to(dtype)

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W Rᵀ, block by block."""
        weight = base["weight"]
        turn = self.turn(weight.dtype).detach()
        split = weight.reshape(-1, self.blocks, self.size)
        return {"weight": weight + torch.einsum("obc,bkc->obk", split, turn.expand(self.blocks, -1, -1)).flatten(1)}

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Every row is turned alike; a turn mixes columns."""
        return None if side else self

    @torch.no_grad()
    def after_step(self) -> None:
        """Brings the blocks back to the neighbourhood of the identity that coft allows."""
        if self.radius is not None:
            self.oft_R.copy_(self._inside(self.oft_R))


def parameter_count(site: Site, cfg: OFT) -> int:
    """b (b - 1) / 2 for each block of b features, or once when the blocks share a rotation."""
    size = block_size(site, cfg)
    return (1 if cfg.block_share else site.in_features // size) * (size * (size - 1) // 2)


def build(site: Site, cfg: OFT, shared: nn.Module | None) -> OftAdapter:
    """The adapter of one projection."""
    return OftAdapter(site, cfg)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: OFT) -> None:
    """Zeros, which rotate nothing, unless init_weights is False."""
    assert isinstance(adapter, OftAdapter)
    if cfg.init_weights:
        nn.init.zeros_(adapter.oft_R)
    else:
        nn.init.normal_(adapter.oft_R, std=0.1)


def block_sizes(model: nn.Module) -> Sequence[int]:
    """Block sizes from 2 that divide the input features of every projection.

    Raises:
        ConfigError: there is none.
    """
    widths = []
    for path in backbones.linear_paths(model):
        module = model.get_submodule(path)
        widths.append(int(module.in_features if isinstance(module, nn.Linear) else module.nx))  # type: ignore[arg-type]
    shared = math.gcd(*widths)
    found = [d for d in range(2, shared + 1) if shared % d == 0]
    if not found:
        raise ConfigError(
            f"oft: no block size divides the input features of every projection of {type(model).__name__} "
            f"({', '.join(map(str, sorted(set(widths))))}); set oft_block_size yourself"
        )
    return found


def with_block_size(cfg: OFT, size: int) -> OFT:
    """The config with blocks of `size` features."""
    return dataclasses.replace(cfg, r=0, oft_block_size=size)


METHOD = Method(
    name="oft",
    title="OFT",
    summary="Block-diagonal rotations of the input of each adapted projection.",
    paper=Paper(
        title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        authors="Qiu et al.",
        year=2023,
        arxiv="2306.07280",
    ),
    config=OFT,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    quantized_base=True,
    knob=Knob(
        field="oft_block_size",
        low=2,
        values=block_sizes,
        apply=with_block_size,
    ),
    peft=PeftFormat(
        peft_type="OFT", names={"oft_R": "oft_R.weight"}, ignored={"fan_in_fan_out": (), "bias": ("none",)}
    ),
)
