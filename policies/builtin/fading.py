"""Fading: evict the least used of late."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Context, Policy
from policies.orders import Faded
from policies.registry import parameter, register
from policies.routing import Routing


@register("fading")
@dataclass
class Fading(Policy):
    """Counts uses, each of which counts half after *half_life* steps, and evicts the least.

    The frequency that Lee et al. 2001 (LRFU) blend with recency. Counts survive eviction; ties
    go to the smallest (layer, id).
    """

    half_life: float = parameter(
        32.0, "decode steps after which a use counts half", low=1, high=1e6
    )

    def reset(self, context: Context) -> None:
        self._faded = Faded(context, self.half_life)
        self._step = -1

    def on_route(self, routing: Routing) -> None:
        # Not in a hook of its own: a policy that has nothing to fetch at a step's begin has none.
        if routing.step.number != self._step:
            self._step = routing.step.number
            self._faded.begin()
        self._faded.use(routing.experts)

    def on_load(self, copy: int) -> None:
        self._faded.add(copy)

    def on_evict(self, copy: int) -> None:
        self._faded.remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._faded.least(incoming)
