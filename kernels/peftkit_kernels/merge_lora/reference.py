"""The definition of merging and unmerging in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

GAP_SKIPS = 255
"""A gap byte of this value passes 255 elements and names none."""
ESCAPE = -128
"""A code of this value takes the element's bits from the escapes."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = -7046029254386353131  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio, as a signed number

Residual = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's bits as signed integers of its width; shares memory."""
    return tensor.view(_BITS[tensor.element_size()])


AT_A_TIME = {"cpu": 1 << 17}
"""Device -> elements that are added up together: on the CPU few, so that what is made in float64 stays in cache."""


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 numbers, rounded once to float32, as a fused multiply-add gives it.

    The product is exact in float64. The sum is rounded there to odd: where something is lost and the last bit is even,
    the neighbour on the side of the loss is taken. Rounding that to float32 is rounding the exact sum.
    """
    product, wide = a.double() * b.double(), c.double()
    total = product + wide
    back = total - product
    lost = (product - (total - back)) + (wide - back)  # exact: Knuth's two-sum
    bits = total.view(torch.int64)
    odd = torch.where((lost > 0) == (total > 0), bits + 1, bits - 1)
    inexact = (lost.abs() > 0) & ((bits & 1) == 0)
    return torch.where(inexact, odd, bits).view(torch.float64).float()


def delta(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale * up @ down, (out, in), float32 (float64 for float64).

    A chain of fused multiply-adds in float32, one rank after the other, and one product with the scale: the same bits
    from every implementation.

    Args:
        down: (r, in).
        up: (out, r).
    """
    wide = torch.float64 if down.dtype == torch.float64 else torch.float32
    down, up = down.to(wide), up.to(wide)
    found = torch.empty(up.shape[0], down.shape[1], dtype=wide, device=down.device)
    rows = max(1, AT_A_TIME.get(down.device.type, 1 << 24) // max(1, down.shape[1]))
    for to, part in zip(found.split(rows), up.split(rows), strict=True):
        total = torch.zeros_like(to)
        for index in range(down.shape[0]):
            a, b = part[:, index, None], down[index]
            total = total + a * b if wide == torch.float64 else fused(a, b, total)
        to.copy_(total * scale)
    return found


def merged(weight: Tensor, change: Tensor) -> Tensor:
    """weight + change, added in float32 (float64 for a float64 weight) and rounded once to the weight's dtype."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.to(wide) + change.to(wide)).to(weight.dtype)


def checksum(weight: Tensor) -> Tensor:
    """sum over i of word_i * ((i * m) | 1) modulo 2^64, (1,), int64; a single changed element always changes it.

    word_i are the 8 byte words of the rows of a matrix one after the other, each row filled up with zeros; m is odd.
    """
    if not weight.numel():
        return torch.zeros(1, dtype=torch.int64, device=weight.device)
    bits = bits_of(weight.contiguous())
    each = 8 // bits.element_size()
    words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % each)).view(torch.int64).reshape(-1)
    index = torch.arange(len(words), device=weight.device, dtype=torch.int64)
    return (words * ((index * _MULTIPLIER) | 1)).sum().reshape(1)


def residual(weight: Tensor, guess: Tensor) -> Residual:
    """What turns `guess` into `weight`: gaps, codes, escapes, starts, checksum.

    Row by row, every element that differs has a gap byte, the number of elements passed since the last one, and a
    code, the difference of the bits as int8. Where it is wider, the code is -128 and the bits stand in the escapes.
    """
    rows = weight.shape[0]
    wrong = bits_of(weight) != bits_of(guess)
    row, column = wrong.nonzero(as_tuple=True)
    before = torch.cat((column.new_full((1,), -1), column[:-1]))
    first = torch.cat((row.new_full((1,), -1), row[:-1])) != row
    passed = column - torch.where(first, -1, before) - 1
    skips = passed // GAP_SKIPS
    ends = (skips + 1).cumsum(0)
    gaps = torch.full((int(ends[-1]) if len(ends) else 0,), GAP_SKIPS, dtype=torch.uint8, device=weight.device)
    gaps[ends - 1] = (passed % GAP_SKIPS).to(torch.uint8)
    own = bits_of(weight)[row, column]
    step = own.long() - bits_of(guess)[row, column].long()
    narrow = (step > ESCAPE) & (step <= -ESCAPE - 1)
    codes = torch.where(narrow, step, ESCAPE).to(torch.int8)
    escapes = own[~narrow]
    starts = torch.zeros(3, rows + 1, dtype=torch.int64, device=weight.device)
    for place, amount in enumerate((skips + 1, torch.ones_like(row), (~narrow).long())):
        starts[place, 1:].index_add_(0, row, amount)
    return gaps, codes, escapes, starts.cumsum(1).to(torch.int32), checksum(weight)


def corrected(guess: Tensor, gaps: Tensor, codes: Tensor, escapes: Tensor, starts: Tensor) -> Tensor:
    """The tensor that `residual` was taken of."""
    counts = starts.long().diff(dim=1)
    gap_row = torch.repeat_interleave(torch.arange(guess.shape[0], device=guess.device), counts[0])
    names = gaps != GAP_SKIPS
    passed = torch.where(names, gaps.long() + 1, GAP_SKIPS).cumsum(0)
    begin = torch.cat((passed.new_zeros(1), passed))[starts[0, :-1].long()]
    column = (passed - begin[gap_row] - 1)[names]
    row = gap_row[names]
    out = guess.clone()
    bits = bits_of(out)
    value = bits[row, column].long() + codes.long()
    escaped = codes == ESCAPE
    value[escaped] = escapes.long()
    bits[row, column] = value.to(bits.dtype)
    return out


def merge_lora_(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> None:
    """weight ← weight + scale * up @ down in place."""
    weight.copy_(merged(weight, delta(down, up, scale)))


def merge_lora_reversibly_(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Residual:
    """The same, and what `unmerge_lora_` needs beside the factors to restore every bit."""
    change = delta(down, up, scale)
    after = merged(weight, change)
    kept = residual(weight, merged(after, -change))
    weight.copy_(after)
    return kept


def unmerge_lora_(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    gaps: Tensor,
    codes: Tensor,
    escapes: Tensor,
    starts: Tensor,
) -> Tensor:
    """Restores the weight from before the merge in place; gives its checksum, (1,), int64."""
    guess = merged(weight, -delta(down, up, scale))
    weight.copy_(corrected(guess, gaps, codes, escapes, starts))
    return checksum(weight)
