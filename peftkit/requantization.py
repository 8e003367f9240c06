"""Codes for a changed weight that keep the change, where rounding to the nearest code would give the old ones back.

A weight W that is stored in 4 bits lies on a grid that is coarse against what an adapter adds. Rounding W + dW element
by element returns W. What counts is the output, so the codes are chosen together: the error E = stored - (W + dW) is
made small in the metric tr(E M Eᵀ), where

    M = H + λ H V (Vᵀ H V)⁻¹ Vᵀ H.

H = XᵀX holds the inputs that the layer sees (the identity where none are given), and V spans what the adapter reads
of its input, so that the second term asks for an error that is orthogonal to the adapter's own effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftkit.lattice import Grid, Rows, Search, decoded, encoded, format_of

if TYPE_CHECKING:
    from peftkit_kernels import Quantized

DAMPING = 0.1
"""Added to the diagonal of the gram matrix, over its mean; what is not seen in calibration counts this much."""
EMPHASES = (0.0, 1.0, 4.0, 16.0, 64.0)
"""Weights λ of the adapter's directions, tried in turn until the least effect is kept."""
UNSEEN_EMPHASES = (0.0, 4.0, 8.0, 16.0, 64.0)
"""The same without calibration inputs."""
LEAST_EFFECT = 0.9
"""Where the caller names none: more of the effect at the price of more noise brought logits nearer, up to here."""
UNSEEN_LEAST_EFFECT = 0.7
"""The same without calibration inputs, where noise costs more."""
DIRECTIONS = 16
"""Singular directions of the change that are emphasised where none are given."""

EXACT = 1e-8
"""Square of the error, over that of the change, below which nothing is left to choose."""
_ALTERNATIONS = 3
"""Of codes and low-rank residual."""


@dataclass(frozen=True, kw_only=True)
class Requantized:
    """Codes that were chosen, what stays beside them, and what of the change they keep."""

    quantized: Quantized | Rows
    residual: tuple[Tensor, Tensor] | None
    """down (k, in) and up (out, k), float32, to be added as up @ down; None: no residual was asked for."""
    effect: float
    """⟨stored - W, dW⟩ / ‖dW‖², on the calibration inputs where they were given; 1 where nothing was to change."""
    error: float
    """‖stored - (W + dW)‖ / ‖dW‖, likewise; 0 where nothing was to change."""
    emphasis: float
    """Weight λ of the adapter's directions that was used."""

    def weight(self) -> Tensor:
        """What is stored: decoded codes plus residual, (out, in), float32."""
        codes = decoded(self.quantized)
        return codes if self.residual is None else torch.addmm(codes, self.residual[1], self.residual[0])


def gram_of(inputs: Tensor, gram: Tensor | None = None) -> Tensor:
    """XᵀX of inputs X, (in, in), float32 (float64 for float64); added to `gram`, in place, where it is given.

    Args:
        inputs: (..., in), any floating dtype; rows of padding left out.
        gram: of earlier inputs.
    """
    wide = torch.float64 if inputs.dtype is torch.float64 else torch.float32
    rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(wide)
    if gram is None:
        gram = rows.new_zeros(rows.shape[1], rows.shape[1])
    return gram.addmm_(rows.t(), rows)


@torch.no_grad()
def requantized(
    target: Tensor,
    start: Quantized | Rows | None = None,
    *,
    base: Tensor | None = None,
    kind: str = "nf4",
    block: int | None = 64,
    nested: bool = False,
    gram: Tensor | None = None,
    directions: Tensor | None = None,
    residual_rank: int = 0,
    least_effect: float | None = None,
) -> Requantized:
    """Codes, and where asked for a low-rank residual, for a weight W + dW, that keep dW better than rounding does.

    Codes are chosen column by column, the error of each carried to those that follow, then changed one by one while
    that helps, and block scales are refitted where they are stored in float32. With a residual, codes and residual
    are fitted in turn; at a rank that holds all of dW the old codes stay and nothing is lost.

    Args:
        target: W + dW, (out, in), finite.
        start: codes of W, whose format is kept, and scales too where they are quantized themselves; None: W is not
            quantized yet, and `base` is given.
        base: W, (out, in); read where `start` is None.
        kind: nf4, fp4 or int8; read where `start` is None, and so are `block` and `nested`.
        block: elements that share a scale; None: one scale a row, for int8.
        nested: whether scales are quantized too.
        gram: `gram_of` calibration inputs, (in, in), at any scale; None: none are known.
        directions: (k, in), rows that span what the adapter reads of its input, such as LoRA's A; None: the leading
            singular directions of dW.
        residual_rank: rank of what may stay beside the codes.
        least_effect: the effect to be kept. The adapter's directions are weighed up to 64 times the rest until it is;
            this adds noise elsewhere, so look at `error` too. None: 0.9 with calibration inputs, 0.7 without.

    Returns:
        On the device of `target`; never further from it in the metric above than rounding to the nearest codes.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a gram matrix of zeros.

    Sources: Frantar et al. 2022, arXiv:2210.17323 (columns in order with error feedback, largest input first); Chee
    et al. 2023, arXiv:2307.13304 (the same without an inverse, section 4.1); Li et al. 2023, arXiv:2310.08659 and
    Zhang et al. 2024, arXiv:2402.02446 (codes and low-rank residual). The emphasis of directions, starting from the
    codes of W, and the passes that follow are peftkit's own.
    """
    before = _checked(target, start, base, gram, directions, residual_rank)
    goal = target.float()
    change = goal - before
    inputs = None if gram is None else gram.float() / gram.float().diagonal().mean()
    if start is not None:
        kind, block, nested = format_of(start)
    plain = encoded(goal, kind, block, nested)
    if not goal.numel() or (start is not None and not bool(change.any())):
        none = _no_residual(goal) if residual_rank else None
        return Requantized(quantized=start or plain, residual=none, effect=1.0, error=0.0, emphasis=0.0)
    basis = _basis(directions, change)
    wanted = least_effect
    if wanted is None:
        wanted = UNSEEN_LEAST_EFFECT if gram is None else LEAST_EFFECT
    for emphasis in UNSEEN_EMPHASES if gram is None else EMPHASES:
        metric = None if inputs is None and not emphasis else _metric(inputs, basis, emphasis)
        found = _solved(goal, start, plain, metric, residual_rank)
        moved = decoded(found.codes) - before
        if found.residual is not None:
            moved.addmm_(found.residual[1], found.residual[0])
        effect, error = _kept(moved, change, inputs)
        if effect >= wanted:
            break
    return Requantized(quantized=found.codes, residual=found.residual, effect=effect, error=error, emphasis=emphasis)


@dataclass(frozen=True)
class _Candidate:
    codes: Quantized | Rows
    residual: tuple[Tensor, Tensor] | None
    costs: Tensor
    """e M eᵀ of each row, (out,)."""

    @property
    def cost(self) -> float:
        return _sum(self.costs)


def _solved(
    goal: Tensor, start: Quantized | Rows | None, plain: Quantized | Rows, metric: Tensor | None, rank: int
) -> _Candidate:
    """The best codes and residual that were found, the old codes and plain rounding among them."""

    def candidate(codes: Quantized | Rows) -> _Candidate:
        rest = goal - decoded(codes)
        residual = None
        if rank:
            residual = _low_rank(rest, metric, rank)
            rest.addmm_(residual[1], residual[0], alpha=-1)
        return _Candidate(codes, residual, _costs(rest, metric))

    importance = goal.new_ones(goal.shape[1]) if metric is None else metric.diagonal()
    grid = Grid.refined(goal, plain, importance) if start is None else Grid(start)
    taken = candidate(grid.quantized())
    best = min(taken, candidate(plain), key=lambda one: one.cost)
    if start is not None and rank and best.cost <= EXACT * _sum(_costs(goal - decoded(start), metric)):
        return best
    if metric is None:
        # Rounding is the best choice where columns do not matter to each other.
        return best
    search = Search(metric)
    for turn in range(_ALTERNATIONS if rank else 1):
        aim = goal
        if taken.residual is not None:
            aim = goal.addmm(taken.residual[1], taken.residual[0], alpha=-1)
        search.fit(grid, aim, None if turn else taken.costs)
        taken = candidate(grid.quantized())
        best = min(best, taken, key=lambda one: one.cost)
    return best


def _checked(
    target: Tensor,
    start: Quantized | Rows | None,
    base: Tensor | None,
    gram: Tensor | None,
    directions: Tensor | None,
    residual_rank: int,
) -> Tensor:
    """W in float32, or ValueError when the arguments do not fit together or are not finite."""
    if target.dim() != 2:
        raise ValueError(f"requantized: expected target (out, in), found {tuple(target.shape)}")
    if residual_rank < 0:
        raise ValueError(f"requantized: residual_rank is {residual_rank}; expected 0 or more")
    if (start is None) == (base is None):
        raise ValueError("requantized: expected start, the codes of W, or base, W itself; found both or neither")
    before = base.float() if base is not None else None
    if start is not None:
        before = decoded(start)
    assert before is not None
    width = target.shape[1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "start" if base is None else "base": (before, tuple(target.shape)),
        "target": (target, tuple(target.shape)),
        "gram": (gram, (width, width)),
        "directions": (directions, (len(directions) if directions is not None and directions.dim() else 0, width)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"requantized: target is {tuple(target.shape)} and {name} {tuple(tensor.shape)}; "
                f"expected {name} {shape}"
            )
        if tensor.device != target.device:
            raise ValueError(f"requantized: target is on {target.device} and {name} on {tensor.device}; move them")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"requantized: {name} has values that are not finite; look for overflow in training, or in the inputs "
                "that were collected"
            )
    if gram is not None and gram.numel() and not bool(gram.diagonal().sum() > 0):
        raise ValueError(
            "requantized: gram has no positive diagonal; the layer saw no inputs in calibration, or zeros only: give "
            "inputs that reach it, or gram=None"
        )
    return before


def _kept(moved: Tensor, change: Tensor, inputs: Tensor | None) -> tuple[float, float]:
    """Effect and error of a stored change against the one that was meant."""
    seen = change if inputs is None else change @ inputs
    power = _sum(seen * change)
    if power <= 0:
        return 1.0, 0.0
    effect = _sum(seen * moved) / power
    return effect, max(_sum(_costs(moved - change, inputs)) / power, 0.0) ** 0.5


def _costs(error: Tensor, metric: Tensor | None) -> Tensor:
    """e M eᵀ of each row, (out,)."""
    return (error if metric is None else error @ metric).mul(error).sum(1)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _metric(inputs: Tensor | None, basis: Tensor, emphasis: float) -> Tensor:
    """M, (in, in), of inputs whose gram matrix has a mean diagonal of 1 and of orthonormal columns (in, k)."""
    if inputs is None:
        metric = torch.eye(len(basis), device=basis.device)
        return metric.addmm_(basis, basis.t(), alpha=emphasis)
    metric = inputs.clone()
    metric.diagonal().add_(DAMPING)
    read = metric @ basis
    read = torch.linalg.solve_triangular(torch.linalg.cholesky(basis.t() @ read), read.t(), upper=False).t()
    metric.addmm_(read, read.t(), alpha=emphasis)
    return metric.add_(metric.t().clone()).mul_(0.5)


def _basis(directions: Tensor | None, change: Tensor) -> Tensor:
    """Orthonormal columns (in, k) that span the directions, or the leading ones of the change."""
    if directions is None:
        found = _leading(change.t(), None, DIRECTIONS)
        sizes = (change @ found).norm(dim=0)
    else:
        _, sizes, rows = torch.linalg.svd(directions.float(), full_matrices=False)
        found = rows.t()
    return found[:, sizes > 1e-3 * sizes.max()] if sizes.numel() else found


def _leading(matrix: Tensor, metric: Tensor | None, rank: int) -> Tensor:
    """Orthonormal columns (rows, rank): leading eigenvectors of A M Aᵀ, by subspace iteration from a fixed start."""
    rows, columns = matrix.shape
    rank, width = min(rank, rows, columns), min(rank + 16, rows, columns)
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(rows, width, generator=generator).to(matrix)
    for _ in range(8):
        back = matrix.t() @ space
        space = torch.linalg.qr(matrix @ (back if metric is None else metric @ back))[0]
    back = matrix.t() @ space
    turn: Tensor = torch.linalg.eigh((back.t() @ (back if metric is None else metric @ back)).double())[1]
    found: Tensor = space @ turn.flip(1)[:, :rank].to(space)
    return found


def _low_rank(matrix: Tensor, metric: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """down (k, in) and up (out, k), balanced, whose product is nearest to a matrix in the metric."""
    up = _leading(matrix, metric, rank)
    down = up.t() @ matrix
    root = down.norm(dim=1).clamp_min(torch.finfo(down.dtype).tiny).sqrt()
    return down / root[:, None], up * root


def _no_residual(goal: Tensor) -> tuple[Tensor, Tensor]:
    return goal.new_zeros(0, goal.shape[1]), goal.new_zeros(goal.shape[0], 0)
