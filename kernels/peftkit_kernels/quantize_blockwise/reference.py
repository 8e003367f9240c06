"""The definition of quantizing in blocks in plain torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

KINDS = ("nf4", "fp4")
"""Of 4-bit codes; an operation takes the place in this list."""
SMALLEST = 1e-38
"""The least size that a block is scaled by, so that a block of zeros does not divide by zero."""
STATISTICS_BLOCK = 256
"""Block of the sizes of blocks, where they are quantized themselves."""
_STEPS = 65535
"""Of the grid between -1 and 1 on which values meet the map of sizes."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Code -> value: quantiles of the normal distribution, QLoRA (arXiv:2305.14314), appendix E."""
FP4 = tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""Code -> value: a sign, two bits of exponent and one of mantissa."""
_ORDERS = (tuple(range(16)), (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3))
"""Codes by ascending value; fp4 has two zeros."""


def values_of(kind: int, device: torch.device) -> Tensor:
    """Code -> value, (16,), float32."""
    return torch.tensor((NF4, FP4)[kind], dtype=torch.float32, device=device)


def _blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The tensor, flat and in float32 at the least, in whole blocks (n, block), and what is left over."""
    flat = x.reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    whole = flat.numel() // block * block
    return flat[:whole].view(-1, block), flat[whole:]


def quantize_4bit(x: Tensor, kind: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes, two a byte with the earlier one in the upper half, (ceil(n / 2),), uint8, and sizes, (blocks,), float32.

    The size of a block is the largest absolute value in it; a value over that size takes the code whose value is
    nearest, the smaller one of two that are as near. Whole blocks are multiplied by the inverse of the size, rounded to
    float32, and a short last one is divided by it. A NaN, and what shares a block with one, takes the largest value.
    """
    whole, rest = _blocks(x, block)
    order = torch.tensor(_ORDERS[kind], device=x.device)
    values = values_of(kind, x.device)[order]
    sizes = whole.abs().amax(1)
    scaled = (whole * (1.0 / sizes.clamp(min=SMALLEST))[:, None]).reshape(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST)
        sizes = torch.cat([sizes, last[None]])
        scaled = torch.cat([scaled, rest / last])
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    between = (values[:-1] + values[1:]) / 2
    codes = order[torch.bucketize(scaled, between.to(scaled.dtype))].to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], sizes.float()


def dequantize_4bit(codes: Tensor, absmax: Tensor, kind: int, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """Value of the code times size of the block, (count,), the product in float32 and rounded once to the dtype."""
    flat = codes.reshape(-1)
    each = torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[:count]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = absmax.to(wide).repeat_interleave(block)[:count]
    return (values_of(kind, codes.device).to(wide)[each.int()] * sizes).to(dtype)


def quantize_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes from -127 to 127, (n,), int8, and sizes of blocks, (blocks,), float32.

    A value takes the code round(value * (1 / size) * 127), ties to even; a NaN, and a value over an infinite size, 0.
    """
    flat = x.reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    count = flat.numel()
    blocks = -(-count // block)
    padded = torch.cat([flat, flat.new_zeros(blocks * block - count)]).view(blocks, block)
    sizes = padded.abs().amax(1)
    scaled = padded * (1.0 / sizes.clamp(min=SMALLEST))[:, None] * 127.0
    codes = scaled.round().clamp(-127, 127).nan_to_num(nan=0.0).to(torch.int8)
    return codes.reshape(-1)[:count], sizes.float()


def dequantize_int8(codes: Tensor, absmax: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """code * (size / 127), (n,), in float32 and rounded once to the dtype."""
    flat = codes.reshape(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = (absmax.to(wide) / 127.0).repeat_interleave(block)[: flat.numel()]
    return (flat.to(wide) * steps).to(dtype)


def map_of_sizes(device: torch.device) -> Tensor:
    """Code -> value for sizes of blocks, (256,), float32, ascending: a decimal exponent and a fraction in a byte.

    Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561: the smaller the exponent, the
    fewer bits are left for the fraction; here bits i = 0..6 of fraction for magnitudes 10^(i - 6).
    """
    return torch.tensor(_map_of_sizes(), dtype=torch.float32, device=device)


@functools.cache
def _map_of_sizes() -> tuple[float, ...]:
    found = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        found += middles.tolist() + (-middles).tolist()
    return tuple(sorted(found))


def quantize_sizes(sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (blocks,), uint8; sizes of their blocks of 256, float32; and the mean that was taken off, ().

    A size less the mean, over the largest such number in its block, meets the map on a grid of 65535 steps between -1
    and 1: it takes the code nearest to its point of the grid. A block of zeros takes code 0.
    """
    offset = sizes.mean()
    flat = sizes - offset
    blocks = -(-flat.numel() // STATISTICS_BLOCK)
    padded = torch.cat([flat, flat.new_zeros(blocks * STATISTICS_BLOCK - flat.numel())]).view(blocks, STATISTICS_BLOCK)
    most = padded.abs().amax(1)
    scaled = (padded * (1.0 / most)[:, None]).clamp(-1, 1)
    # The sum is rounded to float32 once; the product is exact in float64.
    steps = ((scaled + 1.0).double() * (_STEPS / 2) + 0.5).float().nan_to_num(nan=0.0).long()
    values = map_of_sizes(sizes.device)
    grid = -1.0 + torch.arange(_STEPS + 1, device=sizes.device, dtype=torch.float32) * 2.0 / _STEPS
    table = torch.bucketize(grid, 0.5 * (values[:-1] + values[1:])).to(torch.uint8)
    codes = torch.where(most[:, None] == 0, 0, table[steps]).to(torch.uint8)
    return codes.reshape(-1)[: flat.numel()], most, offset


def dequantize_sizes(codes: Tensor, most: Tensor, offset: Tensor) -> Tensor:
    """value of the code * size of its block + offset, (blocks,), float32."""
    values = map_of_sizes(codes.device)[codes.int()]
    return values * most.repeat_interleave(STATISTICS_BLOCK)[: codes.numel()] + offset
