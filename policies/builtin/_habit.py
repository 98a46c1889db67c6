"""The order in which ``predictive`` evicts where no forecast tells what is used again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from policies.base import Context
from policies.builtin._counted import Duel
from policies.orders import Faded, recency


class Habit:
    """Held copies by how often they were used of late, or by recency while that is better.

    Which is better a :class:`Duel` says. *half_life* as of :class:`Faded`; 0: recency, always.
    """

    def __init__(self, context: Context, half_life: float) -> None:
        self._recency = recency(context)
        self._faded = Faded(context, half_life) if half_life else None
        self._duel = Duel()
        self._held: set[int] = set()
        self._pinned: Sequence[int] = ()

    def begin(self) -> None:
        """A step begins."""
        if self._faded is not None:
            self._pinned = ()
            self._faded.begin()
            self._duel.begin()

    def use(self, experts: Sequence[int]) -> None:
        """An event uses *experts*."""
        self._recency.touch(experts)
        if self._faded is not None:
            self._pinned = experts
            self._faded.use(experts)
            self._duel.use(experts)

    def add(self, copy: int) -> None:
        """*copy* is held now."""
        self._held.add(copy)
        self._recency.add(copy)
        if self._faded is not None:
            self._faded.add(copy)

    def remove(self, copy: int, due: Container[int]) -> None:
        """*copy* goes, none of those *due* having been named before it."""
        if self._faded is not None:
            if self._duel.due() and copy not in due:
                self._judge(copy, due)
            self._faded.remove(copy)
        self._held.discard(copy)
        self._recency.remove(copy)

    def wrong(self, copy: int) -> None:
        """*copy* was fetched for an event that did not use it."""
        self._recency.first(copy)

    def order(self, incoming: int) -> Iterable[int]:
        """The pool of *incoming*, least worth keeping first; also what an event just used."""
        if self._faded is None or self._duel.lost:
            return self._recency.order(incoming)
        return self._faded.least(incoming)

    def _judge(self, copy: int, due: Container[int]) -> None:
        """Watch what either order would have evicted for *copy* to go."""
        assert self._faded is not None
        orders = self._faded.least(copy), self._recency.order(copy)
        self._duel.watch(*(self._first(order, copy, due) for order in orders))

    def _first(self, order: Iterable[int], copy: int, due: Container[int]) -> int:
        """The first of *order* that may go."""
        held, pinned = self._held, self._pinned
        return next((c for c in order if c in held and c not in pinned and c not in due), copy)
