from __future__ import annotations

import math

import numpy as np
import pytest
from peftkit_bench.metrics import METRICS
from peftkit_bench.resampling import permutation_test
from peftkit_bench.runs import RunVariance, difference_variances
from peftkit_bench.statistics import (
    MCNEMAR,
    PERMUTATION,
    T_TEST,
    compare_all,
    estimate,
    holm,
    paired_test,
    pareto,
)
from peftkit_bench.tables import table as table_of
from scipy import stats


def test_estimate_matches_a_case_worked_by_hand() -> None:
    # Seed means 0.75 and 0.25: variance 0.125, over 2 seeds 1/16. Example means 1, 0.5, 0.5, 0: variance 1/6, over 4
    # examples 1/24. Without both, a quarter is left in each of the 8 cells, of either sign: squares 1/2, over 1 · 3
    # degrees 1/6, over 8 cells 1/48. V = 1/16 + 1/24 - 1/48 = 1/12; df = V² / ((1/16)² / 1 + (1/24)² / 3).
    table = np.array([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    found = estimate(table)
    degrees = (1 / 12) ** 2 / (1 / 16**2 + (1 / 24) ** 2 / 3)
    assert found.mean == 0.5
    assert found.interaction == pytest.approx(1 / 6)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 12))
    assert found.degrees == pytest.approx(degrees)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(1 / 12))
    assert (found.seeds, found.examples, found.groups) == (2, 4, 4)
    assert (found.from_runs, found.from_groups, found.runs_degrees) == (pytest.approx(1 / 16), pytest.approx(1 / 24), 1)


def test_estimate_is_never_narrower_than_runs_alone_or_examples_alone() -> None:
    # Every example is right in one of two runs: means of runs and of examples are all 0.5, so that what is left, of
    # which each part must hold its share, is all there is.
    table = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1]])
    runs = RunVariance(variance=0.02, degrees=8)
    assert estimate(table, runs=runs).standard_error == pytest.approx(math.sqrt(0.02 / 2))
    assert estimate(table, runs=runs).degrees >= 3


def test_degrees_of_freedom_are_not_below_the_smaller_part() -> None:
    rng = np.random.default_rng(12)
    for _ in range(200):
        found = estimate(rng.integers(0, 2, (3, 6)).astype(float))
        assert found.degrees >= 2 - 1e-9


def test_estimate_of_one_seed_is_the_t_interval_over_examples() -> None:
    values = np.array([1.0, 0, 1, 1, 0, 1, 1, 1])
    found = estimate(values[None, :])
    low, high = stats.t.interval(0.95, 7, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_estimate_of_equal_groups_is_that_of_their_means() -> None:
    table = np.array([[1.0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0]])
    by_group = table.reshape(3, 3, 2).mean(axis=2)
    grouped, means = estimate(table, [7, 7, 3, 3, 5, 5]), estimate(by_group)
    assert grouped.mean == pytest.approx(means.mean)
    assert grouped.standard_error == pytest.approx(means.standard_error)
    assert grouped.groups == 3


def test_estimate_without_any_variance_is_a_point() -> None:
    found = estimate(np.ones((3, 5)))
    assert (found.low, found.mean, found.high) == (1, 1, 1)


def test_paired_test_of_one_seed_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 2, (2, 1, 200)).astype(float)
    difference, p = paired_test(first, second)
    assert p == pytest.approx(stats.ttest_rel(first[0], second[0]).pvalue)
    assert difference.mean == pytest.approx((first - second).mean())


def test_paired_test_of_equal_predictions_finds_nothing() -> None:
    table = np.array([[1.0, 0, 1], [0, 0, 1]])
    difference, p = paired_test(table, table)
    assert (difference.mean, p) == (0, 1)


def test_paired_test_raises_when_tables_differ_in_shape() -> None:
    with pytest.raises(ValueError, match="same seeds and examples"):
        paired_test(np.ones((2, 3)), np.ones((3, 3)))


def test_holm_matches_a_case_worked_by_hand() -> None:
    # Ascending 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never falling: the last becomes 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_compare_all_corrects_over_all_pairs_and_puts_the_better_first() -> None:
    rng = np.random.default_rng(1)
    strong, weak = (rng.random((3, 400)) < 0.9).astype(float), (rng.random((3, 400)) < 0.2).astype(float)
    found = compare_all({"weak": weak, "strong": strong, "also": strong.copy()})
    assert [(c.first, c.second) for c in found] == [("also", "strong"), ("also", "weak"), ("strong", "weak")]
    assert [c.significant() for c in found] == [False, True, True]
    assert found[1].p_corrected == pytest.approx(3 * found[1].p)


def test_estimate_uses_the_variance_that_it_is_given() -> None:
    table = np.array([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    found = estimate(table, runs=RunVariance(variance=0.06, degrees=8))
    variance = 0.06 / 2 + 1 / 24 - 1 / 48
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert found.degrees == pytest.approx(variance**2 / (0.03**2 / 8 + (1 / 24) ** 2 / 3))


def test_intervals_of_differences_hold_together_and_agree_with_the_verdicts() -> None:
    rng = np.random.default_rng(6)
    tables = {str(i): (rng.random((3, 300)) < 0.5 + 0.06 * i).astype(float) for i in range(5)}
    found = compare_all(tables)
    runs = difference_variances([tables["4"], *(tables[str(i)] for i in (3, 2, 1)), tables["0"]])[0, 4]
    single, _ = paired_test(tables["4"], tables["0"], runs=runs)
    pair = next(c for c in found if (c.first, c.second) == ("4", "0"))
    ratio = stats.t.ppf(1 - 0.025 / 10, single.degrees) / stats.t.ppf(0.975, single.degrees)
    assert pair.difference.half_width == pytest.approx(ratio * single.half_width)
    assert {c.significant() for c in found} == {True, False}
    for each in found:
        if not each.significant():
            assert each.difference.low <= 0 <= each.difference.high


def test_one_seed_is_decided_by_mcnemar_where_all_is_right_or_wrong() -> None:
    rng = np.random.default_rng(8)
    tables = {"a": (rng.random((1, 200)) < 0.9).astype(float), "b": (rng.random((1, 200)) < 0.7).astype(float)}
    (found,) = compare_all(tables)
    only_a = int(((tables["a"] == 1) & (tables["b"] == 0)).sum())
    only_b = int(((tables["a"] == 0) & (tables["b"] == 1)).sum())
    assert (found.test, found.these_runs_only) == (MCNEMAR, True)
    assert found.p == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert compare_all(tables, list(range(200)))[0].test == MCNEMAR


def test_one_seed_is_decided_by_permutation_with_groups_or_other_metrics() -> None:
    rng = np.random.default_rng(9)
    right = {name: (rng.random((1, 200)) < share).astype(float) for name, share in (("a", 0.9), ("b", 0.7))}
    groups = [i // 4 for i in range(200)]
    assert [c.test for c in compare_all(right, groups)] == [PERMUTATION]
    metric = METRICS["perplexity"]
    counts = {name: np.stack([rng.gamma(4, 10 * s, (1, 200)), np.full((1, 200), 20.0)], -1) for name, s in
              (("low", 1.0), ("high", 1.4))}  # fmt: skip
    (found,) = compare_all({n: table_of(metric, c) for n, c in counts.items()}, metric=metric, counts=counts)
    assert found.test == PERMUTATION
    assert found.p == permutation_test(metric, counts["low"], counts["high"]).p < 0.01
    assert compare_all({n: rng.random((3, 50)) for n in "ab"})[0].test == T_TEST


def test_where_lower_is_better_the_lower_stands_first_and_wins() -> None:
    rng = np.random.default_rng(10)
    tables = {name: rng.normal(level, 0.1, (3, 100)) for name, level in (("high", 9.0), ("low", 8.0))}
    (found,) = compare_all(tables, metric=METRICS["perplexity"])
    assert (found.first, found.second, found.winner()) == ("low", "high", "low")
    assert found.difference.mean < 0
    (found,) = compare_all(tables)
    assert (found.first, found.winner()) == ("high", "high")
    assert compare_all({"a": tables["low"], "b": tables["low"]})[0].winner() is None


def simulate(rng: np.random.Generator, seeds: int, groups: np.ndarray, between: float) -> np.ndarray:
    """Tables whose true mean is 0.5, with effects of seeds, groups and examples, and their interaction."""
    shape = (seeds, len(groups))
    effects = between * rng.normal(size=(seeds, 1)) + 0.2 * rng.normal(size=groups.max() + 1)[groups]
    return 0.5 + effects + 0.2 * rng.normal(size=(1, len(groups))) + 0.3 * rng.normal(size=shape)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(100), 4)
    covered = 0
    for _ in range(400):
        found = estimate(simulate(rng, 3, groups, 0.015), groups)
        covered += found.low <= 0.5 <= found.high
    # 95 % of 400 is 380 with a standard deviation of 4.4; the interval may err on the wide side.
    assert covered >= 367


def test_equal_methods_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(100), 4)
    false = 0
    for _ in range(400):
        shared = 0.3 * rng.normal(size=(1, 400))
        pair = [shared + 0.015 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 400)) for _ in range(2)]
        false += paired_test(pair[0], pair[1], groups)[1] < 0.05
    assert false <= 33  # 5 % of 400 is 20 with a standard deviation of 4.4


def test_any_false_finding_among_equal_methods_is_rare() -> None:
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(100), 3)
    false = 0
    for _ in range(200):
        shared = 0.3 * rng.normal(size=(1, 300))
        noise = [0.015 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 300)) for _ in range(6)]
        tables = {str(i): shared + each for i, each in enumerate(noise)}
        false += any(c.significant() for c in compare_all(tables, groups))
    assert false <= 19  # 5 % of 200 is 10 with a standard deviation of 3.1


def test_pareto_front_holds_what_nothing_beats() -> None:
    found = {"head": (3.0, 0.4), "small": (10.0, 0.5), "waste": (20.0, 0.45), "tie": (30.0, 0.5), "full": (900.0, 0.6)}
    assert pareto(found) == ["head", "small", "full"]
