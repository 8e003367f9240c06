"""What the methods that train the backbone's own parameters have in common: choosing, counting and copying them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from peftkit import targets
from peftkit.spec import Adapter, Config, Site
from peftkit.whole import WholeModule


def selected_parameters(
    model: nn.Module,
    cfg: Config,
    *,
    names: Sequence[str] | None,
    keep: Callable[[nn.Module], bool] = lambda module: True,
) -> list[Site]:
    """Sites for the parameters of the backbone's modules, tied ones counted once, modules trained whole left out.

    Args:
        names: parameter names, such as ("bias",); None: all.
        keep: which modules qualify when `target_modules` names none.
    """
    extras = targets.extra_paths(model, cfg)
    candidates = [(p, m) for p, m in targets.modules(model) if not targets.inside(p, extras)]
    named = cfg.target_modules is not None
    paths = targets.narrow(model, cfg, [p for p, m in candidates if named or keep(m)])
    modules = dict(candidates)
    seen: set[int] = set()
    found = []
    for path in paths:
        site = targets.parameter_site(path, modules[path], names)
        if site is None:
            continue
        fresh = [n for n, _ in site.parameters if id(modules[path]._parameters[n]) not in seen]
        seen |= {id(modules[path]._parameters[n]) for n in fresh}
        found.append(dataclasses.replace(site, facts={"counted": tuple(fresh)}))
    return found


def parameter_total(site: Site, cfg: Any) -> int:
    """Elements of the copied parameters; one that an earlier site already copies counts there."""
    counted = site.facts.get("counted", tuple(n for n, _ in site.parameters))
    total = 0
    for name, shape in site.parameters:
        if name in counted:
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


def parameter_adapter(site: Site, cfg: Any, shared: nn.Module | None) -> Adapter:
    """Copies of the site's parameters, not yet filled."""
    return WholeModule(site.parameters)


def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: Any) -> None:
    """Starts from the backbone's own values."""
    assert isinstance(adapter, WholeModule)
    adapter.copy_from(module)
