"""How much training varies from seed to seed: each method's own variance, drawn towards what the methods share.

A few seeds say little about one method's spread, and methods do not spread alike: prefix tuning's scores may scatter
ten times as far as LoRA's. One variance for all would make the steady ones look uncertain and the erratic ones certain.
So each variance is moderated as in Smyth (2004, "Linear models and empirical Bayes methods for assessing differential
expression in microarray experiments", Statistical Applications in Genetics and Molecular Biology 3(1)):

    v = (d₀ s₀² + d s²) / (d₀ + d)     with d₀ + d degrees of freedom

where s² with d degrees is the method's own, and s₀², d₀ describe how the true variances are spread: they are fitted to
the mean and the variance of log s² over the methods. Where these differ no more than chance would have it, d₀ is
infinite and the variance is the pooled one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, gammaln, polygamma

from peftkit_bench.tables import Table

LEAST = 0.01
"""A variance below this share of their median counts as this: scores are counts of examples, and may agree."""
SHARED = 0.25
"""The square of the correlation, 1/2, of two differences that share a method."""
NEGLIGIBLE = 1e-8
"""A variance of logarithms below this is none."""


@dataclass(frozen=True, kw_only=True)
class RunVariance:
    """How much the score of one training run, or the difference of two, varies with its seed."""

    variance: float
    degrees: float
    """Degrees of freedom of the estimate."""


def run_variances(tables: Sequence[Table]) -> list[RunVariance | None]:
    """The variance of a seed's mean about its method's, for each method; None where none has several seeds.

    A method with one seed has what the others share.
    """
    own = [_own(table) for table in tables]
    known = [each for each in own if math.isfinite(each.variance)]
    degrees = sum(each.degrees for each in known)
    if not degrees:
        return [None] * len(own)
    pooled = RunVariance(variance=sum(each.degrees * each.variance for each in known) / degrees, degrees=degrees)
    return list(moderated(own, pooled))


def _own(table: Table) -> RunVariance:
    """The variance of a seed's mean from one method's own seeds; 0 without degrees of freedom with one seed."""
    degrees = table.shape[0] - 1
    squares = float(np.square(table.mean(axis=1) - table.mean()).sum())
    return RunVariance(variance=squares / max(degrees, 1), degrees=degrees)


def difference_variances(tables: Sequence[Table]) -> Mapping[tuple[int, int], RunVariance | None]:
    """The variance of the difference of two methods' means on one seed, by their places; None with one seed.

    What a seed does to both alike cancels. The pooled one is twice the residual mean square of methods × seeds, methods
    with a score that is not finite left out.
    """
    means = np.stack([table.mean(axis=1) for table in tables])
    pairs = list(itertools.combinations(range(len(means)), 2))
    known = means[np.isfinite(means).all(axis=1)]
    methods, seeds = known.shape
    degrees = (methods - 1) * (seeds - 1)
    if degrees <= 0:
        return dict.fromkeys(pairs)
    residuals = known - known.mean(axis=1, keepdims=True) - known.mean(axis=0, keepdims=True) + known.mean()
    pooled = RunVariance(variance=2 * float(np.square(residuals).sum()) / degrees, degrees=degrees)
    own = [RunVariance(variance=float((means[i] - means[j]).var(ddof=1)), degrees=seeds - 1) for i, j in pairs]
    sharing = 4 / (methods + 1) if methods > 2 else 0.0  # share of the pairs of differences that share a method
    return dict(zip(pairs, moderated(own, pooled, sharing * _alike((seeds - 1) / 2)), strict=True))


def moderated(own: Sequence[RunVariance], pooled: RunVariance, correlation: float = 0.0) -> list[RunVariance]:
    """Each variance drawn towards what all share.

    Args:
        own: each by itself; without degrees of freedom it says nothing, and one that is not finite stays so.
        pooled: what all are where they do not differ.
        correlation: mean correlation between the logarithms of two of them.
    """
    shared = _prior([each for each in own if each.degrees and math.isfinite(each.variance)], correlation)
    found = []
    for each in own:
        if not math.isfinite(each.variance):
            found.append(each)
            continue
        if shared is None:
            found.append(pooled)
            continue
        degrees = shared.degrees + each.degrees
        variance = (shared.degrees * shared.variance + each.degrees * each.variance) / degrees
        found.append(RunVariance(variance=variance, degrees=min(degrees, pooled.degrees)))
    return found


def _alike(half: float) -> float:
    """Correlation of the logarithms of two sample variances with 2 · half degrees each, of draws whose square
    correlates by SHARED: Σ SHAREDᵏ Γ(k) Γ(half) / (k Γ(half + k)) / ψ'(half)."""
    k = np.arange(1, 30)
    terms = np.exp(k * math.log(SHARED) + gammaln(k) + gammaln(half) - gammaln(half + k)) / k
    return float(terms.sum() / polygamma(1, half))


def _prior(own: Sequence[RunVariance], correlation: float) -> RunVariance | None:
    """s₀² and d₀; None: the variances differ no more than by chance."""
    positive = [each.variance for each in own if each.variance > 0]
    if len(own) < 2 or not positive:
        return None
    least = LEAST * float(np.median(positive))
    halves = np.array([each.degrees for each in own]) / 2
    logs = np.log([max(each.variance, least) for each in own]) - digamma(halves) + np.log(halves)
    excess = float(logs.var(ddof=1) - (1 - correlation) * polygamma(1, halves).mean())
    if excess <= NEGLIGIBLE:
        return None
    half = math.exp(brentq(lambda log: polygamma(1, math.exp(log)) - excess, -20, 20))
    return RunVariance(variance=float(np.exp(logs.mean() + digamma(half) - math.log(half))), degrees=2 * half)
