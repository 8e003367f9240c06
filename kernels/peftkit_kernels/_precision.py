"""The precision in which definitions compute: float32 at the least, whatever autocast wants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and scales: float64 for float64, float32 for any other."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def exactly(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, whose products autocast leaves in the dtype that they have here."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        kind = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return called
