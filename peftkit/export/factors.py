"""Adapters as two factors for each weight: exact where the update is low-rank, else the nearest at a rank or error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.errors import ConfigError, ExportError
from peftkit.export.source import Source
from peftkit.folding import folded
from peftkit.spec import Adapter, Attach, Site

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NOISE = 1e-13
"""Squares of singular values below this share of the largest are the rounding of their computation in float64."""
LARGE = 256
"""Rows from which a few singular values are sought by iteration instead of all by decomposition."""
FIRST_GUESS, LONGEST, STILL = 16, 100, 1e-5
"""Singular values that are sought first when an error is given; steps at most; gain of a step that is the last."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What one weight gets: W' = W + up @ down, and what that leaves out of the adapter's own update."""

    site: Site
    down: Tensor
    """(rank, in)."""
    up: Tensor
    """(out, rank), scale included."""
    exact: bool
    """Whether the factors are the adapter's own, up to rounding."""
    size: float
    """‖ΔW‖ of the adapter's update."""
    error: float
    """‖up @ down - ΔW‖, the rounding to the stored dtype included."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return int(self.down.shape[0])


def check_choice(rank: int | None, error: float | None, dtype: str) -> None:
    """Raises ConfigError unless rank, error and dtype can be meant together."""
    if rank is not None and error is not None:
        raise ConfigError("rank and error each choose the size of the factors; give one of them")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, found {rank}")
    if error is not None and not 0 < error < 1:
        raise ConfigError(f"error must lie between 0 and 1 (0.01 for 1 % of the update's norm), found {error}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")


def check_convertible(source: Source) -> None:
    """Raises ExportError unless the adapter changes projections only, as a LoRA does."""
    method = source.planned.method
    if not method.mergeable:
        raise ExportError(
            f"{method.name} is no change of weights, so no LoRA computes it: {method.summary.lower().rstrip('.')}. "
            "Use the adapter folder itself" + (", which Hugging Face peft reads too" if method.peft else "")
        )
    if method.attach is not Attach.WEIGHT or not source.planned.sites:
        raise ExportError(
            f"{method.name} trains the model's own parameters ({method.summary.lower().rstrip('.')}), and a LoRA adds "
            "to projections only. Export with --to merged"
        )


def factors_of(
    source: Source, *, rank: int | None = None, error: float | None = None, dtype: str = "float32"
) -> Iterator[Factors]:
    """The factors of each site, one site in memory at a time.

    Args:
        rank: the largest rank to use; None: that of the update.
        error: the largest ‖up @ down - ΔW‖ / ‖ΔW‖ at each site, by the smallest rank that keeps it; None: 0.
        dtype: in which the factors are stored.

    Raises:
        ExportError: the update is not low-rank and neither rank nor error is given, it changes biases too, the base
            is needed and not at hand, or a value is not finite in `dtype`.
        ConfigError: rank, error or dtype cannot be meant.
    """
    check_choice(rank, error, dtype)
    check_convertible(source)
    for site in source.planned.sites:
        yield _of_site(source, site, rank, error, DTYPES[dtype])


@torch.no_grad()
def _of_site(source: Source, site: Site, rank: int | None, error: float | None, dtype: torch.dtype) -> Factors:
    adapter = source.adapter(site)
    pair = adapter.low_rank()
    if pair is not None:
        down, up = (f.detach().cpu().double() for f in pair)
        _check_finite(site, down, up)
        size = product_norm(down, up)
        kept = (down, up) if rank is None and error is None else _truncated(down, up, rank, error)
        exact = kept[0] is down
        stored = _rounded(site, *kept, dtype)
        if exact and torch.equal(stored[0].double(), down) and torch.equal(stored[1].double(), up):
            lost = 0.0
        else:
            lost = product_norm(torch.cat((down, stored[0].double())), torch.cat((up, -stored[1].double()), dim=1))
        return Factors(site=site, down=stored[0], up=stored[1], exact=exact, size=size, error=lost)
    if rank is None and error is None:
        raise ExportError(
            f"the update of {source.planned.method.name} ({type(adapter).__name__}) at {site.path} is not low-rank, so "
            "a LoRA can only come near it. Choose a rank (--rank 16) or an error (--error 0.01, a share of the "
            "update's norm), or keep the adapter as it is"
            + (": Hugging Face peft reads the adapter folder itself" if source.planned.method.peft else "")
        )
    update = _update(source, site, adapter)
    _check_finite(site, update)
    stored = _rounded(site, *_nearest(update, rank, error), dtype)
    lost = float((update - stored[1].double() @ stored[0].double()).norm())
    return Factors(site=site, down=stored[0], up=stored[1], exact=False, size=float(update.norm()), error=lost)


def _update(source: Source, site: Site, adapter: Adapter) -> Tensor:
    """What merging would add to the weight, (out, in), float64.

    Raises:
        ExportError: merging would change a bias too.
    """
    device = next(adapter.parameters()).device
    if adapter.additive:
        base = {"weight": torch.zeros(site.out_features, site.in_features, dtype=torch.float64)}
        if site.bias:
            base["bias"] = torch.zeros(site.out_features, dtype=torch.float64)
    else:
        base = {n: t.double() for n, t in source.base(site).items()}
    base = {n: t.to(device) for n, t in base.items()}
    changed = folded(site.path, [adapter], base, lambda _, value: value)
    others = [n for n in changed if n != "weight" and not torch.equal(changed[n], base[n])]
    if others:
        raise ExportError(
            f"{source.planned.method.name} changes {site.path}.{others[0]} too, and these factors add to the weight "
            "only. Export with --to merged"
        )
    return (changed.get("weight", base["weight"]) - base["weight"]).cpu()


def scaled(factors: Factors, by: float) -> Factors:
    """The factors with `up` multiplied, for a reader that divides by the same number.

    The error grows by no more than what rounding `up` once more can change.
    """
    if by == 1 or not factors.rank:
        return factors
    up = (factors.up.double() * by).to(factors.up.dtype)
    lost = product_norm(factors.down.double(), up.double() / by - factors.up.double())
    return dataclasses.replace(factors, up=up, error=factors.error + lost)


def product_norm(down: Tensor, up: Tensor) -> float:
    """‖up @ down‖ without forming the product.

    Args:
        down: (r, in).
        up: (out, r).
    """
    return float((_corner(up) @ _corner(down.T).T).norm())


def _corner(tall: Tensor) -> Tensor:
    """R of tall = Q R, which carries all lengths and angles; with fewer rows than columns the matrix itself."""
    if tall.shape[0] <= tall.shape[1]:
        return tall
    corner: Tensor = torch.linalg.qr(tall, mode="r").R
    return corner


def _wanted(squares: Tensor, total: float, rank: int | None, error: float | None) -> int | None:
    """How many singular values to keep, none that is rounding only; None where those given leave too large an error.

    Args:
        squares: of the largest singular values, largest first.
        total: the sum of the squares of all.
    """
    present = int((squares > squares[:1] * NOISE).sum())
    if rank is not None:
        return min(rank, present)
    assert error is not None
    allowed = max(error**2, NOISE) * total
    above = int((total - squares.cumsum(0) > allowed).sum())
    return min(present, above + 1) if above < squares.numel() else None


def _truncated(down: Tensor, up: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor]:
    """The nearest product of smaller rank; the factors themselves where they are small enough."""
    if rank is not None and down.shape[0] <= rank:
        return down, up
    if not down.shape[0]:
        return down, up
    left, corner_left = torch.linalg.qr(up)
    right, corner_right = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(corner_left @ corner_right.T, full_matrices=False)
    squares = values.square()
    kept = _wanted(squares, float(squares.sum()), rank, error)
    if kept is None or kept >= down.shape[0]:
        return down, up
    root = values[:kept].sqrt()
    return root[:, None] * (v[:kept] @ right.T), (left @ u[:, :kept]) * root


def _nearest(update: Tensor, rank: int | None, error: float | None) -> tuple[Tensor, Tensor]:
    """The nearest product of two factors to a dense update (Eckart and Young 1936)."""
    wide = update.shape[0] <= update.shape[1]
    short = update if wide else update.T
    total = float(short.square().sum())
    guess, kept = rank or FIRST_GUESS, None
    while kept is None and 4 * guess <= short.shape[0] >= LARGE:
        squares, basis = _leading(short, guess)
        kept = _wanted(squares[:guess], total, rank, error)
        guess *= 2
    if kept is None:
        found, vectors = torch.linalg.eigh(short @ short.T)
        squares, basis = found.flip(0).clamp_min(0), vectors.flip(1)
        kept = _wanted(squares, float(squares.sum()), rank, error)
    basis = basis[:, :kept]
    # Both factors get the root of each singular value, so that neither overflows in half precision.
    root = squares[:kept] ** 0.25
    one, other = basis * root, (basis.T @ short) / root[:, None]
    return (other, one) if wide else (one.T, other.T)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest squared singular values and their left vectors, by subspace iteration.

    It stops when a further step lowers the square of what `count` of them leave over by less than STILL of it. A
    decomposition of the whole matrix took eight times as long at 2048 rows.

    Returns:
        Squares, largest first, and columns to them: some more than `count`.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (matrix.shape[0], min(matrix.shape[0], 2 * count + 16))
    basis = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=matrix.dtype)).Q
    total, left = float(matrix.square().sum()), torch.inf
    for _ in range(LONGEST):
        inner = basis.T @ matrix
        squares, turn = torch.linalg.eigh(inner @ inner.T)
        before, left = left, total - float(squares[-count:].sum())
        if before - left <= STILL * abs(left):
            break
        basis = torch.linalg.qr(matrix @ inner.T).Q
    else:
        inner = basis.T @ matrix
        squares, turn = torch.linalg.eigh(inner @ inner.T)
    return squares.flip(0).clamp_min(0), (basis @ turn).flip(1)


def _rounded(site: Site, down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    stored = down.to(dtype).contiguous(), up.to(dtype).contiguous()
    if not all(bool(t.isfinite().all()) for t in stored):
        raise ExportError(f"the factors of {site.path} overflow {str(dtype).removeprefix('torch.')}; use float32")
    return stored


def _check_finite(site: Site, *tensors: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ExportError(
            f"the adapter at {site.path} holds values that are not finite; check it for a diverged training run"
        )


def relative(parts: list[tuple[float, float]]) -> float:
    """The error of all updates taken together, relative to them: sqrt(Σ error² / Σ size²); 0 without any.

    Args:
        parts: (size, error) of each.
    """
    whole = math.sqrt(sum(size**2 for size, _ in parts))
    return math.sqrt(sum(error**2 for _, error in parts)) / whole if whole else 0.0
