from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from peftkit_bench.power import Parts, needed, parts, power
from peftkit_bench.runs import difference_variances
from peftkit_bench.statistics import Estimate, paired_test
from scipy import stats

SEEN = Parts(runs=1e-4, groups=0.02, interaction=0.3, degrees=1)


def seen(mean: float, seeds: int, groups: int, these: Parts = SEEN, examples: int | None = None) -> Estimate:
    """An estimate whose parts are the given ones."""
    from_runs = (these.runs + these.interaction / groups) / seeds
    from_groups = (these.groups + these.interaction / seeds) / groups
    return Estimate(mean=mean, low=0, high=0, standard_error=these.error(seeds, groups), degrees=1, seeds=seeds,
                    examples=examples or groups, groups=groups, from_runs=from_runs if seeds > 1 else 0.0,
                    from_groups=from_groups, interaction=these.interaction if seeds > 1 else 0.0,
                    runs_degrees=these.degrees * (seeds - 1))  # fmt: skip


def drawn(rng: np.random.Generator, difference: float, seeds: int, groups: int) -> list[np.ndarray]:
    """Two tables whose difference has the variances of SEEN."""
    runs = math.sqrt(SEEN.runs) * rng.normal(size=(seeds, 1))
    added = math.sqrt(SEEN.groups) * rng.normal(size=groups) + math.sqrt(SEEN.interaction) * rng.normal(
        size=(seeds, groups)
    )
    return [difference + runs + added, np.zeros((seeds, groups))]


def test_parts_are_what_the_estimate_was_made_of() -> None:
    found = parts(seen(0.02, 4, 500))
    assert (found.runs, found.groups) == (pytest.approx(SEEN.runs), pytest.approx(SEEN.groups))
    assert (found.interaction, found.degrees) == (SEEN.interaction, 1)


def test_parts_of_drawn_tables_are_those_they_were_drawn_with() -> None:
    tables = drawn(np.random.default_rng(0), 0.0, 300, 400)
    found = parts(paired_test(tables[0], tables[1])[0])
    assert found.runs == pytest.approx(SEEN.runs, rel=0.4)
    assert found.groups == pytest.approx(SEEN.groups, rel=0.2)
    assert found.interaction == pytest.approx(SEEN.interaction, rel=0.02)


def test_power_of_one_seed_is_that_of_the_paired_t_test() -> None:
    # Cohen's d = 0.5 with 34 pairs: 80.8 % (Cohen 1988; G*Power gives 0.8078).
    these = Parts(runs=0, groups=1, interaction=0, degrees=0)
    assert power(0.5, these, 1, 34) == pytest.approx(0.8078, abs=5e-4)
    assert power(0.0, these, 1, 34) == pytest.approx(0.025)
    assert power(0.5, replace(these, groups=0), 1, 34) == 1


def test_needed_seeds_and_examples_are_the_fewest_that_reach_the_aim() -> None:
    found = needed(seen(0.05, 3, 800))
    assert found.seeds is not None
    seeds, groups = int(found.seeds), int(found.examples)
    assert seeds > 3
    assert groups > 800
    assert power(0.05, SEEN, seeds, 800) >= 0.8 > power(0.05, SEEN, seeds - 1, 800)
    assert power(0.05, SEEN, 3, groups) >= 0.8 > power(0.05, SEEN, 3, groups - 1)
    assert needed(seen(0.02, 3, 800), difference=0.05) == replace(found)
    # Three examples to a group: as many groups, three times the examples.
    assert needed(seen(0.05, 3, 800, examples=2400)).examples == 3 * groups


def test_what_is_needed_finds_the_difference_four_times_in_five() -> None:
    rng = np.random.default_rng(1)
    found = needed(seen(0.05, 3, 800))
    assert found.seeds is not None
    for seeds, groups in ((int(found.seeds), 800), (3, int(found.examples))):
        hits = 0
        for _ in range(300):
            tables = drawn(rng, 0.05, seeds, groups)
            hits += paired_test(tables[0], tables[1], runs=difference_variances(tables)[0, 1])[1] < 0.05
        # 240 expected, standard deviation 6.9.
        assert 219 <= hits <= 263


def test_what_the_other_part_alone_makes_impossible_is_infinite() -> None:
    few = needed(seen(0.01, 3, 50))
    assert few.seeds == math.inf
    assert few.examples == math.inf
    noisy = Parts(runs=0.005, groups=0.02, interaction=0.3, degrees=1)
    assert needed(seen(0.05, 3, 1000, noisy)).examples == math.inf
    assert math.isfinite(needed(seen(0.05, 3, 1000, noisy)).seeds or math.inf)
    assert needed(seen(0.0, 3, 1000)).seeds == needed(seen(0.0, 3, 1000)).examples == math.inf


def test_one_seed_says_nothing_of_seeds() -> None:
    found = needed(seen(0.1, 1, 40))
    assert found.seeds is None
    # Paired t: the variance of an example is that of groups and interaction.
    expected = next(
        n for n in range(2, 10_000)
        if stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, 0.1 / math.sqrt(0.32 / n)) >= 0.8
    )  # fmt: skip
    assert found.examples == expected
