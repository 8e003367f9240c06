"""8-bit linear layers against bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from peftkit_bench.ops import Comparison, Setting

SIZE = 4096
ROWS = (1, 64, 512)


def _setting(rows: int, device: torch.device) -> Setting:
    import bitsandbytes as bnb
    from peftkit_kernels.int8_linear import int8_linear, pack_int8, quantize_rows

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
    layer: Any = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
    # Moved as a parameter, so that it is quantized once and not in each call.
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to(device)
    layer.eval()
    codes, scales = quantize_rows(weight)
    packed = pack_int8(codes) if device.type == "cpu" else None
    codes, scales = codes.to(device), scales.to(device)
    x = torch.randn(rows, SIZE, generator=generator).to(device, torch.bfloat16)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        found: torch.Tensor = layer(x)
        return found

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return int8_linear(x, codes, scales, packed=packed)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return int8_linear(x, codes, scales)

    @torch.no_grad()
    def weight_only() -> torch.Tensor:
        return int8_linear(x, codes, scales, dynamic=False)

    exact = x.double() @ weight.to(device).double().t()
    facts = {f"{n}error": float((f() - exact).norm() / exact.norm()) for n, f in (("", ours), ("theirs: ", theirs))}
    calls = {"peftkit": ours, "bitsandbytes": theirs, "not packed": plain, "weight only": weight_only}
    return Setting(calls=calls, facts=facts)


def comparisons() -> Iterator[Comparison]:
    """Rows quantized as they come; besides, without the packed weight, and with rows that are not quantized."""
    for rows in ROWS:
        yield Comparison(
            op="int8_linear",
            label=f"int8 bfloat16 {rows} row{'s' if rows > 1 else ''} of {SIZE}x{SIZE}",
            setting=functools.partial(_setting, rows),
            against="bitsandbytes",
            aim=1.6,
            bytes=SIZE * SIZE + 4 * rows * SIZE,
            # An integer product takes half the time of a bfloat16 one.
            flops=rows * SIZE * SIZE,
            rounds=15,
        )
