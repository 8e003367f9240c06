"""peftkit's own methods as contenders; full fine-tuning and head only are among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import peftkit
from peftkit import targets
from peftkit.errors import StateError, nearest
from peftkit.methods.adalora import Allocator
from peftkit.training import adapter_state_dict, set_total_steps, stepped_adapters
from peftkit.wrap import record_of
from peftkit_bench.spec import Contender, Resolved, SuiteError
from peftkit_bench.subjects.quantized import BITSANDBYTES, put_bitsandbytes
from peftkit_bench.subjects.schedule import allocation
from peftkit_bench.subjects.stored import stored_parameters

OWN = ("nf4", "int8")


class PeftkitSubject:
    """Methods of `peftkit.METHODS`."""

    name = "peftkit"
    quantizations = (*OWN, *BITSANDBYTES)

    def resolve(self, model: nn.Module, contender: Contender, budget: int | None) -> Resolved:
        """See `Subject`: the budget is the method's own, the head comes on top.

        Raises:
            SuiteError: no such method or quantization, or the method does not work on a quantized base.
            ConfigError: a field is wrong.
            TargetError: a pattern matches nothing.
        """
        if contender.method not in peftkit.METHODS:
            raise SuiteError(f"no method {contender.method!r}; {nearest(contender.method, peftkit.METHODS)}")
        method = peftkit.METHODS[contender.method]
        if contender.quantization is not None:
            self._check_quantization(contender.quantization)
            if not method.quantized_base:
                raise SuiteError(
                    f"{method.name} does not work with quantization {contender.quantization!r}: it needs the "
                    "backbone's weights in floating point; leave the quantization out"
                )
        solved = method.knob is not None and budget is not None and contender.budget
        if solved:
            assert budget is not None
            config = peftkit.fit_budget(
                model,
                contender.method,
                parameters=budget,
                adapter_only=True,
                or_smallest=True,
                **contender.config,
            )
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

    def _check_quantization(self, quantization: str) -> None:
        if quantization not in self.quantizations:
            raise SuiteError(
                f"peftkit's methods have no quantization {quantization!r}; {nearest(quantization, self.quantizations)}"
            )

    def quantize(self, model: nn.Module, quantization: str) -> nn.Module:
        """See `Subject`: peftkit's own layers, or bitsandbytes'.

        Raises:
            SuiteError: no such quantization, or bitsandbytes is missing or has no layer for a projection.
            BackboneError: there is no projection to quantize.
        """
        self._check_quantization(quantization)
        if quantization in BITSANDBYTES:
            return put_bitsandbytes(model, quantization)
        return peftkit.quantize(model, "nf4" if quantization == "nf4" else "int8")

    def attach(self, model: nn.Module, method: str, fields: Mapping[str, Any]) -> nn.Module:
        """See `Subject`."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return peftkit.wrap(model, peftkit.METHODS[method].config(**values))

    def parameters(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """See `Subject`."""
        heads = [site.path for site in record_of(model).plans["default"].extras]
        adapter: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (head if targets.inside(name, heads) else adapter).append(parameter)
        return adapter, head

    # Training -------------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, steps: int) -> None:
        """See `Subject`: AdaLoRA's schedule gets its length, as `schedule.allocation` says.

        Raises:
            TrainingError: a schedule that the config names does not fit the run.
        """
        record = record_of(model)
        for adapter in stepped_adapters(model):
            if isinstance(adapter, Allocator) and adapter.config.total_step is None:
                tinit, tfinal = allocation(steps, adapter.config.tinit, adapter.config.tfinal)
                adapter.config = dataclasses.replace(adapter.config, tinit=tinit, tfinal=tfinal)
                planned = record.plans["default"]
                # What is saved says how it was trained.
                record.plans["default"] = dataclasses.replace(planned, config=adapter.config)
        set_total_steps(model, steps)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """See `Subject`: None, AdaLoRA adds its penalty's gradient at the optimizer's step by itself."""
        return None

    def stepped(self, model: nn.Module, step: int) -> None:
        """See `Subject`: nothing, methods with a schedule notice the optimizer's steps by themselves."""

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Subject`: adapters and modules trained whole, with masks, running scores and step counts."""
        return {name: tensor.detach().clone() for name, tensor in adapter_state_dict(model).items()}

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See `Subject`.

        Raises:
            StateError: the state is that of another model.
        """
        own = adapter_state_dict(model)
        if own.keys() != state.keys():
            other = sorted(own.keys() ^ state.keys())
            raise StateError(f"the state is not that of this model: {', '.join(other[:3])} only on one side")
        nn.Module.load_state_dict(model, dict(state), strict=False)

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """See `Subject`."""
        return peftkit.disabled(model)

    # Afterwards -----------------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, folder: Path) -> int:
        """See `Subject`: peftkit's folder."""
        return stored_parameters(peftkit.save(model, folder))

    def merge(self, model: nn.Module) -> bool:
        """See `Subject`."""
        if not record_of(model).plans["default"].method.mergeable:
            return False
        peftkit.merge(model)
        return True

    def detach(self, model: nn.Module) -> nn.Module:
        """See `Subject`: with the head that it came with."""
        return peftkit.unwrap(model)
