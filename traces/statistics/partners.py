"""Who goes with whom beyond chance: partners of experts, and of token ids.

Each expert of a layer has one *partner* in the next, and each token id one among the first
choices of layer 0: the expert that it meets most often beyond chance in one half of the trace.
How often the partner is really taken is read off the other half, so that luck in finding
partners does not count. Chance knows the popularity of experts in each domain.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.model import ModelSpec
from traces.statistics.pieces import Piece
from traces.statistics.popularity import Popularity
from traces.statistics.prediction import NextLayer

Floats = npt.NDArray[np.float64]

#: Token ids above this are not looked at one by one.
MOST_IDS = 2**18


def excess(together: Floats, expected: Floats, total: Floats) -> float | None:
    """How often partners meet beyond chance, from 0 (by chance) to 1 (always).

    *together* and *expected* are [2 halves, ..., from, to]: counts of meetings, and those to
    be expected if both sides were independent; *total* [2]: meetings there could have been.
    None when a half is empty.
    """
    if not total.all():
        return None
    found = chance = 0.0
    lift = together - expected
    for half in (0, 1):
        partner = lift[1 - half].argmax(axis=-1)[..., None]
        found += float(np.take_along_axis(together[half], partner, axis=-1).sum())
        chance += float(np.take_along_axis(expected[half], partner, axis=-1).sum())
    possible = float(total.sum()) - chance
    return (found - chance) / possible if possible > 1e-9 else None


def correlation(tables: NextLayer, popularity: Popularity) -> float | None:
    """The share of experts whose partner in the next layer is taken, beyond chance."""
    model = tables.model
    if model.layers < 2:
        return None
    counts, tokens = popularity.counts, np.maximum(popularity.tokens, 1)
    expected = np.zeros_like(tables.together)
    for half in (0, 1):
        for domain in range(counts.shape[1]):
            one = counts[half, domain]
            expected[half] += one[:-1, :, None] * one[1:, None, :] / tokens[half, domain]
    total = popularity.tokens.sum(axis=1) * model.top_k * (model.layers - 1)
    return excess(tables.together, expected, total)


class TokenPartners:
    """Counts how often each token id meets each first expert of layer 0."""

    def __init__(self, model: ModelSpec, domains: int) -> None:
        self._first = np.zeros((2, domains, model.experts))
        self._together = np.zeros((2, 0, model.experts))
        self._ids = np.zeros((2, domains, 0))

    def add(self, piece: Piece) -> None:
        """Count the token ids of *piece*."""
        if piece.tokens is None:
            return
        known = (piece.tokens >= 0) & (piece.tokens < MOST_IDS)
        if not known.any():
            return
        tokens: npt.NDArray[np.intp] = piece.tokens[known].astype(np.intp)
        first: npt.NDArray[np.intp] = piece.experts[known, 0, 0].astype(np.intp)
        self._grow(int(tokens.max()) + 1)
        half, domain = piece.half, piece.domain
        np.add.at(self._together[half], (tokens, first), 1)
        np.add.at(self._ids[half, domain], tokens, 1)
        np.add.at(self._first[half, domain], first, 1)

    def _grow(self, size: int) -> None:
        extra = size - self._together.shape[1]
        if extra > 0:
            # Twice as much as asked for, so that a growing vocabulary is not copied each time.
            extra += size
            self._together = np.pad(self._together, ((0, 0), (0, extra), (0, 0)))
            self._ids = np.pad(self._ids, ((0, 0), (0, 0), (0, extra)))

    def information(self) -> float | None:
        """The share of tokens whose first expert is the partner of their id, beyond chance."""
        tokens = np.maximum(self._first.sum(axis=2, keepdims=True), 1)
        expected = np.einsum("hdv,hde->hve", self._ids, self._first / tokens)
        return excess(self._together, expected, self._ids.sum(axis=(1, 2)))
