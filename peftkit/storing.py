"""How a merged weight is stored when it does not go where the weight before was: dequantized, in codes, or fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from peftkit.certificate import SiteMerge, compared, measured, on_inputs, to_original
from peftkit.errors import ConfigError, MergeError, nearest
from peftkit.lattice import Rows
from peftkit.quantization import BaseWeights, Kind, QuantizedLinear, original_class
from peftkit.quantization.layer import parts_of
from peftkit.quantize import checked
from peftkit.requantization import requantized
from peftkit.spec import Adapter

if TYPE_CHECKING:
    from peftkit_kernels import Quantized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FUSED = "fused"
KNOWN = (*DTYPES, *get_args(Kind), FUSED)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What merged weights are stored as."""

    into: str
    """One of KNOWN; "": the dtype that the weight had, or was quantized from."""
    residual_rank: int = 0
    """Rank of what may stay beside codes."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights, where they are in no codes."""
        return DTYPES.get(self.into)


def form_of(into: str | torch.dtype, residual_rank: int = 0) -> Form:
    """The form that a caller names.

    Raises:
        ConfigError: there is no such form, or it takes no residual.
    """
    named = {dtype: name for name, dtype in DTYPES.items()}
    name = named.get(into, str(into)) if isinstance(into, torch.dtype) else into
    if name not in KNOWN:
        raise ConfigError(f"into={into!r} is no form of weights; {nearest(str(into), KNOWN)}")
    if residual_rank < 0 or (residual_rank and name not in get_args(Kind)):
        raise ConfigError(
            f"residual_rank={residual_rank} with into={name!r}: a residual of 0 or more goes beside nf4, fp4 and int8"
        )
    return Form(into=name, residual_rank=residual_rank)


def unchanged(dtype: torch.dtype | None) -> Form:
    """Plain weights of a dtype; None: of the dtype that they had or were quantized from."""
    return Form(into=next((name for name, known in DTYPES.items() if known == dtype), ""))


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of one module that is to be stored anew."""

    path: str
    module: nn.Module
    weights: BaseWeights
    adapters: Sequence[Adapter]
    before: Mapping[str, Tensor]
    """Parameters before, float32."""
    meant: Mapping[str, Tensor]
    """Those that change, float32."""
    gram: Tensor | None = None
    """XᵀX of calibration inputs, (in, in)."""
    original: Tensor | None = None
    """The weight before it was quantized, (out, in)."""

    @property
    def target(self) -> Tensor:
        """The weight to be stored, (out, in), float32."""
        return self.meant.get("weight", self.before["weight"])

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias to be stored."""
        found = self.meant.get("bias", self.before.get("bias"))
        return None if found is None else found.to(dtype)


def stored_anew(given: Given, form: Form) -> tuple[nn.Module, list[SiteMerge]]:
    """A module that holds the merged parameters in the form asked for, and what of the change it holds.

    Raises:
        MergeError: a value is not finite, or the form cannot hold what the adapters do.
    """
    for kind, values in (("the weight before the merge", given.before), ("the merged value", given.meant)):
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise MergeError(
                    f"{given.path}.{name}: {kind} holds values that are not finite; the model is left as it was. "
                    "Check the adapter for a diverged training run"
                )
    make = {FUSED: _fused, **dict.fromkeys(get_args(Kind), _coded)}.get(form.into, _dense)
    module, after, reference, stored_as = make(given, form)
    sites = []
    if "weight" in given.meant:
        before, meant = given.before["weight"], given.meant["weight"]
        changed = int((after != reference).sum())
        site = measured(given.path, "weight", stored_as, compared(before, meant, after, changed))
        residual = getattr(module, "residual_down", None)
        if residual is not None:
            site = dataclasses.replace(site, residual_rank=residual.shape[0])
        if given.gram is not None:
            site = on_inputs(site, before, meant, after, given.gram)
        if given.original is not None:
            site = to_original(site, before, meant, after, given.original)
        sites.append(site)
    own: Any = module
    if "bias" in given.meant:
        before, meant, stored = given.before["bias"], given.meant["bias"], own.bias.detach().to(torch.float32)
        changed = int((stored != before).sum())
        sites.append(measured(given.path, "bias", _name(own.bias.dtype), compared(before, meant, stored, changed)))
    return module, sites


Made = tuple[nn.Module, Tensor, Tensor, str]
"""The module; its weight as stored, float32; what the unchanged weight would be stored as; what it is stored as."""


def _dense(given: Given, form: Form) -> Made:
    dtype = form.dtype or given.weights.dtype
    weight, bias = given.target.to(dtype), given.bias(dtype)
    module = dense(weight, bias, given.weights.conv1d) if given.weights.quantized else _shell(given, weight, bias)
    return module, weight.to(given.target.dtype), given.before["weight"].to(dtype).to(weight), _name(dtype)


def dense(weight: Tensor, bias: Tensor | None, conv1d: bool) -> nn.Module:
    """A plain projection that holds these tensors, of the class that was quantized.

    Args:
        weight: (out, in).
        conv1d: a Conv1D of transformers, which stores (in, out); else a Linear.
    """
    out, inside = weight.shape
    made: Any
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        made, weight = Conv1D(out, inside), weight.t().contiguous()
    else:
        made = nn.Linear(inside, out, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made  # type: ignore[no-any-return]  # transformers is untyped


def _shell(given: Given, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of the same class and settings with other parameters."""
    cls = original_class(given.module)
    made = cls.__new__(cls)
    made.__dict__.update(given.module.__dict__)
    stored = {"weight": given.weights.turn("weight", weight).contiguous(), "bias": bias}
    made.__dict__["_parameters"] = {
        name: parameter if (value := stored[name]) is None else nn.Parameter(value, requires_grad=False)
        for name, parameter in given.module._parameters.items()
    }
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fused(given: Given, form: Form) -> Made:
    layer = given.weights.layer()
    if layer is None:
        raise MergeError(
            f"{given.path}: into='fused' keeps codes as they are and puts the update beside them, and "
            f"{type(given.adapters[0]).__name__} is on a weight stored as {given.weights.storage}; quantize the base "
            "with peftkit.quantize or bitsandbytes, or merge into bf16"
        )
    factors = [adapter.low_rank() for adapter in given.adapters]
    pairs = [pair for pair in factors if pair is not None]
    if len(pairs) < len(factors):
        raise MergeError(
            f"{given.path}: the update of {type(given.adapters[factors.index(None)]).__name__} is no product of two "
            "low-rank factors, which into='fused' needs; merge into bf16, or use the adapter unmerged"
        )
    down = torch.cat([d.detach().float() for d, _ in pairs])
    up = torch.cat([u.detach().float() for _, u in pairs], dim=1)
    if layer.residual_down is not None and layer.residual_up is not None:
        down = torch.cat((layer.residual_down.float(), down))
        up = torch.cat((layer.residual_up.float(), up), dim=1)
    module = _layer_like(layer, given, (down, up))
    return module, module.dequantized(torch.float32).addmm_(up, down), given.before["weight"], f"{layer.kind} fused"


def _layer_like(layer: QuantizedLinear, given: Given, residual: tuple[Tensor, Tensor] | None) -> QuantizedLinear:
    """A layer with the same codes, the bias that is to be stored, and another low-rank part."""
    scales = {n: b for n, b in layer._buffers.items() if b is not None and not n.startswith("residual")}
    return QuantizedLinear.holding(
        layer.weight.data,
        scales,
        kind=layer.kind,
        shape=(layer.out_features, layer.in_features),
        block=layer.block,
        bias=given.bias(layer.bias.dtype) if layer.bias is not None else None,
        residual=residual,
        dynamic=layer.dynamic,
        dtype=layer.dtype,
        conv1d=layer.conv1d,
    )


def _coded(given: Given, form: Form) -> Made:
    kind: Any = form.into
    layer = given.weights.layer()
    same = layer is not None and layer.kind == kind and layer.residual_down is None
    own: dict[str, Any] = {}
    if same and layer is not None:
        own = {"dynamic": layer.dynamic} if kind == "int8" else {"block": layer.block, "nested": layer.nested}
    settings = checked(kind, **own)
    before = given.before["weight"]
    dtype = given.weights.dtype
    # Layers of another package hold no residual, and a model of two packages' layers cannot be loaded again.
    backend = given.weights.holding if same and not form.residual_rank else _itself
    if "weight" not in given.meant:
        if same and layer is not None:
            return backend(_layer_like(layer, given, None)), before, before, kind
        return (
            QuantizedLinear.of(before, given.bias(dtype), kind=kind, **{**_of(given), **settings}),
            before,
            before,
            kind,
        )
    found = requantized(
        given.target,
        _start(layer) if same and layer is not None else None,
        base=None if same else before,
        kind=kind,
        block=None if kind == "int8" else settings["block"],
        nested=settings.get("nested", False),
        gram=given.gram,
        directions=_directions(given),
        residual_rank=form.residual_rank,
    )
    residual = None
    if found.residual is not None and found.residual[0].shape[0]:
        residual = (found.residual[0].to(dtype), found.residual[1].to(dtype))
    quantized = found.quantized
    codes, scales = (
        (quantized.codes, {"scale": quantized.scales}) if isinstance(quantized, Rows) else parts_of(quantized)
    )
    module = QuantizedLinear.holding(
        codes, scales, shape=tuple(before.shape), bias=given.bias(dtype), residual=residual,
        **{**_of(given), **{k: v for k, v in settings.items() if k != "nested"}, "kind": kind},
    )  # fmt: skip
    after = module.dequantized(torch.float32)
    if residual is not None:
        after.addmm_(residual[1].float(), residual[0].float())
    reference = before if same else _decoded(before, kind, settings)
    return backend(module), after, reference, kind


def _itself(layer: QuantizedLinear) -> nn.Module:
    return layer


def _of(given: Given) -> dict[str, Any]:
    return {"dtype": given.weights.dtype, "conv1d": given.weights.conv1d}


def _start(layer: QuantizedLinear) -> Quantized | Rows:
    return Rows(codes=layer.weight.data, scales=layer.scale) if layer.kind == "int8" else layer.codes()


def _directions(given: Given) -> Tensor | None:
    """Where the adapters read their input, (r, in), as far as they say."""
    factors = [adapter.low_rank() for adapter in given.adapters]
    rows = [pair[0].detach().float() for pair in factors if pair is not None]
    return torch.cat(rows) if rows and len(rows) == len(factors) else None


def _decoded(weight: Tensor, kind: Any, settings: Mapping[str, Any]) -> Tensor:
    """What the nearest codes of a weight stand for."""
    return QuantizedLinear.of(weight, kind=kind, **settings).dequantized(torch.float32)
