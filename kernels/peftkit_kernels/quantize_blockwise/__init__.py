"""Quantizing a tensor in blocks that have a scale each: NF4 and FP4 with the codes of bitsandbytes, and int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.quantize_blockwise import reference

Kind = Literal["nf4", "fp4", "int8"]
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of blocks."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that are quantized and dequantized to."""


def _blocks(count: int, block: int) -> int:
    return (count + block - 1) // block


def _fake_quantize_4bit(x: Tensor, kind: int, block: int) -> tuple[Tensor, Tensor]:
    sizes = x.new_empty(_blocks(x.numel(), block), dtype=torch.float32)
    return x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8), sizes


def _fake_quantize_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    sizes = x.new_empty(_blocks(x.numel(), block), dtype=torch.float32)
    return x.new_empty(x.numel(), dtype=torch.int8), sizes


def _fake_dequantize_4bit(
    codes: Tensor, absmax: Tensor, kind: int, block: int, count: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(count, dtype=dtype)


def _fake_dequantize_int8(codes: Tensor, absmax: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=dtype)


OP = declare(
    Op(
        name="quantize_blockwise",
        summary="NF4, FP4 and int8 codes in blocks, and back.",
        functions=(
            Function(
                schema="quantize_4bit(Tensor x, int kind, int block) -> (Tensor, Tensor)",
                reference=reference.quantize_4bit,
                fake=_fake_quantize_4bit,
            ),
            Function(
                schema="dequantize_4bit(Tensor codes, Tensor absmax, int kind, int block, int count, ScalarType dtype) "
                "-> Tensor",
                reference=reference.dequantize_4bit,
                fake=_fake_dequantize_4bit,
            ),
            Function(
                schema="quantize_int8(Tensor x, int block) -> (Tensor, Tensor)",
                reference=reference.quantize_int8,
                fake=_fake_quantize_int8,
            ),
            Function(
                schema="dequantize_int8(Tensor codes, Tensor absmax, int block, ScalarType dtype) -> Tensor",
                reference=reference.dequantize_int8,
                fake=_fake_dequantize_int8,
            ),
        ),
        sources={"cpu": "quantize_blockwise.cpp", "cuda": "quantize_blockwise.cu"},
    )
)
_quantize_4bit, _dequantize_4bit, _quantize_int8, _dequantize_int8 = OP.functions


@dataclass(frozen=True, kw_only=True)
class Nested:
    """What codes of block sizes stand for, beside the codes."""

    absmax: Tensor
    """Size of each block of 256 block sizes, float32."""
    offset: Tensor
    """Mean of the block sizes, (), float32."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized tensor."""

    codes: Tensor
    """4-bit: (ceil(n / 2),), uint8, the earlier code in the upper half; int8: (n,), int8."""
    absmax: Tensor
    """Size of each block, (ceil(n / block),), float32; its codes, uint8, where it is quantized too."""
    kind: Kind
    block: int
    shape: torch.Size
    dtype: torch.dtype
    """Of the tensor that was quantized."""
    nested: Nested | None = None
    """Set where the block sizes are quantized too."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        sizes = self.nested.absmax.nbytes + self.nested.offset.nbytes if self.nested is not None else 0
        return self.codes.nbytes + self.absmax.nbytes + sizes

    def sizes(self) -> Tensor:
        """Size of each block, (ceil(n / block),), float32."""
        if self.nested is None:
            return self.absmax
        return reference.dequantize_sizes(self.absmax, self.nested.absmax, self.nested.offset)


def check_blocks(name: str, kind: str, block: int) -> None:
    """Raises ValueError unless there is such a kind of codes and such a size of blocks."""
    if kind not in get_args(Kind):
        raise ValueError(f"{name}: kind is {kind!r}; expected {', '.join(get_args(Kind))}")
    if block not in BLOCKS:
        raise ValueError(f"{name}: block is {block}; expected one of {', '.join(map(str, BLOCKS))}")


@torch.no_grad()
def quantize_blockwise(x: Tensor, kind: Kind = "nf4", block: int = 64, *, nested: bool = False) -> Quantized:
    """The tensor in codes of 4 or 8 bits, with a scale for each block of elements that follow each other.

    NF4 and FP4 codes and scales are those of bitsandbytes 0.50.2 on a CPU, bit for bit, nested ones too.

    Args:
        x: any shape; bfloat16, float16, float32 or float64.
        kind: nf4, fp4 or int8 (symmetric, -127 to 127).
        block: elements that share a scale, a power of two from 32 to 4096; the last block may be short.
        nested: whether the scales are quantized as well, to 8 bits, less their mean and in blocks of 256.

    Raises:
        ValueError: no such kind or size of blocks.
        TypeError: a dtype that is not quantized.
    """
    check_blocks("quantize_blockwise", kind, block)
    if x.dtype not in DTYPES:
        raise TypeError(f"quantize_blockwise: x is {x.dtype}; expected bfloat16, float16, float32 or float64")
    whole = x.contiguous()
    if kind == "int8":
        codes, absmax = _quantize_int8(whole, block)
    else:
        codes, absmax = _quantize_4bit(whole, reference.KINDS.index(kind), block)
    inner = None
    if nested:
        absmax, most, offset = reference.quantize_sizes(absmax)
        inner = Nested(absmax=most, offset=offset)
    return Quantized(codes=codes, absmax=absmax, kind=kind, block=block, shape=x.shape, dtype=x.dtype, nested=inner)


@torch.no_grad()
def dequantize_blockwise(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that the codes stand for: value of the code times scale of the block, rounded once to the dtype.

    Args:
        dtype: bfloat16, float16, float32 or float64; None: that of the tensor that was quantized.

    Returns:
        The shape that was quantized.

    Raises:
        ValueError: codes and scales whose numbers do not fit the shape, or that lie on different devices.
        TypeError: a dtype that is not dequantized to.
    """
    q, wanted = quantized, dtype or quantized.dtype
    check_blocks("dequantize_blockwise", q.kind, q.block)
    if wanted not in DTYPES:
        raise TypeError(f"dequantize_blockwise: dtype is {wanted}; expected bfloat16, float16, float32 or float64")
    count = q.shape.numel()
    if q.absmax.device != q.codes.device:
        raise ValueError(
            f"dequantize_blockwise: codes are on {q.codes.device} and absmax on {q.absmax.device}; move them together"
        )
    expected = (count if q.kind == "int8" else (count + 1) // 2, _blocks(count, q.block))
    if (q.codes.numel(), q.absmax.numel()) != expected:
        raise ValueError(
            f"dequantize_blockwise: expected {expected[0]} codes and {expected[1]} scales for the shape "
            f"{tuple(q.shape)} in blocks of {q.block}, found {q.codes.numel()} and {q.absmax.numel()}"
        )
    sizes, codes = q.sizes().contiguous(), q.codes.contiguous()
    if q.kind == "int8":
        run = _dequantize_int8.reference if wanted is torch.float64 else _dequantize_int8
        flat = run(codes, sizes, q.block, wanted)
    else:
        run = _dequantize_4bit.reference if wanted is torch.float64 else _dequantize_4bit
        flat = run(codes, sizes, reference.KINDS.index(q.kind), q.block, count, wanted)
    result: Tensor = flat.view(q.shape)
    return result
