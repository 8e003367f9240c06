"""Parameters that several processes hold in parts, as FSDP2 leaves them: gathered, laid out again, or given whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        return isinstance(tensor, DTensor)
    return False


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is. Every rank must call it."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor
    return whole


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, laid out as `like`."""
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]  # a DTensor
    return tensor


@contextmanager
def whole_parameters(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block sharded parameters are those of a whole state dict, so that one rank can read them by itself."""
    sharded = [
        (module, name, parameter, f"{path}.{name}".lstrip("."))
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    swapped = [(m, n, p, state_dict[key]) for m, n, p, key in sharded if isinstance(state_dict.get(key), Tensor)]
    try:
        for module, name, parameter, whole in swapped:
            module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter, _ in swapped:
            module._parameters[name] = parameter
