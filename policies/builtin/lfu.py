"""Least frequently used: evict the expert with the fewest uses since it was placed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Context, Policy
from policies.orders import Frequency, Pools
from policies.registry import register
from policies.routing import Routing


@register("lfu")
@dataclass
class LFU(Policy):
    """Counts uses since placing and forgets them on eviction; ties go to the least recent."""

    def reset(self, context: Context) -> None:
        self._pools = Pools(context)
        self._counts = [Frequency() for _ in range(self._pools.count)]
        self._wanted: set[int] = set()

    def on_route(self, routing: Routing) -> None:
        counts = self._counts[self._pools.of(routing.experts[0])]
        self._wanted.clear()
        for expert in routing.experts:
            if expert in counts:
                counts.use(expert)
            else:
                self._wanted.add(expert)

    def on_load(self, copy: int) -> None:
        self._counts[self._pools.of(copy)].add(copy, uses=int(copy in self._wanted))

    def on_evict(self, copy: int) -> None:
        self._counts[self._pools.of(copy)].remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._counts[self._pools.of(incoming)].least()
