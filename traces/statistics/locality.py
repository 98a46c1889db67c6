"""How much of a token's routing its neighbours share."""

from __future__ import annotations

from typing import Any

import numpy as np

from traces.model import ModelSpec
from traces.statistics.pieces import SEGMENT_TOKENS, Piece


class Adjacency:
    """Two consecutive tokens of a sequence at the same layer."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self.pairs = 0
        self._shared = np.zeros(model.layers)
        self._any = np.zeros(model.layers)
        self._first = np.zeros(model.layers)

    def add(self, piece: Piece) -> None:
        """Compare every token of *piece* with the one before."""
        experts, hot = piece.experts, piece.hot
        if piece.previous is not None:
            before = np.zeros_like(hot[:1])
            np.put_along_axis(before, piece.previous[None].astype(np.intp), True, axis=2)
            hot = np.concatenate((before, hot))
            experts = np.concatenate((piece.previous[None], experts))
        again = np.take_along_axis(hot[:-1], experts[1:].astype(np.intp), axis=2)
        self.pairs += len(again)
        self._shared += np.count_nonzero(again, axis=(0, 2))
        self._any += np.count_nonzero(again.any(axis=2), axis=0)
        self._first += np.count_nonzero(experts[1:, :, 0] == experts[:-1, :, 0], axis=0)

    @property
    def overlap(self) -> float | None:
        """Share of a token's experts that the token before took; None without neighbours."""
        if not self.pairs:
            return None
        return float(self._shared.mean() / self.pairs / self.model.top_k)

    def result(self) -> dict[str, Any]:
        """Means over layers.

        ``overlap_experts``: experts in common, ``overlap_ratio``: that over the k^2 / E of
        uniform routing (2.0 for Qwen3-30B in arXiv 2608.18261). ``first_choice_repeat`` and
        ``any_repeat``: share of tokens whose first choice is the previous token's first, and
        that have any expert in common with it (the Mixtral report's table of repetition).
        """
        if self.overlap is None:
            return {}
        chance = self.model.top_k**2 / self.model.experts
        shared = self.overlap * self.model.top_k
        return {
            "overlap_experts": shared,
            "overlap_ratio": shared / chance,
            "first_choice_repeat": float(self._first.mean() / self.pairs),
            "first_choice_repeat_by_layer": _rounded(self._first / self.pairs),
            "any_repeat": float(self._any.mean() / self.pairs),
        }


class Segments:
    """The segment-routing score: how well one fixed set of experts serves 16 tokens.

    For every layer and segment the set with the best F1 against the tokens' routed sets is
    chosen; with c the tokens that want each expert, a set of g experts has
    F1 = 2 * sum(c) / (16 * (g + k)), so the best set of each size is the most wanted ones.
    After SRP(E, 16) of "Not All Models Suit Expert Offloading" (Mixtral .494, Qwen3 .541).
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self._sum = 0.0
        self._count = 0

    def add(self, piece: Piece) -> None:
        """Score the whole segments of *piece*."""
        segments = len(piece) // SEGMENT_TOKENS
        if not segments:
            return
        hot = piece.hot[: segments * SEGMENT_TOKENS]
        hot = hot.reshape(segments, SEGMENT_TOKENS, *hot.shape[1:])
        wanted = np.sort(hot.sum(axis=1, dtype=np.int16), axis=2)[:, :, ::-1]
        sizes = np.arange(1, self.model.experts + 1)
        f1 = 2 * wanted.cumsum(axis=2) / (SEGMENT_TOKENS * (sizes + self.model.top_k))
        self._sum += float(f1.max(axis=2).sum())
        self._count += segments * self.model.layers

    def result(self) -> dict[str, Any]:
        """The mean over segments and layers; nothing when no sequence has 16 tokens."""
        return {"srp_16": self._sum / self._count} if self._count else {}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
