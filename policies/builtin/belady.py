"""Belady: evict the expert whose next event comes last. Needs the future; a bound, not a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import ClassVar

from policies.base import Context, Policy
from policies.future import NEVER
from policies.orders import Pools
from policies.registry import register
from policies.routing import Routing


@register("belady")
@dataclass
class Belady(Policy):
    """The fewest moves any exact policy can make that computes on the GPU alone.

    That holds where every event's demand fits the slots; one that runs in waves can be played
    against the order of its waves (``bounds`` in a result allow for it).
    MIN (Belady 1966, Mattson 1970) on events: the victim's next event comes last,
    never-again first, ties by smallest (layer, id). A heap entry orders by both at once:
    ``(NEVER - next event) * experts + expert``. An expert's entry changes with every use;
    outdated ones are dropped when they surface or when they outnumber the valid ones.
    """

    offline: ClassVar[bool] = True

    def reset(self, context: Context) -> None:
        self._pools = Pools(context)
        self._total = context.total
        self._heaps: list[list[int]] = [[] for _ in range(self._pools.count)]
        self._wanted: dict[int, int] = {}
        self._entry: dict[int, int] = {}
        self._demand: Sequence[int] = ()
        self._limit = 8 * context.slots + 1024

    def on_route(self, routing: Routing) -> None:
        total, entries, wanted = self._total, self._entry, self._wanted
        heap = self._heaps[self._pools.of(routing.experts[0])]
        wanted.clear()
        self._demand = routing.experts
        for expert, event in zip(routing.experts, routing.next_use, strict=True):
            entry = (NEVER - event) * total + expert
            if expert in entries:
                entries[expert] = entry
                heappush(heap, entry)
            else:
                wanted[expert] = entry
        if len(heap) > self._limit:
            heap[:] = [e for x, e in entries.items() if self._pools.of(x) == self._pools.of(expert)]
            heapify(heap)

    def on_load(self, copy: int) -> None:
        entry = self._entry[copy] = self._wanted[copy]
        heappush(self._heaps[self._pools.of(copy)], entry)

    def on_evict(self, copy: int) -> None:
        del self._entry[copy]

    def victims(self, incoming: int) -> Iterator[int] | tuple[int]:
        heap, entries, demand = self._heaps[self._pools.of(incoming)], self._entry, self._demand
        aside = []
        found = -1
        while heap:
            entry = heap[0]
            expert = entry % self._total
            if entries.get(expert) != entry:
                heappop(heap)
            elif expert in demand:
                aside.append(heappop(heap))
            else:
                found = expert
                break
        for entry in aside:
            heappush(heap, entry)
        return (found,) if found >= 0 else self._computed(heap)

    def _computed(self, heap: list[int]) -> Iterator[int]:
        """Later waves give up experts of the demand that earlier ones have computed."""
        total = self._total
        return iter([e % total for e in sorted(heap) if self._entry.get(e % total) == e])
