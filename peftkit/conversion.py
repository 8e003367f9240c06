"""Which modules change their storage when adapters are merged, and the exchange itself, which can be undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import targets
from peftkit.calibration import grams
from peftkit.certificate import SiteMerge
from peftkit.errors import ConfigError, MergeError
from peftkit.folding import folded
from peftkit.quantization import Former, QuantizedLinear, exchange, is_quantized, put_back, weights_of
from peftkit.quantize import declaration, declare, projections, quantizable, redeclare, undeclare
from peftkit.spec import Adapter, is_weight_module
from peftkit.storing import FUSED, Form, Given, stored_anew, unchanged

Work = Sequence[tuple[str, nn.Module, Sequence[Adapter]]]
"""Path, module and adapters, inner ones first, of each site."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a model's modules were before they changed storage. Holds their own tensors, no copies."""

    formers: Mapping[str, Former]
    declared: Mapping[str, Any]
    """What a transformers model said of its quantization."""

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """The parameters that were there, by module path and name."""
        return {path: former.parameters for path, former in self.formers.items()}


def anew(
    model: nn.Module,
    work: Work,
    form: Form | None,
    inputs: Sequence[Any] | None,
    original: nn.Module | Mapping[str, Tensor] | None,
) -> tuple[dict[str, nn.Module], list[SiteMerge]]:
    """Modules that take the place of others, by path, and what of the changes they hold; nothing is changed yet.

    Modules that are missing are to be written in place. Arguments and errors as for `peftkit.merge`.
    """
    running = running_dtype(model)
    if form is not None and form.dtype is not None:
        _refuse_other_dtype(running, form.dtype)
    by_path = {path: (module, adapters) for path, module, adapters in work}
    chosen = _chosen(model, by_path, form, inputs is not None or original is not None)
    measured = {p: m for p, m in chosen.items() if p in by_path and is_weight_module(m)}
    found: dict[str, nn.Module] = {}
    sites: dict[str, list[SiteMerge]] = {}
    for path, gram in _with_grams(model, measured, chosen, inputs):
        module = chosen[path]
        adapters = by_path[path][1] if path in by_path else ()
        weights = weights_of(module)
        before = weights.read()
        given = Given(
            path=path,
            module=module,
            weights=weights,
            adapters=adapters,
            before=before,
            meant=folded(path, adapters, before, weights.turn) if adapters else {},
            gram=gram,
            original=_original(original, path, module) if adapters and original is not None else None,
        )
        found[path], sites[path] = stored_anew(given, form or unchanged(running if weights.quantized else None))
    return found, [site for path in by_path if path in sites for site in sites[path]]


def _with_grams(
    model: nn.Module, measured: Mapping[str, nn.Module], chosen: Mapping[str, nn.Module], inputs: Sequence[Any] | None
) -> Iterator[tuple[str, Tensor | None]]:
    if inputs is not None:
        yield from grams(model, measured, inputs)
    yield from ((path, None) for path in chosen if inputs is None or path not in measured)


def _chosen(model: nn.Module, by_path: Mapping[str, Any], form: Form | None, judged: bool) -> dict[str, nn.Module]:
    """The modules that get other storage, by path, in the model's order."""
    coded = {path: module for path, module in targets.modules(model) if is_quantized(module)}
    sites = {path: module for path, module in projections(model).items() if path in by_path}
    if form is None or form.dtype is not None:
        # With inputs or an original to judge by, plain weights too are made before anything is written.
        return {**coded, **(sites if judged else {})}
    if form.into == FUSED:
        plain = next(iter(sites), None)
        if plain is not None and not any(path in coded for path in sites):
            raise MergeError(
                f"{plain} is stored as {weights_of(sites[plain]).storage}: into='fused' puts the update beside codes; "
                "quantize the base first with peftkit.quantize or bitsandbytes, or merge without `into`"
            )
        return {path: m for path, m in coded.items() if path in sites or not isinstance(m, QuantizedLinear)}
    # What is to stay in floating point, as the output head is, takes its change in floating point too.
    fits = quantizable(model)
    wanted = {**{path: module for path, module in sites.items() if path in coded}, **fits}
    for path, module in coded.items():
        layer = weights_of(module).layer()
        other = layer is None or layer.kind != form.into
        if other or (form.residual_rank and not isinstance(module, QuantizedLinear)):
            wanted[path] = module
    return {path: module for path, module in targets.modules(model) if path in wanted}


def running_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of what is in no codes, matrices before vectors; None where everything is in codes."""
    counts: dict[tuple[bool, torch.dtype], int] = {}
    for _, module in targets.modules(model):
        if not is_quantized(module):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    key = (parameter.dim() > 1, parameter.dtype)
                    counts[key] = counts.get(key, 0) + parameter.numel()
    return max(counts, key=lambda key: (key[0], counts[key]))[1] if counts else None


def _refuse_other_dtype(running: torch.dtype | None, wanted: torch.dtype) -> None:
    """Raises ConfigError when what is in no codes has another dtype: a model of two dtypes does not run."""
    if running is not None and running != wanted:
        raise ConfigError(
            f"into={wanted}: the rest of the model is {running}, and weights of another dtype would not run beside it; "
            f"leave `into` out, or name that dtype, and call model.to({wanted}) after the merge"
        )


def _original(original: nn.Module | Mapping[str, Tensor], path: str, module: nn.Module) -> Tensor | None:
    """The original weight of a module, (out, in)."""
    key = f"{path}.weight".lstrip(".")
    found = original.state_dict() if isinstance(original, nn.Module) else original
    if not is_weight_module(module):
        return None
    if key not in found:
        raise ConfigError(f"original holds no {key}; give the model that was quantized, or its state dict")
    own: Any = module
    weight = found[key].detach()
    shape = (own.out_features, own.in_features) if isinstance(module, nn.Linear) else (own.nf, own.nx)
    turned = weight.t() if type(module).__name__ == "Conv1D" or getattr(own, "conv1d", False) else weight
    if tuple(turned.shape) != shape or not weight.is_floating_point():
        raise ConfigError(
            f"original: {key} is {tuple(weight.shape)} of {weight.dtype}; expected {shape} in floating point"
        )
    return turned.to(own.weight.device, torch.float32)


def take_over(model: nn.Module, fresh: Mapping[str, nn.Module]) -> Conversion:
    """Puts other storage in the place of modules; their code must be their own, without that of adapters."""
    before = declaration(model)
    modules = dict(model.named_modules())
    formers = {path: exchange(modules[path], made) for path, made in fresh.items()}
    if any(type(made) is not formers[path].cls or isinstance(made, QuantizedLinear) for path, made in fresh.items()):
        undeclare(model)
        declare(model)
    return Conversion(formers=formers, declared=before)


def undo(model: nn.Module, conversion: Conversion) -> None:
    """Puts back what `take_over` replaced, every bit."""
    modules = dict(model.named_modules())
    for path, former in conversion.formers.items():
        put_back(modules[path], former)
    redeclare(model, conversion.declared)
