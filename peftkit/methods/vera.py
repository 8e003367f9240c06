"""VeRA: two frozen random projections that all sites share, and two trained scaling vectors a site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.functional import Derived
from peftkit.spec import (
    METADATA_PREFIX,
    Adapter,
    Attach,
    Config,
    Knob,
    Method,
    Paper,
    PeftFormat,
    Site,
    State,
    adapter_dtype,
    config,
)

SHARED_PREFIX = "base_model."
"""What precedes the shared projections in an adapter file."""


@config
class VeRA(Config):
    """Size and start of the scaling vectors, and the seed of the shared projections."""

    r: int = 256
    """Rank of the shared projections, at least 1."""
    projection_prng_key: int = 0
    """Seed of the shared projections."""
    save_projection: bool = True
    """Whether the shared projections are saved; otherwise they are drawn again from the seed."""
    vera_dropout: float = 0.0
    """Probability of dropping an input element of the update in training, in [0, 1)."""
    d_initial: float = 0.1
    """Start of every element of the inner vector."""
    init_weights: bool = True
    """Start the outer vector at zero; False: outer ones, inner normal noise."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range."""
        self.require(self.r >= 1, f"r must be at least 1, found {self.r}")
        self.require(0 <= self.vera_dropout < 1, f"vera_dropout must lie in [0, 1), found {self.vera_dropout}")


class SharedProjections(Adapter):
    """A (r, largest in) and B (largest out, r), frozen; a site uses the leading columns of A and rows of B."""

    advises = False

    def __init__(self, sites: Sequence[Site], cfg: VeRA) -> None:
        super().__init__()
        wide = max(site.in_features for site in sites)
        tall = max(site.out_features for site in sites)
        self.register_buffer("vera_A", torch.empty(cfg.r, wide), persistent=cfg.save_projection)
        self.register_buffer("vera_B", torch.empty(tall, cfg.r), persistent=cfg.save_projection)
        self._cast = Derived()

    def projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in `dtype`."""
        down, up = self._buffers["vera_A"], self._buffers["vera_B"]
        assert down is not None
        assert up is not None
        if down.dtype == dtype:
            return down, up
        # They are frozen, so a cast copy is right in evaluation whatever the owner's mode.
        return self._cast.get(False, dtype, (down, up), lambda: (down.to(dtype), up.to(dtype)))  # type: ignore[no-any-return]


class VeraAdapter(Adapter):
    """h = W x + b ∘ B (d ∘ A x), with d (r,) and b (out,)."""

    additive = True

    def __init__(self, site: Site, cfg: VeRA, shared: SharedProjections) -> None:
        super().__init__()
        self.dropout = cfg.vera_dropout
        self.inside, self.out = site.in_features, site.out_features
        self.vera_lambda_d = nn.Parameter(torch.empty(cfg.r))
        self.vera_lambda_b = nn.Parameter(torch.empty(site.out_features))
        # In a tuple, so that the shared module is not registered a second time below every site.
        self._shared = (shared,)

    def projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this site in `dtype`."""
        down, up = self._shared[0].projections(dtype)
        if down.shape[1] != self.inside:
            down = down[:, : self.inside]
        if up.shape[0] != self.out:
            up = up[: self.out]
        return down, up

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., out)."""
        inner_scale: Tensor = self._parameters["vera_lambda_d"]  # type: ignore[assignment]  # set above
        outer_scale: Tensor = self._parameters["vera_lambda_b"]  # type: ignore[assignment]  # set above
        out: Tensor = call(x)
        dtype = x.dtype
        down, up = self.projections(dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        inner = F.linear(x, down)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or inner.dtype != out.dtype:
            update = F.linear(inner * inner_scale.to(inner.dtype), up) * outer_scale.to(out.dtype)
            return out + update.to(out.dtype)
        return out.addcmul_(F.linear(inner.mul_(inner_scale.to(dtype)), up), outer_scale.to(out.dtype))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """diag(d) A and diag(b) B; None where r is no less than a side of the weight."""
        inner, outer = self.vera_lambda_d.detach(), self.vera_lambda_b.detach()
        if inner.shape[0] >= min(self.inside, self.out):
            return None
        down, up = (t.detach() for t in self.projections(adapter_dtype(inner.dtype)))
        return inner[:, None].to(down.dtype) * down, outer[:, None].to(up.dtype) * up

    def merged(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' = W + diag(b) B diag(d) A."""
        wide = base["weight"].dtype
        down, up = (t.detach().to(wide) for t in self.projections(self.vera_lambda_d.dtype))
        inner, outer = self.vera_lambda_d.detach().to(wide), self.vera_lambda_b.detach().to(wide)
        return {"weight": base["weight"] + (outer[:, None] * up) @ (inner[:, None] * down)}

    def part(self, side: int, start: int, stop: int) -> Adapter | None:
        """Columns of A, or rows of B with their factors."""
        down, up = self.projections(self.vera_lambda_d.dtype)
        if side:
            shared = self._shared[0]._with(vera_A=down[:, start:stop], vera_B=up)
            twin = self._with()
            twin.inside = stop - start
        else:
            shared = self._shared[0]._with(vera_A=down, vera_B=up[start:stop])
            twin = self._with(vera_lambda_b=self.vera_lambda_b[start:stop])
            twin.out = stop - start
        twin._shared = (shared,)
        return twin


def parameter_count(site: Site, cfg: VeRA) -> int:
    """out + r."""
    return site.out_features + cfg.r


def build_shared(sites: Sequence[Site], cfg: VeRA) -> SharedProjections:
    """The projections that all sites share, large enough for the largest."""
    return SharedProjections(sites, cfg)


def build(site: Site, cfg: VeRA, shared: nn.Module | None) -> VeraAdapter:
    """The adapter of one projection."""
    assert isinstance(shared, SharedProjections)
    return VeraAdapter(site, cfg, shared)


def _draw(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform with variance 2 / columns: the paper's Kaiming start, on the CPU so that a seed means one matrix."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialise_shared(shared: Adapter, model: nn.Module, sites: Sequence[Site], cfg: VeRA) -> None:
    """Draws A, then B, from projection_prng_key."""
    generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
    for buffer in (shared.vera_A, shared.vera_B):
        buffer.copy_(_draw(tuple(buffer.shape), generator))  # type: ignore[operator, arg-type]  # a buffer


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: VeRA) -> None:
    """d at d_initial and b at zero, which changes nothing, unless init_weights is False."""
    assert isinstance(adapter, VeraAdapter)
    if cfg.init_weights:
        nn.init.constant_(adapter.vera_lambda_d, cfg.d_initial)
        nn.init.zeros_(adapter.vera_lambda_b)
    else:
        nn.init.normal_(adapter.vera_lambda_d)
        nn.init.ones_(adapter.vera_lambda_b)


def pack(plan: Any, state: State) -> dict[str, Tensor]:
    """Tensors by key on disk: those of the model itself stand outside the wrapped model's name space."""
    return {
        f"{METADATA_PREFIX}{path}.{name}" if path else f"{SHARED_PREFIX}{name}": tensor
        for path, tensors in state.items()
        for name, tensor in tensors.items()
    }


def unpack(plan: Any, tensors: Mapping[str, Tensor]) -> State:
    """The state: site path -> tensor name -> tensor."""
    state: State = {}
    for key, tensor in tensors.items():
        inside = key.startswith(METADATA_PREFIX)
        path, _, name = key.removeprefix(METADATA_PREFIX if inside else SHARED_PREFIX).rpartition(".")
        state.setdefault(path, {})[name] = tensor
    return state


METHOD = Method(
    name="vera",
    title="VeRA",
    summary="Two scaling vectors a projection around random low-rank factors that all projections share.",
    paper=Paper(
        title="VeRA: Vector-based Random Matrix Adaptation", authors="Kopiczko et al.", year=2023, arxiv="2310.11454"
    ),
    config=VeRA,
    attach=Attach.WEIGHT,
    default_targets=("attention.query", "attention.value"),
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    shared=build_shared,
    initialise_shared=initialise_shared,
    quantized_base=True,
    knob=Knob(field="r"),
    peft=PeftFormat(peft_type="VERA", pack=pack, unpack=unpack, ignored={"fan_in_fan_out": (), "bias": ("none",)}),
)
