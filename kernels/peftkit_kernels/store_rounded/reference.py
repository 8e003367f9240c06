"""The definition of storing values and measuring what was stored, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

AT_A_TIME = {"cpu": 1 << 16}
"""Device -> elements that are measured together: on the CPU few, so that what is made in float64 stays in cache."""


def store_rounded_(stored: Tensor, meant: Tensor) -> Tensor:
    """stored ← meant, rounded once; gives eight sums, (8,), float64.

    With w before, m meant and s after, d = m - w and r = s - w: Σ w², Σ d², Σ (r - d)², Σ r d, the number of elements
    that changed, and how many of w, m and s are not finite.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=stored.device)
    if not stored.numel():
        return sums
    flat, wanted = stored.view(-1), meant.view(-1)
    size = AT_A_TIME.get(stored.device.type, 1 << 24)
    for part, want in zip(flat.split(size), wanted.split(size), strict=True):
        before, target = part.double(), want.double()
        part.copy_(want)
        after = part.double()
        delta, reached = target - before, after - before
        sums += torch.stack(
            (
                before.square().sum(),
                delta.square().sum(),
                (reached - delta).square().sum(),
                (reached * delta).sum(),
                (after != before).sum(),
                (~before.isfinite()).sum(),
                (~target.isfinite()).sum(),
                (~after.isfinite()).sum(),
            )
        )
    return sums
