"""Full fine-tuning, as a baseline: every parameter of the backbone is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.selective import initialise, parameter_adapter, parameter_total, selected_parameters
from peftkit.spec import Attach, Config, Method, Site, config


@config
class FullFineTuning(Config):
    """Which modules are trained: all, or those that `target_modules` selects.

    The frozen originals are kept beside the trained copies, so that disabling and unwrapping stay exact; this adds
    the size of the weights to what full fine-tuning needs anyway.
    """


def _sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    return selected_parameters(model, cfg, names=None)


METHOD = Method(
    name="full",
    title="Full fine-tuning",
    summary="Every parameter of the backbone: the baseline that the others are measured against.",
    paper=None,
    config=FullFineTuning,
    attach=Attach.PARAMETERS,
    sites=_sites,
    parameter_count=parameter_total,
    adapter=parameter_adapter,
    initialise=initialise,
)
