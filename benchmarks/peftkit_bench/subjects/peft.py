"""The methods of Hugging Face peft as contenders: `method: peft:boft`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peftkit import backbones
from peftkit.errors import StateError, nearest
from peftkit_bench.spec import Contender, Resolved, SuiteError
from peftkit_bench.subjects import peft_fields
from peftkit_bench.subjects.peft_attached import ADAPTER, Counted, attach, attached, count
from peftkit_bench.subjects.quantized import BITSANDBYTES, put_bitsandbytes
from peftkit_bench.subjects.schedule import allocation
from peftkit_bench.subjects.snapshot import Snapshot
from peftkit_bench.subjects.stored import stored_parameters

LISTED = 32
"""A list of at most so many possible sizes is tried out whole: peft refuses some in the middle."""
_PATTERN = "rank_pattern."
_PROMPTED = ("forward", "prepare_inputs_for_generation")


class PeftSubject:
    """Methods of peft, by the names of its types in lower case."""

    name = "peft"
    quantizations = BITSANDBYTES

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[nn.Module, dict[str, Counted]] = weakref.WeakKeyDictionary()

    def resolve(self, model: nn.Module, contender: Contender, budget: int | None) -> Resolved:
        """See `Subject`.

        Raises:
            SuiteError: no such method, field or quantization; the method does not train on such a base; or peft
                cannot put it into the model.
        """
        name = contender.method
        method = peft_fields.entry(name)
        if contender.quantization is not None:
            self._check_quantization(contender.quantization)
            if contender.quantization in method.not_with:
                raise SuiteError(
                    f"peft:{name} does not work with quantization {contender.quantization!r}: "
                    f"{method.not_with[contender.quantization]}; leave the quantization out"
                )
        fields = peft_fields.resolved(model, name, contender.config)
        solved = method.knob is not None and budget is not None and contender.budget
        if solved:
            assert method.knob is not None
            assert budget is not None
            fields = self._solved(model, name, fields, budget)
        counted = self._count(model, name, fields)
        if not counted.adapter:
            raise SuiteError(f"peft:{name} finds nothing to train in {type(model).__name__}; name target_modules")
        self._check_head(model, contender, counted)
        base = sum(parameter.numel() for parameter in model.parameters())
        return Resolved(
            fields=fields,
            knob=method.knob if solved else None,
            adapter_parameters=counted.adapter,
            head_parameters=counted.head,
            total_parameters=base + (0 if method.replaces else counted.adapter),
        )

    def _check_head(self, model: nn.Module, contender: Contender, counted: Counted) -> None:
        """Raises SuiteError unless a task's new head is trained, whole and once."""
        if "modules_to_save" in contender.config:
            return
        heads = [model.get_submodule(path) for path in backbones.head_names(model)]
        expected = sum(parameter.numel() for head in heads for parameter in head.parameters())
        if counted.head != expected:
            raise SuiteError(
                f"peft:{contender.method} trains {counted.head:,} of the {expected:,} parameters of the new head of "
                f"{type(model).__name__}; compare it on a task without a head"
            )

    def _check_quantization(self, quantization: str) -> None:
        if quantization not in self.quantizations:
            raise SuiteError(f"peft has no quantization {quantization!r}; {nearest(quantization, self.quantizations)}")

    def _solved(self, model: nn.Module, name: str, fields: dict[str, Any], budget: int) -> dict[str, Any]:
        """The fields with the largest size that is not above the budget; where none is, the smallest."""
        method, twin = peft_fields.entry(name), peft_fields.counterpart(name)
        knob = method.knob
        assert knob is not None
        own_values = twin.knob.values if twin is not None and twin.knob is not None else None
        choices: Sequence[Any] = (
            own_values(model)
            if own_values is not None
            else method.values(peft_fields.shapes(model, fields.get("target_modules")))
        )
        refusals: list[SuiteError] = []

        def sized(index: int) -> dict[str, Any]:
            value = choices[index]
            return {**fields, **method.with_knob(value), knob: value}

        def size(index: int) -> int | None:
            try:
                return self._count(model, name, sized(index)).adapter
            except SuiteError as error:
                refusals.append(error)
                return None

        def fits(index: int) -> bool:
            found = size(index)
            return found is not None and found <= budget

        # The counts of values that peftkit lists need not grow with the value.
        if own_values is not None or len(choices) <= LISTED:
            sizes = {index: found for index in range(len(choices)) if (found := size(index)) is not None}
            if not sizes:
                raise refusals[-1]
            within = {index: found for index, found in sizes.items() if found <= budget}
            wanted = max(within.values()) if within else min(sizes.values())
            return sized(next(index for index, found in sizes.items() if found == wanted))
        if size(0) is None:
            raise refusals[-1]
        low, step = 0, 1
        while low + step < len(choices) and fits(low + step):
            low, step = low + step, step * 2
        high = min(len(choices) - 1, low + step - 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return sized(low)

    def _count(self, model: nn.Module, name: str, fields: Mapping[str, Any]) -> Counted:
        known = self._counts.setdefault(model, {})
        key = repr((name, sorted(fields.items())))
        if key not in known:
            known[key] = count(model, name, fields)
        return known[key]

    def quantize(self, model: nn.Module, quantization: str) -> nn.Module:
        """See `Subject`.

        Raises:
            SuiteError: no such quantization, or bitsandbytes is missing or has no layer for a projection.
        """
        self._check_quantization(quantization)
        found: Any = put_bitsandbytes(model, quantization)
        # peft looks for these, and takes the layers for ordinary ones without.
        found.is_loaded_in_4bit = quantization == "bnb-nf4"
        found.is_loaded_in_8bit = quantization == "bnb-int8"
        return found  # type: ignore[no-any-return]  # a module, treated as any here

    def attach(self, model: nn.Module, method: str, fields: Mapping[str, Any]) -> nn.Module:
        """See `Subject`."""
        return attach(model, method, fields)

    def parameters(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """See `Subject`."""
        known, own = attached(model), dict(model.named_parameters())
        adapter = [own[name] for name in known.trained if name not in known.head]
        return adapter, [own[name] for name in known.trained if name in known.head]

    # Training -------------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, steps: int) -> None:
        """See `Subject`: AdaLoRA's schedule gets its length, as `schedule.allocation` says."""
        known = attached(model)
        if known.name == "adalora":
            config = _config(model)
            if not known.scheduled:
                config.tinit, config.tfinal = allocation(steps, config.tinit, config.tfinal)
                config.total_step, known.scheduled = steps, True
            elif config.total_step - config.tfinal > steps:
                raise SuiteError(
                    f"peft:adalora: with total_step={config.total_step} and tfinal={config.tfinal} the budget is final "
                    f"after {config.total_step - config.tfinal} steps, but training makes {steps}; leave total_step out"
                )

    def penalty(self, model: nn.Module) -> Tensor | None:
        """See `Subject`: AdaLoRA's, as peft adds it where it is given labels.

        orth_reg_weight * mean over all A and B of ‖A Aᵀ - I‖_F, ‖Bᵀ B - I‖_F
        """
        if attached(model).name != "adalora":
            return None
        weight = float(_config(model).orth_reg_weight)
        norms = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or not (".lora_A." in name or ".lora_B." in name):
                continue
            product = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return weight * torch.stack(norms).mean() if weight and norms else None

    def stepped(self, model: nn.Module, step: int) -> None:
        """See `Subject`: methods that move their budget between the sites are told; peft leaves that to the loop."""
        known: Any = attached(model)
        own: Any = model
        if known.name == "adalora":
            if not known.scheduled:
                raise StateError("peft:adalora does not know how many steps there will be; call begin first")
            allocator = own.base_model.rankallocator
            # With nothing to give up there is nothing to allocate, and peft would look for the 0th smallest score.
            if allocator.init_bgt > allocator.target_bgt:
                own.base_model.update_and_allocate(step + 1)
        elif known.name == "adamss":
            own.base_model.update_and_allocate(step + 1)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Subject`: what is trained, buffers of the adapters, and the triplets that AdaLoRA keeps."""
        known = attached(model)
        found = {name: tensor.detach().clone() for name, tensor in self._changing(model)}
        if known.name == "adalora":
            for name, kept in (_config(model).rank_pattern or {}).items():
                found[_PATTERN + name] = torch.tensor([bool(each) for each in kept])
        return found

    def restore(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See `Subject`.

        Raises:
            StateError: the state is that of another model.
        """
        known, own = attached(model), dict(self._changing(model))
        patterns = {name: kept for name, kept in state.items() if name.startswith(_PATTERN)}
        if own.keys() != state.keys() - patterns.keys():
            other = sorted(own.keys() ^ (state.keys() - patterns.keys()))
            raise StateError(f"the state is not that of this model: {', '.join(other[:3])} only on one side")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.data.copy_(state[name])
        if known.name == "adalora":
            found = {name.removeprefix(_PATTERN): kept.tolist() for name, kept in patterns.items()}
            _config(model).rank_pattern = found or None

    def _changing(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        known = attached(model)
        own = dict(model.named_parameters())
        yield from ((name, own[name]) for name in known.trained)
        bare = known.snapshot.tensors
        yield from ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in bare)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """See `Subject`; modules trained whole are as in the bare backbone too, which peft leaves out in places."""
        own: Any = model
        known = attached(model)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        whole = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and not m.disable_adapters]
        prompt = _config(model).is_prompt_learning
        try:
            with _past_the_prompt(own, known.base) if prompt else own.disable_adapter():
                for module in whole:
                    module.enable_adapters(False)
                yield
        finally:
            for module in whole:
                module.enable_adapters(True)
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(flags[name])

    # Afterwards -----------------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, folder: Path) -> int:
        """See `Subject`: peft's own folder."""
        own: Any = model
        own.save_pretrained(str(folder), save_embedding_layers=False)
        return stored_parameters(folder)

    def merge(self, model: nn.Module) -> bool:
        """See `Subject`: `merge_and_unload`, after which peft's model goes through the bare modules."""
        known = attached(model)
        own: Any = model
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if not layers:
            return False
        bases = [layer.get_base_layer() for layer in layers]
        codes = any(not p.is_floating_point() for base in bases for p in base.parameters())
        # Layers that do not know codes would add to them.
        knows_codes = known.method.merges_codes and all(type(layer).__module__.endswith(".bnb") for layer in layers)
        if codes and not knows_codes:
            return False
        before = Snapshot(model)
        for snapshot in (before, known.snapshot):
            snapshot.keep_values(p for base in bases for p in base.parameters() if p.is_floating_point())
        try:
            own.merge_and_unload()
        except (NotImplementedError, AttributeError, RuntimeError, TypeError, ValueError):
            # What a method cannot do, peft finds out in the middle.
            before.restore(model)
            return False
        return True

    def detach(self, model: nn.Module) -> nn.Module:
        """See `Subject`: every module, parameter and bit as it was before `attach`."""
        known = attached(model)
        known.snapshot.restore(known.base)
        known.base.train(model.training)
        return known.base


@contextmanager
def _past_the_prompt(model: Any, base: Any) -> Iterator[None]:
    """Inside the block peft's model calls the backbone without virtual tokens.

    peft's own way asks the backbone for a method that only those that generate have.
    """
    taken = {name: getattr(base, name) for name in _PROMPTED if hasattr(base, name)}
    before = {name: model.__dict__[name] for name in taken if name in model.__dict__}
    model.__dict__.update(taken)
    model._adapters_disabled = True
    try:
        yield
    finally:
        model._adapters_disabled = False
        for name in taken:
            del model.__dict__[name]
        model.__dict__.update(before)


def _config(model: Any) -> Any:
    return model.peft_config[ADAPTER]
