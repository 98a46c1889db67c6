"""How unevenly experts are wanted, and how that differs between domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from traces.gates import zipf_exponent
from traces.model import ModelSpec
from traces.statistics.pieces import Piece

Floats = npt.NDArray[np.float64]


class Popularity:
    """Counts per half, domain, layer and expert, and what follows from them alone.

    Sums of squared shares are taken between *different sequences of one domain*, so that
    neither a sequence's memory of itself nor sampling noise passes for skew.
    """

    def __init__(self, model: ModelSpec, names: tuple[str, ...]) -> None:
        self.model = model
        self.names = names
        domains = max(len(names), 1)
        self.counts = np.zeros((2, domains, model.layers, model.experts))
        self.tokens = np.zeros((2, domains))
        self._squares = np.zeros((domains, model.layers))
        self._squared_tokens = np.zeros(domains)
        self._sequence = np.zeros((model.layers, model.experts))
        self._sequence_tokens = 0

    def add(self, piece: Piece) -> None:
        """Count *piece*."""
        counts = np.count_nonzero(piece.hot, axis=0)
        self.counts[piece.half, piece.domain] += counts
        self.tokens[piece.half, piece.domain] += len(piece)
        self._sequence += counts
        self._sequence_tokens += len(piece)
        if piece.ends:
            self._squares[piece.domain] += (self._sequence**2).sum(axis=1)
            self._squared_tokens[piece.domain] += self._sequence_tokens**2
            self._sequence[:] = 0
            self._sequence_tokens = 0

    @property
    def collision(self) -> float:
        """Mean over layers of the sum of squared shares of tokens, within a domain."""
        counts, tokens = self.counts.sum(axis=0), self.tokens.sum(axis=0)
        pairs = (tokens**2 - self._squared_tokens).sum()
        agreeing = ((counts**2).sum(axis=2) - self._squares).sum(axis=0)
        if pairs == 0:  # one sequence per domain: nothing to compare it with but itself
            pairs, agreeing = (tokens**2).sum(), (counts**2).sum(axis=(0, 2))
        return float(agreeing.mean() / pairs)

    @property
    def chance(self) -> float:
        """Share of a token's experts that an unrelated token of its domain takes too."""
        return self.collision / self.model.top_k

    @property
    def skew(self) -> float:
        """From 0, all experts wanted alike, to 1: (chance - k/E) / (1 - k/E)."""
        even = self.model.top_k / self.model.experts
        return (self.chance - even) / (1 - even) if even < 1 else 0.0

    def separation(self) -> float | None:
        """1 - the mean correlation of popularity between domains; None for a single one.

        Zero where all domains want the same experts, about one where they have nothing in
        common. The correlation is freed of sampling noise as :attr:`collision` is.
        """
        counts, tokens = self.counts.sum(axis=0), self.tokens.sum(axis=0)
        pairs_within = (tokens**2 - self._squared_tokens).sum()
        pairs_between = tokens.sum() ** 2 - (tokens**2).sum()
        if not pairs_within or not pairs_between:
            return None
        chance = self.model.top_k**2 / self.model.experts
        within = self.collision - chance
        total = (counts.sum(axis=0) ** 2).sum(axis=1)
        between = (total - (counts**2).sum(axis=(0, 2))).mean() / pairs_between - chance
        return None if within < 1e-3 * chance else float(1 - between / within)

    def result(self) -> dict[str, Any]:
        """Figures over all tokens, and means over layers.

        ``entropy``: of a layer's accesses over log E. ``load_std``: standard deviation over
        experts of the share of tokens that take them, in points (as in "Not All Models Suit
        Expert Offloading", table 2). ``hottest_2``: share of a layer's accesses that go to
        its two hottest experts. ``traffic_95``: share of all experts that get 95 % of accesses.
        ``zipf_exponent``: of the Zipf law that is as skewed within a domain.
        """
        counts = self.counts.sum(axis=(0, 1))
        tokens, layers = self.tokens.sum(), self.model.layers
        shares = counts / counts.sum(axis=1, keepdims=True)
        logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
        scale = np.log(self.model.experts) or 1.0
        entropy = -(shares * logs).sum(axis=1) / scale
        hottest = np.sort(shares, axis=1)[:, ::-1][:, :2].sum(axis=1)
        falling = np.sort(counts.ravel())[::-1].cumsum()
        needed = int(np.searchsorted(falling, 0.95 * falling[-1])) + 1
        return {
            "entropy": float(entropy.mean()),
            "entropy_by_layer": [round(float(x), 4) for x in entropy],
            "load_std": float((100 * counts / tokens).std(axis=1).mean()),
            "hottest_2": float(hottest.mean()),
            "hottest_2_highest": float(hottest.max()),
            "hottest_2_layer": int(hottest.argmax()),
            "traffic_95": needed / (layers * self.model.experts),
            "zipf_exponent": zipf_exponent(self.model.experts, self.model.top_k, self.skew),
        }

    def domains(self) -> dict[str, Any]:
        """The share of tokens of each domain and how far their popularity differs."""
        tokens = self.tokens.sum(axis=0)
        named = {name: float(n / tokens.sum()) for name, n in zip(self.names, tokens, strict=True)}
        return {"token_share": named, "separation": self.separation()}
