"""What the tests of the core share: tiny models with random adapters, and bit-exact pictures of a model's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkit.testing.backbones import BACKBONES
from peftkit.wrap import adapters_of

NOISE = 0.05


def built(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny backbone in evaluation mode, the same weights every time."""
    return BACKBONES[name](dtype)


def batch(name: str, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The backbone's batch; on the CPU for a model whose weights are offloaded or sharded."""
    reference = next(model.parameters())
    made = BACKBONES[name].make_inputs(torch.Generator().manual_seed(1000 + seed))
    return {key: value.to(reference.dtype) if value.is_floating_point() else value for key, value in made.items()}


def logits(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's logits on the backbone's batch, without gradients."""
    with torch.no_grad():
        return BACKBONES[name].run(model, batch(name, model, seed))[1]


def loss(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's loss on the backbone's batch, with gradients."""
    return BACKBONES[name].run(model, batch(name, model, seed))[0]


def randomise(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    """The same model with every trained tensor of an adapter moved off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters_of(model, name):
            for parameter in adapter.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.add_((NOISE * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def bits(tensor: Tensor) -> bytes:
    """The tensor's bytes, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + str(tensor.dtype).encode()


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_identity(v) for v in value)
    return value if isinstance(value, bool | int | float | str | type(None)) else id(value)


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a verb could leave changed: tensors, classes, attributes, flags, modes, generator."""
    attributes = {
        path: {
            key: _identity(value)
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for path, module in model.named_modules()
    }
    return {
        "bits": {key: bits(value) for key, value in model.state_dict(keep_vars=True).items()},
        "identities": {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "attributes": attributes,
        "flags": {key: value.requires_grad for key, value in model.named_parameters(remove_duplicate=False)},
        "generator": bits(torch.get_rng_state()),
    }
