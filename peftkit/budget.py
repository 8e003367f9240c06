"""Solves a method's size for a trainable-parameter budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftkit.errors import ConfigError, nearest
from peftkit.methods import METHODS
from peftkit.plan import plan

LISTED = 256
"""A list of at most so many possible values is tried out whole: its counts need not grow with the value."""


def fit_budget(
    model: nn.Module,
    method: str,
    *,
    parameters: int,
    adapter_only: bool = False,
    or_smallest: bool = False,
    **fields: Any,
) -> Any:
    """The config of a method whose exact trainable count comes closest to a budget without going over it.

    Args:
        model: the model to be wrapped; nothing is changed.
        method: a name in `peftkit.METHODS`.
        parameters: the budget: trainable parameters, those of a task's new head included.
        adapter_only: whether the budget is for the method alone, with the modules trained whole on top.
        or_smallest: whether a budget below the smallest size gives that size; False: it is an error.
        **fields: further fields of the config; the method's own size field is solved for.

    Raises:
        ConfigError: the method is unknown, has no size to set, or its smallest size is over the budget.
    """
    if method not in METHODS:
        raise ConfigError(f"no method {method!r}; {nearest(method, METHODS)}")
    entry = METHODS[method]
    knob = entry.knob
    start = entry.config(**fields)

    def counted(config: Any) -> int:
        planned = plan(model, config)
        return planned.adapter_parameters if adapter_only else planned.trainable

    if knob is None:
        count = counted(start)
        if count > parameters and not or_smallest:
            raise ConfigError(f"{method} has no size to set and needs {count:,} parameters, over {parameters:,}")
        return start
    choices: Sequence[int] = knob.values(model) if knob.values else range(knob.low, knob.high + 1)

    def count_at(index: int) -> int:
        return counted(knob.set(start, choices[index]))

    low, high = 0, len(choices) - 1
    smallest = count_at(low)
    if smallest > parameters and not or_smallest:
        raise ConfigError(
            f"{method} with {knob.field}={choices[low]} already trains {smallest:,} parameters, over the budget of "
            f"{parameters:,}; raise the budget or name fewer target_modules"
        )
    if knob.values and high < LISTED:
        counts = [count_at(index) for index in range(len(choices))]
        # Where none is within the budget, which is an error above unless it was asked for, the least of all.
        best = max((count for count in counts if count <= parameters), default=min(counts))
        return knob.set(start, choices[counts.index(best)])
    step = 1
    while low + step <= high and count_at(low + step) <= parameters:
        low, step = low + step, step * 2
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_at(middle) <= parameters else (low, middle - 1)
    return knob.set(start, choices[low])
