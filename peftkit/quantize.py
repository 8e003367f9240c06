"""Quantizes a model's projections in place with peftkit's own layers, and teaches transformers to load them again."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from peftkit import backbones, targets
from peftkit.errors import BackboneError, ConfigError, StateError, nearest
from peftkit.quantization import KINDS, Kind, QuantizedLinear, exchange, is_quantized
from peftkit.spec import is_weight_module

M = TypeVar("M", bound=nn.Module)
METHOD = "peftkit"
"""What transformers finds as `quant_method` in the config of a model that was quantized here."""


def quantize(
    model: M,
    kind: Kind = "nf4",
    *,
    block: int = 64,
    nested: bool = False,
    dynamic: bool = False,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
) -> M:
    """The same model with its projections in 4 or 8 bits, in place, one after the other; the rest stays as it is.

    Needs no other package, computes on CPU and CUDA, trains adapters (`peftkit.wrap`), and is saved and loaded:
    `model.save_pretrained(path)` and `peftkit.load_quantized(path)` for transformers models; for others
    `state_dict()`, and `load_state_dict()` of a model that was quantized the same way, on the meta device if wanted.

    Args:
        model: any module without adapters attached.
        kind: "nf4" and "fp4": codes and scales of bitsandbytes, bit for bit; "int8": symmetric, a scale a row.
        block: weights that share a scale, a power of two from 32 to 4096; not for int8.
        nested: the scales are stored in 8 bits too ("double quantization"): 0.516 bytes a weight instead of 0.5625.
        dynamic: int8 quantizes the rows of the inputs too: faster for many rows, less exact.
        target_modules: suffixes, or one regular expression; None: every Linear and Conv1D but the output head and a
            task's head.
        exclude_modules: suffixes or one regular expression of modules to leave as they are.

    Raises:
        ConfigError: no such kind or size of blocks, or settings that do not go together.
        TargetError: a pattern matches nothing.
        StateError: adapters are attached.
        BackboneError: nothing is left to quantize.
    """
    settings = checked(kind, block=block, nested=nested, dynamic=dynamic)
    if any(targets.HOLDER in module._modules for module in model.modules()):
        raise StateError("adapters are attached: quantize the base first, then wrap or load")
    chosen = quantizable(model, target_modules, exclude_modules)
    if not chosen:
        raise BackboneError("there is no projection to quantize; loosen target_modules or exclude_modules")
    for module in chosen.values():
        exchange(module, fresh_layer(module, kind, settings))
    declare(model)
    return model


def checked(kind: str, *, block: int = 64, nested: bool = False, dynamic: bool = False) -> dict[str, Any]:
    """The settings that a kind takes.

    Raises:
        ConfigError: no such kind or size of blocks, or settings that do not go together.
    """
    if kind not in KINDS:
        raise ConfigError(f"no kind {kind!r}; {nearest(kind, KINDS)}")
    if kind == "int8" and (nested or block != 64):
        raise ConfigError("int8 has one scale a row: block and nested are for nf4 and fp4")
    if kind != "int8" and dynamic:
        raise ConfigError(f"dynamic is for int8, found kind {kind!r}")
    if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ConfigError(f"block must be a power of two from 32 to 4096, found {block}")
    return {"dynamic": dynamic} if kind == "int8" else {"block": block, "nested": nested}


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Every projection of the model by path, adapters left out."""
    return {path: module for path, module in targets.modules(model) if is_weight_module(module)}


def quantizable(
    model: nn.Module, wanted: Sequence[str] | str | None = None, excluded: Sequence[str] | str | None = None
) -> dict[str, nn.Module]:
    """Paths and modules to quantize: projections in floating point that share their weight with nothing."""
    known = [path for path, _ in targets.modules(model) if path]
    for patterns, field in ((wanted, "target_modules"), (excluded, "exclude_modules")):
        if patterns is not None:
            targets.check_each_matches(patterns, known, field)
    paths = set(backbones.linear_paths(model)) if wanted is None else {p for p in known if targets.matches(p, wanted)}
    tied = {name for names in backbones.tied(model).values() for name in names}
    # Projections that a model wants in float32 are too delicate for codes; their dtype is read by its code, too.
    delicate = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if wanted is None else ()
    return {
        path: module
        for path, module in projections(model).items()
        if path in paths
        and not (excluded is not None and targets.matches(path, excluded))
        and f"{path}.weight" not in tied
        and not any(name in path.split(".") for name in delicate)
        and not is_quantized(module)
    }


def fresh_layer(module: nn.Module, kind: Kind, settings: dict[str, Any]) -> QuantizedLinear:
    """A layer of peftkit's with the module's weight quantized."""
    own: Any = module
    conv1d = not isinstance(module, nn.Linear)
    weight = own.weight.detach().t() if conv1d else own.weight.detach()
    bias = None if own.bias is None else own.bias.detach()
    return QuantizedLinear.of(weight, bias, kind=kind, **{"dtype": weight.dtype, "conv1d": conv1d, **settings})


# transformers -------------------------------------------------------------------------------------------------------


_DECLARED = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def _is_transformers(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) is not None


def declare(model: nn.Module) -> None:
    """Makes a transformers model say how its layers are quantized, so that it is saved and loaded as such."""
    layers = {path: module for path, module in projections(model).items() if isinstance(module, QuantizedLinear)}
    if not _is_transformers(model) or not layers:
        return
    config_class, quantizer_class = _registered()
    first = next(iter(layers.values()))
    own: Any = model
    own.config.quantization_config = config_class(
        kind=first.kind,
        left=[path for path in projections(model) if path not in layers],
        residual={p: m.residual_down.shape[0] for p, m in layers.items() if m.residual_down is not None},
        **({"dynamic": first.dynamic} if first.kind == "int8" else {"block": first.block, "nested": first.nested}),
    )
    own.hf_quantizer = quantizer_class(own.config.quantization_config)
    own.is_quantized, own.quantization_method = True, METHOD


def declaration(model: nn.Module) -> dict[str, Any]:
    """What a transformers model says of its quantization now, for `redeclare`."""
    found = {name: model.__dict__[name] for name in _DECLARED if name in model.__dict__}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        found["quantization_config"] = config.quantization_config
    return found


def redeclare(model: nn.Module, said: Mapping[str, Any]) -> None:
    """Makes a transformers model say of its quantization what it said before."""
    undeclare(model)
    config: Any = getattr(model, "config", None)
    for name, value in said.items():
        setattr(config if name == "quantization_config" else model, name, value)


def undeclare(model: nn.Module) -> None:
    """Takes back what a transformers model says of its quantization, whoever quantized it."""
    for name in _DECLARED:
        model.__dict__.pop(name, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def load_quantized(path: str | os.PathLike[str], cls: Any = None, **kwargs: Any) -> Any:
    """A transformers model that `save_pretrained` wrote after `quantize`.

    Args:
        path: the folder, or a name on the hub.
        cls: the class to load, such as `AutoModelForCausalLM`; None: the one that the config names.
        kwargs: for `from_pretrained`.

    Raises:
        BackboneError: the folder holds no model that was quantized by peftkit.
    """
    import transformers

    _registered()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read the config of {os.fspath(path)!r}: {str(error).splitlines()[0]}") from None
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    if found.get("quant_method") != METHOD:
        raise BackboneError(
            f"{os.fspath(path)!r} was not quantized by peftkit (quant_method {found.get('quant_method')!r}); load it "
            "with transformers, and call peftkit.quantize(model)"
        )
    if cls is None:
        names = getattr(config, "architectures", None) or ["AutoModel"]
        cls = getattr(transformers, names[0], transformers.AutoModel)
    return cls.from_pretrained(path, **kwargs)


@functools.cache
def _registered() -> tuple[type[Any], type[Any]]:
    """The config and the quantizer that transformers knows peftkit's layers by."""
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
        """How a model was quantized by peftkit."""

        def __init__(
            self,
            kind: Kind = "nf4",
            left: Sequence[str] = (),
            residual: Mapping[str, int] | None = None,
            **settings: Any,
        ) -> None:
            self.quant_method = METHOD
            self.kind, self.left, self.residual = kind, list(left), dict(residual or {})
            settings.pop("quant_method", None)
            for name, value in checked(kind, **settings).items():
                setattr(self, name, value)
            self.names = tuple(checked(kind, **settings))

        def to_dict(self) -> dict[str, Any]:
            """Plain values, for config.json."""
            own = {name: getattr(self, name) for name in self.names}
            own["residual"] = self.residual
            return {"quant_method": METHOD, "kind": self.kind, "left": self.left, **own}

    @register_quantizer(METHOD)
    class Quantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
        """Puts empty layers into a model before its weights are read."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            given = self.quantization_config
            settings = {name: getattr(given, name) for name in given.names}
            dtype = kwargs.get("dtype") or model.dtype
            for path, module in projections(model).items():
                if path not in given.left:
                    found = {**settings, "dtype": dtype, "residual_rank": given.residual.get(path, 0)}
                    with torch.device("meta"):
                        exchange(module, fresh_layer(module, given.kind, found))

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            """Codes and scales are ordinary tensors."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Adapters train beside the layers."""
            return True

        @property
        def is_compileable(self) -> bool:
            """The layers are operations that a compiler sees whole."""
            return True

    return QuantizationConfig, Quantizer
