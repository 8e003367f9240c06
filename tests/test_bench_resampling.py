from __future__ import annotations

import itertools

import numpy as np
import pytest
from peftkit_bench.metrics import METRICS
from peftkit_bench.resampling import bootstrap, mcnemar, paired_bootstrap, permutation_test
from scipy import stats

ACCURACY, F1 = METRICS["accuracy"], METRICS["entity F1"]


def test_mcnemar_matches_a_case_worked_by_hand() -> None:
    # 5 + 1 examples on which the two differ: p = 2 (C(6, 0) + C(6, 1)) / 2⁶ = 14 / 64.
    first = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0])
    second = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0])
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only) == (5, 1)
    assert found.p == pytest.approx(14 / 64)
    assert mcnemar(second, first).p == pytest.approx(14 / 64)


def test_mcnemar_of_the_textbook_approval_ratings_is_far_below_chance() -> None:
    # Agresti, section 11.1: 150 and 86 of 1600 changed their minds; z² = 64² / 236 = 17.36, and the exact p is near.
    first = np.repeat([1, 1, 0, 0], [794, 150, 86, 570])
    second = np.repeat([1, 0, 1, 0], [794, 150, 86, 570])
    found = mcnemar(first, second)
    assert found.p == pytest.approx(stats.binomtest(150, 236).pvalue)
    assert found.p == pytest.approx(stats.chi2.sf((150 - 86) ** 2 / 236, 1), rel=0.5)


def test_mcnemar_of_runs_that_never_differ_finds_nothing() -> None:
    assert mcnemar([1, 0, 1], [1, 0, 1]).p == 1
    assert mcnemar([1, 0], [0, 1]).p == 1


def test_mcnemar_refuses_what_is_not_right_or_wrong() -> None:
    with pytest.raises(ValueError, match="expected 0 or 1 for each example, found other numbers"):
        mcnemar([0.5, 1], [0, 1])
    with pytest.raises(ValueError, match="two runs of the same examples, found shapes"):
        mcnemar([1, 1, 0], [0, 1])


def test_permutation_test_is_close_to_all_permutations() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.poisson(2.0, (2, 2, 10, 3)).astype(float)
    second[..., 1] += 1
    groups = [0, 0, 1, 2, 2, 3, 4, 5, 6, 7]
    observed = np.mean([F1.score(a) - F1.score(b) for a, b in zip(first, second, strict=True)])
    reached = 0
    for swapped in itertools.product((0, 1), repeat=8):
        chosen = np.array([swapped[g] for g in groups], dtype=bool)[:, None]
        ours, theirs = np.where(chosen, second, first), np.where(chosen, first, second)
        value = np.mean([F1.score(a) - F1.score(b) for a, b in zip(ours, theirs, strict=True)])
        reached += abs(value) >= abs(observed) - 1e-12
    found = permutation_test(F1, first, second, groups, rounds=20_000)
    assert found.difference == pytest.approx(observed)
    assert found.p == pytest.approx(reached / 2**8, abs=4 * np.sqrt(0.25 / 20_000))


def test_permutation_test_counts_the_data_themselves_and_repeats_itself() -> None:
    first, second = np.ones((1, 30, 1)), np.zeros((1, 30, 1))
    assert permutation_test(ACCURACY, first, second, rounds=99).p == 1 / 100
    assert permutation_test(ACCURACY, first, first, rounds=99).p == 1
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, (2, 3, 50, 1))
    assert permutation_test(ACCURACY, a, b, seed=4) == permutation_test(ACCURACY, a, b, seed=4)
    assert permutation_test(ACCURACY, a, b, seed=4).p == permutation_test(ACCURACY, b, a, seed=4).p


def test_permutation_test_swaps_whole_groups() -> None:
    # Four files in each of which one method has all ten right: swapped one by one that is beyond chance, as files not.
    first, second = np.ones((1, 40, 1)), np.zeros((1, 40, 1))
    assert permutation_test(ACCURACY, first, second).p < 0.001
    assert permutation_test(ACCURACY, first, second, np.repeat(range(4), 10).tolist()).p == pytest.approx(
        1 / 8, abs=0.02
    )


def test_permutation_test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expected the same examples, found 30 and 20"):
        permutation_test(ACCURACY, np.ones((1, 30, 1)), np.ones((1, 20, 1)))
    with pytest.raises(ValueError, match="expected the same seeds, found 1 and 2"):
        permutation_test(ACCURACY, np.ones((1, 30, 1)), np.ones((2, 30, 1)))
    with pytest.raises(ValueError, match="expected a group for each of 30 examples, found 3"):
        permutation_test(ACCURACY, np.ones((1, 30, 1)), np.ones((1, 30, 1)), [0, 1, 2])


@pytest.mark.parametrize("corrected", [False, True])
def test_bootstrap_of_one_seed_matches_that_of_scipy(corrected: bool) -> None:
    values = np.random.default_rng(2).gamma(1.0, size=(1, 80, 1))
    found = bootstrap(ACCURACY, values, rounds=9999, corrected=corrected)
    oracle = stats.bootstrap((values[0, :, 0],), np.mean, n_resamples=9999, method="BCa" if corrected else "percentile",
                             rng=np.random.default_rng(3)).confidence_interval  # fmt: skip
    assert found.score == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(oracle.low, abs=0.015), pytest.approx(oracle.high, abs=0.015))


def test_bootstrap_draws_seeds_and_whole_groups() -> None:
    # Seeds that all do the same, on twenty groups of five that do: the spread is that of twenty means.
    rng = np.random.default_rng(4)
    by_group = rng.normal(size=20)
    counts = np.broadcast_to(np.repeat(by_group, 5)[None, :, None], (3, 100, 1))
    groups = np.repeat(range(20), 5).tolist()
    found = bootstrap(ACCURACY, counts, groups, rounds=4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * by_group.std() / np.sqrt(20), rel=0.1)
    # Seeds that differ, examples that do not: the spread is that of three seeds.
    seeds = np.array([0.0, 1.0, 2.0])
    found = bootstrap(ACCURACY, np.broadcast_to(seeds[:, None, None], (3, 100, 1)), rounds=4000)
    assert (found.low, found.high) == (pytest.approx(0, abs=0.4), pytest.approx(2, abs=0.4))


def test_paired_bootstrap_gives_both_the_same_draws() -> None:
    rng = np.random.default_rng(5)
    counts = rng.random((3, 60, 1))
    found = paired_bootstrap(ACCURACY, counts + 0.25, counts)
    assert (found.score, found.low, found.high) == tuple(pytest.approx(0.25) for _ in range(3))
    with pytest.raises(ValueError, match="expected counts of the same seeds and examples"):
        paired_bootstrap(ACCURACY, counts, counts[:2])
