"""What a training step and an evaluation would compute and hold, operation by operation, on tensors without data."""

from __future__ import annotations

import contextlib
import io
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkit_bench.spec import Subject
from peftkit_bench.tasks.contract import Batch, Task

STEPS = 1000
"""What methods with a schedule are told, so that the traced step is an early one, before they prune anything."""

_aten = torch.ops.aten
_FREE = {
    _aten._unsafe_view,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.set_,
}
"""What moves no data, though it is no view."""


_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS: Mapping[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Floating-point operations of what torch's own counter leaves out."""


def _product(x: Tensor, out: Tensor) -> int:
    """Of an operation that may multiply the rows of x, (rows, in), with a matrix, as (rows, out) shows."""
    rows = x.dim() == out.dim() == 2 and x.shape[0] == out.shape[0]
    return 2 * x.numel() * out.shape[1] if rows else 0


@dataclass(frozen=True)
class Work:
    """One operation: what it computes, and what it moves."""

    flops: int
    """Of products; 0: an operation on elements."""
    bytes: int
    """Read and written."""
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step."""

    weights_bytes: int
    """Parameters and buffers, those that are trained included."""
    state_bytes: int
    """What the optimizer keeps."""
    peak_bytes: int
    """The most that is held at a time, weights and the optimizer's state included."""
    trained_bytes: int
    passes: Counter[Work]
    """Operations of the forward and the backward pass."""
    update: Counter[Work]
    """Operations of clipping and of the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass without gradients."""

    peak_bytes: int
    """The most that is held at a time, the weights included."""
    work: Counter[Work]


class Trace(TorchDispatchMode):
    """Follows which storages are alive, and lists the operations, while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.held_bytes = 0
        self.peak_bytes = 0
        self.work: Counter[Work] = Counter()
        self._alive: dict[int, weakref.ref[Any]] = {}

    def follow(self, tensor: Tensor) -> None:
        """Counts the tensor's storage until it is gone; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.held_bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _INDEXED:
            args = (args[0], _unmasked(args[1]), *args[2:])
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.follow(tensor)
        if made and not func.is_view and packet not in _FREE:
            taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *made))
            formula = _FORMULAS.get(packet) or flop_counter.flop_registry.get(packet)
            if formula is not None:
                flops = int(formula(*args, **kwargs, out_val=out))
            else:
                flops = _product(taken[0], made[0]) if func.namespace == "peftkit" and taken else 0
            self.work[Work(flops, moved, made[0].dtype)] += 1
        return out

    def taken(self) -> Counter[Work]:
        """The operations since the last call."""
        found, self.work = self.work, Counter()
        return found


def _unmasked(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with each mask replaced by the places that it chooses where it is true everywhere; others are data."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype is not torch.bool:
            found.append(index)
        else:
            found += [torch.empty(index.numel(), dtype=torch.int64, device=index.device) for _ in index.shape]
    return found


def traced(
    task: Task,
    subject: Subject,
    model: nn.Module,
    batch: Batch,
    evaluated: Batch,
    *,
    device: torch.device,
    precision: str = "float32",
) -> tuple[Step, Pass]:
    """One training step with AdamW and one evaluation, of a model on the meta device, adapted already.

    Args:
        batch: that is trained on, of real rows; its values are not looked at.
        evaluated: that is predicted.
        device: where the model would be.
        precision: "float32", or "bfloat16" for autocast.

    Raises:
        Exception: what a model, a method or a package raises that looks at values, or cannot do without them.
    """
    with _without_data():
        _place(model, device)
        step = _step(task, subject, model, _blank(batch, device), device, precision)
        return step, _evaluation(task, model, _blank(evaluated, device), device, precision)


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    """Inside the block tensors have shapes, dtypes and devices, and no data."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        warnings.simplefilter("ignore")
        yield


def _place(model: nn.Module, device: torch.device) -> None:
    """Gives tensors on the meta device a device; ties stay."""
    made: dict[int, Tensor] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if parameter else fresh
        return made[id(tensor)]

    # Tensors that were replaced are kept until the end, so that no other takes the identity of one.
    kept: list[Tensor] = []
    for module in model.modules():
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in owned:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    kept.append(tensor)
                    tensors[name] = placed(tensor)


def _blank(batch: Batch, device: torch.device) -> Batch:
    """The batch's shapes and dtypes on a device."""
    return {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in batch.items()}


def _following(model: nn.Module) -> Trace:
    trace = Trace()
    for tensor in (*model.parameters(), *model.buffers()):
        trace.follow(tensor)
    return trace


def _follow(trace: Trace, batch: Batch) -> None:
    for tensor in batch.values():
        trace.follow(tensor)


def _step(task: Task, subject: Subject, model: nn.Module, batch: Batch, device: torch.device, precision: str) -> Step:
    trace = _following(model)
    weights = trace.held_bytes
    _follow(trace, batch)
    trained = [parameter for group in subject.parameters(model) for parameter in group]
    subject.begin(model, STEPS)
    optimizer = torch.optim.AdamW(trained)
    model.train()
    with trace:
        with _precise(device, precision):
            loss = task.loss(model, batch)
            penalty = subject.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        del loss, penalty
        passes, peak, before = trace.taken(), trace.peak_bytes, trace.held_bytes
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    state = trace.held_bytes - before
    found = Step(
        weights_bytes=weights,
        state_bytes=state,
        # The first step makes the state at its end; later ones have it from the beginning.
        peak_bytes=max(peak + state, trace.peak_bytes),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        passes=passes,
        update=trace.taken(),
    )
    optimizer.zero_grad()
    return found


@torch.no_grad()
def _evaluation(task: Task, model: nn.Module, batch: Batch, device: torch.device, precision: str) -> Pass:
    trace = _following(model)
    _follow(trace, batch)
    model.eval()
    with trace, _precise(device, precision):
        task.loss(model, batch)
    return Pass(peak_bytes=trace.peak_bytes, work=trace.taken())


def _precise(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
