"""Belady: evict the expert whose next event comes last. Needs the future; a bound, not a plan."""

from __future__ import annotations

from collections.abc import Iterator
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
        self._limit = 8 * context.slots + 1024

    def on_route(self, routing: Routing) -> None:
        total, entries, wanted = self._total, self._entry, self._wanted
        heap = self._heaps[self._pools.of(routing.experts[0])]
        wanted.clear()
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

    def victims(self, incoming: int) -> Iterator[int]:
        heap = self._heaps[self._pools.of(incoming)]
        passed: list[int] = []
        try:
            while heap:
                entry = heappop(heap)
                expert = entry % self._total
                if self._entry.get(expert) == entry:
                    passed.append(entry)
                    yield expert
        finally:
            for entry in passed:
                heappush(heap, entry)
