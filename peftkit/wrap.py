"""Plan -> the same model, frozen and adapted, in place; unwrap undoes it bit for bit.

A module at a site keeps its identity, its parameters and its place in the tree. Only its class changes, to a subclass
whose forward runs the active adapters around the original forward. Adapters live in a child ModuleDict named "peftkit".
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit import backbones, swap
from peftkit.conversion import Conversion, undo
from peftkit.errors import ConfigError, StateError, TargetError, nearest
from peftkit.plan import Plan, plan
from peftkit.quantization import is_quantized
from peftkit.spec import Adapter, Site, State, adapter_dtype
from peftkit.swap import CHILD
from peftkit.whole import WholeModule

M = TypeVar("M", bound=nn.Module)


@dataclass
class Record:
    """What a wrapped model knows about itself; kept on the model, by paths, so that a deep copy has its own."""

    plans: dict[str, Plan] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    frozen: set[str] = field(default_factory=set)
    """Names of adapters that do not train."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """The backbone's flags before wrapping."""
    backups: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Parameters before merging, by module path; empty when nothing is merged."""
    conversion: Conversion | None = None
    """What modules were before a merge gave them other storage."""
    merged: tuple[str, ...] = ()
    resumed: tuple[str, ...] = ()
    """Adapters that were active before merging, and are again after it."""
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is known of an adapter's origin, by adapter name."""


def replaced_by_merge(record: Record) -> dict[str, dict[str, Tensor]]:
    """The parameters that a merge replaced, as they were, by module path and name."""
    converted = record.conversion.parameters() if record.conversion is not None else {}
    return {**record.backups, **converted}


def record_of(model: nn.Module) -> Record:
    """The model's record.

    Raises:
        StateError: the model is not wrapped.
    """
    found = model.__dict__.get("_peftkit")
    if not isinstance(found, Record):
        raise StateError(
            f"{type(model).__name__} is not wrapped; call peftkit.wrap(model, config) or peftkit.load first"
        )
    return found


def is_wrapped(model: nn.Module) -> bool:
    """Whether adapters are attached to the model."""
    return isinstance(model.__dict__.get("_peftkit"), Record)


# Attaching ----------------------------------------------------------------------------------------------------------


def wrap(
    model: M,
    config: Any,
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    trainable: bool = True,
) -> M:
    """The same model, frozen, with the adapters of `config` attached and active.

    Fresh adapters draw from torch's global random generator.

    Args:
        model: any module; changed in place and returned.
        config: a configuration such as `peftkit.LoRA(r=16)`.
        name: name of the adapter; several adapters can be attached under different names.
        dtype: dtype of the adapters; None: that of the weights beside them, at least float32.
        trainable: False attaches frozen adapters.

    Raises:
        ConfigError: the name is taken or not usable, or the config does not fit the model.
        TargetError: a pattern matches nothing, or two adapters of one name would meet at one module.
        StateError: a merge is in effect.
    """
    check_name(name)
    if is_wrapped(model):
        record = record_of(model)
        if record.merged:
            raise StateError(
                f"{', '.join(record.merged)} is merged into the weights; call peftkit.unmerge(model) first"
            )
        if name in record.plans:
            raise ConfigError(f"an adapter named {name!r} is attached already; choose another name or unwrap it first")
    return attach(model, plan(model, config), name=name, dtype=dtype, trainable=trainable)


def check_name(name: str) -> None:
    """Raises ConfigError when the name cannot be that of an adapter."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"{name!r} cannot be an adapter's name: use letters, digits, '-' and '_'")


def attach(
    model: M,
    planned: Plan,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    state: State | None = None,
) -> M:
    """Carries out a plan: builds and initialises every adapter, then attaches them all at once.

    Args:
        state: tensors to fill the adapters with instead of a fresh initialisation.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _refuse_sharded(model)
    if state is None:
        pending = _build(modules, planned, dtype, None)
    else:
        with torch.random.fork_rng(devices=[]):
            pending = _build(modules, planned, dtype, state)
    record = model.__dict__.get("_peftkit")
    if record is None:
        record = model.__dict__["_peftkit"] = Record(
            requires_grad={n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for path, adapter in pending:
        module = modules[path]
        if CHILD not in module._modules:
            module.add_module(CHILD, nn.ModuleDict())
        adapter.train(module.training)
        module._modules[CHILD][name] = adapter
    record.plans[name] = planned
    if not trainable:
        record.frozen.add(name)
    activate(model, name)
    return model


def _build(
    modules: dict[str, nn.Module], planned: Plan, dtype: torch.dtype | None, state: State | None
) -> list[tuple[str, Adapter]]:
    """New adapters for every site of a plan, filled, not yet attached."""
    method, config = planned.method, planned.config
    occupied: dict[str, str] = {}
    for site in (*planned.sites, *planned.extras):
        if site.path in occupied:
            raise TargetError(
                f"{site.path or 'the model'} is a target twice: as {occupied[site.path]} and as {site.role}"
            )
        occupied[site.path] = site.role
        if not _forward_is_of_class(modules[site.path]):
            raise TargetError(
                f"{site.path}.forward was replaced on the instance; adapters go around a class's forward only"
            )
    pending: list[tuple[str, Adapter]] = []
    root = modules[""]
    # Beside codes, copies that train get float32 as adapters do: 16 bits would round small steps away.
    copies_dtype = torch.float32 if any(map(is_quantized, modules.values())) else None
    shared = method.shared(planned.sites, config) if method.shared else None
    if shared is not None:
        _place(shared, modules[planned.sites[0].path], dtype)
        if method.initialise_shared and not _on_meta(shared):
            method.initialise_shared(shared, root, planned.sites, config)
        if state is not None:
            fill(shared, state.get("", {}))
        pending.append(("", shared))
    copies: dict[int, nn.Parameter] = {}
    for site in (*planned.sites, *planned.extras):
        module = modules[site.path]
        if site.role == "extra":
            whole = WholeModule(site.parameters)
            _place(whole, module, None, copies_dtype)
            with onloaded(module):
                whole.copy_from(module)
            adapter: Adapter = whole
        else:
            adapter = method.adapter(site, config, shared)
            _place(adapter, module, dtype, copies_dtype)
            if not _on_meta(adapter):
                with onloaded(module):
                    method.initialise(adapter, module, site, config)
        if state is not None:
            fill(adapter, state.get(site.path, {}))
        if site.parameters:
            _share_tied(adapter, module, copies)
        pending.append((site.path, adapter))
    return pending


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Inside the block, weights that accelerate keeps elsewhere between two forwards are in the module."""
    if not getattr(module.__dict__.get("_hf_hook"), "offload", False):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _refuse_sharded(model: nn.Module) -> None:
    """Raises StateError when parameters are sharded: adapters attached now would be trained apart on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.tensor import DTensor

    name = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if name is not None:
        raise StateError(f"{name} is sharded already; wrap the model (or load the adapter) before fully_shard")


def _forward_is_of_class(module: nn.Module) -> bool:
    """Whether the instance runs its class's forward, around accelerate's hooks if there are any."""
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return own is None or (isinstance(own, types.MethodType) and own.__func__ is type(module).forward)


def _on_meta(adapter: Adapter) -> bool:
    return any(t.is_meta for t in adapter.tensors().values())


def _share_tied(adapter: Adapter, module: nn.Module, copies: dict[int, nn.Parameter]) -> None:
    """Gives modules that share a parameter one trained copy of it."""
    for name, parameter in list(adapter._parameters.items()):
        own = module._parameters.get(name)
        if own is not None and parameter is not None:
            adapter._parameters[name] = copies.setdefault(id(own), parameter)


def _place(adapter: Adapter, module: nn.Module, dtype: torch.dtype | None, copies: torch.dtype | None = None) -> None:
    """Moves a new adapter's floating-point tensors to the device and dtype that go with the module.

    Args:
        copies: the least dtype of trained copies of the backbone's own parameters; None: theirs.
    """
    reference = next((p for p in module.parameters(recurse=False)), None)
    if reference is None:
        reference = next(module.parameters(), None)
    wanted = dtype
    if wanted is None and reference is not None and reference.is_floating_point():
        whole = isinstance(adapter, WholeModule) or adapter.raw
        own = reference.dtype if copies is None else torch.promote_types(reference.dtype, copies)
        wanted = own if whole else adapter_dtype(reference.dtype)
    device = backbones.device_of(module)
    if device.type == "meta":
        adapter.to(dtype=wanted)
        adapter.to_empty(device=device)
    else:
        adapter.to(device=device, dtype=wanted)


def fill(adapter: Adapter, values: dict[str, Tensor]) -> None:
    """Copies tensors into an adapter; names and shapes were checked before."""
    with torch.no_grad():
        for key, tensor in adapter.tensors().items():
            if key in values:
                tensor.data.copy_(values[key])


# Verbs on a wrapped model -------------------------------------------------------------------------------------------


def check_classes(model: nn.Module) -> None:
    """Raises StateError when the original classes cannot be put back."""
    for path, module in (("", model), *sites_of(model)):
        if swap.class_grew(module):
            raise StateError(
                f"{path or 'the model'} became a {type(module).__name__} after it was wrapped (fully_shard and "
                "parametrizations do this), so its class cannot be put back; save the adapter and load it into a model "
                "without that"
            )


def detach_code(model: nn.Module) -> None:
    """Takes the adapters' code off every path and leaves their tensors where they are; `activate` puts it back."""
    record_of(model).active = ()
    for _, module in sites_of(model):
        swap.detach(module, root=module is model)


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules that hold adapters."""
    for path, module in model.named_modules():
        if CHILD in module._modules:
            yield path, module


def adapters_of(model: nn.Module, name: str) -> Iterator[tuple[str, Adapter]]:
    """Site paths and adapters of one name.

    Raises:
        StateError: the model is not wrapped, or holds no adapter of that name.
    """
    check_known(record_of(model), name)
    for path, module in sites_of(model):
        children = module._modules[CHILD]
        if name in children:  # type: ignore[operator]  # a ModuleDict by construction
            yield path, children[name]  # type: ignore[index]


def check_known(record: Record, name: str) -> None:
    """Raises StateError unless the model holds an adapter of that name."""
    if name not in record.plans:
        raise StateError(f"no adapter named {name!r} is attached; {nearest(name, record.plans)}")


def activate(model: nn.Module, *names: str) -> None:
    """Makes these adapters, and no others, take part in the forward pass; inner ones first.

    Active adapters require gradients unless they were attached frozen; inactive ones do not.

    Raises:
        StateError: a name is unknown, or a merge is in effect.
    """
    record = record_of(model)
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged into the weights; call peftkit.unmerge(model) first")
    for name in names:
        check_known(record, name)
    record.active = names
    swap.refresh(model, names, root=True)
    for _, module in list(sites_of(model)):
        swap.refresh(module, names, root=module is model)
        for name, adapter in module._modules[CHILD].items():  # type: ignore[union-attr, operator]
            train = name in names and name not in record.frozen
            for key, parameter in adapter.named_parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(train and key not in adapter.untrained)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes exactly what the backbone alone computes.

    Raises:
        StateError: the model is not wrapped, or a merge is in effect.
    """
    record = record_of(model)
    if record.merged:
        raise StateError(f"{', '.join(record.merged)} is merged into the weights; call peftkit.unmerge(model) first")
    with with_active(model, dict.fromkeys((module for _, module in sites_of(model)), ())):
        yield


@contextmanager
def with_active(model: nn.Module, active: Mapping[nn.Module, tuple[Any, ...]]) -> Iterator[None]:
    """Inside the block these take part at the given modules, in place of what is active there."""
    record = record_of(model)
    held = {module: module.__dict__["_peftkit_active"] for module in active}
    was = record.active
    try:
        for module, own in active.items():
            module.__dict__["_peftkit_active"] = own
        yield
    finally:
        # A verb called inside the block has decided anew what is active.
        if model.__dict__.get("_peftkit") is record and record.active is was:
            for module, own in held.items():
                module.__dict__["_peftkit_active"] = own


def unwrap(model: M, name: str | None = None) -> M:
    """The original model, every bit; merged weights are restored first.

    Args:
        name: detach this adapter only; None: all of them, and restore the backbone's gradient flags.

    Raises:
        StateError: the model is not wrapped, or holds no adapter of that name.
    """
    record = record_of(model)
    if name is not None:
        check_known(record, name)
    check_classes(model)
    restore(model)
    for _, module in list(sites_of(model)):
        children = module._modules[CHILD]
        for key in list(children.keys()):  # type: ignore[union-attr, operator]
            if name is None or key == name:
                del children[key]  # type: ignore[union-attr, operator]
    remaining = [n for n in record.plans if name is not None and n != name]
    for gone in set(record.plans) - set(remaining):
        del record.plans[gone]
        record.frozen.discard(gone)
    if not remaining:
        flags = record.requires_grad
        del model.__dict__["_peftkit"]
        for _, module in list(sites_of(model)):
            swap.refresh(module, (), root=False)
        swap.refresh(model, (), root=False)
        for key, parameter in model.named_parameters(remove_duplicate=False):
            # What a merge put into codes has no gradient, whatever was there before.
            parameter.requires_grad_(flags.get(key, parameter.requires_grad) and parameter.is_floating_point())
        return model
    for _, module in list(sites_of(model)):
        swap.refresh(module, (), root=module is model)
    activate(model, *(n for n in record.active if n in remaining))
    return model


def restore(model: nn.Module) -> None:
    """Puts back every bit of what a merge changed, and the adapters on the path; nothing merged: nothing."""
    record = record_of(model)
    if not record.merged:
        return
    modules = dict(model.named_modules())
    for path, stored in record.backups.items():
        for key, value in stored.items():
            own = modules[path]._parameters[key]
            assert own is not None
            own.data.copy_(value)
    if record.conversion is not None:
        undo(model, record.conversion)
    record.merged, record.backups, record.conversion = (), {}, None
    activate(model, *record.resumed)


def state_of(model: nn.Module, name: str) -> State:
    """The tensors of one adapter by site path and name, tied copies once."""
    seen: set[int] = set()
    found: State = {}
    for path, adapter in adapters_of(model, name):
        fresh = {k: t.detach() for k, t in adapter.tensors().items() if id(t) not in seen}
        seen |= {id(t) for t in adapter.tensors().values()}
        if fresh:
            found[path] = fresh
    return found


def step_sites(planned: Plan) -> tuple[Site, ...]:
    """All sites of a plan, those of the modules trained whole included."""
    return (*planned.sites, *planned.extras)
