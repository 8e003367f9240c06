"""A fingerprint of the backbone's weights, so that an adapter finds out when it is put on other weights.

Weights are often trained in one precision and used in another, so a digest is kept for the weights as they would be in
each of float32, bfloat16 and float16; two models agree on a tensor when their digests agree in the dtype of either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import targets
from peftkit.sharding import gathered

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = "codes"
"""Stands for the dtype of a quantized weight."""
SAMPLE = 1 << 14
"""Elements of a tensor that enter the digest one by one; all of them enter a sum."""
AT_A_TIME = 1 << 16
"""Elements that are summed together on the CPU."""
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _digest(tensor: Tensor) -> str:
    """16 hexadecimal digits: shape, dtype, the wrapping sum of all bit patterns, and evenly spaced elements."""
    running = Running(tuple(tensor.shape), tensor.dtype)
    running.add(tensor.detach().contiguous().view(-1))
    return running.digest()


class Running:
    """The digest of a tensor that is seen part by part.

    Args:
        shape: of the whole tensor.
        dtype: in which it is seen.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._text = f"{shape} {dtype}"
        self._step = max(1, math.prod(shape) // SAMPLE)
        self._seen, self._total, self._sample = 0, 0, bytearray()

    def add(self, flat: Tensor) -> None:
        """Takes in the next elements, (n,)."""
        bits = flat.view(_INTEGERS[flat.element_size()])
        # torch sums integers of another width through a copy of 8 bytes an element: in parts that stay in the cache.
        size = AT_A_TIME if flat.device.type == "cpu" else max(1, bits.numel())
        self._total += sum(int(part.sum(dtype=torch.int64)) for part in bits.split(size))
        sample = bits[-self._seen % self._step :: self._step].cpu().numpy().tobytes()
        self._sample += sample[: SAMPLE * bits.element_size() - len(self._sample)]
        self._seen += bits.numel()

    def digest(self) -> str:
        """16 hexadecimal digits; what was added so far is taken as the whole."""
        total = (self._total + 2**63) % 2**64 - 2**63
        return hashlib.sha256(f"{self._text} {total}".encode() + self._sample).hexdigest()[:16]


def digests(tensor: Tensor, dtypes: tuple[str, ...] = tuple(DTYPES)) -> dict[str, str]:
    """Digest of the tensor by the dtype it is first rounded to."""
    tensor = gathered(tensor)
    return {name: _digest(tensor.to(DTYPES[name])) for name in dtypes}


def base_tensors(
    model: nn.Module, replaced: Mapping[str, Mapping[str, Tensor]], left_out: list[str]
) -> dict[str, Tensor]:
    """The backbone's parameters by name, as they were before a merge, without modules trained whole.

    Args:
        replaced: parameters before a merge, by module path and name.
        left_out: paths of modules to leave out.
    """
    found = {}
    for path, module in targets.modules(model):
        if targets.inside(path, left_out):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{path}.{name}".lstrip(".")] = replaced.get(path, {}).get(name, parameter.detach())
    return found


def recoded(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[str]:
    """Names of tensors that are in codes on one side, the model's or a stored fingerprint's, and not on the other."""
    return sorted(
        n
        for n, t in tensors.items()
        if n in stored and not t.is_meta and _in_codes(t) != (stored[n].get("dtype") == CODES)
    )


def _in_codes(tensor: Tensor) -> bool:
    """Whether a tensor holds a weight in codes, whose bits depend on how a package lays them out."""
    return not tensor.is_floating_point() or type(tensor.data).__module__.startswith("torchao.")


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"dtype": of each tensor, and its digests by dtype}, plain values; meta tensors are left out.

    Tensors in codes are named and have no digest: an adapter that was trained beside them is used beside the weights
    that were quantized, too.
    """
    kept = {n: t for n, t in sorted(tensors.items()) if not t.is_meta}
    return {
        n: {"dtype": CODES} if _in_codes(t) else {"dtype": str(t.dtype).removeprefix("torch."), **digests(t)}
        for n, t in kept.items()
    }


def differences(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[str]:
    """Names of tensors that are not those of a stored fingerprint, or that only one side has; quantized ones pass.

    Args:
        stored: what `fingerprint` returned, read from JSON.
    """
    wrong = [n for n in stored if n not in tensors]
    for name, tensor in tensors.items():
        known = stored.get(name)
        if known is None:
            wrong.append(name)
            continue
        if tensor.is_meta or _in_codes(tensor) or known.get("dtype") == CODES:
            continue
        own = str(tensor.dtype).removeprefix("torch.")
        asked = tuple(d for d in DTYPES if d in (own, known.get("dtype"))) or ("float32",)
        mine = digests(tensor, asked)
        if not any(mine[d] == known.get(d) for d in asked):
            wrong.append(name)
    return sorted(wrong)
