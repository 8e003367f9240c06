"""Adapters that act on what a sub-layer or a block reads and gives: where they go, and how they join the data flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import backbones, targets
from peftkit.errors import TargetError
from peftkit.spec import Adapter, Config, Method, Site, is_weight_module

Placement = Literal["houlsby", "pfeiffer", "parallel"]
Join = Literal["output", "norm", "branch", "residual", "joined", "input", "parameters"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
    "linear": lambda x: x,
}
"""Names of non-linearities -> functions."""


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a module gave: the tensor, or the first entry of the tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """What a module gave, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class Carrier(Adapter):
    """Takes the input of a feed-forward whose two projections stand in the block itself from the first to the second.

    Held at the model, without tensors of its own. What is held lives from one projection to the next, both inside the
    same block, so that recomputing a block fills it anew.
    """

    advises = False

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": {}}


class InputAdapter(Adapter):
    """Hands the input of a feed-forward's first projection to the adapter at its second one."""

    def __init__(self, site: Site, carrier: nn.Module | None) -> None:
        super().__init__()
        assert isinstance(carrier, Carrier)
        self.key = str(site.facts["joined"])
        self._shared = (carrier,)

    def forward(self, module: nn.Module, call: Callable[..., Any], x: Tensor) -> Tensor:
        """Args: x (..., in). Returns: (..., intermediate), unchanged."""
        self._shared[0].held[self.key] = x
        out: Tensor = call(x)
        return out


class SublayerAdapter(Adapter):
    """Adds `update` of a sub-layer's input or output, at the point of the data flow that the site's role names.

    output:    h + A(h), with h what the module gives
    norm:      LN(s + A(LN(s))), with LN the module and s the residual sum that it reads
    branch:    f(x) + A(x), with f the module
    residual:  f(h, x + A(x)), with f a module that adds its second argument to a projection of its first
    joined:    f(h) + A(x), with x the input of the feed-forward that f ends
    """

    skip: bool = True
    """False: A(h) takes the place of h at an "output"."""

    def __init__(self, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.role = site.role
        self.key = site.path
        self._shared = (shared,)

    def update(self, x: Tensor) -> Tensor:
        """A(x). Args: x (..., in). Returns: (..., out) of the site's widths."""
        raise NotImplementedError

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module gives, with the update joined."""
        match self.role:
            case "output":
                output = call(*args, **kwargs)
                hidden = hidden_states(output)
                update = self.update(hidden).to(hidden.dtype)
                return with_hidden_states(output, hidden + update if self.skip else update)
            case "norm":
                total = _only(*args, **kwargs)
                return call(total + self.update(call(total)).to(total.dtype))
            case "residual":
                hidden, residual = _pair(*args, **kwargs)
                return call(hidden, residual + self.update(residual).to(residual.dtype))
            case "joined":
                carrier = self._shared[0]
                assert isinstance(carrier, Carrier)
                x = carrier.held.pop(self.key)
            case _:
                x = _only(*args, **kwargs)
        output = call(*args, **kwargs)
        hidden = hidden_states(output)
        return with_hidden_states(output, hidden + self.update(x).to(hidden.dtype))


def _only(*args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _pair(hidden_states: Tensor, input_tensor: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_states, input_tensor


def sublayer_sites(
    model: nn.Module, method: Method, cfg: Config, placement: Placement, *, with_norms: bool = False
) -> list[Site]:
    """The places that a placement names, narrowed by the config; `role` says how the adapter joins.

    houlsby: the output projection of every attention and of the feed-forward, before residual sum and norm.
    pfeiffer: behind the feed-forward's residual sum; where a norm follows that sum, around the norm.
    parallel: beside the feed-forward, from its input to its output.

    A projection that `target_modules` names elsewhere gets an adapter on its output, or beside it when parallel. On an
    architecture that is not in the table, every Linear but the output head is such a projection.

    Args:
        with_norms: `norm_sites` adds the norms, so that target_modules may name them besides.

    Raises:
        TargetError: a pattern matches nothing, selects a module that no adapter can join, or nothing is left.
    """
    everything = dict(targets.modules(model))
    known = backbones.family(model) is not None
    roles = _placed(model, everything, placement) if known else {}
    elsewhere: Join = "branch" if placement == "parallel" else "output"
    if cfg.target_modules is None:
        start = list(roles) if known else list(backbones.linear_paths(model))
    else:
        start = [path for path in everything if path]
    extras = targets.extra_paths(model, cfg)
    chosen = [p for p in targets.narrow(model, cfg, start) if not targets.inside(p, extras)]
    inputs = _inputs(model, [p for p in chosen if roles.get(p) == "joined"])
    follow = set(inputs) | (set(backbones.slot_paths(model, "norm")) if with_norms and known else set())
    wrong = [p for p in chosen if p not in roles and p not in follow and not is_weight_module(everything[p])]
    if wrong and not isinstance(cfg.target_modules, str):
        raise TargetError(
            f"{method.name} with placement={placement!r} attaches to projections and to {_names(roles)}, but "
            f"target_modules selects {wrong[0]} ({type(everything[wrong[0]]).__name__}); name one of those"
        )
    chosen = [p for p in chosen if p not in follow and p not in wrong]
    if not chosen:
        raise TargetError(
            f"{method.name}: target_modules, exclude_modules, layers_to_transform and modules_to_save leave no place "
            "for an adapter; loosen one of them"
        )
    found = [_site(model, path, everything[path], roles.get(path, elsewhere)) for path in chosen]
    for path, joined in inputs.items():
        site = targets.site_of(path, everything[path], role="input")
        found.append(dataclasses.replace(site, facts={"joined": joined}))
    return found


def _placed(model: nn.Module, everything: Mapping[str, nn.Module], placement: Placement) -> dict[str, Join]:
    """Paths of a placement and how an adapter joins there, in the model's order."""
    slots: Sequence[tuple[str, Join]]
    if placement == "houlsby":
        slots = [("attention.output", "output"), ("ffn.down", "output")]
    elif placement == "pfeiffer":
        slots = [("ffn.norm", "norm")] if backbones.post_norm(model) else [("block", "output")]
    else:
        choices: Sequence[tuple[str, Join]] = [("ffn", "branch"), ("ffn.residual", "residual"), ("ffn.down", "joined")]
        slots = next([(s, j)] for s, j in choices if backbones.slot_paths(model, s))
    found = {path: join for slot, join in slots for path in backbones.slot_paths(model, slot)}
    return {path: found[path] for path in everything if path in found}


def _inputs(model: nn.Module, joined: Sequence[str]) -> dict[str, str]:
    """First projections of the feed-forwards that end in `joined` -> the projection that ends them."""
    if not joined:
        return {}
    pairs = zip(backbones.slot_paths(model, "ffn.up"), backbones.slot_paths(model, "ffn.down"), strict=True)
    return {first: last for first, last in pairs if last in set(joined)}


def _site(model: nn.Module, path: str, module: nn.Module, role: Join) -> Site:
    """The site with the widths of what the adapter reads and gives there."""
    site = targets.site_of(path, module, role=role)
    if is_weight_module(module):
        wide = site.out_features
        return dataclasses.replace(site, in_features=site.in_features if role == "branch" else wide)
    wide = block_width(model, path)
    return dataclasses.replace(site, in_features=wide, out_features=wide)


def block_width(model: nn.Module, path: str) -> int:
    """Width of the hidden states in the block that is or holds the module at `path`."""
    block = next(b for b, _ in backbones.blocks(model) if path == b or path.startswith(b + "."))
    modules = dict(model.named_modules())
    down = next(p for p in backbones.slot_paths(model, "ffn.down") if p.startswith(block + "."))
    return targets.site_of(down, modules[down]).out_features


def norm_sites(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Sites that copy the norms of the blocks which hold one of `sites`."""
    modules = dict(targets.modules(model))
    held = [b for b, _ in backbones.blocks(model) if any(targets.inside(site.path, [b]) for site in sites)]
    paths = [p for p in backbones.slot_paths(model, "norm") if targets.inside(p, held)]
    found = (targets.parameter_site(p, modules[p]) for p in paths)
    return [site for site in found if site is not None]


def _names(roles: Mapping[str, Join]) -> str:
    last = sorted({path.rsplit(".", 1)[-1] for path in roles if not path.rsplit(".", 1)[-1].isdigit()})
    return f"the modules {', '.join(last)}" if last else "the blocks"
