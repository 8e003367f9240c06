"""Merging and unmerging against Hugging Face peft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftkit_bench.ops import Comparison, Setting

SIZE, RANK = 4096, 16


def _problem(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and factors whose product is 5 % of it."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=generator)
    down = torch.randn(RANK, SIZE, generator=generator)
    up = torch.randn(SIZE, RANK, generator=generator)
    up *= 0.05 * weight.norm() / (up @ down).norm()
    return weight.to(device, dtype), down.to(device), up.to(device)


def _their_layer(weight: Tensor, down: Tensor, up: Tensor) -> Any:
    """peft's LoRA around a linear layer of that weight, with its default adapters in float32."""
    import peft

    linear = nn.Linear(SIZE, SIZE, bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped: Any = peft.get_peft_model(nn.Sequential(linear), config)
    layer = wrapped.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(down)
    layer.lora_B["default"].weight.data.copy_(up)
    return layer


def _merging(device: torch.device) -> Setting:
    from peftkit_kernels import merge_lora_

    weight, down, up = _problem(device, torch.bfloat16)
    layer = _their_layer(weight, down, up)

    def theirs() -> None:
        layer.merge()
        layer.merged_adapters.clear()

    added = weight.clone()
    narrow_down, narrow_up = down.bfloat16(), up.bfloat16()
    return Setting(
        calls={
            "peftkit": lambda: merge_lora_(weight, down, up, 1.0),
            "peft": theirs,
            "torch.addmm_": lambda: added.addmm_(narrow_up, narrow_down),
        }
    )


def _unmerging(device: torch.device) -> Setting:
    from peftkit_kernels import merge_lora_reversibly_, unmerge_lora_

    weight, down, up = _problem(device, torch.bfloat16)
    before = weight.clone()
    undo = merge_lora_reversibly_(weight, down, up, 1.0)
    merged = weight.clone()
    unmerge_lora_(weight, down, up, undo)
    wrong = int((weight.view(torch.int16) != before.view(torch.int16)).sum())
    layer = _their_layer(before, down, up)
    layer.merge()
    stored = layer.get_base_layer().weight
    their_merged = stored.data.clone()
    layer.unmerge()
    theirs_wrong = int((stored.data.view(torch.int16) != before.view(torch.int16)).sum())

    def ours() -> None:
        weight.copy_(merged)
        unmerge_lora_(weight, down, up, undo)

    def theirs() -> None:
        stored.data.copy_(their_merged)
        layer.merged_adapters.append("default")
        layer.unmerge()

    return Setting(
        calls={"peftkit": ours, "peft": theirs},
        facts={
            "wrong": wrong,
            "peft wrong": f"{100 * theirs_wrong / before.numel():.2f} %",
            "bytes kept an element": undo.nbytes / before.numel(),
        },
    )


def comparisons() -> Iterator[Comparison]:
    """Merging, and unmerging with a copy of the merged weight in each call on both sides."""
    moved = 4 * SIZE * SIZE
    work = 2 * SIZE * SIZE * RANK
    yield Comparison(
        op="merge_lora",
        label=f"merge bfloat16 {SIZE}x{SIZE}, r {RANK}",
        setting=_merging,
        against="peft",
        aim=20,
        bytes=moved,
        flops=work,
    )
    yield Comparison(
        op="merge_lora",
        label=f"unmerge bfloat16 {SIZE}x{SIZE}, r {RANK}, with a copy",
        setting=_unmerging,
        against="peft",
        aim=10,
        bytes=2 * moved,
        flops=work,
    )
