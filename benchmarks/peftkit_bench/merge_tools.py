"""Who merges: peftkit, Hugging Face peft, folding into dequantized weights, and bitsandbytes' rounding."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import peftkit
from peftkit.errors import MergeError, PeftkitError
from peftkit.quantization import QuantizedLinear
from peftkit_bench.merge_suite import Route
from peftkit_bench.merge_yardstick import Weights, stored_weights
from peftkit_bench.tasks.contract import Batch, Prepared, Task

LEAST = "would be stored"
"""What peftkit's refusal of a merge that keeps too little says, and no other refusal."""


@dataclass(frozen=True)
class Outcome:
    """What came of a merge."""

    model: nn.Module | None
    """The merged model; None: the tool does not do it."""
    refused: str | None = None
    """Why not, in the tool's own words; beside a model: why peftkit did not do it before it was told to keep going."""
    report: peftkit.MergeReport | None = None
    """peftkit's certificate."""
    seconds: float = 0.0


class Bases:
    """The backbone as each tool starts from it, its 16-bit weights the same for all; copies of one that is kept."""

    def __init__(self, task: Task, prepared: Prepared) -> None:
        self.task, self.prepared = task, prepared

    def plain(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Weights rounded to bfloat16, in any dtype."""
        return copy.deepcopy(self._plain).to(dtype)

    def native(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """In peftkit's NF4; what is in no codes in the dtype."""
        return peftkit.quantize(self.plain(dtype), "nf4")

    def bitsandbytes(self, kind: str) -> nn.Module:
        """Loaded by transformers in bitsandbytes' NF4 or int8."""
        return copy.deepcopy(self._four_bit if kind == "nf4" else self._eight_bit)

    @functools.cached_property
    def _plain(self) -> nn.Module:
        return self.task.model(self.prepared.folder, self.prepared.facts).to(torch.bfloat16)

    @functools.cached_property
    def _four_bit(self) -> nn.Module:
        return self._loaded(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=False,
        )  # fmt: skip

    @functools.cached_property
    def _eight_bit(self) -> nn.Module:
        return self._loaded(load_in_8bit=True)

    def _loaded(self, **settings: Any) -> nn.Module:
        made: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            self.prepared.folder,
            num_labels=len(self.prepared.facts["classes"]),
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **settings),
        )
        return made.eval()

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The projections that are quantized."""
        return tuple(path for path, m in self.native().named_modules() if isinstance(m, QuantizedLinear))

    @functools.cached_property
    def weights(self) -> Mapping[str, Weights]:
        """What the projections hold before a merge, by how the base is stored."""
        models = {"bf16": self._plain, "nf4": self.native(), "int8": self._eight_bit}
        return {kind: stored_weights(model, self.paths) for kind, model in models.items()}


def merged(route: Route, bases: Bases, folder: Path, calibration: Sequence[Batch], minimum_effect: float) -> Outcome:
    """What a route makes of the adapter in a folder.

    Args:
        calibration: rows that a calibrated merge is shown.
        minimum_effect: what peftkit is asked to keep.
    """
    with warnings.catch_warnings():
        # The others warn of rounding errors where they make them; here they are counted.
        warnings.simplefilter("ignore")
        if route.tool == "peftkit":
            return _peftkit(route, bases, folder, calibration, minimum_effect)
        base = bases.plain() if route.base == "bf16" else bases.bitsandbytes(route.base)
        if route.tool != "peft":
            base = _dequantized(base, bases.paths, torch.bfloat16 if route.tool == "dequantize" else torch.float32)
        return _peft(base, folder, lambda model: _stored(model, route, bases.paths))


def _peftkit(route: Route, bases: Bases, folder: Path, calibration: Sequence[Batch], minimum_effect: float) -> Outcome:
    made = {"bf16": bases.plain, "nf4": bases.native, "int8": lambda: peftkit.quantize(bases.plain(), "int8")}
    model = peftkit.load(made[route.base](), folder, trainable=False, ignore=["base"]).eval()
    settings: dict[str, Any] = {
        "into": route.into,
        "residual_rank": route.residual_rank,
        "inputs": calibration if route.calibrated else None,
        "original": bases.plain().state_dict(),
    }
    refused = None
    start = time.perf_counter()
    try:
        try:
            report = peftkit.merge(model, minimum_effect=minimum_effect, **settings)
        except MergeError as error:
            if LEAST not in str(error):
                raise
            refused, start = str(error), time.perf_counter()
            report = peftkit.merge(model, minimum_effect=0.0, **settings)
        seconds = time.perf_counter() - start
    except PeftkitError as error:
        return Outcome(None, refused=f"{type(error).__name__}: {error}")
    return Outcome(model, refused, report, seconds)


def _peft(base: nn.Module, folder: Path, finish: Callable[[nn.Module], nn.Module]) -> Outcome:
    """peft's own loading and merging, and what is done with the weights afterwards."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
        start = time.perf_counter()
        model = finish(adapted.merge_and_unload())
    except Exception as error:  # whatever another tool raises is its answer
        said = str(error).strip() or "without a message"
        return Outcome(None, refused=f"{type(error).__name__}: {said.splitlines()[0]}")
    return Outcome(model, seconds=time.perf_counter() - start)


def _dequantized(base: nn.Module, paths: Sequence[str], rounded: torch.dtype) -> nn.Module:
    """A plain float32 model that holds the decoded weights, rounded to a dtype."""
    found = stored_weights(base, paths)
    modules = dict(base.named_modules())
    for path, (weight, bias) in found.items():
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        made.weight = nn.Parameter(weight.to(rounded).float(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.float(), requires_grad=False)
        _exchange(modules, path, made)
    model: Any = base
    del model.config.quantization_config
    model.is_loaded_in_4bit = model.is_quantized = False
    return nn.Module.float(base)  # transformers' own refuses what was quantized once


def _stored(model: nn.Module, route: Route, paths: Sequence[str]) -> nn.Module:
    """The merged model as a route stores it."""
    if route.tool == "peft":
        return model
    if route.tool == "dequantize":
        nn.Module.to(model, torch.bfloat16)
    if route.into == "bf16":
        return model
    modules = dict(model.named_modules())
    for path in paths:
        _exchange(modules, path, _coded(modules[path], route.into))
    return nn.Module.to(model, torch.bfloat16)


def _coded(linear: Any, kind: str) -> nn.Module:
    """A layer of bitsandbytes that holds a projection's weight, rounded to the nearest codes."""
    from bitsandbytes import nn as layers

    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    made: Any
    if kind == "nf4":
        made = layers.Linear4bit(*shape, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
        made.weight = layers.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
    else:
        made = layers.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = layers.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu")  # type: ignore[no-any-return]  # untyped; the move is what quantizes


def _exchange(modules: dict[str, nn.Module], path: str, made: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(modules[parent], name, made)
