"""Training through `transformers.Trainer`: checkpoints of the adapters only, exact resumption, the schedules' length.

Importing this module makes `save_pretrained` and `load_state_dict` of wrapped models adapter-aware. transformers itself
is imported only when a callback or the Trainer is asked for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from peftkit import checkpoint
from peftkit.errors import ConfigError
from peftkit.sharding import gathered, whole_parameters
from peftkit.stepping import Stepped
from peftkit.swap import CHILD, ROOT_METHODS
from peftkit.wrap import adapters_of, is_wrapped, record_of

IN_MODEL = "model.safetensors"
"""Name under which transformers looks for a checkpoint's weights."""
_HARMLESS = frozenset({"safe_serialization", "max_shard_size", "save_peft_format", "token", "save_original_format"})
"""Arguments of `save_pretrained` that change nothing about an adapter folder."""
_NOT_GIVEN: Any = object()


def is_adapter_key(key: str) -> bool:
    """Whether a key of a wrapped model's state dict belongs to an adapter."""
    return CHILD in key.split(".")


def adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Everything of the adapters that a state dict holds, under the names that it has in the model.

    That is more than an adapter folder: running scores, step counts and whatever else training needs to go on exactly.

    Args:
        state_dict: where to take the tensors from; None: `model.state_dict()`.
    """
    return {k: v for k, v in (model.state_dict() if state_dict is None else state_dict).items() if is_adapter_key(k)}


def save_pretrained(
    original: Any,
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Any = _NOT_GIVEN,
    **kwargs: Any,
) -> None:
    """Writes the adapters of a wrapped model as peft's folders, in place of the whole model.

    When a training loop passes `state_dict`, as transformers.Trainer does, the folder is also a checkpoint to resume
    from: `model.safetensors` holds all that the adapters keep for training, and nothing of the base.

    Raises:
        ConfigError: an argument that an adapter folder cannot honour.
    """
    for key, value in kwargs.items():
        if key not in _HARMLESS and value not in (None, False):
            raise ConfigError(
                f"save_pretrained of a wrapped model writes its adapters and cannot take {key}={value!r}; "
                "call peftkit.merge_and_unload(model) first to save a whole model"
            )
    if not is_main_process:
        return
    directory = Path(save_directory)
    # Under FSDP only one rank is here, and it must not wait for the others: their parts are in the state dict.
    with whole_parameters(model, {} if state_dict is _NOT_GIVEN else state_dict):
        for name in record_of(model).plans:
            checkpoint.save(model, directory, name=name)
    if state_dict is _NOT_GIVEN:
        return
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _unshared(adapter_state_dict(model, state_dict))
    partial = directory / f".{IN_MODEL}.{os.getpid()}"
    try:
        safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, directory / IN_MODEL)
    finally:
        partial.unlink(missing_ok=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, which safetensors requires."""
    return {key: gathered(t.detach()).to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def load_state_dict(
    original: Any, model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Loads a state dict; one that holds exactly the adapters is complete, and the base is not reported missing.

    Only with strict=False, which is how transformers.Trainer resumes.
    """
    result = original(state_dict, strict=strict, assign=assign)
    own = {key for key in model.state_dict() if is_adapter_key(key)}
    if own and set(state_dict) == own:
        result = type(result)([k for k in result.missing_keys if k in own], result.unexpected_keys)
    return result


ROOT_METHODS["save_pretrained"] = save_pretrained
ROOT_METHODS["load_state_dict"] = load_state_dict


# Schedules ----------------------------------------------------------------------------------------------------------


def stepped_adapters(model: nn.Module) -> Iterator[Stepped]:
    """The active adapters of a wrapped model that follow its optimizer steps; none on a model without adapters."""
    if is_wrapped(model):
        for name in record_of(model).active:
            for _, adapter in adapters_of(model, name):
                if isinstance(adapter, Stepped):
                    yield adapter


def set_total_steps(model: nn.Module, steps: int) -> None:
    """Tells methods with a schedule (AdaLoRA) how many optimizer steps training is going to make from now on.

    Raises:
        StateError: the model is not wrapped.
        ConfigError: steps is not positive.
        TrainingError: the schedule has no room in that many steps, or cannot end within them.
    """
    record_of(model)
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, found {steps}")
    for adapter in stepped_adapters(model):
        adapter.training_begins(steps)


def check_training_ended(model: nn.Module) -> None:
    """Checks, at the end of training, that methods with a schedule (AdaLoRA) went through it.

    Raises:
        TrainingError: the steps that a method needs never came.
    """
    for adapter in stepped_adapters(model):
        adapter.training_ended()


@functools.cache
def _callback_class() -> type[Any]:
    from transformers import TrainerCallback

    class PeftkitCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        """Gives methods with a schedule its length, and checks at the end that they went through it."""

        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Fills in the number of optimizer steps."""
            for adapter in stepped_adapters(self.model):
                adapter.training_begins(state.max_steps - state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Keeps that number right when a step was skipped because a scaled gradient overflowed."""
            for adapter in stepped_adapters(self.model):
                adapter.steps_left(state.max_steps - state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Checks that schedules were followed."""
            check_training_ended(self.model)

    return PeftkitCallback


def callback(model: nn.Module) -> Any:
    """A `transformers.TrainerCallback` for a wrapped model: sets the length of schedules, checks them at the end.

    Methods without a schedule need no callback.

    Raises:
        StateError: the model is not wrapped.
    """
    record_of(model)
    return _callback_class()(model)


@contextmanager
def _declared_adapted(model: nn.Module | None) -> Iterator[None]:
    """Inside the block a wrapped model says that it has adapters; transformers trains no quantized model without."""
    if model is None or not is_wrapped(model):
        yield
        return
    before = model.__dict__.get("_hf_peft_config_loaded")
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["_hf_peft_config_loaded"]
        else:
            model.__dict__["_hf_peft_config_loaded"] = before


@functools.cache
def _trainer_class() -> type[Any]:
    from transformers import Trainer

    class PeftkitTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
        """`transformers.Trainer` that adds `callback(model)` by itself and trains adapters on a quantized base."""

        def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
            with _declared_adapted(model):
                super().__init__(model, *args, **kwargs)
            if is_wrapped(self.model):
                self.add_callback(callback(self.model))

    PeftkitTrainer.__name__ = PeftkitTrainer.__qualname__ = "Trainer"
    return PeftkitTrainer


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        return _trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
