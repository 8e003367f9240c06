"""Searches beyond a grid, by Optuna: what to try next, given what was tried; the same answer for the same history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftkit_bench.record import digest
from peftkit_bench.spec import SuiteError

if TYPE_CHECKING:
    from peftkit_bench.suite import Tune

NUMBER = "trial"
"""Key under which a record's `searched` holds the number of its trial, from 0."""
RATE = "learning_rate"


def ask(
    tune: Tune,
    seed: str,
    names: Sequence[str],
    finished: Sequence[tuple[float, Mapping[str, Any], float]],
    *,
    maximise: bool,
) -> tuple[float, dict[str, Any]]:
    """The learning rate of the next trial, and its other values with its number.

    The study is built anew from the finished trials each time, and its sampler is seeded by the candidate and the
    number of the trial, so that an interrupted search goes on as if it had not been.

    Args:
        tune: gives the range of the learning rate, and what else may be searched.
        seed: names the candidate.
        names: what of `tune.search` the candidate has.
        finished: learning rate, other values and score of each finished trial, in order.

    Raises:
        SuiteError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise SuiteError("tune, trials: Optuna is not installed; pip install 'peftkit[bench]'") from None
    space: dict[str, Any] = {
        RATE: optuna.distributions.FloatDistribution(tune.learning_rates[0], tune.learning_rates[-1], log=True)
    }
    for name in names:
        choice = tune.search[name]
        if choice.low is not None and choice.high is not None:
            space[name] = optuna.distributions.FloatDistribution(choice.low, choice.high, log=choice.log)
        else:
            space[name] = optuna.distributions.CategoricalDistribution(choice.values)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(
            seed=int(digest([seed, len(finished)])[:8], 16), n_startup_trials=max(3, tune.trials // 3)
        )
        study = optuna.create_study(direction="maximize" if maximise else "minimize", sampler=sampler)
        for rate, values, score in finished:
            parameters = {RATE: rate, **{name: values[name] for name in names}}
            study.add_trial(optuna.trial.create_trial(params=parameters, distributions=space, value=score))
        asked = study.ask(space).params
    finally:
        optuna.logging.set_verbosity(before)
    values = {name: _short(value, space[name]) for name, value in asked.items()}
    return values.pop(RATE), {**values, NUMBER: len(finished)}


def _short(value: Any, distribution: Any) -> Any:
    """Four significant digits, within the range."""
    if not isinstance(value, float) or not hasattr(distribution, "low"):
        return value
    return min(max(float(f"{value:.4g}"), distribution.low), distribution.high)
