"""The Gram matrices of what a model's modules are given on calibration inputs, a few modules at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import ConfigError
from peftkit.requantization import gram_of

LIMIT = 2 << 30
"""Bytes that Gram matrices take at a time; more modules than fit take further passes over the inputs."""


def run(model: nn.Module, batch: Any) -> None:
    """Calls the model with a batch: a mapping of arguments, a tuple of them, or one tensor."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def grams(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], limit: int = LIMIT
) -> Iterator[tuple[str, Tensor]]:
    """Path and XᵀX, (in, in), float32, for each module; the rows of X are all inputs that it was given but padding.

    The model runs as it is, in evaluation mode, without gradients. Nothing may be changed on it before the last pair.

    Args:
        modules: modules of the model whose first argument is (..., in).
        batches: mappings of arguments, tuples of them, or tensors; run once for each group of modules.
        limit: bytes of matrices held at a time; at least one module is measured at a time.

    Raises:
        ConfigError: there are no batches, or a module was given nothing.
    """
    if not batches:
        raise ConfigError("calibration inputs hold no batch; give a list of batches, or None")
    for group in _groups(modules, limit):
        found = _measured(model, group, batches)
        for path in group:
            yield path, found.pop(path)


def _groups(modules: Mapping[str, nn.Module], limit: int) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    held = 0
    for path, module in modules.items():
        width: Any = module.in_features if hasattr(module, "in_features") else module.nx
        size = 4 * width * width
        if group and held + size > limit:
            yield group
            group, held = {}, 0
        group[path] = module
        held += size
    if group:
        yield group


@torch.no_grad()
def _measured(model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if mask is not None and mask.shape == x.shape[:-1]:
                x = x[mask.to(x.device) != 0]
            with torch.autocast(x.device.type, enabled=False):
                found[path] = gram_of(x, found.get(path))

        return hook

    handles = [m.register_forward_pre_hook(watch(p), with_kwargs=True) for p, m in modules.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    missing = [path for path in modules if path not in found]
    if missing:
        raise ConfigError(
            f"no calibration input reached {missing[0]}; give batches that the model is used with, such as a list of "
            "what a tokenizer returns"
        )
    return found
