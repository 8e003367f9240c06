from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from peftkit_bench.ranking import Tally, critical_difference, friedman, wilcoxon, win_tie_loss
from peftkit_bench.statistics import Comparison, estimate
from scipy import stats

# Demšar 2006, table 6: AUC of C4.5 with and without two tuned parameters on 14 data sets. Two of the voting data's
# scores are printed equal and ranked 2 and 3: the fourth digit here restores the paper's ranks.
AUC = {
    "C4.5": [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.0, 0.940, 0.619, 0.972, 0.957],
    "C4.5+m": [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.0, 0.962, 0.666, 0.981, 0.978],
    "C4.5+cf": [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.0, 0.965, 0.614, 0.9751, 0.946],
    "C4.5+m+cf": [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.0, 0.962, 0.669, 0.975, 0.970],
}


def test_friedman_gives_the_numbers_of_the_papers_example() -> None:
    found = friedman(AUC)
    assert found.methods == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    assert [round(rank, 3) for rank in found.ranks] == [1.964, 2.0, 2.893, 3.143]
    assert found.chi_squared == pytest.approx(9.28, abs=0.01)
    assert found.f == pytest.approx(3.69, abs=0.01)
    assert found.p == pytest.approx(stats.f.sf(3.69, 3, 39), abs=2e-4)
    assert round(found.critical_difference, 2) == 1.25
    assert round(friedman(AUC, level=0.1).critical_difference, 2) == 1.12
    # At 10 % the paper finds C4.5 apart from the two best, at 5 % nothing.
    assert friedman(AUC, level=0.1).cliques == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))
    assert found.cliques == (found.methods,)


@pytest.mark.parametrize(
    ("level", "published"),
    [
        (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
        (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
    ],
)
def test_critical_values_are_those_of_the_papers_table_5(level: float, published: list[float]) -> None:
    for methods, q in enumerate(published, start=2):
        found = critical_difference(methods, 10, level) / math.sqrt(methods * (methods + 1) / 60)
        assert found == pytest.approx(q, abs=0.0011)


def test_friedman_without_ties_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(size=(5, 12))
    found = friedman({str(i): row for i, row in enumerate(values)})
    assert found.chi_squared == pytest.approx(stats.friedmanchisquare(*values).statistic)


def test_friedman_ranks_the_lower_first_where_that_is_better() -> None:
    scores = {"a": [1.0, 0.9, 30.0], "b": [2.0, 0.8, 40.0]}
    assert friedman(scores, higher_is_better=[False, True, False]).ranks == (1.0, 2.0)
    assert friedman(scores, higher_is_better=[False, True, False]).methods == ("a", "b")
    assert friedman(scores, higher_is_better=True).methods == ("b", "a")


def test_blocks_that_all_agree_have_the_chance_of_that_as_their_p() -> None:
    found = friedman({"a": [3.0, 3, 3], "b": [2.0, 2, 2], "c": [1.0, 1, 1]})
    assert (found.f, found.p) == (math.inf, pytest.approx(1 / 36))
    assert friedman({"a": [1.0, 1], "b": [1.0, 1]}).p == 1


@pytest.mark.parametrize(
    "scores", [{"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}, {"a": [1.0, math.nan], "b": [1.0, 2.0]}]
)
def test_friedman_refuses_what_cannot_be_ranked(scores: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="at least two methods on at least two blocks"):
        friedman(scores)


def test_friedman_refuses_methods_that_miss_a_block() -> None:
    with pytest.raises(ValueError, match="a score of every method on every block, found a 2, b 1 of them"):
        friedman({"a": [1.0, 2.0], "b": [1.0]})


def test_wilcoxon_is_the_exact_test_of_scipy_without_ties() -> None:
    rng = np.random.default_rng(1)
    for size in (3, 6, 11):
        first, second = rng.normal(size=(2, size))
        assert wilcoxon(first, second) == pytest.approx(stats.wilcoxon(first, second, method="exact").pvalue)


@pytest.mark.parametrize("seed", range(6))
def test_wilcoxon_counts_every_sign_with_ties_and_zeros(seed: int) -> None:
    differences = np.random.default_rng(seed).integers(-2, 6, 8) / 10
    ranks = stats.rankdata(abs(differences))[differences != 0]
    middle = ranks.sum() / 2
    observed = abs(ranks[differences[differences != 0] > 0].sum() - middle)
    sums = [abs(np.dot(signs, ranks) - middle) for signs in itertools.product((0, 1), repeat=len(ranks))]
    # 0.3 - 0.2 is a little less than 0.1 in floating point: the two share a rank, and three of sixteen are as far out.
    assert wilcoxon([0.2, 0.1, 0.5, 0.6], [0.3, 0.0, 0.0, 0.0]) == pytest.approx(6 / 16)
    assert wilcoxon(differences, np.zeros(8)) == pytest.approx(np.mean(np.array(sums) >= observed - 1e-9))


def test_wilcoxon_of_the_papers_example_rejects_as_the_paper_does() -> None:
    assert wilcoxon(AUC["C4.5"], AUC["C4.5+m"]) < 0.05
    assert wilcoxon([1.0, 2.0], [1.0, 2.0]) == 1
    with pytest.raises(ValueError, match="expected scores of the same tasks, found 0 and 0"):
        wilcoxon([], [])


def test_win_tie_loss_counts_who_is_better_whichever_stands_first() -> None:
    level = estimate(np.array([[0.1, 0.3], [0.2, 0.4]]))
    base = Comparison(first="a", second="b", difference=level, p=0.01, p_corrected=0.01)
    tasks = {
        "one": [base],
        "two": [replace(base, first="b", second="a")],
        "three": [replace(base, p_corrected=0.2)],
        "perplexity": [replace(base, higher_is_better=False)],
        "four": [base, replace(base, first="c")],
    }
    found = win_tie_loss(tasks)
    assert found["a", "b"] == Tally(wins=2, ties=1, losses=2)
    assert found["b", "a"] == Tally(wins=2, ties=1, losses=2)
    assert found["c", "b"] == Tally(wins=1, ties=0, losses=0)
    assert found["a", "b"].tasks == 5
    assert ("a", "c") not in found
