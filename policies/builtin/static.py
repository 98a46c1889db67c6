"""Static: the most popular experts stay, the rest pass through a few slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Policy
from policies.orders import recency
from policies.registry import parameter, register
from policies.routing import Routing, Step
from traces.trace import IntArray


@register("static")
@dataclass
class Static(Policy):
    """Pins the most popular experts before the first token and never gives them up.

    Popularity comes from a training trace if one is given, else from the run itself
    (hindsight: a bound on what any fixed placement can reach). *staging* slots, evicted least
    recently used first, serve everything else.
    """

    needs: ClassVar[tuple[str, ...]] = ("popularity",)
    #: Staging slots may be fewer than an event demands.
    refuses_victims = True

    staging: int = parameter(0, "slots for the rest; 0: top_k of every sequence", low=0)

    def reset(self, context: Context) -> None:
        if context.training is not None:
            popularity = context.training.popularity
        elif context.popularity is not None:
            popularity = context.popularity
        else:
            popularity = np.zeros(context.total, dtype=np.int64)
        self._pinned = dict.fromkeys(self._choose(context, popularity).tolist())
        self._staged = recency(context)
        self._placed = False

    def _choose(self, context: Context, popularity: IntArray) -> IntArray:
        """The most popular experts that fit beside the staging slots, most popular first."""
        ranked = np.lexsort((np.arange(context.total), -popularity))
        staging = self.staging or context.top_k * context.batch
        if context.pool == "global":
            return ranked[: max(context.slots - staging, 0)]
        share, rest = divmod(context.slots, context.layers)
        chosen = []
        for layer in range(context.layers):
            room = share + (layer < rest) - min(self.staging or context.top_k, share)
            chosen.append(ranked[ranked // context.experts == layer][:room])
        return np.concatenate(chosen)

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        if self._placed:
            return ()
        self._placed = True
        return self._pinned

    def on_route(self, routing: Routing) -> None:
        rest = [expert for expert in routing.experts if expert not in self._pinned]
        if rest:
            self._staged.touch(rest)

    def on_load(self, copy: int) -> None:
        if copy not in self._pinned:
            self._staged.add(copy)

    def on_evict(self, copy: int) -> None:
        self._staged.remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._staged.order(incoming)
