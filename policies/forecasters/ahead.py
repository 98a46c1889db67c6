"""Ahead: the next layers' gates applied to this layer's gate input, as recorded in a trace."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Forecaster, Prediction
from policies.forecasting import MAX_TOKENS
from policies.registry import parameter, register_forecaster
from policies.routing import Routing
from traces.trace import IntArray


@register_forecaster("ahead")
@dataclass
class Ahead(Forecaster):
    """Looks up to three layers ahead (Mixtral-offloading, arXiv 2312.17238, section 3.2).

    The gates rank their experts; what a rank is worth is counted as the run goes, for each
    distance, starting from *prior* (a chance that halves with every *top_k* ranks).
    """

    needs: ClassVar[tuple[str, ...]] = ("ahead",)

    width: float = parameter(1.5, "experts named per layer and token, in top_k", low=1, high=16)
    prior: float = parameter(
        0.8, "chance of the first rank before anything is counted", low=0, high=1
    )

    def reset(self, context: Context) -> None:
        self._context = context
        self._width = max(1, round(self.width * context.top_k))
        ranks = np.arange(4096)
        start = self.prior * 0.5 ** (ranks / context.top_k)
        self._right = np.tile(start * 8.0, (4, 1))
        self._seen = np.full((4, len(ranks)), 8.0)
        self._open: deque[tuple[int, int, IntArray]] = deque()

    def on_route(self, routing: Routing) -> Forecast:
        self._count(routing)
        if routing.step.size > MAX_TOKENS:
            return ()
        forecast = []
        for distance, guess in enumerate(routing.ahead, start=1):
            guess = guess[:, : self._width]
            self._open.append((routing.event + distance, distance, guess))
            forecast.append(self._predict(routing.layer + distance, distance, guess))
        return forecast

    def _count(self, routing: Routing) -> None:
        """Compare what was guessed for this event with what its gate chose."""
        still: deque[tuple[int, int, IntArray]] = deque()
        chosen = routing.token_experts if self._open else None
        for event, distance, guess in self._open:
            if event > routing.event:
                still.append((event, distance, guess))
            elif event == routing.event and chosen is not None and len(guess) == len(chosen):
                right = (guess[:, :, None] == chosen[:, None, :]).any(axis=2)
                self._right[distance, : guess.shape[1]] += right.sum(axis=0)
                self._seen[distance, : guess.shape[1]] += len(guess)
        self._open = still

    def _predict(self, layer: int, distance: int, guess: IntArray) -> Prediction:
        width = guess.shape[1]
        worth = self._right[distance, :width] / self._seen[distance, :width]
        base = layer * self._context.experts
        if len(guess) == 1:
            return Prediction(distance, (guess[0] + base).tolist(), worth.tolist())
        none = np.zeros(self._context.experts)
        known = guess >= 0
        chances = np.minimum(np.broadcast_to(worth, guess.shape)[known], 0.999)
        np.add.at(none, guess[known], np.log1p(-chances))
        best = np.argsort(none, kind="stable")
        best = best[none[best] < 0]
        return Prediction(distance, (best + base).tolist(), (1 - np.exp(none[best])).tolist())
