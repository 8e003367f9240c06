from __future__ import annotations

import numpy as np
import pytest
from peftkit_bench.metrics import METRICS, Metric
from peftkit_bench.tables import influence, scores, table

OTHERS = [name for name, metric in METRICS.items() if len(metric.counts) > 1]


def drawn(metric: Metric, seeds: int = 3, examples: int = 60) -> np.ndarray:
    return np.random.default_rng(0).poisson(3.0, (seeds, examples, len(metric.counts))).astype(float) + 1


@pytest.mark.parametrize("name", [name for name in METRICS if name not in OTHERS])
def test_table_of_a_mean_is_its_counts(name: str) -> None:
    counts = np.random.default_rng(1).random((3, 50, 1))
    assert (table(METRICS[name], counts) == counts[..., 0]).all()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("way", [table, influence])
def test_table_averages_to_the_score_of_each_seed(name: str, way: object) -> None:
    metric = METRICS[name]
    counts = drawn(metric)
    assert callable(way)
    assert way(metric, counts).mean(axis=1) == pytest.approx([metric.score(each) for each in counts])


@pytest.mark.parametrize("name", OTHERS)
def test_table_matches_leaving_out_one_example_after_another(name: str) -> None:
    metric = METRICS[name]
    counts = drawn(metric, seeds=1, examples=12)
    without = np.array([metric.score(np.delete(counts[0], i, axis=0)) for i in range(12)])
    found = table(metric, counts)[0]
    assert found - found.mean() == pytest.approx(-11 * (without - without.mean()))
    # Quenouille's variance of the jackknife is that of the values over their number.
    assert found.var(ddof=1) / 12 == pytest.approx(11 / 12 * np.square(without - without.mean()).sum())


def test_influence_of_a_ratio_matches_its_derivative() -> None:
    metric = METRICS["perplexity"]
    counts = drawn(metric, seeds=1)
    nats, tokens = counts[0].T
    rate = nats.mean() / tokens.mean()
    by_hand = np.exp(rate) * (1 + (nats - rate * tokens) / tokens.mean())
    assert influence(metric, counts)[0] == pytest.approx(by_hand, rel=1e-4)
    # The jackknife divides by the tokens that are left where the derivative divides by their mean.
    assert table(metric, drawn(metric, 1, 4000)).std() == pytest.approx(
        influence(metric, drawn(metric, 1, 4000)).std(), rel=1e-2
    )


def test_a_single_count_that_is_not_averaged_is_no_mean() -> None:
    squared = Metric(name="squared", counts=("x",), formula=lambda c: c[..., 0] ** 2, source="made up")
    counts = np.random.default_rng(2).integers(0, 2, (1, 40, 1)).astype(float)
    found = table(squared, counts)
    assert found.mean() == pytest.approx(counts.mean() ** 2)
    assert found.std() == pytest.approx(2 * counts.mean() * counts.std(), rel=0.1)


def test_a_match_that_only_one_example_has_leaves_no_trace_without_it() -> None:
    metric = METRICS["BLEU"]
    # 49 times 1 / 49 is not 1 in floating point.
    counts = np.full((1, 49, 10), 10.0)
    counts[0, :, 3] = np.arange(49) == 2
    found = table(metric, counts)
    assert np.isfinite(found).all()
    assert found[0].argmax() == 2
    without = metric.score(np.delete(counts[0], 2, axis=0))
    assert without == 0
    others = [metric.score(np.delete(counts[0], i, axis=0)) for i in range(49) if i != 2]
    assert found[0, 2] - found[0, 0] == pytest.approx(48 * (others[0] - without))


def test_entities_that_are_nowhere_leave_a_table_of_zeros() -> None:
    assert (table(METRICS["entity F1"], np.zeros((2, 5, 3))) == 0).all()


def test_one_example_is_its_score() -> None:
    counts = drawn(METRICS["perplexity"], seeds=2, examples=1)
    assert table(METRICS["perplexity"], counts)[:, 0] == pytest.approx(scores(METRICS["perplexity"], counts))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((3, 5)), r"expected counts of accuracy, \(seeds, examples, 1\), found shape \(3, 5\)"),
        (np.ones((3, 5, 2)), r"found shape \(3, 5, 2\); the last axis is right"),
        (np.ones((3, 0, 1)), r"found shape \(3, 0, 1\)"),
        (np.full((1, 2, 1), np.nan), "a prediction of these runs was not a number"),
    ],
)
def test_counts_of_another_shape_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(METRICS["accuracy"], counts)
