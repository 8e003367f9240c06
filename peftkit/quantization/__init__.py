"""How the parameters of a module are read and written, whatever their storage. One file a backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peftkit.errors import MergeError
from peftkit.quantization import bnb, gptq, native, torchao
from peftkit.quantization.base import BaseWeights, CodedWeights
from peftkit.quantization.exchange import Former, exchange, original_class, put_back
from peftkit.quantization.layer import KINDS, Kind, QuantizedLinear
from peftkit.quantization.plain import PlainWeights

BACKENDS: tuple[Callable[[nn.Module], CodedWeights | None], ...] = (
    native.weights,
    bnb.weights,
    torchao.weights,
    gptq.weights,
)
"""Each gives access to a module that is its own, and None for any other."""


def weights_of(module: nn.Module) -> BaseWeights:
    """Access to the module's own parameters.

    Raises:
        MergeError: the module stores its weight in a way that no backend here knows, or is not quantized yet.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.is_meta:
            raise MergeError(
                f"a weight of {type(module).__name__} is on the meta device: offloaded, or never loaded; load the base "
                "model without offloading to merge"
            )
    for backend in BACKENDS:
        found = backend(module)
        if found is not None:
            return found
    for parameter in module.parameters(recurse=False):
        if not parameter.is_floating_point():
            raise MergeError(
                f"{type(module).__name__} stores its weight as {parameter.dtype}, which no backend of this version can "
                "read; load the base model in bfloat16, float16 or float32, or quantized with bitsandbytes, torchao "
                "or peftkit.quantize"
            )
    return PlainWeights(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is stored in codes, or will be once it is loaded."""
    try:
        return any(backend(module) is not None for backend in BACKENDS)
    except MergeError:
        return True


__all__ = [
    "KINDS",
    "BaseWeights",
    "Former",
    "Kind",
    "PlainWeights",
    "QuantizedLinear",
    "exchange",
    "is_quantized",
    "original_class",
    "put_back",
    "weights_of",
]
