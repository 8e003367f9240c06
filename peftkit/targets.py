"""Which modules a config selects: suffixes, regular expressions, layers, exclusions; and the sites they make."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from peftkit import backbones
from peftkit.errors import BackboneError, ConfigError, TargetError, nearest
from peftkit.spec import Attach, Config, Method, Site, is_weight_module

C = TypeVar("C", bound=Config)

HOLDER = "peftkit"
"""Name of the child module that holds adapters; never a target."""


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules of the backbone, adapters left out."""
    return [(n, m) for n, m in model.named_modules() if HOLDER not in n.split(".")]


def inside(path: str, parents: Sequence[str]) -> bool:
    """Whether a module is one of `parents` or lies below one."""
    return any(path == p or path.startswith(p + ".") for p in parents)


def suffix_match(path: str, suffix: str) -> bool:
    """Whether a dotted suffix selects the path."""
    return path == suffix or path.endswith("." + suffix)


def matches(path: str, patterns: Sequence[str] | str) -> bool:
    """Whether a path is selected by suffixes, or wholly matched by one regular expression."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(suffix_match(path, p) for p in patterns)


def check_each_matches(patterns: Sequence[str] | str, paths: Sequence[str], field: str) -> None:
    """Raises TargetError unless every pattern matches a path."""
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        single: Sequence[str] | str = pattern if isinstance(patterns, str) else (pattern,)
        try:
            matched = any(matches(p, single) for p in paths)
        except re.error as error:
            raise TargetError(f"{field}={pattern!r} is not a regular expression: {error}") from None
        if not matched:
            names = {part for p in paths for part in (p, p.rsplit(".", 1)[-1]) if part and not part.isdigit()}
            raise TargetError(f"{field}: {pattern!r} matches no module; {nearest(pattern, names)}")


def narrow(model: nn.Module, config: Config, paths: Sequence[str]) -> list[str]:
    """What target_modules, exclude_modules and layers_to_transform leave of `paths`.

    Raises:
        TargetError: a pattern matches no module of the model, or a layer holds none of the targets.
    """
    known = [p for p, _ in modules(model) if p]
    chosen = list(paths)
    if config.target_modules == "all-linear":
        linear = set(backbones.linear_paths(model))
        chosen = [p for p in chosen if p in linear]
    elif config.target_modules is not None:
        check_each_matches(config.target_modules, known, "target_modules")
        chosen = [p for p in chosen if matches(p, config.target_modules)]
    if config.exclude_modules is not None:
        check_each_matches(config.exclude_modules, known, "exclude_modules")
        chosen = [p for p in chosen if not matches(p, config.exclude_modules)]
    if config.layers_to_transform is not None:
        chosen = _in_layers(chosen, config)
    return chosen


def weight_sites(model: nn.Module, method: Method, config: Config) -> list[Site]:
    """The projections (and embeddings, where the method adapts them) that the config selects.

    Raises:
        TargetError: a pattern matches nothing, selects a module of another kind, or nothing is left.
    """
    everything = dict(modules(model))
    extras = extra_paths(model, config)
    start = default_paths(model, method) if config.target_modules is None else [p for p in everything if p]
    chosen = [p for p in narrow(model, config, start) if not inside(p, extras)]
    wrong = [p for p in chosen if not _attachable(method, everything[p])]
    if wrong and not isinstance(config.target_modules, str):
        raise TargetError(
            f"{method.name} attaches to Linear{', Embedding' if method.embeddings else ''} and Conv1D modules, but "
            f"target_modules selects {wrong[0]} ({type(everything[wrong[0]]).__name__}); name the projections inside it"
        )
    chosen = [p for p in chosen if p not in set(wrong)]
    if not chosen:
        raise TargetError(
            f"{method.name}: target_modules, exclude_modules, layers_to_transform and modules_to_save leave no "
            "projection to adapt; loosen one of them"
        )
    _check_patterns(config, chosen)
    return [site_of(path, everything[path]) for path in chosen]


def _check_patterns(config: Config, paths: Sequence[str]) -> None:
    """Raises TargetError or ConfigError unless every key of rank_pattern and alpha_pattern selects a target."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (getattr(config, field, None) or {}).items():
            try:
                matched = any(pattern_match(pattern, p) for p in paths)
            except re.error as error:
                raise TargetError(f"{field}: {pattern!r} is not a regular expression: {error}") from None
            if not matched:
                names = {part for p in paths for part in (p, p.rsplit(".", 1)[-1])}
                raise TargetError(f"{field}: {pattern!r} matches no target; {nearest(pattern, names)}")
            if field == "rank_pattern" and isinstance(value, int) and value < 1:
                raise ConfigError(f"{field}: the rank of {pattern!r} must be at least 1, found {value}")


def without_idle(model: nn.Module, config: C) -> C:
    """The config without the names and patterns that select nothing in the model.

    In a folder they cannot hide a mistake, because its tensors say which modules were trained. Where nothing would
    remain of target_modules, it stays as it is.
    """
    known = [p for p, _ in modules(model) if p]
    changed: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules"):
        names = getattr(config, field)
        if isinstance(names, tuple):
            live = tuple(n for n in names if any(suffix_match(p, n) for p in known))
            changed[field] = live or (names if field == "target_modules" else None)
    config = dataclasses.replace(config, **changed)
    selected = narrow(model, config, known)
    patterns: dict[str, Any] = {}
    for field in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, field, None)
        if isinstance(values, Mapping):
            patterns[field] = {k: v for k, v in values.items() if _may_select(k, selected)}
    return dataclasses.replace(config, **patterns)


def _may_select(pattern: str, paths: Sequence[str]) -> bool:
    try:
        return any(pattern_match(pattern, p) for p in paths)
    except re.error:  # refused by name when the config is planned
        return True


def pattern_match(pattern: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern selects the path: a regular expression for its end."""
    return re.match(rf"(?:.*\.)?(?:{pattern})$", path) is not None


def from_pattern(patterns: Any, path: str, default: Any) -> Any:
    """The value that rank_pattern or alpha_pattern gives the path: the first key that matches, else `default`."""
    for pattern, value in (patterns or {}).items():
        if pattern_match(pattern, path):
            return value
    return default


def _attachable(method: Method, module: nn.Module) -> bool:
    if method.attach is Attach.WEIGHT:
        return is_weight_module(module) or (method.embeddings and isinstance(module, nn.Embedding))
    return True


def default_paths(model: nn.Module, method: Method) -> list[str]:
    """Where the method attaches when the config names no target.

    The slots it declares; on an architecture that is not in the table, every Linear but the output head.
    """
    if backbones.family(model) is None:
        return list(backbones.linear_paths(model))
    order = {name: i for i, (name, _) in enumerate(modules(model))}
    found = {p for slot in method.default_targets for p in backbones.slot_paths(model, slot)}
    if not found:
        raise BackboneError(
            f"{method.name} attaches to {', '.join(method.default_targets)} by default, which "
            f"{backbones.model_type(model)} models do not have; name modules with target_modules"
        )
    return sorted(found, key=order.__getitem__)


def _in_layers(paths: Sequence[str], config: Config) -> list[str]:
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted or ())
    pattern = config.layers_pattern

    def index(path: str) -> int | None:
        if pattern is None:
            return backbones.layer_index(path)
        for name in (pattern,) if isinstance(pattern, str) else pattern:
            match = re.search(rf"(?:^|\.){name}\.(\d+)(?:\.|$)", path)
            if match:
                return int(match.group(1))
        return None

    present = {i for i in map(index, paths) if i is not None}
    missing = indices - present
    if missing:
        raise TargetError(
            f"layers_to_transform: no target in layer {min(missing)}; layers with targets: {sorted(present)}"
        )
    return [p for p in paths if index(p) in indices]


def site_of(path: str, module: nn.Module, role: str = "weight") -> Site:
    """The site for a projection, an embedding or any other module, its sizes read from the module."""
    inside: int = 0
    out: int = 0
    if isinstance(module, nn.Linear):
        inside, out = module.in_features, module.out_features
    elif is_weight_module(module):
        inside, out = int(module.nx), int(module.nf)  # type: ignore[arg-type]  # Conv1D's own fields
    elif isinstance(module, nn.Embedding):
        inside, out = module.num_embeddings, module.embedding_dim
    return Site(
        path=path,
        role="embedding" if isinstance(module, nn.Embedding) and role == "weight" else role,
        kind=type(module).__name__,
        in_features=inside,
        out_features=out,
        bias=module._parameters.get("bias") is not None,
        layer=backbones.layer_index(path),
    )


def parameter_site(path: str, module: nn.Module, names: Iterable[str] | None = None) -> Site | None:
    """The site that copies a module's own parameters, all or those named; None when it has none of them."""
    wanted = set(names) if names is not None else None
    shapes = tuple(
        (n, tuple(p.shape)) for n, p in module._parameters.items() if p is not None and (wanted is None or n in wanted)
    )
    if not shapes:
        return None
    return dataclasses.replace(site_of(path, module, role="parameters"), parameters=shapes)


def extra_paths(model: nn.Module, config: Config) -> list[str]:
    """Paths of the modules that are trained whole: `modules_to_save`, or a task's new head."""
    paths = [p for p, _ in modules(model) if p]
    if config.modules_to_save is None:
        return list(backbones.head_names(model))
    if config.modules_to_save:
        check_each_matches(config.modules_to_save, paths, "modules_to_save")
    return [p for p in paths if matches(p, config.modules_to_save)]


def shortest_suffixes(paths: Sequence[str], all_paths: Sequence[str]) -> tuple[str, ...]:
    """The shortest list of suffixes that selects exactly `paths` among `all_paths`, sorted."""
    wanted = set(paths)
    found: set[str] = set()
    done: set[str] = set()
    by_last: dict[str, list[str]] = {}
    for path in all_paths:
        by_last.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    for path in paths:
        if path in done or not path:
            continue
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            hit = [p for p in by_last[parts[-1]] if suffix_match(p, suffix)]
            if wanted.issuperset(hit):
                break
        found.add(suffix)
        done.update(hit)
    return tuple(sorted(found))
