"""A suite of merges: which trained adapters, of which sizes, are merged by whom into what. YAML, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peftkit
from peftkit.errors import nearest
from peftkit_bench import suite as suites
from peftkit_bench.data.dataset import Source
from peftkit_bench.spec import Contender, SuiteError
from peftkit_bench.strict import require, strictly, values
from peftkit_bench.suite import Backbone, Suite, Training
from peftkit_bench.tasks.contract import Task
from peftkit_bench.tasks.sequence_classification import SequenceClassification

FORMATS = ("bf16", "nf4", "int8", "fused")
ROUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "peftkit": {"bf16": ("bf16", "nf4", "int8"), "nf4": FORMATS, "int8": FORMATS},
    "peft": {"bf16": ("bf16",), "nf4": ("nf4",), "int8": ("int8",)},
    "dequantize": {"nf4": ("bf16", "nf4", "int8")},
    "bitsandbytes": {"nf4": ("nf4", "int8")},
}
"""What each tool can start from, and what it can merge that into."""
SHARED = ("name", "title", "backbone", "data", "task", "training")
"""Keys that mean the same in a comparison."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A method that is trained once, on the base in NF4."""

    method: str
    """Name in `peftkit.METHODS`."""
    learning_rate: float
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's config."""
    scaled: str | None = None
    """The parameter that the change of the weight is proportional to, such as lora_B; None: it stays as it is."""
    sizes: tuple[float, ...] = ()
    """‖ΔW‖ / ‖W‖, over all sites, that the change is scaled to; empty: as trained."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A way to merge."""

    tool: str
    """Who merges: peftkit; peft (Hugging Face); dequantize (fold into the dequantized base in 16 bits, then quantize
    again where `into` asks for it); bitsandbytes (the exact sum, rounded to codes)."""
    base: str
    """How the weights are stored before."""
    into: str
    """How they are stored afterwards."""
    calibrated: bool = False
    """Whether the merge is shown rows, which are not those that judge it."""
    residual_rank: int = 0


@dataclass(frozen=True, kw_only=True)
class MergeSuite:
    """What is merged, by whom, and what judges it."""

    kind: str
    name: str
    title: str
    backbone: Backbone
    data: Source
    task: Task
    training: Training
    """Of every adapter; with `evaluations` left out, the weights after the last step are kept."""
    adapters: Mapping[str, Adapter]
    routes: Mapping[str, Route]
    """Contenders by the name that the report shows."""
    seed: int = 0
    calibration_rows: int = 64
    """Texts of the training split that a calibrated merge is shown."""
    judged_rows: int = 32
    """Texts of the test split on which activations and logits are compared."""
    minimum_effect: float = 0.9
    """What peftkit is asked to keep; where it refuses for that, it merges again with 0, and the record says so."""

    def comparison(self) -> Suite:
        """The adapters as a suite of the engine's, which trains them."""
        return Suite(
            name=self.name,
            title=self.title,
            backbone=self.backbone,
            data=self.data,
            task=self.task,
            training=self.training,
            seeds=(self.seed,),
            contenders={
                name: Contender(method=a.method, learning_rate=a.learning_rate, config=a.config)
                for name, a in self.adapters.items()
            },
        )


def load(path: Path) -> MergeSuite:
    """The suite that a YAML file describes.

    Raises:
        SuiteError: a key is unknown, missing or of the wrong type, or values contradict each other.
    """
    found = values(path)
    try:
        return parse(found, folder=path.parent)
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None


def parse(found: Any, *, folder: Path | None = None) -> MergeSuite:
    """The suite that plain values describe.

    Args:
        folder: where relative paths in it start; None: the working directory.

    Raises:
        SuiteError: see `load`.
    """
    if not isinstance(found, dict):
        raise SuiteError(f"the suite: expected keys and values, found {type(found).__name__} {found!r}")
    suite = strictly(MergeSuite, {**found, **_shared(found, folder)})
    require(suite.kind == "merge", f"kind: expected 'merge', found {suite.kind!r}")
    require(
        isinstance(suite.task, SequenceClassification),
        f"task: merges are judged by the logits of {SequenceClassification.name}, found {suite.task.name!r}",
    )
    for key, rows in (("calibration_rows", suite.calibration_rows), ("judged_rows", suite.judged_rows)):
        require(rows >= 1, f"{key}: expected at least 1, found {rows}")
    require(0 <= suite.minimum_effect <= 1, f"minimum_effect: expected a share in [0, 1], found {suite.minimum_effect}")
    require(len(suite.adapters) > 0, "adapters: expected at least one")
    require(len(suite.routes) > 0, "routes: expected at least one")
    for name, adapter in suite.adapters.items():
        _check_adapter(f"adapters, {name}", adapter)
    for name, route in suite.routes.items():
        _check_route(f"routes, {name}", route)
    return suite


def _shared(found: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What a suite of merges says in the words of a comparison, read and checked as there."""
    shared = {key: found[key] for key in SHARED if key in found}
    training = shared.get("training")
    if isinstance(training, dict):
        shared["training"] = {"evaluations": 1, **training}
    anyone = Contender(method="lora", learning_rate=1.0)
    comparison = suites.parse({**shared, "seeds": [0], "contenders": {"any": anyone}}, folder=folder)
    return {key: getattr(comparison, key) for key in SHARED}


def _check_adapter(where: str, adapter: Adapter) -> None:
    known = peftkit.METHODS
    require(adapter.method in known, f"{where}, method: {nearest(adapter.method, known)}")
    require(known[adapter.method].mergeable, f"{where}, method: {adapter.method} cannot be merged")
    require(adapter.learning_rate > 0, f"{where}, learning_rate: expected a positive number")
    require(all(size > 0 for size in adapter.sizes), f"{where}, sizes: expected positive shares")
    require(
        bool(adapter.sizes) == (adapter.scaled is not None),
        f"{where}: sizes go with scaled, the parameter that the change is proportional to; give both or neither",
    )


def _check_route(where: str, route: Route) -> None:
    require(route.tool in ROUTES, f"{where}, tool: {nearest(route.tool, ROUTES)}")
    bases = ROUTES[route.tool]
    require(route.base in bases, f"{where}, base: {route.tool} starts from {' or '.join(bases)}, found {route.base!r}")
    into = bases[route.base]
    require(
        route.into in into,
        f"{where}, into: {route.tool} merges a base in {route.base} into {' or '.join(into)}, found {route.into!r}",
    )
    own = route.tool == "peftkit"
    require(own or not route.calibrated, f"{where}, calibrated: {route.tool} merges without inputs")
    require(
        route.residual_rank == 0 or (own and route.residual_rank > 0 and route.into in ("nf4", "int8")),
        f"{where}, residual_rank: a positive rank goes beside peftkit's nf4 and int8, found {route.residual_rank}",
    )
