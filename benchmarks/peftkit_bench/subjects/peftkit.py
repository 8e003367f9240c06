"""peftkit's own methods as contenders; full fine-tuning and head only are among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

import peftkit
from peftkit import targets
from peftkit.errors import nearest
from peftkit.wrap import record_of
from peftkit_bench.spec import Contender, Resolved, SuiteError


class PeftkitSubject:
    """Methods of `peftkit.METHODS`."""

    name = "peftkit"

    def resolve(self, model: nn.Module, contender: Contender, budget: int | None) -> Resolved:
        """The contender's config for this model, its size solved for the budget; the model may be on the meta device.

        The budget is the method's own: the head comes on top.

        Raises:
            SuiteError: no such method.
            ConfigError: a field is wrong, or the method's smallest size is over the budget.
        """
        if contender.method not in peftkit.METHODS:
            raise SuiteError(f"no method {contender.method!r}; {nearest(contender.method, peftkit.METHODS)}")
        method = peftkit.METHODS[contender.method]
        solved = method.knob is not None and budget is not None and contender.budget
        if solved:
            assert budget is not None
            head = peftkit.plan(model, peftkit.HeadOnly()).extra_parameters
            config = peftkit.fit_budget(model, contender.method, parameters=budget + head, **contender.config)
        else:
            config = method.config(**contender.config)
        planned = peftkit.plan(model, config)
        return Resolved(
            fields=config.to_dict(),
            knob=method.knob.field if solved and method.knob is not None else None,
            adapter_parameters=planned.adapter_parameters,
            head_parameters=planned.extra_parameters,
            total_parameters=planned.total,
        )

    def attach(self, model: nn.Module, method: str, fields: Mapping[str, Any]) -> nn.Module:
        """The model, frozen and adapted."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return peftkit.wrap(model, peftkit.METHODS[method].config(**values))

    def parameters(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained: of the method, and of the head."""
        heads = [site.path for site in record_of(model).plans["default"].extras]
        adapter: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (head if targets.inside(name, heads) else adapter).append(parameter)
        return adapter, head

    def save(self, model: nn.Module, folder: Path) -> int:
        """Writes the adapter and the head; returns the number of parameters written."""
        written = peftkit.save(model, folder)
        total = 0
        for file in sorted(written.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                total += sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118  # no mapping
        return total

    def merge(self, model: nn.Module) -> bool:
        """Folds the adapter into the weights; False, and nothing done, where the method cannot."""
        if not record_of(model).plans["default"].method.mergeable:
            return False
        peftkit.merge(model)
        return True

    def detach(self, model: nn.Module) -> nn.Module:
        """The bare backbone again, with its own head."""
        return peftkit.unwrap(model)
