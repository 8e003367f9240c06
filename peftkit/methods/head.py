"""Head only, as a baseline: the task's new head on a frozen backbone (a linear probe)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.selective import initialise, parameter_adapter, parameter_total
from peftkit.spec import Attach, Config, Method, Site, config


@config
class HeadOnly(Config):
    """Nothing is adapted; `modules_to_save`, by default the task's new head, is trained."""


def _sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    return ()


METHOD = Method(
    name="head",
    title="Head only",
    summary="The task's new head on the frozen backbone: the baseline that every method must beat.",
    paper=None,
    config=HeadOnly,
    attach=Attach.PARAMETERS,
    sites=_sites,
    parameter_count=parameter_total,
    adapter=parameter_adapter,
    initialise=initialise,
    quantized_base=True,
)
