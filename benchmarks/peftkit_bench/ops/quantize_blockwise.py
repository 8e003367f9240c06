"""Quantizing to NF4 and back against bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkit_bench.ops import Comparison, Setting

SIZE, BLOCK = 4096, 64


def _weight(device: torch.device) -> Tensor:
    return (0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))).to(device, torch.bfloat16)


def _quantizing(device: torch.device, nested: bool) -> Setting:
    import bitsandbytes.functional as theirs
    from peftkit_kernels.quantize_blockwise import quantize_blockwise

    weight = _weight(device)
    own = quantize_blockwise(weight, "nf4", BLOCK, nested=nested)
    codes, state = theirs.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested)
    return Setting(
        calls={
            "peftkit": lambda: quantize_blockwise(weight, "nf4", BLOCK, nested=nested),
            "bitsandbytes": lambda: theirs.quantize_4bit(
                weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested
            ),
        },
        facts={
            "other codes": int((own.codes != codes.view(-1)).sum()),
            "other scales": int((own.absmax != state.absmax).sum()),
        },
    )


def _dequantizing(device: torch.device) -> Setting:
    import bitsandbytes.functional as theirs
    from peftkit_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

    weight = _weight(device)
    own = quantize_blockwise(weight, "nf4", BLOCK)
    codes, state = theirs.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return Setting(
        calls={
            "peftkit": lambda: dequantize_blockwise(own),
            "bitsandbytes": lambda: theirs.dequantize_4bit(codes, state),
        }
    )


def comparisons() -> Iterator[Comparison]:
    """To codes, to codes with nested scales, and back."""
    moved = SIZE * SIZE * 5 // 2 + SIZE * SIZE // BLOCK * 4
    for nested in (False, True):
        yield Comparison(
            op="quantize_blockwise",
            label=f"NF4 of bfloat16 {SIZE}x{SIZE}{', nested scales' if nested else ''}",
            setting=lambda device, nested=nested: _quantizing(device, nested),  # type: ignore[misc]  # bound now
            against="bitsandbytes",
            aim=12,
            bytes=moved,
            rounds=7,
        )
    yield Comparison(
        op="quantize_blockwise",
        label=f"NF4 to bfloat16 {SIZE}x{SIZE}",
        setting=_dequantizing,
        against="bitsandbytes",
        bytes=moved,
    )
