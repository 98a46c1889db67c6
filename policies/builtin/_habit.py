"""The order in which ``predictive`` evicts where no forecast tells what is used again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from policies.base import Context
from policies.builtin._counted import Duel
from policies.orders import Faded, recency


class Habit:
    """Held copies by how often they were used of late, least first.

    How late, a :class:`Duel` says: of two :class:`Faded` orders, with *half_life* and with
    *SHORT* of it, the one that names the better victims counts. Without a half-life it is recency.
    """

    #: The shorter of two half-lives, as a share of the longer.
    SHORT = 1 / 12

    def __init__(self, context: Context, half_life: float | None) -> None:
        self._recency = recency(context) if half_life is None else None
        lives = () if half_life is None else (half_life, half_life * self.SHORT)
        self._faded = [Faded(context, life) for life in lives]
        self._duel = Duel()
        self._held: set[int] = set()
        self._pinned: Sequence[int] = ()

    def begin(self) -> None:
        """A step begins."""
        self._pinned = ()
        self._duel.begin()
        for order in self._faded:
            order.begin()

    def use(self, experts: Sequence[int]) -> None:
        """An event uses *experts*."""
        if self._recency is not None:
            self._recency.touch(experts)
            return
        self._pinned = experts
        self._duel.use(experts)
        for order in self._faded:
            order.use(experts)

    def add(self, copy: int) -> None:
        """*copy* is held now."""
        self._held.add(copy)
        if self._recency is not None:
            self._recency.add(copy)
        for order in self._faded:
            order.add(copy)

    def remove(self, copy: int, due: Container[int]) -> None:
        """*copy* goes; those *due* were not to be named before it."""
        if self._recency is not None:
            self._recency.remove(copy)
        elif self._duel.due() and copy not in due:
            lost = self._duel.lost
            other = self._first(self._faded[not lost], copy, due)
            self._duel.watch(*((other, copy) if lost else (copy, other)))
        for order in self._faded:
            order.remove(copy)
        self._held.discard(copy)

    def wrong(self, copy: int) -> None:
        """*copy* was fetched for an event that did not use it: counts know, recency does not."""
        if self._recency is not None:
            self._recency.first(copy)

    def order(self, incoming: int) -> Iterable[int]:
        """The pool of *incoming*, least worth keeping first; also what an event just used."""
        if self._recency is not None:
            return self._recency.order(incoming)
        return self._faded[self._duel.lost].least(incoming)

    def _first(self, order: Faded, copy: int, due: Container[int]) -> int:
        """The first of *order* that could go in the place of *copy*."""
        held, pinned = self._held, self._pinned
        named = order.least(copy)
        return next((c for c in named if c in held and c not in pinned and c not in due), copy)
