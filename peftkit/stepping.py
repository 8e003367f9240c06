"""Adapters that act at every optimizer step, driven by whatever loop trains them.

One pair of hooks on every torch optimizer, registered when the first such adapter is made, finds the adapters whose
parameters a step updates. No loop has to call anything.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from peftkit.spec import Adapter

_LIVE: weakref.WeakSet[Stepped] = weakref.WeakSet()
_LOCK = threading.Lock()


class Stepped(Adapter):
    """An adapter that is told of the optimizer steps that update it.

    A step is one update of all parameters that train. Where several optimizers share them, the step is done when each
    parameter had its turn; parameters that no optimizer holds are left out from the second round on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._covered: frozenset[str] = frozenset()
        self._round: frozenset[str] | None = None
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch
        _watch(self)

    def stepped(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters whose updates concern the adapter; its own, unless a method says otherwise."""
        return self.named_parameters(recurse=False)

    def before_step(self, names: Collection[str], scale: float) -> float | Tensor:
        """The loss whose gradient was added to the `.grad` of these parameters, which are about to be updated.

        Args:
            scale: what the gradients are multiplied by (an optimizer that undoes loss scaling itself); usually 1.
        """
        return 0.0

    def after_update(self, names: Collection[str]) -> None:
        """Called when an optimizer has updated these parameters; their gradients are still there."""

    def after_step(self) -> None:
        """Called when every parameter that trains was updated once more."""

    def training_begins(self, steps: int) -> None:
        """Called by a training loop that knows how many optimizer steps it is going to make.

        Raises:
            TrainingError: the method cannot do its work within that many.
        """

    def steps_left(self, steps: int) -> None:
        """Called by such a loop after each step; steps that were skipped in between do not come again."""

    def training_ended(self) -> None:
        """Called at the end of training by a loop that has one.

        Raises:
            TrainingError: the steps that the adapter needs never came.
        """

    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that require gradients."""
        return frozenset(name for name, parameter in self.stepped() if parameter.requires_grad)

    def _take_turn(self, held: frozenset[str]) -> None:
        """Counts a step when the optimizers that came by hold, together, every parameter that trains."""
        if self._covered & held:
            self._round = self._covered
            self._covered = frozenset()
            self.after_step()
        self._covered |= held
        expected = self.trained_names() if self._round is None else self._round & self.trained_names()
        if expected <= self._covered:
            self._covered = frozenset()
            self.after_step()


def _watch(adapter: Stepped) -> None:
    _register()
    with _LOCK:
        _LIVE.add(adapter)


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


# A gradient is marked with its version, so that optimizers that call one another act on it
# once, and on the next one again.


def _fresh(parameter: nn.Parameter, mark: str) -> bool:
    grad = parameter.grad
    return grad is not None and grad.__dict__.get(mark) != grad._version


def _mark(parameter: nn.Parameter, mark: str) -> None:
    grad = parameter.grad
    if grad is not None:
        grad.__dict__[mark] = grad._version


def _concerned(optimizer: Optimizer) -> Iterator[tuple[Stepped, dict[str, nn.Parameter]]]:
    """The live adapters that the optimizer trains, with those of their parameters that it holds."""
    with _LOCK:
        live = list(_LIVE)
    if not live or _overflowed(optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in live:
        found = {n: p for n, p in adapter.stepped() if p.requires_grad and id(p) in held}
        if found:
            yield adapter, found


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether the optimizer is about to skip the step, or has skipped it, because a scaled gradient overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _add_gradients(optimizer: Optimizer) -> float | Tensor:
    scale = getattr(optimizer, "grad_scale", None)
    total: float | Tensor = 0.0
    with torch.no_grad():
        for adapter, found in _concerned(optimizer):
            fresh = [n for n, p in found.items() if _fresh(p, "_peftkit_added")]
            if fresh:
                total = total + adapter.before_step(fresh, 1.0 if scale is None else float(scale))
                for name in fresh:
                    _mark(found[name], "_peftkit_added")
    return total


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Adds gradients before the step; inside the closure where the optimizer computes gradients by calling one."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        _add_gradients(optimizer)
        return None
    if not any(True for _ in _concerned(optimizer)):
        return None
    wrapped = _with_gradients(optimizer, closure)
    if len(args) > 1:
        return (args[0], wrapped, *args[2:]), kwargs
    return args, {**kwargs, "closure": wrapped}


def _with_gradients(optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        loss = closure()
        added = _add_gradients(optimizer)
        return loss if loss is None else loss + added

    return call


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for adapter, found in _concerned(optimizer):
            fresh = [n for n, p in found.items() if _fresh(p, "_peftkit_counted")]
            if fresh:
                adapter.after_update(fresh)
                for name in fresh:
                    _mark(found[name], "_peftkit_counted")
                adapter._take_turn(frozenset(found))
