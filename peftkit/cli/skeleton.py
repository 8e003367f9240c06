"""Models on the meta device, built from a config alone, for commands that read shapes and no weights."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from peftkit.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn


class Task(StrEnum):
    """What the model is built for."""

    auto = "auto"
    base = "base"
    seq_cls = "seq-cls"
    token_cls = "token-cls"
    qa = "qa"
    causal_lm = "causal-lm"
    seq2seq = "seq2seq"
    image_cls = "image-cls"


AUTO_CLASSES = {
    Task.base: "AutoModel",
    Task.seq_cls: "AutoModelForSequenceClassification",
    Task.token_cls: "AutoModelForTokenClassification",
    Task.qa: "AutoModelForQuestionAnswering",
    Task.causal_lm: "AutoModelForCausalLM",
    Task.seq2seq: "AutoModelForSeq2SeqLM",
    Task.image_cls: "AutoModelForImageClassification",
}


def load_skeleton(name: str, task: Task, labels: int | None) -> nn.Module:
    """A transformers model on the meta device, built from its config alone.

    Args:
        name: a folder with config.json, or a name on the hub.
        task: which head it gets.
        labels: number of classes; None: what the config says.

    Raises:
        BackboneError: the config cannot be read, or transformers has no such model for the task.
    """
    import torch
    import transformers

    try:
        extra = {} if labels is None else {"num_labels": labels}
        config = transformers.AutoConfig.from_pretrained(name, **extra)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot read the config of {name!r}: expected a folder with a transformers config.json or a model's name "
            f"on the hub; {first}"
        ) from None
    try:
        with torch.device("meta"):
            model: nn.Module = _model_class(config, task)(config)
    except (ValueError, KeyError) as error:
        raise BackboneError(
            f"transformers cannot build a {config.model_type} model for task {task.value!r}: "
            f"{str(error).splitlines()[0]}; choose another --task"
        ) from None
    return model


def _model_class(config: Any, task: Task) -> Callable[[Any], Any]:
    """What builds the model: the class that the config names, or the auto class of the task."""
    import transformers

    if task is Task.auto:
        for name in getattr(config, "architectures", None) or ():
            named = getattr(transformers, name, None)
            if named is not None:
                return named  # type: ignore[no-any-return]  # transformers is untyped
        task = Task.base
    return getattr(transformers, AUTO_CLASSES[task]).from_config  # type: ignore[no-any-return]  # transformers is untyped
