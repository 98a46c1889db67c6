"""A gate as scores plus Gaussian noise: how often each expert wins, and how alike two draws are.

A token takes the k experts with the highest *score + noise*, the noise being standard normal
for every expert. Two numbers follow from the scores: each expert's share, and how much of
the choice is kept when the noise of a second draw correlates with that of the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]

#: No expert is wanted by more tokens than this; its score would have to grow without end.
LARGEST_SHARE = 0.95

#: Beyond this exponent Zipf shares hardly change.
LARGEST_EXPONENT = 20.0

#: Random numbers behind an estimate of overlap.
DRAWS = 2**21

_ERF = np.vectorize(math.erf, otypes=[float])
_NORMAL = NormalDist()


def zipf_shares(experts: int, top_k: int, exponent: float) -> Floats:
    """The share of tokens that take the expert of each rank; they sum to *top_k*.

    Shares are proportional to rank^-*exponent*; where that would ask more than 95 % of the
    tokens for one expert, it gets 95 % and the others the rest.
    """
    cap = max(LARGEST_SHARE, top_k / experts)
    law = np.arange(1, experts + 1, dtype=float) ** -exponent
    low, high = 0.0, cap / law[-1]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * law, cap).sum() < top_k else (low, middle)
    shares: Floats = np.minimum(high * law, cap)
    return shares


def skew_of(shares: Floats, top_k: int) -> float:
    """The skew of popularity: 0 where all experts are wanted alike, 1 for always the same.

    It is (c - k/E) / (1 - k/E), c the share of a token's experts that an unrelated token
    takes too.
    """
    even = top_k / len(shares)
    return float(((shares**2).sum() / top_k - even) / (1 - even)) if even < 1 else 0.0


def zipf_exponent(experts: int, top_k: int, skew: float) -> float:
    """The exponent at which :func:`zipf_shares` have this *skew*; the nearest, if none has."""
    low, high = 0.0, LARGEST_EXPONENT
    for _ in range(50):
        middle = (low + high) / 2
        found = skew_of(zipf_shares(experts, top_k, middle), top_k)
        low, high = (middle, high) if found < skew else (low, middle)
    return (low + high) / 2


def shares_of(scores: Floats, top_k: int) -> Floats:
    """The share of tokens that take each expert, given the experts' *scores*."""
    step = 0.1
    at = np.arange(scores.min() - 5, scores.max() + 5 + step, step)
    away = at[:, None] - scores[None, :]
    above = 0.5 - 0.5 * _ERF(away / math.sqrt(2))
    experts = len(scores)
    # fewer[x, i, j]: probability that j of the experts but i score above x
    fewer = np.zeros((len(at), experts, top_k))
    fewer[:, :, 0] = 1
    for other in range(experts):
        own = fewer[:, other].copy()
        p = above[:, other, None, None]
        won = fewer[:, :, :-1] * p
        fewer *= 1 - p
        fewer[:, :, 1:] += won
        fewer[:, other] = own
    density = np.exp(-0.5 * away**2) / math.sqrt(2 * math.pi)
    shares: Floats = (density * fewer.sum(axis=2)).sum(axis=0) * step
    return shares


def scores_for(shares: Floats, top_k: int) -> Floats:
    """Scores whose experts are taken by these *shares* of tokens."""
    scores = np.zeros(len(shares))
    if top_k == len(shares) or np.ptp(shares) == 0:
        return scores
    wanted = _probit(shares)
    for _ in range(60):
        found = shares_of(scores, top_k)
        if np.abs(found - shares).max() < 1e-4 * shares.max():
            break
        scores += wanted - _probit(found)
        scores -= scores.mean()
    return scores


def _probit(shares: Floats) -> Floats:
    inside = np.clip(shares, 1e-9, 1 - 1e-9)
    return np.array([_NORMAL.inv_cdf(float(p)) for p in inside])


def best(scores: Scores, count: int) -> tuple[npt.NDArray[np.intp], Scores]:
    """The *count* highest of the last axis, falling: their indices and their scores."""
    width = scores.shape[-1]
    if count < width:
        index = np.argpartition(scores, width - count, axis=-1)[..., width - count :]
    else:
        index = np.broadcast_to(np.arange(width), scores.shape)
    top = np.take_along_axis(scores, index, axis=-1)
    order = np.argsort(-top, axis=-1)
    return np.take_along_axis(index, order, axis=-1), np.take_along_axis(top, order, axis=-1)


@dataclass
class Gate:
    """A gate of *top_k* of ``len(shares)`` experts, wanted by *shares* of the tokens."""

    shares: Floats
    top_k: int

    def __post_init__(self) -> None:
        experts = len(self.shares)
        self.scores: Scores = scores_for(self.shares, self.top_k).astype(np.float32)
        rng = np.random.default_rng(0)
        size = (min(max(DRAWS // experts, 1), 65536), experts)
        self._noise = rng.standard_normal(size, dtype=np.float32)
        self._other = rng.standard_normal(size, dtype=np.float32)
        self._chosen = best(self.scores + self._noise, self.top_k)[0]

    @property
    def chance(self) -> float:
        """Share of a token's experts that an unrelated token takes too."""
        return float((self.shares**2).sum() / self.top_k)

    @property
    def first_choices(self) -> npt.NDArray[np.intp]:
        """The first choices of many unrelated tokens."""
        first: npt.NDArray[np.intp] = self._chosen[:, 0]
        return first

    def overlap(self, correlation: float) -> float:
        """Share of a token's experts kept when the noise correlates by *correlation*."""
        noise = correlation * self._noise + math.sqrt(1 - correlation**2) * self._other
        kept = np.zeros((len(noise), len(self.shares)), bool)
        np.put_along_axis(kept, best(self.scores + noise, self.top_k)[0], True, axis=1)
        return float(np.take_along_axis(kept, self._chosen, axis=1).mean())

    def correlation_for(self, overlap: float) -> float:
        """The correlation of the noise at which *overlap* of the experts are kept."""
        if overlap <= self.chance:
            return 0.0
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (low, middle) if self.overlap(middle) > overlap else (middle, high)
        return (low + high) / 2
