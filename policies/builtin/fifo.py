"""First in, first out: evict what was placed longest ago, however often it was used since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Context, Policy
from policies.orders import recency
from policies.registry import register


@register("fifo")
@dataclass
class FIFO(Policy):
    """Ignores use altogether; the cheapest bookkeeping there is."""

    def reset(self, context: Context) -> None:
        self._placed = recency(context)

    def on_load(self, copy: int) -> None:
        self._placed.add(copy)

    def on_evict(self, copy: int) -> None:
        self._placed.remove(copy)

    def victims(self, incoming: int) -> Iterable[int]:
        return self._placed.order(incoming)
