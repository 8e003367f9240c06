"""A linear layer with LoRA, trained and decoding, against Hugging Face peft's and the frozen layer alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit_bench.ops import Comparison, Setting

RANK = 16
STEPS = ((2048, 4096, 4096), (256, 4096, 4096), (128, 512, 512), (512, 512, 512), (128, 512, 1408), (512, 512, 1408))
"""Rows, in and out of training steps."""
DECODES = ((1, 512, 512), (1, 4096, 4096))


def saved_bytes(call: Callable[[], Any], besides: set[int]) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Args:
        besides: addresses of tensors that are there anyway.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for address, size in kept.items() if address not in besides)


def _layer(width: int, out: int, device: torch.device) -> Any:
    """peft's LoRA around a bfloat16 layer, its adapters in float32 as they are by default."""
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=False, device=device, dtype=torch.bfloat16))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped: Any = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_(std=0.01)
    return layer


def _forwards(
    rows: int, width: int, out: int, device: torch.device
) -> tuple[Tensor, dict[str, Callable[[], Tensor]], Any]:
    from peftkit_kernels.lora_linear import lora_linear

    layer = _layer(width, out, device)
    weight = layer.base_layer.weight
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(rows, width, device=device).bfloat16()
    calls = {
        "peftkit": lambda: lora_linear(x, weight, None, down, up, 1.0),
        "peft": lambda: layer(x),
        "frozen layer": lambda: F.linear(x, weight),
    }
    return x, calls, (weight, down, up)


def _training(rows: int, width: int, out: int, device: torch.device) -> Setting:
    x, forwards, parameters = _forwards(rows, width, out, device)
    x.requires_grad_()
    grad = torch.randn(rows, out, device=device).bfloat16()
    besides = {t.untyped_storage().data_ptr() for t in parameters}
    # x itself is what either side has to keep.
    kept = {name: saved_bytes(call, besides) for name, call in forwards.items() if name != "frozen layer"}

    def step(call: Callable[[], Tensor]) -> None:
        call().backward(grad)

    return Setting(
        calls={name: functools.partial(step, call) for name, call in forwards.items()},
        facts={"MiB kept": kept["peftkit"] / 2**20, "of peft's": kept["peftkit"] / kept["peft"]},
    )


def _decoding(rows: int, width: int, out: int, device: torch.device) -> Setting:
    _, forwards, _ = _forwards(rows, width, out, device)
    return Setting(calls={name: torch.no_grad()(call) for name, call in forwards.items()})


def comparisons() -> Iterator[Comparison]:
    """Training steps, and one row without gradients."""
    for rows, width, out in STEPS:
        large = rows * width * out > 2**33
        yield Comparison(
            op="lora_linear",
            label=f"forward + backward bfloat16 {rows} rows of {width}x{out}, r {RANK}",
            setting=functools.partial(_training, rows, width, out),
            against="peft",
            aim=1.5 if large else None,
            flops=4 * rows * width * out + 14 * rows * RANK * (width + out) // 2,
            rounds=7 if large else 61,
        )
    for rows, width, out in DECODES:
        yield Comparison(
            op="lora_linear",
            label=f"decode bfloat16 {rows} row of {width}x{out}, r {RANK}",
            setting=functools.partial(_decoding, rows, width, out),
            against="peft",
            bytes=2 * width * out + 4 * RANK * (width + out),
            rounds=61,
        )
