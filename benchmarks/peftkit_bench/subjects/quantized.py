"""A backbone's projections in bitsandbytes' layers, put in by hand, so that no hub and no loading is involved."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import nn

from peftkit.quantize import quantizable
from peftkit_bench.spec import SuiteError

BITSANDBYTES = ("bnb-nf4", "bnb-int8")


def put_bitsandbytes(model: nn.Module, quantization: str) -> nn.Module:
    """The same model with every projection but the heads in bitsandbytes' layers, in place, on the same device.

    Args:
        model: without adapters.
        quantization: "bnb-nf4" (4 bits, blocks of 64, scales not nested) or "bnb-int8".

    Raises:
        SuiteError: bitsandbytes is not installed, or a projection is of a kind that it has no layer for.
    """
    bitsandbytes = package(quantization)
    chosen = quantizable(model)
    for path, module in chosen.items():
        if type(module) is not nn.Linear:
            raise SuiteError(
                f"quantization {quantization!r}: bitsandbytes has layers for Linear only, and {path} is a "
                f"{type(module).__name__}; use 'nf4' or 'int8' of peftkit"
            )
    make = _four_bit if quantization == "bnb-nf4" else _eight_bit
    for path, module in chosen.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(bitsandbytes, module))
    return model


def package(quantization: str) -> Any:
    """The package bitsandbytes, which is large: it is imported before memory is measured.

    Raises:
        SuiteError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # On some processors bitsandbytes looks for a package of compiled code and warns when there is none.
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes")
    except ImportError:
        raise SuiteError(
            f"quantization {quantization!r} needs bitsandbytes: pip install 'peftkit[quantized]'"
        ) from None


def _four_bit(bitsandbytes: Any, linear: Any) -> nn.Module:
    weight = linear.weight.detach()
    with torch.device("meta"):
        made: Any = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
    # In evaluation on a CPU bitsandbytes lays the codes out anew, and then cannot train beside them any more.
    made.support_avx512bf16_for_cpu = False
    made.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64
    )
    return _finished(made, linear)


def _eight_bit(bitsandbytes: Any, linear: Any) -> nn.Module:
    with torch.device("meta"):
        made: Any = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
    made.weight = bitsandbytes.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return _finished(made, linear)


def _finished(made: Any, linear: Any) -> nn.Module:
    """The layer with its weight quantized, which happens as it moves to a device, and the bias as it was."""
    made.bias = linear.bias
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    made.train(linear.training)
    found: nn.Module = made.to(linear.weight.device)
    return found
