"""Markov: which experts follow which, learned from the trace so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.base import Context, Forecast, Forecaster
from policies.forecasting import MAX_TOKENS, any_of, last_rows, predictions
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray


class Table:
    """How often each of *reach* experts followed expert a: counts and their shares.

    Shares start at *start*, as if seen once. Rows are normalised when they are learned, so
    that reading a chance is one look-up.
    """

    def __init__(self, experts: int, reach: int, start: float) -> None:
        self._counts = np.full((experts, reach), start, dtype=np.float32)
        self._uses = np.ones((experts, 1), dtype=np.float32)
        self.shares = self._counts.copy()

    def learn(self, before: IntArray, after: IntArray) -> None:
        """Expert *before* [n, k] was followed by columns *after* [n, m], each pair once."""
        rows = before.reshape(-1)
        self._uses[rows] += 1
        self._counts[before[:, :, None], after[:, None, :]] += 1
        self.shares[rows] = self._counts[rows] / self._uses[rows]


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
    floor: float = parameter(0.35, "least chance at which an expert is named", low=0, high=1)
    blend: float = parameter(0.3, "share of the previous token in the chance", low=0, high=1)

    def reset(self, context: Context) -> None:
        self._context = context
        self._reach = self.horizon * context.experts
        start = context.top_k / context.experts
        self._across = Table(context.total, self._reach, start)
        self._along = Table(context.total, context.experts, start)
        self._base = np.arange(context.layers)[:, None] * context.experts
        self._step: Step | None = None
        self._routes: list[IntArray | Sequence[int]] = []
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
        shares = np.stack([self._along.shares[route].mean(axis=1) for route in known])
        previous = any_of(shares).reshape(-1)
        # Padded, so that a window that reaches past the last layer is as long as any other.
        self._previous = np.append(self.blend * previous, np.zeros(self._reach, np.float32))
        return predictions(previous, 0, self._context.experts, self.floor)

    def on_route(self, routing: Routing) -> Forecast:
        layer, experts = routing.layer + 1, self._context.experts
        size = routing.step.size
        single = size == 1
        chosen = routing.experts if single else routing.token_experts + (layer - 1) * experts
        self._routes.append(chosen)
        ahead = min(self.horizon, self._context.layers - layer)
        if size > MAX_TOKENS or ahead == 0:
            return ()
        if single:
            scores = np.add.reduce(self._across.shares.take(chosen, axis=0))
            scores *= (1.0 if self._previous is None else 1.0 - self.blend) / len(chosen)
        else:
            scores = any_of(self._across.shares[chosen].mean(axis=1))
            scores = scores * (1.0 if self._previous is None else 1.0 - self.blend)
        if self._previous is not None:
            scores += self._previous[layer * experts : layer * experts + self._reach]
        return predictions(scores[: ahead * experts], layer, experts, self.floor)

    def _learn(self) -> None:
        """Add the step that has ended to the tables."""
        step, layers, experts = self._step, self._context.layers, self._context.experts
        if step is None or len(self._routes) != layers:
            return
        taken = np.array(self._routes, dtype=np.int64)
        routes = taken[None] if step.size == 1 else taken.transpose(1, 0, 2)
        for route in routes[-MAX_TOKENS:]:
            for d in range(1, min(self.horizon, layers - 1) + 1):
                self._across.learn(route[:-d], (route - self._base)[d:] + (d - 1) * experts)
        sequences, rows = last_rows(step)
        alive: dict[int, IntArray] = {}
        for sequence, row in zip(sequences.tolist(), rows.tolist(), strict=True):
            before = self._last.get(sequence)
            if before is not None and step.phase == "decode":
                self._along.learn(before, routes[row] - self._base)
            alive[sequence] = routes[row]
        self._last = alive
