"""Least recently used: evict the expert whose last use lies furthest back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Context, Policy
from policies.orders import recency
from policies.registry import register
from policies.routing import Routing


@register("lru")
@dataclass
class LRU(Policy):
    """Keeps what was used last and never prefetches.

    The baseline every other policy is measured against: no parameters, no training,
    constant work per access. Within one event experts become recent in ascending order.
    """

    def reset(self, context: Context) -> None:
        self._recency = recency(context)

    def on_route(self, routing: Routing) -> None:
        self._recency.touch(routing.experts)

    def on_load(self, copy: int) -> None:
        self._recency.add(copy)

    def on_evict(self, copy: int) -> None:
        self._recency.remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._recency.order(incoming)
