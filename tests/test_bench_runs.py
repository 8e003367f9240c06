from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from peftkit_bench import runs
from peftkit_bench.runs import RunVariance, difference_variances, moderated, run_variances
from scipy import stats
from scipy.special import digamma, polygamma


def normal_tables(rng: np.random.Generator, deviations: list[float], seeds: int) -> list[np.ndarray]:
    """Tables of one example: a seed's score is a draw of the method's deviation."""
    return [deviation * rng.normal(size=(seeds, 1)) for deviation in deviations]


def test_alike_variances_are_pooled() -> None:
    # Means 0.25 and 0.75 (squares 2 * 0.0625), 1 and 0 (2 * 0.25): their logs differ by less than chance would have it.
    tables = [np.array([[0, 0, 0, 1], [1, 1, 1, 0.0]]), np.array([[1.0, 1], [0, 0]]), np.ones((1, 4))]
    assert run_variances(tables) == [RunVariance(variance=0.3125, degrees=2)] * 3
    assert run_variances([np.ones((1, 4))]) == [None]


def test_moderated_variance_is_that_of_the_paper() -> None:
    own = [RunVariance(variance=v, degrees=4) for v in (0.1, 0.2, 0.15, 8.0, 0.3, 0.05)]
    pooled = RunVariance(variance=sum(each.variance for each in own) / 6, degrees=24)
    found = moderated(own, pooled)
    # Smyth's equations: E log s^2 and var log s^2 give d0, s0^2.
    prior = {(f.degrees - 4) for f in found}
    assert len(prior) == 1
    (degrees,) = prior
    logs = np.log([each.variance for each in own])
    assert polygamma(1, degrees / 2) == pytest.approx(logs.var(ddof=1) - polygamma(1, 2.0))
    variance = math.exp(logs.mean() - digamma(2) + math.log(2) + digamma(degrees / 2) - math.log(degrees / 2))
    for each, made in zip(own, found, strict=True):
        assert made.variance == pytest.approx((degrees * variance + 4 * each.variance) / (degrees + 4))


def test_true_spread_of_variances_is_found() -> None:
    rng = np.random.default_rng(0)
    # True variances are s0^2 d0 / chi^2(d0) with s0^2 = 2, d0 = 6.
    true = 2 * 6 / rng.chisquare(6, 4000)
    own = [RunVariance(variance=v * c / 4, degrees=4) for v, c in zip(true, rng.chisquare(4, 4000), strict=True)]
    found = moderated(own, RunVariance(variance=float(np.mean([e.variance for e in own])), degrees=16000))
    assert found[0].degrees == pytest.approx(6 + 4, rel=0.15)
    error = [math.log(f.variance / v) for f, v in zip(found, true, strict=True)]
    alone = [math.log(o.variance / v) for o, v in zip(own, true, strict=True)]
    assert np.std(error) < 0.75 * np.std(alone)


def test_degrees_are_never_more_than_pooled_ones() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        for each in run_variances(normal_tables(rng, [1.0] * 5 + [1.6], 3)):
            assert each is not None
            assert 2 <= each.degrees <= 12


def test_an_erratic_method_keeps_its_variance_and_leaves_the_others_theirs() -> None:
    rng = np.random.default_rng(2)
    made = np.array(
        [[r.variance for r in run_variances(normal_tables(rng, [1.0] * 9 + [10.0], 5)) if r] for _ in range(200)]
    )
    assert np.median(made[:, :9]) == pytest.approx(1.0, rel=0.25)
    assert np.median(made[:, 9]) > 40


@pytest.mark.parametrize("times", [100.0, 10_000.0])
def test_one_broken_method_does_not_make_the_others_uncertain(times: float) -> None:
    rng = np.random.default_rng(3)
    drawn = [run_variances(normal_tables(rng, [1.0] * 9 + [times], 3)) for _ in range(100)]
    steady = [each.variance for found in drawn for each in found[:9] if each]
    assert np.median(steady) == pytest.approx(1.0, rel=0.5)
    collapsed = [np.array([[0.90], [0.90], [0.17]]), *normal_tables(rng, [0.005] * 9, 3)]
    for each in run_variances(collapsed)[1:]:
        assert each is not None
        assert each.variance < 4 * 0.005**2


def test_a_score_that_is_not_finite_leaves_the_others_theirs() -> None:
    rng = np.random.default_rng(4)
    tables = normal_tables(rng, [1.0] * 5, 3)
    broken = np.array([[1.0], [math.inf], [1.0]])
    with np.errstate(invalid="ignore"):
        found, pairs = run_variances([*tables, broken]), difference_variances([*tables, broken])
    assert found[:5] == run_variances(tables)
    assert found[5] is not None
    assert math.isnan(found[5].variance)
    alone = difference_variances(tables)
    assert {pair: pairs[pair] for pair in alone} == alone
    assert all(each is not None and math.isnan(each.variance) for pair, each in pairs.items() if 5 in pair)


def test_runs_that_agree_exactly_do_not_make_a_method_certain() -> None:
    tables = [
        np.full((3, 100), 0.5),
        *(np.arange(3)[:, None] * step + np.zeros((3, 100)) for step in (0.01, 0.012, 0.02)),
    ]
    first = run_variances(tables)[0]
    assert first is not None
    assert first.variance > 1e-6
    assert {each.variance for each in run_variances([np.full((3, 10), 0.5)] * 3) if each} == {0.0}


def test_the_difference_of_two_methods_alone_is_theirs() -> None:
    first, second = np.random.default_rng(4).integers(0, 2, (2, 3, 50)).astype(float)
    found = difference_variances([first, second])
    assert list(found) == [(0, 1)]
    made = found[0, 1]
    assert made is not None
    assert made.variance == pytest.approx((first - second).mean(axis=1).var(ddof=1))
    assert made.degrees == 2
    assert difference_variances([first[:1], second[:1]]) == {(0, 1): None}


def test_what_a_seed_does_to_all_is_left_out_of_differences() -> None:
    rng = np.random.default_rng(5)
    tables = [rng.random((4, 30)) for _ in range(5)]
    shifted = [table + np.array([[0.0], [10], [20], [-30]]) for table in tables]
    before, after = difference_variances(tables), difference_variances(shifted)
    assert list(before) == list(itertools.combinations(range(5), 2))
    for pair, each in before.items():
        other = after[pair]
        assert each is not None
        assert other is not None
        assert other.variance == pytest.approx(each.variance)
        assert other.degrees == pytest.approx(each.degrees)
        assert each.degrees <= 12


@pytest.mark.parametrize(("methods", "seeds", "erratic"), [(8, 3, 1.0), (10, 5, 1.0), (10, 5, 8.0)])
def test_intervals_of_differences_hold_nothing_as_often_as_they_say(methods: int, seeds: int, erratic: float) -> None:
    rng = np.random.default_rng(6)
    held: dict[bool, list[bool]] = {False: [], True: []}
    for _ in range(150):
        tables = normal_tables(rng, [1.0] * (methods - 1) + [erratic], seeds)
        for (i, j), each in difference_variances(tables).items():
            assert each is not None
            reach = stats.t.ppf(0.975, each.degrees) * math.sqrt(each.variance / seeds)
            held[j == methods - 1].append(abs(float(tables[i].mean() - tables[j].mean())) <= reach)
    assert 0.93 <= np.mean(held[False]) <= 0.985
    # Pooled, the erratic one's would hold it in 57 %.
    assert np.mean(held[True]) >= (0.93 if erratic == 1 else 0.87)


@pytest.mark.parametrize("seeds", [3, 5])
def test_variances_of_differences_are_taken_for_as_alike_as_sharing_methods_makes_them(
    monkeypatch: pytest.MonkeyPatch, seeds: int
) -> None:
    seen: list[tuple[list[float], float]] = []

    def caught(own: list[RunVariance], pooled: RunVariance, correlation: float = 0.0) -> list[RunVariance]:
        seen.append(([math.log(each.variance) for each in own], correlation))
        return own

    monkeypatch.setattr(runs, "moderated", caught)
    rng = np.random.default_rng(7)
    for _ in range(6000):
        difference_variances(normal_tables(rng, [1.0] * 6, seeds))
    drawn = np.corrcoef(np.array([logs for logs, _ in seen]).T)
    pairs = len(drawn)
    mean = (drawn.sum() - pairs) / (pairs * (pairs - 1))
    assert seen[0][1] == pytest.approx(mean, abs=0.01)
    assert mean > 0.08


def test_correlation_counts_as_alikeness() -> None:
    own = [RunVariance(variance=v, degrees=4) for v in (0.5, 0.8, 1.3, 2.2)]
    pooled = RunVariance(variance=1.2, degrees=16)
    spread = float(np.log([each.variance for each in own]).var(ddof=1) / polygamma(1, 2.0))
    assert spread < 1
    assert moderated(own, pooled) == moderated(own, pooled, 1 - spread - 0.01) == [pooled] * 4
    assert moderated(own, pooled, 1 - spread + 0.01)[0].variance < moderated(own, pooled, 1 - spread + 0.01)[3].variance
