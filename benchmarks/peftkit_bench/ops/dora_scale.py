"""DoRA's norms against those of Hugging Face peft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftkit_bench.ops import Comparison, Setting

SIZE, RANK = 4096, 16


def _setting(device: torch.device) -> Setting:
    import peft
    from peftkit_kernels.dora_scale import dora_norms, row_squares

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
    down, up = torch.randn(RANK, SIZE, generator=generator), torch.randn(SIZE, RANK, generator=generator)
    up *= 0.05 * weight.norm() / (up @ down).norm()
    narrow = weight.to(device, torch.bfloat16)
    linear = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=torch.bfloat16)
    linear.weight.data.copy_(narrow)
    model = nn.Sequential(linear)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=True)
    wrapped: Any = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    lower, upper = layer.lora_A["default"], layer.lora_B["default"]
    lower.weight.data.copy_(down)
    upper.weight.data.copy_(up)
    dora = layer.lora_magnitude_vector["default"]
    squared = row_squares(narrow)
    down, up = down.to(device), up.to(device)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        change = dora.get_lora_weight(lower, upper).to(narrow.dtype)
        found: torch.Tensor = dora.get_weight_norm(narrow, change, 1.0)
        return found

    def ours() -> torch.Tensor:
        return dora_norms(narrow, squared, down, up, 1.0)

    exact = (narrow.double() + up.double() @ down.double()).norm(dim=1)
    errors = {
        f"{n}error": float(((f().double() - exact) / exact).abs().max()) for n, f in (("", ours), ("peft ", theirs))
    }
    return Setting(calls={"peftkit": ours, "peft": theirs}, facts=errors)


def comparisons() -> Iterator[Comparison]:
    """The norms of one forward pass."""
    yield Comparison(
        op="dora_scale",
        label=f"DoRA norms bfloat16 {SIZE}x{SIZE}, r {RANK}",
        setting=_setting,
        against="peft",
        aim=50,
        bytes=2 * SIZE * SIZE,
        flops=2 * SIZE * SIZE * RANK,
        rounds=9,
    )
