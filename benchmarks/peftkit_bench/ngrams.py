"""What n-gram models predict: the baseline that a pretrained decoder has to beat. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nats(training: NDArray[np.int64], validation: NDArray[np.int64], longest: int) -> dict[int, float]:
    """Mean nats a token of n-gram models up to a length, each interpolated with the next shorter one.

        p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)), t(h): different tokens seen after h

    What a decoder has to beat to be worth the name. Witten & Bell 1991.
    """
    base = int(max(training.max(), validation.max())) + 1
    chance = np.full(len(validation), 1 / base)
    found = {}
    for length in range(1, longest + 1):
        grams, counts = np.unique(_grams(training, length, base), return_counts=True)
        contexts, first = np.unique(grams // base, return_index=True)
        totals = np.add.reduceat(counts, first).astype(float)
        types = np.diff([*first, len(grams)]).astype(float)
        asked = _grams(validation, length, base)
        seen = _looked_up(grams, counts.astype(float), asked)
        total = _looked_up(contexts, totals, asked // base)
        kinds = _looked_up(contexts, types, asked // base)
        shorter = chance[length - 1 :]
        chance[length - 1 :] = np.where(total > 0, (seen + kinds * shorter) / np.maximum(total + kinds, 1), shorter)
        found[length] = float(-np.log(chance).mean())
    return found


def _grams(tokens: NDArray[np.int64], length: int, base: int) -> NDArray[np.int64]:
    """Each run of tokens as one number."""
    key = np.zeros(len(tokens) - length + 1, dtype=np.int64)
    for offset in range(length):
        key = key * base + tokens[offset : offset + len(key)]
    return key


def _looked_up(keys: NDArray[np.int64], values: NDArray[np.float64], asked: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values of the keys, which are sorted; 0 for a key that is not there."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0.0)
