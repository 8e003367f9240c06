"""Rows of one batch through different adapters: one pass through the backbone, a low-rank update for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit import functional
from peftkit.errors import ConfigError, StateError
from peftkit.quantization import is_quantized
from peftkit.spec import Adapter, is_weight_module
from peftkit.swap import CHILD
from peftkit.wrap import check_known, record_of, sites_of, with_active


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block row i of a batch computes what the adapter `names[i]` alone would compute; None: the backbone.

        out_i = W x_i + s_a B_a A_a x_i,   a = names[i]

    Adapters may be of different ranks, sites and methods, as long as each is a low-rank update of weights, as those of
    LoRA and AdaLoRA are. The cost is that of the adapters in the batch, not of those attached. Where a model expands
    its batch, as beam search does, the copies of a row follow each other and keep its adapter. For inference: adapters
    get no gradients. Factors are read at the start of the block.

        with peftkit.route(model, ["french", "german", None]), torch.inference_mode():
            model.generate(**batch)

    Args:
        model: wrapped, in evaluation mode.
        names: for each row of the batch the adapter's name, or None.

    Raises:
        StateError: the model is not wrapped or in training mode, a merge is in effect, a name is unknown, or an adapter
            is more than a low-rank update.
        ConfigError: no rows are named. Inside the block: a batch whose rows are no multiple of those named.

    Paper: Chen et al. 2023 (Punica), arXiv:2310.18547, section 4.
    """
    record = record_of(model)
    if isinstance(names, str) or not names:
        raise ConfigError(f"route: expected a name or None for each row of the batch, found {names!r}")
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged into the weights; call peftkit.unmerge(model) first")
    if model.training:
        raise StateError("route: adapters get no gradients inside; call model.eval() first")
    used = tuple(dict.fromkeys(name for name in names if name is not None))
    for name in used:
        check_known(record, name)
    chosen = {module: _rows_of(path, module, names, used) for path, module in sites_of(model)}
    with with_active(model, chosen):
        yield


def _rows_of(path: str, module: nn.Module, names: Sequence[str | None], used: Sequence[str]) -> tuple[_Rows, ...]:
    """What is active at a module: the updates of all rows at once, or nothing.

    Raises:
        StateError: an adapter there is no low-rank update.
    """
    children: Mapping[str, Adapter] = module._modules[CHILD]._modules  # type: ignore[union-attr, assignment]  # a ModuleDict of adapters
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in used:
        adapter = children.get(name)
        if adapter is None or not (adapter.advises or adapter.replaces):
            continue
        pair = adapter.low_rank() if is_weight_module(module) or is_quantized(module) else None
        if pair is None:
            raise StateError(
                f"route: {name!r} at {path or 'the model'} ({type(adapter).__name__} on {type(module).__name__}) is no "
                "low-rank update of a weight, so rows cannot differ in it; run its rows as a batch of their own, after "
                f"peftkit.activate(model, {name!r})"
            )
        factors[name] = pair
    if not factors:
        return ()
    places = {name: place for place, name in enumerate(factors)}
    own = [places.get(name, -1) if name is not None else -1 for name in names]
    return (_Rows(path, own, tuple(factors.values())),)


class _Rows:
    """Stands in the place of an adapter: adds to each row the update of its own."""

    advises = True
    replaces: tuple[str, ...] = ()

    def __init__(self, path: str, places: list[int], factors: tuple[tuple[Tensor, Tensor], ...]) -> None:
        self.path = path
        self.places = places
        self.factors = factors
        self.made: tuple[Any, Any, Tensor] | None = None

    def _stack(self, x: Tensor) -> tuple[Any, Tensor]:
        """The factors one behind the other in the dtype of x, and the place of each row of x."""
        from peftkit_kernels import stacked  # when it is needed: loading compiled code takes time

        key = (x.dtype, x.device, x.shape[0])
        if self.made is None or self.made[0] != key:
            named = len(self.places)
            if x.shape[0] % named:
                raise ConfigError(
                    f"route: {named} rows are named, and {self.path} is given {x.shape[0]}; name each row of the batch"
                )
            with torch.inference_mode(False), torch.no_grad():
                stack = stacked(
                    [(down.to(x.device, x.dtype), up.to(x.device, x.dtype), 1.0) for down, up in self.factors]
                )
                places = torch.tensor(self.places, device=x.device).repeat_interleave(x.shape[0] // named)
            self.made = (key, stack, places)
        return self.made[1], self.made[2]

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (batch, ..., in). Returns: (batch, ..., out)."""
        import peftkit_kernels

        stack, places = self._stack(x)
        if (plain := functional.one_pass(module, call, x)) is not None:
            out = peftkit_kernels.frozen_linear(x, *plain)
        else:
            out = call(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not out.is_contiguous():
            return peftkit_kernels.multi_lora(out, x.to(stack.down.dtype), stack, places)
        peftkit_kernels.multi_lora_(out, x, stack, places)
        return out
