"""Ahead: the next layers' gates applied to this layer's gate input, as recorded in a trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
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
        start = self.prior * 0.5 ** (np.arange(self._width) / context.top_k)
        #: How often a guess of a distance was right at each rank, and was made. Lists: in events
        #: of a few tokens an array takes longer to be called than to be worked on.
        self._right: list[list[float]] = [(start * 8.0).tolist() for _ in range(4)]
        self._made = [8.0] * 4
        #: Guesses whose event is to come: of one token experts, of several ids within the layer.
        self._open: deque[tuple[int, int, list[list[int]]]] = deque()

    def on_route(self, routing: Routing) -> Forecast:
        self._count(routing)
        if routing.step.size > MAX_TOKENS:
            return ()
        forecast = []
        width, experts = self._width, self._context.experts
        for distance, guess in enumerate(routing.ahead, start=1):
            guess = guess[:, :width]
            base = (routing.layer + distance) * experts
            rows, made = guess.tolist(), self._made[distance]
            worth = [right / made for right in self._right[distance][: guess.shape[1]]]
            if len(rows) == 1:
                rows = [[base + id for id in rows[0]]]
                forecast.append(Prediction(distance, rows[0], worth))
            else:
                forecast.append(self._of_several(base, distance, guess, worth))
            self._open.append((routing.event + distance, distance, rows))
        return forecast

    def _count(self, routing: Routing) -> None:
        """Compare what was guessed for this event with what its gate chose."""
        if not self._open:
            return
        still: deque[tuple[int, int, list[list[int]]]] = deque()
        tokens = routing.step.size
        chosen: list[frozenset[int]] = []
        if tokens == 1:
            chosen = [frozenset(routing.experts)]
        elif tokens <= MAX_TOKENS:
            chosen = list(map(frozenset, routing.token_experts.tolist()))
        for guess in self._open:
            event, distance, rows = guess
            if event > routing.event:
                still.append(guess)
            elif event == routing.event and len(rows) == len(chosen):
                self._made[distance] += tokens
                right = self._right[distance]
                for guesses, ids in zip(rows, chosen, strict=True):
                    for rank, id in enumerate(guesses):
                        if id in ids:
                            right[rank] += 1.0
        self._open = still

    def _of_several(
        self, base: int, distance: int, guess: IntArray, worth: Sequence[float]
    ) -> Prediction:
        """What *guess* [T, m] says of an event of several tokens, each rank being *worth* that."""
        missing = np.log1p(-np.minimum(worth, 0.999))
        known = guess >= 0
        ids, ranks = guess[known], known.nonzero()[1]
        # Summed in the order of the tokens.
        none = np.bincount(ids, missing.take(ranks), self._context.experts)
        best = none.argsort(kind="stable")[: np.count_nonzero(none)]
        return Prediction(distance, (best + base).tolist(), (1 - np.exp(none.take(best))).tolist())
