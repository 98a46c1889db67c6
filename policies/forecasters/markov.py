"""Markov: which experts follow which, learned from the trace so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.base import Context, Forecast, Forecaster
from policies.forecasting import MAX_TOKENS, any_of, last_rows, predictions
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray


@register_forecaster("markov")
@dataclass
class Markov(Forecaster):
    """Two tables of conditional frequencies, blended.

    *across* layers: how often expert b of layer l + d followed expert a of layer l, for d up
    to *horizon*. *along* the sequence: how often b of layer l followed a of layer l in the
    previous token. A token's chance of b is the mean over its experts a. Both are learned at
    the end of each step; sequences of a batch are kept apart.
    """

    horizon: int = parameter(2, "layers ahead", low=1, high=8)
    width: float = parameter(1.5, "experts named per layer, in top_k", low=1, high=16)
    blend: float = parameter(0.5, "share of the previous token in the chance", low=0, high=1)

    def reset(self, context: Context) -> None:
        self._context = context
        layers, experts, k = context.layers, context.experts, context.top_k
        self._width = max(1, round(self.width * k))
        reach = self.horizon * experts
        start = k / experts
        self._across = np.full((layers, experts, reach), start, dtype=np.float32)
        self._along = np.full((layers, experts, experts), start, dtype=np.float32)
        self._uses = np.ones((layers, experts, 1), dtype=np.float32)
        self._followed = np.ones((layers, experts, 1), dtype=np.float32)
        self._step: Step | None = None
        self._routes: list[IntArray] = []
        self._last: dict[int, IntArray] = {}
        self._previous: FloatArray | None = None

    def on_step(self, step: Step) -> Forecast:
        self._learn()
        self._step, self._routes, self._previous = step, [], None
        if step.size > MAX_TOKENS or step.sequence_ids is None:
            return ()
        known = [self._last[s] for s in step.sequence_ids.tolist() if s in self._last]
        if not known:
            return ()
        layer = np.arange(self._context.layers)[:, None]
        chances = [self._table(self._along, self._followed, layer, route) for route in known]
        self._previous = any_of(np.stack(chances))
        return predictions(self._previous, 0, self._context, self._width * step.size)

    @staticmethod
    def _table(
        counts: FloatArray, uses: FloatArray, layer: IntArray | int, route: IntArray
    ) -> FloatArray:
        """Mean chance of what follows, over the last axis of *route* [..., k]."""
        rows: FloatArray = counts[layer, route] / uses[layer, route]
        mean: FloatArray = rows.mean(axis=-2)
        return mean

    def on_route(self, routing: Routing) -> Forecast:
        chosen = routing.token_experts
        self._routes.append(chosen)
        ahead = min(self.horizon, self._context.layers - 1 - routing.layer)
        if len(chosen) > MAX_TOKENS or ahead == 0:
            return ()
        experts = self._context.experts
        chances = any_of(self._table(self._across, self._uses, routing.layer, chosen))
        scores = chances.reshape(self.horizon, experts)[:ahead]
        if self._previous is not None and self.blend:
            coming = self._previous[routing.layer + 1 : routing.layer + 1 + ahead]
            scores = (1 - self.blend) * scores + self.blend * coming
        return predictions(scores, routing.layer + 1, self._context, self._width * len(chosen))

    def _learn(self) -> None:
        """Add the step that has ended to the tables."""
        step, layers = self._step, self._context.layers
        if step is None or len(self._routes) != layers:
            return
        routes = np.stack(self._routes, axis=1).astype(np.int64)
        layer = np.arange(layers)[:, None]
        for route in routes if len(routes) <= MAX_TOKENS else routes[-MAX_TOKENS:]:
            self._uses[layer, route] += 1
            for d in range(1, min(self.horizon, layers - 1) + 1):
                after = route[d:, None, :] + (d - 1) * self._context.experts
                self._across[layer[:-d, :, None], route[:-d, :, None], after] += 1
        sequences, rows = last_rows(step)
        for sequence, row in zip(sequences.tolist(), rows.tolist(), strict=True):
            route = routes[row]
            before = self._last.get(sequence)
            if before is not None and step.phase == "decode":
                self._followed[layer, before] += 1
                self._along[layer[:, :, None], before[:, :, None], route[:, None, :]] += 1
            self._last[sequence] = route
        alive = set(sequences.tolist())
        self._last = {s: r for s, r in self._last.items() if s in alive}
