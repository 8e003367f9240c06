"""LayerNorm tuning: the gains and biases of the normalisation layers are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.errors import TargetError
from peftkit.selective import initialise, parameter_adapter, parameter_total, selected_parameters
from peftkit.spec import Attach, Config, Method, Paper, PeftFormat, Site, config


@config
class LayerNormTuning(Config):
    """Which norms are trained: all of the backbone's, or those that `target_modules` selects."""


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or type(module).__name__.endswith(
        ("LayerNorm", "RMSNorm")
    )


def _sites(model: nn.Module, cfg: Any) -> Sequence[Site]:
    found = selected_parameters(model, cfg, names=None, keep=_is_norm)
    if not found:
        raise TargetError(f"{type(model).__name__} has no normalisation layer with parameters; choose another method")
    return found


METHOD = Method(
    name="layernorm",
    title="LayerNorm tuning",
    summary="The gains and biases of the normalisation layers.",
    paper=Paper(
        title="Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
        authors="Zhao et al.",
        year=2023,
        arxiv="2312.11420",
    ),
    config=LayerNormTuning,
    attach=Attach.PARAMETERS,
    sites=_sites,
    parameter_count=parameter_total,
    adapter=parameter_adapter,
    initialise=initialise,
    quantized_base=True,
    peft=PeftFormat(
        peft_type="LN_TUNING",
        names={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
    ),
)
