"""What merged weights keep of an adapter, measured in float64 without any code that merges: the judge of a merge suite.

Meant weights are read off the unmerged layers, by what they make of the unit vectors. Stored weights are read with
bitsandbytes' decoding, whoever stored them, and put into a plain copy of the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit.quantization import QuantizedLinear
from peftkit.swap import CHILD
from peftkit.wrap import record_of, sites_of
from peftkit_bench.tasks.contract import Batch

Weights = dict[str, tuple[Tensor, Tensor | None]]
"""Weight (out, in) and bias (out,) by path of the module, float64."""


@dataclass(frozen=True)
class Kept:
    """What is there of a change."""

    effect: float
    """⟨found - before, meant - before⟩ / ‖meant - before‖²."""
    error: float
    """‖found - meant‖ / ‖meant - before‖."""


class Sums:
    """Effect and error of several tensors, taken together as one vector."""

    def __init__(self) -> None:
        self.product = self.error = self.delta = self.before = 0.0

    def add(self, before: Tensor, meant: Tensor, found: Tensor) -> Kept:
        """Takes a tensor in, and gives its own effect and error."""
        delta, moved = (meant - before).double(), (found - before).double()
        size, product = float((delta * delta).sum()), float((moved * delta).sum())
        error = float((moved - delta).square().sum())
        self.product, self.error, self.delta = self.product + product, self.error + error, self.delta + size
        self.before += float(before.double().square().sum())
        return _kept(product, error, size)

    def kept(self) -> Kept:
        """Of everything that was taken in."""
        return _kept(self.product, self.error, self.delta)

    def size(self) -> float:
        """‖meant - before‖ / ‖before‖."""
        return float((self.delta / self.before) ** 0.5) if self.before else 0.0


def _kept(product: float, error: float, delta: float) -> Kept:
    return Kept(product / delta, (error / delta) ** 0.5) if delta else Kept(1.0, 0.0)


@torch.no_grad()
def stored_weights(model: nn.Module, paths: Sequence[str]) -> Weights:
    """What the modules at the paths hold, decoded in float32 and not rounded further."""
    modules = dict(model.named_modules())
    found: Weights = {}
    for path in paths:
        module: Any = modules[path]
        bias = None if module.bias is None else module.bias.detach().double()
        found[path] = (_weight(module).double(), bias)
    return found


def _weight(module: Any) -> Tensor:
    from bitsandbytes import functional
    from bitsandbytes import nn as layers

    if isinstance(module, QuantizedLinear):
        shape = torch.Size((module.out_features, module.in_features))
        if module.kind == "int8":
            weight = module.weight.data.float() * module.scale[:, None]
        else:
            state = functional.QuantState(
                absmax=module.absmax, shape=shape, code=functional.get_4bit_type(module.kind, "cpu"),
                blocksize=module.block, quant_type=module.kind, dtype=torch.float32,
            )  # fmt: skip
            weight = functional.dequantize_4bit(module.weight.data.reshape(-1, 1), state)
        if module.residual_down is not None and module.residual_up is not None:
            weight = weight.double() + module.residual_up.double() @ module.residual_down.double()
        return weight
    if isinstance(module, layers.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        return functional.dequantize_4bit(module.weight.data, state)  # type: ignore[no-any-return]  # untyped
    if isinstance(module, layers.Linear8bitLt):
        codes = module.weight.CB if module.weight.CB is not None else module.weight.data
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return functional.int8_vectorwise_dequant(codes, scales)  # type: ignore[no-any-return]  # untyped
    return module.weight.detach()  # type: ignore[no-any-return]  # a plain projection


def bytes_per_weight(model: nn.Module, paths: Sequence[str]) -> float:
    """Bytes that the modules at the paths take, biases and resting adapters left out, for each element of a weight."""
    modules = dict(model.named_modules())
    stored = sum(
        tensor.nbytes
        for path in paths
        for name, tensor in modules[path].state_dict().items()
        if isinstance(tensor, Tensor) and name != "bias" and not name.startswith(CHILD)
    )
    shapes = [(int(m.out_features), int(m.in_features)) for m in (modules[path] for path in paths)]
    return stored / sum(out * inside for out, inside in shapes)


@dataclass(frozen=True)
class Reference:
    """A base, and the same with the adapter unmerged: what a merge is judged against."""

    base: Weights
    """Of every projection."""
    meant: dict[str, Tensor]
    """The weight that the adapter stands for, (out, in), at each site."""
    inputs: dict[str, Tensor]
    """What each site is given on the judged rows with the adapter on, (tokens, in)."""
    calibration: dict[str, Tensor]
    """The same on the calibration rows."""
    plain: nn.Module
    """The base with the trained head, float32, for weights that are judged."""
    judged: Batch
    base_logits: Tensor
    logits: Tensor
    """With the adapter, unmerged."""
    size: float
    """‖ΔW‖ / ‖W‖ over all sites."""

    def size_of(self, path: str) -> float:
        """‖ΔW‖ / ‖W‖ at a site."""
        sums = Sums()
        sums.add(self.base[path][0], self.meant[path], self.meant[path])
        return sums.size()

    @torch.no_grad()
    def outputs(self, found: Weights) -> Kept:
        """What a model that computes with these weights, of every projection, keeps of the effect on the logits."""
        _put(self.plain, found)
        return self.logits_kept(self.plain(**self.judged).logits)

    def logits_kept(self, logits: Tensor) -> Kept:
        """The same for logits that are there already."""
        return Sums().add(self.base_logits, self.logits, logits.double())

    @torch.no_grad()
    def weights(self, found: Weights) -> tuple[Kept, dict[str, Kept]]:
        """What is kept of the change of the weights: in total, and at each site."""
        sums = Sums()
        each = {path: sums.add(self.base[path][0], meant, found[path][0]) for path, meant in self.meant.items()}
        return sums.kept(), each

    @torch.no_grad()
    def activations(self, found: Weights, *, calibration: bool = False) -> tuple[Kept, dict[str, Kept]]:
        """The same of X ΔWᵀ, for the inputs X of each site on the judged rows, or on the calibration rows."""
        sums = Sums()
        inputs = self.calibration if calibration else self.inputs
        each = {}
        for path, meant in self.meant.items():
            x, base, stored = inputs[path], self.base[path][0], found[path][0]
            each[path] = sums.add(x @ base.t(), x @ meant.t(), x @ stored.t())
        return sums.kept(), each


@torch.no_grad()
def reference(model: nn.Module, base: Weights, folder: Path, judged: Batch, calibration: Sequence[Batch]) -> Reference:
    """What merges of the adapter in a folder are judged against.

    Args:
        model: a plain copy of the backbone, which is used up.
        base: the weights to start from, of every projection.
        judged: rows that no merge is shown.
        calibration: rows that calibrated merges are shown.
    """
    model = model.double().eval()
    _put(model, base)
    plain = copy.deepcopy(model).float()
    model = peftkit.load(model, folder, trainable=False, ignore=["base"], dtype=torch.float64).eval()
    heads = [site.path for site in record_of(model).plans["default"].extras]
    sites = {path: module for path, module in sites_of(model) if path in base}
    seen: dict[str, Tensor] = {}
    logits = _seen(model, sites, [judged], seen)
    shown: dict[str, Tensor] = {}
    if calibration:
        _seen(model, sites, calibration, shown)
    meant = {path: _read_off(module) for path, module in sites.items()}
    modules = dict(model.named_modules())
    _put(plain, {path: _read_off(modules[path]) for path in heads})
    sums = Sums()
    for path, (weight, _) in meant.items():
        sums.add(base[path][0], weight, weight)
    return Reference(
        base=base,
        meant={path: weight for path, (weight, _) in meant.items()},
        inputs=seen,
        calibration=shown,
        plain=plain,
        judged=judged,
        base_logits=plain(**judged).logits.double(),
        logits=logits,
        size=sums.size(),
    )


def _read_off(module: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that is linear in its input, by what it makes of the unit vectors and of zero."""
    unit = torch.eye(module.in_features, dtype=torch.float64)
    bias = module(torch.zeros(1, module.in_features, dtype=torch.float64))
    return (module(unit) - bias).t().contiguous(), bias[0]


def _seen(
    model: nn.Module, sites: Mapping[str, nn.Module], batches: Sequence[Batch], into: dict[str, Tensor]
) -> Tensor:
    """Runs the batches, collects what the sites are given, padding left out, and returns the logits of the last."""
    mask: Tensor | None = None
    logits = torch.empty(0)

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0][mask.bool()] if mask is not None else args[0].flatten(0, -2)
            into[path] = torch.cat((into[path], rows)) if path in into else rows

        return hook

    handles = [module.register_forward_pre_hook(watch(path)) for path, module in sites.items()]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            logits = model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def _put(model: nn.Module, weights: Weights) -> None:
    modules = dict(model.named_modules())
    for path, (weight, bias) in weights.items():
        module: Any = modules[path]
        module.weight.data.copy_(weight)
        if bias is not None:
            module.bias.data.copy_(bias)


@torch.no_grad()
def run_as_it_is(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a merged model, computed by its own layers; in float32 as far as they can. It is used up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes' 8-bit layers say that they compute in float16
        nn.Module.float(model.eval())  # transformers' own refuses where codes are, which stay as they are
        for module in model.modules():
            own: Any = module
            if hasattr(own, "compute_dtype"):
                own.compute_dtype = torch.float32
        return model(**batch).logits  # type: ignore[no-any-return]  # a transformers model
