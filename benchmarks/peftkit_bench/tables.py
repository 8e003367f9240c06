"""Tables: what each example adds to a score, for any metric, so that one theory of intervals serves all. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftkit_bench.metrics import Counts, Metric

Table = NDArray[np.float64]
"""(seeds, examples) of numbers whose mean over examples is the score of a seed."""
SMALL = 1e-4
"""Weight that an example is given on top of its share, relative to that share."""


def table(metric: Metric, counts: Any) -> Table:
    """Jackknife values: what an example adds to the score of its seed, shifted so that their mean is that score.

        x_i = f(m) + d_i - mean of d,    d_i = (n - 1) (f(m) - f(m without i))

    with m the mean counts of the n examples of one seed. Where the score is the mean of one count, its values are the
    counts themselves. The variance of the x_i over n is the jackknife's estimate of the variance of f(m).

    Args:
        metric: gives f.
        counts: (seeds, examples, k).

    Raises:
        ValueError: the counts have another shape.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 11.3; `simulation` compares it with
    the infinitesimal jackknife (`influence`).
    """
    counts = shaped(metric, counts)
    examples = counts.shape[1]
    mean = counts.mean(axis=1)
    if len(metric.counts) == 1 and _is_mean(metric, counts, mean):
        return np.array(counts[..., 0])
    if examples == 1:
        return scores(metric, counts)[:, None]
    without = (mean[:, None, :] * examples - counts) / (examples - 1)
    # A count that only one example has leaves rounding errors behind, of either sign.
    without[np.abs(without) < 1e-12 * np.abs(mean)[:, None, :]] = 0
    score = np.asarray(metric.formula(mean))[:, None]
    return _shifted(score, (examples - 1) * (score - np.asarray(metric.formula(without))))


def influence(metric: Metric, counts: Any) -> Table:
    """The same by the infinitesimal jackknife: the slope of the score as an example is given more weight.

        d_i = (f(m + e (c_i - m)) - f(m)) / e,    e = SMALL / n

    Both points are means of counts, so that f is never asked of what no examples could give.

    Args:
        metric: gives f.
        counts: (seeds, examples, k).
    """
    counts = shaped(metric, counts)
    mean = counts.mean(axis=1)[:, None, :]
    step = SMALL / counts.shape[1]
    score = np.asarray(metric.formula(mean))
    return _shifted(score, (np.asarray(metric.formula(mean + step * (counts - mean))) - score) / step)


def scores(metric: Metric, counts: Any) -> NDArray[np.float64]:
    """The score of each seed, (seeds,).

    Args:
        metric: gives the formula.
        counts: (seeds, examples, k).
    """
    return np.asarray(metric.formula(shaped(metric, counts).mean(axis=1)), dtype=np.float64)


def shaped(metric: Metric, counts: Any) -> Counts:
    """Counts as an array (seeds, examples, k).

    Raises:
        ValueError: they have another shape, or a number that is not finite.
    """
    found = np.asarray(counts, dtype=np.float64)
    width = len(metric.counts)
    if found.ndim != 3 or found.shape[2] != width or 0 in found.shape:
        raise ValueError(
            f"expected counts of {metric.name}, (seeds, examples, {width}), found shape {found.shape}; "
            f"the last axis is {', '.join(metric.counts)}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"counts of {metric.name} that are not finite: a prediction of these runs was not a number")
    return found


def _is_mean(metric: Metric, counts: Counts, mean: Counts) -> bool:
    return all(np.array_equal(np.asarray(metric.formula(each)), each[..., 0]) for each in (counts, mean, counts / 3))


def _shifted(score: Table, added: Table) -> Table:
    """Deviations about the score, a row a seed, whose mean is the score."""
    found: Table = score + added - added.mean(axis=1, keepdims=True)
    return found
