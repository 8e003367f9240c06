"""A suite: what is compared with what, on what, with which seeds, budgets and learning rates. YAML, read strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import nearest
from peftkit_bench import subjects
from peftkit_bench.data import source_class
from peftkit_bench.data.dataset import Source
from peftkit_bench.metrics import METRICS
from peftkit_bench.spec import Contender, SuiteError
from peftkit_bench.strict import require, strictly, values
from peftkit_bench.tasks import task_class
from peftkit_bench.tasks.contract import Task

RUNNERS = {"comparison": "engine", "merge": "merging"}
"""Modules of this package with `run`, by the `kind` of the suites that they take."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The grid of a comparison that names none."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The frozen model: exactly one of the three."""

    package: str | None = None
    """Import name of an installed package that carries a model in its folder `model`."""
    path: str | None = None
    """Folder of a model, or its name on a hub."""
    pretrained: str | None = None
    """Size of the small decoder that `peftkit_bench.pretrain` makes, and keeps, on this machine: "tiny" or "base"."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The same for every method; the learning rate alone is each method's own."""

    steps: int
    """Optimizer steps."""
    batch_size: int = 32
    """Rows of an optimizer step."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after another; the gradient is that of the whole batch."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from zero; it then falls linearly to zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    head_learning_rate: float = 1e-2
    """Of the task's new head, the same for every method."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: str = "float32"
    """Of the arithmetic: "float32" or "bfloat16" (autocast; trained parameters stay float32)."""
    evaluations: int = 5
    """Times that the stop split is predicted during training, evenly spaced; the best weights are kept."""
    patience: int = 0
    """Evaluations without a better score after which training stops; 0: it runs to the end."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search may try for one field: exactly one of a range and a list."""

    low: float | None = None
    high: float | None = None
    log: bool = True
    """Whether the range is searched on a log scale."""
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tune:
    """How each contender's learning rate is found: the same grid, or number of trials, for all."""

    learning_rates: tuple[float, ...] = LEARNING_RATES
    """The grid, ascending."""
    extend: int = 4
    """Rates that may be added at an end of the grid while the best lies there; 0: none."""
    seeds: tuple[int, ...] = (1000,)
    """Of the runs that choose; not those of the runs that count."""
    budget: str | None = None
    """The one of `budgets` whose rate is used for all of them; None: each budget is searched."""
    trials: int = 0
    """0: the grid. Otherwise so many trials of Optuna's TPE sampler over the grid's range and `search`."""
    search: Mapping[str, Choice] = field(default_factory=dict)
    """Fields of every contender's config, or of `training`, that trials search besides the learning rate; a contender
    whose method lacks the field goes without it."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is compared with what."""

    name: str
    title: str
    backbone: Backbone
    data: Source
    task: Task
    training: Training
    seeds: tuple[int, ...]
    contenders: Mapping[str, Contender]
    """Rows by the name that the report shows."""
    budgets: tuple[str, ...] = ()
    """Trainable parameters that sizes are solved for, the head left out: counts, or shares of the backbone ("0.5%");
    none: sizes stand in the configs."""
    tune: Tune | None = None
    """None: the contenders' own learning rates."""
    general: Source | None = None
    """Text on which forgetting is measured."""


def load(path: Path) -> tuple[Suite, ...]:
    """The suites that a YAML file describes: one, or one for each entry of its `each`.

    Under `each` stands, by name, what differs: keys that replace those of the file. The parts are run together, are
    reported on one page, and may be compared over all of them.

    Raises:
        SuiteError: a key is unknown, missing or of the wrong type, or values contradict each other.
    """
    found = values(path)
    try:
        return tuple(parse(part, folder=path.parent) for part in _parts(found))
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from None


def _parts(found: Any) -> list[Any]:
    if not isinstance(found, dict) or "each" not in found:
        return [found]
    shared = {key: value for key, value in found.items() if key != "each"}
    each = found["each"]
    if not isinstance(each, dict) or not each or not all(isinstance(part, dict) for part in each.values()):
        raise SuiteError(f"each: expected parts by name with the keys that differ, found {each!r}")
    name = shared.get("name")
    return [{**shared, "title": str(key), **part, "name": f"{name}: {key}"} for key, part in each.items()]


def runner(path: Path) -> str:
    """The name of the module of this package that runs the suite in a file; see RUNNERS.

    Raises:
        SuiteError: the file holds no suite, or one of an unknown kind.
    """
    found = values(path)
    kind = found.get("kind", "comparison") if isinstance(found, dict) else "comparison"
    if kind not in RUNNERS:
        raise SuiteError(f"{path}: kind: {nearest(str(kind), RUNNERS)}")
    return RUNNERS[kind]


def parse(found: Any, *, folder: Path | None = None) -> Suite:
    """The suite that plain values describe.

    Args:
        folder: where relative paths in it start; None: the working directory.

    Raises:
        SuiteError: see `load`.
    """
    if not isinstance(found, dict):
        raise SuiteError(f"the suite: expected keys and values, found {type(found).__name__} {found!r}")
    made = {key: value for key, value in found.items() if key != "kind"}
    if isinstance(made.get("budgets"), list):
        made["budgets"] = [str(each) for each in made["budgets"]]
    if isinstance(made.get("tune"), dict) and isinstance(made["tune"].get("budget"), int):
        made["tune"] = {**made["tune"], "budget": str(made["tune"]["budget"])}
    contenders = made.get("contenders")
    if isinstance(contenders, dict):
        made["contenders"] = {name: _with_subject(value) for name, value in contenders.items()}
    made["task"] = _task(made.get("task", "seq-cls"))
    for key in ("data", "general"):
        if key in made:
            made[key] = _source(made[key], key, folder)
    suite = strictly(Suite, made)
    _check(suite)
    return suite


def _task(found: Any) -> Task:
    name, options = found, {}
    if isinstance(found, dict):
        options = dict(found)
        name = options.pop("name", None)
    if not isinstance(name, str):
        raise SuiteError(f"task: expected a name, or its name and options, found {found!r}")
    return strictly(task_class(name), options, "task")


def _source(found: Any, key: str, folder: Path | None) -> Source:
    if not isinstance(found, dict):
        raise SuiteError(f"{key}: expected keys and values, found {type(found).__name__} {found!r}")
    options = dict(found)
    name = options.pop("source", None)
    if not isinstance(name, str):
        raise SuiteError(f"{key}: the key 'source' is missing")
    cls = source_class(name)
    takes_folder = any(f.name == "folder" for f in dataclasses.fields(cls))  # type: ignore[arg-type]  # a dataclass
    if takes_folder and folder is not None:
        options.setdefault("folder", str(folder))
    return strictly(cls, options, key)


def _with_subject(contender: Any) -> Any:
    """A contender with `method: peft:boft` taken apart."""
    if isinstance(contender, dict) and isinstance(method := contender.get("method"), str) and ":" in method:
        subject, _, method = method.partition(":")
        return {"subject": subject, **contender, "method": method}
    return contender


def budget_counts(budgets: Sequence[str], parameters: int) -> tuple[int, ...]:
    """Budgets as counts, ascending.

    Args:
        budgets: counts ("74_000") or shares ("0.5%").
        parameters: of the backbone, its head left out.

    Raises:
        SuiteError: one is neither, or two come to the same.
    """
    found = []
    for each in budgets:
        text = each.strip().replace("_", "").replace(",", "")
        try:
            share = text.endswith("%")
            count = round(float(text[:-1]) / 100 * parameters) if share else int(text)
        except ValueError:
            raise SuiteError(f"budgets: expected a count or a share such as 0.5%, found {each!r}") from None
        if count < 1:
            raise SuiteError(f"budgets: expected a positive count, found {each!r}")
        found.append(count)
    if len(set(found)) != len(found):
        raise SuiteError(f"budgets: expected different counts, found {', '.join(map(str, found))}")
    return tuple(sorted(found))


def _check(suite: Suite) -> None:
    backbone, training, tune = suite.backbone, suite.training, suite.tune
    given = [each for each in (backbone.package, backbone.path, backbone.pretrained) if each is not None]
    require(len(given) == 1, "backbone: give one of package, path and pretrained")
    require(len(suite.seeds) > 0 and len(set(suite.seeds)) == len(suite.seeds), "seeds: expected different numbers")
    require(len(suite.contenders) > 0, "contenders: expected at least one")
    for name, contender in suite.contenders.items():
        where = f"contenders, {name}"
        require(contender.subject in subjects.NAMES, f"{where}, subject: {nearest(contender.subject, subjects.NAMES)}")
    for key, source in (("data", suite.data), ("general", suite.general)):
        if source is not None and source.tasks and suite.task.name not in source.tasks:
            raise SuiteError(
                f"{key}: {source.name} has rows for {', '.join(source.tasks)}, not for the task {suite.task.name}"
            )
    require(suite.general is None or suite.task.name == "causal-lm",
            f"general: forgetting is measured as loss on text, which the task {suite.task.name} does not predict; "
            "take the task causal-lm, or leave it out")  # fmt: skip
    options = suite.task.metrics
    require(suite.task.metric in options, f"task, metric: {nearest(suite.task.metric, options)}")
    assert suite.task.metric in METRICS
    require(suite.task.max_tokens >= 8, f"task, max_tokens: expected at least 8, found {suite.task.max_tokens}")
    for key, low in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("evaluations", 1), ("patience", 0)):
        value = getattr(training, key)
        require(value >= low, f"training, {key}: expected at least {low}, found {value}")
    require(
        training.batch_size % training.accumulation == 0,
        f"training, accumulation: expected a part of the batch of {training.batch_size}, found {training.accumulation}",
    )
    require(
        training.evaluations <= training.steps,
        f"training, evaluations: expected at most one a step ({training.steps}), found {training.evaluations}",
    )
    require(0 <= training.warmup < 1, f"training, warmup: expected a share in [0, 1), found {training.warmup}")
    precisions = ("float32", "bfloat16")
    require(training.precision in precisions, f"training, precision: {nearest(training.precision, precisions)}")
    rates = [c.learning_rate for c in suite.contenders.values() if c.learning_rate is not None]
    require(all(rate > 0 for rate in (*rates, training.head_learning_rate)), "learning rates are positive")
    if tune is not None:
        _check_tune(tune, suite)


def _check_tune(tune: Tune, suite: Suite) -> None:
    rates = tune.learning_rates
    require(len(rates) > 0, "tune, learning_rates: expected at least one")
    require(all(rate > 0 for rate in rates), "learning rates are positive")
    require(list(rates) == sorted(set(rates)), f"tune, learning_rates: expected ascending rates, found {list(rates)}")
    require(tune.extend >= 0, f"tune, extend: expected at least 0, found {tune.extend}")
    require(len(tune.seeds) > 0, "tune, seeds: expected at least one")
    shared = sorted(set(tune.seeds) & set(suite.seeds))
    require(not shared, f"tune, seeds: {shared} are among the seeds that count; choose others")
    require(tune.trials >= 0, f"tune, trials: expected at least 0, found {tune.trials}")
    require(not tune.search or tune.trials > 0, "tune, search: give trials too, how many for each contender")
    require(
        not tune.trials or len(rates) > 1, "tune, learning_rates: trials need the ends of a range, found a single rate"
    )
    for name, choice in tune.search.items():
        ranged = choice.low is not None and choice.high is not None
        require(ranged != bool(choice.values), f"tune, search, {name}: give either low and high, or values")
        if ranged:
            assert choice.low is not None
            assert choice.high is not None
            require(choice.low < choice.high, f"tune, search, {name}: expected low < high")
            require(not choice.log or choice.low > 0, f"tune, search, {name}: a log scale needs low > 0")
    require(
        tune.budget is None or tune.budget in suite.budgets,
        f"tune, budget: expected one of the budgets ({', '.join(suite.budgets) or 'none'}), found {tune.budget!r}",
    )
    for name, contender in suite.contenders.items():
        require(
            contender.learning_rate is None,
            f"contenders, {name}, learning_rate: the suite searches it (tune); take one of the two out",
        )
