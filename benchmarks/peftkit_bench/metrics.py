"""Metrics: what is counted of each example, and the formula that makes a score of the mean counts. numpy only.

Every score is a smooth function of means over examples, so that one theory of intervals and tests serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
"""(..., k): the k numbers that are counted of an example, or their means."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score of predictions."""

    name: str
    """Such as "accuracy"; also its key in METRICS."""
    counts: tuple[str, ...]
    """What is counted of each example, in this order."""
    formula: Callable[[Counts], Any]
    """Mean counts (..., k) -> score (...)."""
    percent: bool = True
    """Whether the score is a share, shown times 100 with "%" and in points."""
    higher_is_better: bool = True
    source: str
    """What it is, and where it is defined."""

    def score(self, counts: Any) -> float:
        """The score of examples.

        Args:
            counts: (examples, k).
        """
        return float(self.formula(np.asarray(counts, dtype=np.float64).reshape(-1, len(self.counts)).mean(axis=0)))

    def shown(self, value: float) -> str:
        """The score as a person reads it: 93.1 for a share, 4.231 else."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


def _mean(counts: Counts) -> Any:
    return counts[..., 0]


def _ratio(above: Any, below: Any) -> Any:
    """0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=np.asarray(below) != 0)


def _share(counts: Counts) -> Any:
    return _ratio(counts[..., 0], counts[..., 1])


def _f1(counts: Counts) -> Any:
    right, wrong, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    return _ratio(2 * right, 2 * right + wrong + missed)


def _perplexity(counts: Counts) -> Any:
    return np.exp(_ratio(counts[..., 0], counts[..., 1]))


def _bleu(counts: Counts) -> Any:
    matched, total = counts[..., :4], counts[..., 4:8]
    shares = _ratio(matched, total)
    with np.errstate(divide="ignore"):
        precision = np.exp(np.log(shares).mean(axis=-1))
        brevity = np.exp(np.minimum(0.0, 1 - np.divide(counts[..., 9], np.maximum(counts[..., 8], 1e-12))))
    return precision * brevity


_BLEU_COUNTS = (*(f"matched_{n}" for n in range(1, 5)), *(f"ngrams_{n}" for n in range(1, 5)), "length",
                "reference_length")  # fmt: skip

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", counts=("right",), formula=_mean, source="share of examples whose class is right"),
        Metric(
            name="entity F1",
            counts=("right", "wrong", "missed"),
            formula=_f1,
            source="micro-averaged F1 of whole entities: span and type right (Tjong Kim Sang & De Meulder 2003)",
        ),
        Metric(
            name="token accuracy",
            counts=("right", "tokens"),
            formula=_share,
            source="share of tokens whose tag is right, over all examples together",
        ),
        Metric(
            name="exact match",
            counts=("right",),
            formula=_mean,
            source="share of answers that are a reference once both are normalised (Rajpurkar et al. 2016)",
        ),
        Metric(
            name="answer F1",
            counts=("f1",),
            formula=_mean,
            source="mean over questions of the best F1 of words with a reference (Rajpurkar et al. 2016)",
        ),
        Metric(
            name="perplexity",
            counts=("nats", "tokens"),
            formula=_perplexity,
            percent=False,
            higher_is_better=False,
            source="exp of the mean negative log-likelihood of a token",
        ),
        Metric(
            name="pass rate",
            counts=("passed",),
            formula=_mean,
            source="share of problems whose first generated program passes all its asserts (pass@1, Chen et al. 2021)",
        ),
        Metric(
            name="BLEU",
            counts=_BLEU_COUNTS,
            formula=_bleu,
            source="corpus BLEU, 13a tokens, no smoothing (Papineni et al. 2002; counts by sacrebleu, Post 2018)",
        ),
        Metric(
            name="ROUGE-L",
            counts=("f",),
            formula=_mean,
            source="mean F of the longest common subsequence, stemmed words (Lin 2004; by rouge-score)",
        ),
    )
}
"""Metrics by name. Another one is one more entry here, and a task that gives its counts."""
