"""Linear layers with an NF4 weight against bitsandbytes, and the update in the same call against peft around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftkit_bench.ops import Comparison, Setting

SIZE, BLOCK, RANK = 4096, 64, 16
AIMS = {1: 1.2, 8: 1.2, 64: 2.5, 512: 6.0}
"""Rows -> how many times faster than bitsandbytes on a CPU."""


def _weight(device: torch.device) -> Tensor:
    return (0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))).to(device, torch.bfloat16)


def _their_layer(weight: Tensor) -> Any:
    """bitsandbytes' 4-bit layer of that weight, as it stands for inference."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return layer.to(weight.device).eval()


def _setting(device: torch.device, rows: int, lora: bool) -> Setting:
    from peftkit_kernels.nf4_linear import nf4_linear, nf4_lora_linear
    from peftkit_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

    weight = _weight(device)
    q = quantize_blockwise(weight, "nf4", BLOCK)
    dense, theirs = dequantize_blockwise(q), _their_layer(weight)
    generator = torch.Generator().manual_seed(1)
    x, down, up = (
        torch.randn(*s, generator=generator).to(device, torch.bfloat16)
        for s in ((rows, SIZE), (RANK, SIZE), (SIZE, RANK))
    )
    shape = (SIZE, SIZE)

    def ours() -> Tensor:
        if lora:
            return nf4_lora_linear(x, q.codes, q.absmax, shape, down, up, 2.0, BLOCK)
        return nf4_linear(x, q.codes, q.absmax, shape, BLOCK)

    def with_update(layer: Any) -> Tensor:
        found: Tensor = layer(x)
        return found + 2.0 * torch.nn.functional.linear(torch.nn.functional.linear(x, down), up) if lora else found

    def quietly(layer: Any) -> Any:
        def run() -> Tensor:
            with torch.no_grad():
                return with_update(layer)

        return run

    wanted = x.double() @ dense.double().t()
    if lora:
        wanted += 2.0 * (x.double() @ down.double().t()) @ up.double().t()
    error = float((ours().double() - wanted).norm() / wanted.norm())
    return Setting(
        calls={
            "peftkit": ours,
            "bitsandbytes": quietly(theirs),
            "bfloat16 linear": quietly(lambda x: torch.nn.functional.linear(x, dense)),
        },
        facts={"error": error},
    )


def comparisons() -> Iterator[Comparison]:
    """Few rows to many, alone and with the update."""
    for rows, aim in AIMS.items():
        for lora in (False, True):
            yield Comparison(
                op="nf4_linear",
                label=f"NF4 {SIZE}x{SIZE}, {rows} rows{f', LoRA r {RANK}' if lora else ''}",
                setting=lambda device, rows=rows, lora=lora: _setting(device, rows, lora),  # type: ignore[misc]  # bound now
                against="bitsandbytes",
                aim=aim,
                flops=2 * rows * SIZE * SIZE,
                bytes=SIZE * SIZE // 2 + SIZE * SIZE // BLOCK * 4,
                rounds=31 if rows < 64 else 11,
            )
