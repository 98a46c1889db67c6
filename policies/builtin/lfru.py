"""Least frequently and recently used: evict the lowest uses per age."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from policies.base import Context, Policy
from policies.orders import Ranked
from policies.registry import register
from policies.routing import Routing
from traces.trace import FloatArray, IntArray


@register("lfru")
@dataclass
class LFRU(Policy):
    """Scores each held expert ``uses / (now - last use + 1)`` and evicts the lowest.

    Uses are counted over the whole run and survive eviction; the clock ticks once per event;
    ties go to the smallest (layer, id) (arXiv 2608.07911). All scores change at every event,
    so that the victims of an event are ranked together, over all slots.
    """

    def reset(self, context: Context) -> None:
        self._experts = Ranked(context, self._score)
        self._total = context.total
        self._uses = np.zeros(context.total)
        self._last = np.zeros(context.total)
        self._now = 0

    def _score(self, copies: IntArray) -> FloatArray:
        experts = copies % self._total
        score: FloatArray = self._uses[experts] / (self._now - self._last[experts] + 1)
        return score

    def on_route(self, routing: Routing) -> None:
        self._now = routing.event
        self._uses[routing.experts] += 1
        self._last[routing.experts] = routing.event
        self._experts.stale()

    def on_load(self, copy: int) -> None:
        self._experts.add(copy)

    def on_evict(self, copy: int) -> None:
        self._experts.remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._experts.least(incoming)
