"""Suite and records -> the cells that can be run now. Pure: an interrupted suite goes on from its records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

import peftkit
from peftkit.errors import PeftkitError
from peftkit_bench import record, subjects, trials
from peftkit_bench.metrics import METRICS
from peftkit_bench.record import Record, digest
from peftkit_bench.spec import Contender, Resolved, SuiteError
from peftkit_bench.suite import Suite, Tune, budget_counts
from peftkit_bench.tasks.contract import Prepared

DECISIVE = ("peftkit", "torch", "transformers", "peft")
"""Packages of which another version gives another result, so that cells are run again."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A contender at one budget, its size solved."""

    name: str
    contender: Contender
    resolved: Resolved
    budget: int | None
    """None where no size was solved: the suite has no budget, or the method has no size."""
    trial: str
    """Names the search that finds its learning rate."""
    identity: Mapping[str, Any]
    """What determines its results besides seed, learning rate and split."""
    searches: bool = True
    """False: it takes the learning rate that another budget's search found."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One contender at one budget, one learning rate and one seed."""

    name: str
    contender: Contender
    resolved: Resolved
    budget: int | None
    budgets: tuple[int, ...]
    phase: str
    """ "search" or "final"."""
    learning_rate: float
    searched: Mapping[str, Any]
    tuning: Mapping[str, Any] | None
    seed: int
    key: str
    variant: str
    trial: str

    @property
    def split(self) -> str:
        """What is predicted."""
        return "test" if self.phase == "final" else "tune"


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a search tries."""

    learning_rate: float
    searched: Mapping[str, Any]


def versions() -> dict[str, str]:
    """Versions of what decides the result; peftkit's own also where it runs from a source tree."""
    return {**record.versions(), "peftkit": peftkit.__version__}


def compiled() -> dict[str, list[str]]:
    """By kind of device the operations of peftkit that run as compiled code here; the others run as plain torch."""
    import peftkit_kernels  # loading CUDA code asks for GPUs, which must not happen before processes are forked

    found: dict[str, list[str]] = {}
    for each in peftkit_kernels.status():
        if each.runnable:
            found.setdefault(each.device, []).append(each.op)
    return found


def candidates(suite: Suite, prepared: Prepared, skeleton: nn.Module) -> list[Candidate]:
    """Every contender at every budget, sizes solved; methods without a size to set, once.

    Raises:
        SuiteError: a contender cannot be what the suite says; names it.
    """
    known = versions()
    heads = subjects.subject("peftkit").resolve(skeleton, Contender(method="head"), None).head_parameters
    budgets = budget_counts(suite.budgets, prepared.backbone["parameters"] - heads)
    chosen = suite.tune.budget if suite.tune is not None else None
    tuned_at = budget_counts([chosen], prepared.backbone["parameters"] - heads)[0] if chosen is not None else None
    found: list[Candidate] = []
    for name, contender in suite.contenders.items():
        mine: dict[str, Candidate] = {}
        for budget in budgets or (None,):
            try:
                resolved = subjects.subject(contender.subject).resolve(skeleton, contender, budget)
            except PeftkitError as error:
                raise SuiteError(f"contenders, {name}: {error}") from error
            identity = _identity(suite, prepared, contender, resolved, known)
            at = budget if resolved.knob is not None else None
            made = Candidate(
                name=name, contender=contender, resolved=resolved, budget=at, identity=identity, trial=digest(identity)
            )
            before = mine.get(made.trial)
            # One size may be the nearest to several budgets; it is shown at the one that it is nearest to.
            if before is None or _distance(made) < _distance(before):
                mine[made.trial] = made
        _check_rate(suite, name, contender, next(iter(mine.values())).resolved)
        if tuned_at is not None and len(mine) > 1:
            searched = min(mine.values(), key=lambda c: abs(math.log((c.budget or tuned_at) / tuned_at)))
            mine = {
                t: c if c is searched else replace(c, trial=searched.trial, searches=False) for t, c in mine.items()
            }
        found += mine.values()
    return found


def _distance(candidate: Candidate) -> float:
    count = candidate.resolved.adapter_parameters
    return abs(math.log(count / candidate.budget)) if candidate.budget and count else 0.0


def _check_rate(suite: Suite, name: str, contender: Contender, resolved: Resolved) -> None:
    if suite.tune is None and contender.learning_rate is None and resolved.adapter_parameters:
        raise SuiteError(
            f"contenders, {name}: the key 'learning_rate' is missing, and the suite does not search (tune)"
        )
    if suite.tune is not None and resolved.knob is not None and resolved.knob in suite.tune.search:
        raise SuiteError(f"tune, search: {resolved.knob} is the size of {name}, which the budget decides")


def _identity(
    suite: Suite, prepared: Prepared, contender: Contender, resolved: Resolved, known: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "subject": contender.subject,
        "method": contender.method,
        "quantization": contender.quantization,
        "config": resolved.fields,
        "training": asdict(suite.training),
        "task": {"name": suite.task.name, **asdict(suite.task)},  # type: ignore[call-overload]  # tasks are dataclasses
        "data": [prepared.data["hash"], prepared.data.get("general")],
        "backbone": prepared.backbone["hash"] or prepared.folder,
        "versions": {each: known.get(each) for each in DECISIVE if each != "peft" or contender.subject == "peft"},
    }


# What can be run now ------------------------------------------------------------------------------------------------


def due(suite: Suite, planned: Sequence[Candidate], records: Iterable[Record]) -> list[Cell]:
    """Every cell that can be run now and is not recorded: searches first, then the runs that count, seed by seed."""
    records = list(records)
    budgets = tuple(sorted({c.budget for c in planned if c.budget is not None}))
    done = {found.key for found in records}
    by_trial: dict[str, list[Record]] = {}
    for found in records:
        if found.phase == "search":
            by_trial.setdefault(found.trial, []).append(found)
    cells: list[Cell] = []
    for candidate in planned:
        if suite.tune is None:
            rate = candidate.contender.learning_rate or suite.training.head_learning_rate
            chosen, tuning = Point(learning_rate=rate, searched={}), None
        else:
            state = searched(suite, suite.tune, candidate, by_trial.get(candidate.trial, []))
            tuning = state.tuning
            if candidate.searches:
                for point in state.open:
                    cells += [
                        _cell(candidate, "search", point, seed, budgets, tuning)
                        for seed in suite.tune.seeds
                    ]  # fmt: skip
            if state.chosen is None:
                continue
            chosen = state.chosen
        cells += [_cell(candidate, "final", chosen, seed, budgets, tuning) for seed in suite.seeds]
    order = {"search": 0, "final": 1}
    waiting = [cell for cell in cells if cell.key not in done]
    return sorted(waiting, key=lambda c: (order[c.phase], suite.seeds.index(c.seed) if c.phase == "final" else 0))


def remaining(suite: Suite, planned: Sequence[Candidate], records: Iterable[Record]) -> int:
    """How many cells are left, as far as can be said before searches end."""
    records = list(records)
    waiting = due(suite, planned, records)
    counted = {(c.name, c.budget) for c in waiting if c.phase == "final"}
    finished = {(r.contender, r.budget) for r in records if r.phase == "final"}
    later = [c for c in planned if (c.name, c.budget) not in counted | finished]
    tune = suite.tune
    trials_left = 0
    if tune is not None and tune.trials:
        made = {t: sum(r.phase == "search" and r.trial == t for r in records) for t in {c.trial for c in planned}}
        open_now = sum(c.phase == "search" for c in waiting)
        trials_left = sum(max(0, tune.trials * len(tune.seeds) - n) for n in made.values()) - open_now
    return len(waiting) + len(later) * len(suite.seeds) + max(0, trials_left)


def _cell(
    candidate: Candidate,
    phase: str,
    point: Point,
    seed: int,
    budgets: tuple[int, ...],
    tuning: Mapping[str, Any] | None,
) -> Cell:
    values = {name: value for name, value in point.searched.items() if name != trials.NUMBER}
    variant = digest({**candidate.identity, "learning_rate": point.learning_rate, "searched": values, "phase": phase})
    return Cell(
        name=candidate.name,
        contender=candidate.contender,
        resolved=candidate.resolved,
        budget=candidate.budget,
        budgets=budgets,
        phase=phase,
        learning_rate=point.learning_rate,
        searched=point.searched if phase == "search" else values,
        tuning=tuning,
        seed=seed,
        key=digest([variant, candidate.name, seed, point.searched.get(trials.NUMBER) if phase == "search" else None]),
        variant=variant,
        trial=candidate.trial,
    )


@dataclass(frozen=True, kw_only=True)
class Search:
    """How far the search of one candidate is."""

    open: tuple[Point, ...]
    """What is to be tried now, tried already or not."""
    chosen: Point | None
    """None: not known yet."""
    tuning: Mapping[str, Any]
    """What records keep of the search."""


def searched(suite: Suite, tune: Tune, candidate: Candidate, records: Sequence[Record]) -> Search:
    """The state of a candidate's search, from its records."""
    about: dict[str, Any] = {"learning_rates": list(tune.learning_rates), "seeds": list(tune.seeds)}
    better = METRICS[suite.task.metric].higher_is_better
    tried: dict[str, list[Record]] = {}
    for found in records:
        tried.setdefault(digest([found.learning_rate, found.searched]), []).append(found)
    scores = {name: sum(r.score for r in found) / len(found) for name, found in tried.items()}
    whole = {name: found[0] for name, found in tried.items() if {r.seed for r in found} >= set(tune.seeds)}

    def best(names: Iterable[str]) -> Record:
        """On a tie the lowest rate."""
        sign = 1 if better else -1
        return whole[max(names, key=lambda n: (sign * scores[n], -whole[n].learning_rate))]

    if tune.trials:
        finished = sorted(whole.values(), key=lambda r: int(r.searched[trials.NUMBER]))
        about = {**about, "trials": tune.trials, "search": {k: asdict(v) for k, v in tune.search.items()}}
        if len(finished) < tune.trials:
            shown = [(r.learning_rate, r.searched, scores[digest([r.learning_rate, r.searched])]) for r in finished]
            rate, values = trials.ask(tune, candidate.trial, _searchable(tune, candidate), shown, maximise=better)
            return Search(open=(Point(learning_rate=rate, searched=values),), chosen=None, tuning=about)
        winner = best(whole)
        values = {name: value for name, value in winner.searched.items() if name != trials.NUMBER}
        return Search(open=(), chosen=Point(learning_rate=winner.learning_rate, searched=values), tuning=about)
    rates = list(tune.learning_rates)
    names = {rate: digest([rate, {}]) for rate in rates}
    added: list[float] = []
    while True:
        if any(names[rate] not in whole for rate in rates):
            open_now = tuple(Point(learning_rate=rate, searched={}) for rate in rates)
            return Search(open=open_now, chosen=None, tuning={**about, "extended": added})
        winner_rate = best(names[rate] for rate in rates).learning_rate
        further = extension(rates, winner_rate)
        above = further is not None and further > rates[-1]
        so_far = sum((each > tune.learning_rates[-1]) == above for each in added)
        if further is None or so_far >= tune.extend:
            at_edge = further is not None
            chosen = Point(learning_rate=winner_rate, searched={})
            return Search(open=(), chosen=chosen, tuning={**about, "extended": added, "at_edge": at_edge})
        rates = sorted([*rates, further])
        names[further] = digest([further, {}])
        added.append(further)


def extension(rates: Sequence[float], best: float) -> float | None:
    """The next rate outside the grid where its best lies at an end; None where it does not, or there is no grid.

    The grid's spacing goes on: 0.001, 0.003, 0.01 is followed by 0.03.
    """
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    ends = list(rates) if best == rates[-1] else list(reversed(rates))
    further = ends[-2] * ends[-1] / ends[-3] if len(ends) > 2 else ends[-1] ** 2 / ends[-2]
    return float(f"{further:.3g}")


def _searchable(tune: Tune, candidate: Candidate) -> list[str]:
    """Names in `search` that this candidate has: of its config, or `training.` and a field of the training."""
    return [name for name in tune.search if name.startswith("training.") or name in candidate.resolved.fields]
