"""The points that codes can stand for, and the search for those nearest to a weight in a metric on its columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peftkit_kernels import Quantized

_COLUMNS = 64
"""Columns that are settled before the error is carried to the others in one product."""
_ROWS = 64
"""Rows whose scales are refined at once."""
_SWEEPS = 3
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Sizes of blocks that are tried, over the largest magnitude in the block."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A matrix in int8 codes with a scale for each row, as `peftkit_kernels.quantize_rows` gives it."""

    codes: Tensor
    """(out, in), int8."""
    scales: Tensor
    """(out,), float32."""

    def weight(self) -> Tensor:
        """The matrix that the codes stand for, (out, in), float32."""
        return self.codes.float() * self.scales.float()[:, None]


def decoded(quantized: Quantized | Rows) -> Tensor:
    """The weight that codes stand for, (out, in), float32."""
    if isinstance(quantized, Rows):
        return quantized.weight()
    from peftkit_kernels import dequantize_blockwise

    return dequantize_blockwise(quantized, torch.float32)


def encoded(weight: Tensor, kind: str, block: int | None, nested: bool) -> Quantized | Rows:
    """A weight (out, in) in the nearest codes; block None is one scale a row, for int8.

    Raises:
        ValueError: no such kind of codes or size of blocks, or rows of another kind than int8.
    """
    from peftkit_kernels import quantize_blockwise, quantize_rows

    if block is not None:
        return quantize_blockwise(weight, kind, block, nested=nested)  # type: ignore[arg-type]  # checked there
    if kind != "int8" or nested:
        raise ValueError(f"a scale for each row goes with kind='int8' and nested=False, found {kind!r}; give a block")
    codes, scales = quantize_rows(weight)
    return Rows(codes=codes, scales=scales)


def format_of(quantized: Quantized | Rows) -> tuple[str, int | None, bool]:
    """Kind, block and whether scales are quantized, as `encoded` takes them."""
    if isinstance(quantized, Rows):
        return "int8", None, False
    return quantized.kind, quantized.block, quantized.nested is not None


class Grid:
    """The points that a quantized weight may take, scales given, and the one that it takes in each place.

    Args:
        quantized: whose format, scales and codes are taken.
    """

    def __init__(self, quantized: Quantized | Rows) -> None:
        from peftkit_kernels.quantize_blockwise import reference

        self.start = quantized
        self.moved = False
        """Whether scales differ from those of `start`."""
        device = quantized.codes.device
        if isinstance(quantized, Rows):
            self.shape = quantized.codes.shape
            self.block = max(self.shape[1], 1)
            self.sizes = quantized.scales.float()
        else:
            self.shape = quantized.shape
            self.block = quantized.block
            self.sizes = quantized.sizes()
        self.refits = format_of(quantized)[2] is False and self.shape[1] % self.block == 0
        """Whether scales are free to be refitted row by row."""
        self.values: Tensor | None = None
        """Place -> value over the scale, ascending; None: the places are whole numbers up to 127."""
        if isinstance(quantized, Rows) or quantized.kind == "int8":
            self.places = quantized.codes.view(self.shape)
            return
        values = reference.values_of(reference.KINDS.index(quantized.kind), device)
        self.values, self.codes = values.sort(stable=True)
        self.between = (self.values[:-1] + self.values[1:]) / 2
        each = torch.stack([quantized.codes >> 4, quantized.codes & 15], 1).reshape(-1)[: self.shape.numel()]
        self.places = self.codes.argsort()[each.int()].to(torch.int8).view(self.shape)

    @classmethod
    def refined(cls, weight: Tensor, plain: Quantized | Rows, importance: Tensor) -> Grid:
        """The grid on which a weight (out, in) is rounded with least error, columns weighed by `importance`, (in,).

        Args:
            plain: the weight in its nearest codes.
        """
        grid = cls(plain)
        blocks = len(grid.sizes)
        missing = blocks * grid.block - weight.numel()
        padded, weights = (
            torch.cat([x.reshape(-1), x.new_zeros(missing)]).view(blocks, grid.block)
            for x in (weight, importance.expand_as(weight))
        )
        least = torch.full_like(grid.sizes, torch.inf)
        sizes = grid.sizes.clone()
        for shrink in _SHRINKS:
            steps = grid.step(grid.sizes * shrink)[:, None]
            errors = (weights * (grid.value(grid.nearest(padded, _inverse(steps)), steps) - padded).square()).sum(1)
            better = errors < least
            sizes, least = torch.where(better, grid.sizes * shrink, sizes), torch.where(better, errors, least)
        grid.resize(sizes)
        steps = grid.steps(torch.arange(grid.shape[1], device=weight.device)).t()
        grid.places = grid.nearest(weight, _inverse(steps)).to(torch.int8)
        return grid

    def resize(self, sizes: Tensor) -> None:
        """Takes other scales; rounded to what can be stored where they are quantized themselves."""
        from peftkit_kernels import Nested
        from peftkit_kernels.quantize_blockwise import reference

        self.moved = True
        if isinstance(self.start, Rows):
            self.start = replace(self.start, scales=sizes)
        elif self.start.nested is None:
            self.start = replace(self.start, absmax=sizes)
        else:
            absmax, most, offset = reference.quantize_sizes(sizes)
            self.start = replace(self.start, absmax=absmax, nested=Nested(absmax=most, offset=offset))
            sizes = self.start.sizes()
        self.sizes = sizes

    def step(self, sizes: Tensor) -> Tensor:
        """What a value is multiplied with, in the arithmetic of `dequantize_blockwise`."""
        return sizes if isinstance(self.start, Rows) or self.values is not None else sizes / 127.0

    def steps(self, columns: Tensor) -> Tensor:
        """The step in each place of some columns, (columns, out)."""
        first = torch.arange(self.shape[0], device=columns.device) * self.shape[1]
        found: Tensor = self.step(self.sizes)[(first[None, :] + columns[:, None]) // self.block]
        return found

    def nearest(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """The place nearest to a weight, whose step has the given inverse."""
        scaled = weight * inverse
        return scaled.round_().clamp_(-127, 127) if self.values is None else torch.bucketize(scaled, self.between)

    def value(self, places: Tensor, steps: Tensor) -> Tensor:
        """The weight at a place, float32."""
        return (places if self.values is None else self.values.take(places.long())) * steps

    def quantized(self) -> Quantized | Rows:
        """The codes and scales of the places taken; a place that did not change keeps its code."""
        if isinstance(self.start, Rows):
            return replace(self.start, codes=self.places)
        if self.values is None:
            return replace(self.start, codes=self.places.reshape(-1))
        flat = self.codes[self.places.reshape(-1).int()].to(torch.uint8)
        if len(flat) % 2:
            flat = torch.cat([flat, self.start.codes[-1:] & 15])
        return replace(self.start, codes=flat[::2] << 4 | flat[1::2])


def _inverse(steps: Tensor) -> Tensor:
    return torch.where(steps > 0, 1.0 / steps, 0.0)


class Search:
    """Finds the points of a grid near to a weight in the metric tr(E M Eᵀ).

    Columns are taken in descending order of M's diagonal. With M = U D Uᵀ, U unit upper triangular in that order, the
    error is sum_j D_j ‖(E U)_j‖²: each column in turn can undo what those before it did to its term.

    Args:
        metric: M, (in, in), positive definite.
    """

    def __init__(self, metric: Tensor) -> None:
        self._whole = metric
        self._order = metric.diagonal().argsort(descending=True, stable=True)
        backwards = self._order.flip(0)
        lower: Tensor = torch.linalg.cholesky(metric.double()[backwards][:, backwards])
        self._pivots = lower.diagonal().flip(0).float()
        self._factor = lower.div_(lower.diagonal().clone()).float().flip(0, 1)
        del lower
        self._metric = metric[self._order][:, self._order]

    def fit(self, grid: Grid, weight: Tensor, costs: Tensor | None = None) -> None:
        """Moves the grid's places, and its scales where they are free, towards a weight (out, in).

        Args:
            costs: e M eᵀ of each row for the places taken, (out,): all columns are chosen anew first, in the rows where
                that costs less; None: the places taken are the start.
        """
        goal = weight.t()[self._order]
        places = grid.places.t()[self._order]
        if costs is not None:
            new, least = self._carried(grid, goal)
            places = torch.where(least < costs, new, places)
        places = self._descended(grid, goal, places, _SWEEPS)
        if grid.refits:
            grid.places = self._unordered(places)
            self._refit(grid, weight)
            places = self._descended(grid, goal, places, 1)
        grid.places = self._unordered(places)

    def _unordered(self, places: Tensor) -> Tensor:
        out = torch.empty_like(places)
        out[self._order] = places
        return out.t().contiguous()

    def _blocks(self) -> list[tuple[int, int]]:
        width = len(self._order)
        return [(first, min(first + _COLUMNS, width)) for first in range(0, width, _COLUMNS)]

    def _errors(self, grid: Grid, goal: Tensor, places: Tensor) -> Tensor:
        errors = torch.empty_like(goal)
        for first, last in self._blocks():
            steps = grid.steps(self._order[first:last])
            errors[first:last] = grid.value(places[first:last], steps) - goal[first:last]
        return errors

    def _carried(self, grid: Grid, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Places chosen column by column, what each misses carried to those that follow, (in, out); costs (out,)."""
        places = torch.empty(goal.shape, dtype=torch.int8, device=goal.device)
        errors = torch.empty_like(goal)
        costs = goal.new_zeros(goal.shape[1])
        for first, last in self._blocks():
            factor = self._factor[:, first:last]
            steps = grid.steps(self._order[first:last])
            inverse = _inverse(steps)
            wanted = goal[first:last] - factor[:first].t() @ errors[:first]
            for here in range(last - first):
                column = first + here
                found = grid.nearest(wanted[here], inverse[here])
                places[column] = found
                value = grid.value(found, steps[here])
                torch.sub(value, goal[column], out=errors[column])
                wanted[here + 1 :].addr_(factor[column, here + 1 :], errors[column], alpha=-1)
                costs += (value.sub_(wanted[here]).mul_(self._pivots[column])).square_()
        return places, costs

    def _descended(self, grid: Grid, goal: Tensor, places: Tensor, sweeps: int) -> Tensor:
        """Places changed one column after the other, each to the best one while the others stay, (in, out)."""
        places = places.clone()
        errors = self._errors(grid, goal, places)
        diagonal = self._metric.diagonal()[:, None]
        for _ in range(sweeps):
            still = True
            for first, last in self._blocks():
                steps = grid.steps(self._order[first:last])
                inverse = _inverse(steps)
                now = grid.value(places[first:last], steps)
                metric = self._metric[first:last]
                slope = metric @ errors
                old = errors[first:last].clone()
                for here in range(last - first):
                    column = first + here
                    found = grid.nearest(now[here] - slope[here] / diagonal[column], inverse[here])
                    places[column] = found
                    move = grid.value(found, steps[here]) - now[here]
                    slope[here + 1 :].addr_(metric[here + 1 :, column], move)
                    errors[column] += move
                still = still and torch.equal(old, errors[first:last])
            if still:
                break
        return places

    def _refit(self, grid: Grid, weight: Tensor) -> None:
        """Scales the blocks of each row by least squares; the places stay."""
        rows, width = grid.shape
        blocks = width // grid.block
        sizes = grid.sizes.view(rows, blocks)
        factors = torch.ones_like(sizes)
        metric = self._whole.view(blocks, grid.block, width)
        steps = grid.step(sizes)
        for first in range(0, rows, _ROWS):
            part = slice(first, first + _ROWS)
            split = grid.value(grid.places[part].view(-1, blocks, grid.block), steps[part][:, :, None])
            count = len(split)
            now = split.view(count, width)
            seen = torch.bmm(split.transpose(0, 1), metric)
            normal = (seen.view(blocks, count, blocks, grid.block) * split).sum(3).transpose(0, 1).double()
            pull = (seen * (weight[part] - now)).sum(2).t().double()
            ridge = normal.diagonal(dim1=1, dim2=2).mean(1) * 1e-3 + torch.finfo(torch.float32).tiny
            normal = normal + ridge[:, None, None] * torch.eye(blocks, device=weight.device, dtype=torch.float64)
            factors[part] += torch.linalg.solve(normal, pull[:, :, None])[:, :, 0].clamp(-0.5, 1.0).float()
        grid.resize((sizes * factors).reshape(-1))
