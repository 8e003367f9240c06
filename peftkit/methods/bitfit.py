"""BitFit: the biases are trained, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.errors import TargetError
from peftkit.selective import initialise, parameter_adapter, parameter_total, selected_parameters
from peftkit.spec import Attach, Config, Method, Paper, Site, config


@config
class BitFit(Config):
    """Which biases are trained: all of the backbone's, or those of the modules that `target_modules` selects."""


def _sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    found = selected_parameters(model, cfg, names=("bias",))
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no bias to train (Llama-like models have none); "
            "choose another method, such as layernorm"
        )
    return found


METHOD = Method(
    name="bitfit",
    title="BitFit",
    summary="The backbone's bias vectors.",
    paper=Paper(
        title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        authors="Ben Zaken et al.",
        year=2021,
        arxiv="2106.10199",
    ),
    config=BitFit,
    attach=Attach.PARAMETERS,
    sites=_sites,
    parameter_count=parameter_total,
    adapter=parameter_adapter,
    initialise=initialise,
    quantized_base=True,
)
