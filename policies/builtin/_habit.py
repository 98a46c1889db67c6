"""The order in which ``predictive`` evicts where no forecast tells what is used again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence

from policies.base import Context
from policies.builtin._counted import Duel, Rival
from policies.orders import Faded, recency


class Habit(ABC):
    """Held copies by how they were used of late, least worth keeping first."""

    def begin(self) -> None:
        """A step begins."""

    @abstractmethod
    def use(self, experts: Sequence[int]) -> None:
        """An event uses *experts*."""

    @abstractmethod
    def add(self, copy: int) -> None:
        """*copy* is held now."""

    @abstractmethod
    def remove(self, copy: int, due: Container[int]) -> None:
        """*copy* goes; those *due* were not to be named before it."""

    @abstractmethod
    def order(self, incoming: int) -> Iterable[int]:
        """The pool of *incoming*, least worth keeping first; also what an event just used."""

    def wrong(self, copy: int) -> None:
        """*copy* was fetched for an event that did not use it."""

    def judge(self, missed: int, by_lru: int) -> None:
        """Without prefetches an event would have *missed* so many experts, LRU *by_lru*."""


class Recent(Habit):
    """By when they were used last; what was fetched and not used goes first."""

    def __init__(self, context: Context) -> None:
        self._recency = recency(context)

    def use(self, experts: Sequence[int]) -> None:
        self._recency.touch(experts)

    def add(self, copy: int) -> None:
        self._recency.add(copy)

    def remove(self, copy: int, due: Container[int]) -> None:
        self._recency.remove(copy)

    def order(self, incoming: int) -> Iterable[int]:
        return self._recency.order(incoming)

    def wrong(self, copy: int) -> None:
        self._recency.first(copy)


class Frequent(Habit):
    """By how often they were used of late, which a wrong guess does not change.

    How late, a :class:`Duel` says: of two :class:`Faded` orders, with *half_life* and with
    *SHORT* of it, the one that names the better victims counts. Whether recency would be better
    still no victims tell, for each order is right about a cache that it has filled: it is followed
    while it is a better :class:`Rival`.
    """

    #: The shorter of two half-lives, as a share of the longer.
    SHORT = 1 / 12

    def __init__(self, context: Context, half_life: float) -> None:
        self._faded = [Faded(context, life) for life in (half_life, half_life * self.SHORT)]
        self._recent, self._rival = Recent(context), Rival()
        self._duel = Duel()
        self._held: set[int] = set()
        self._pinned: Sequence[int] = ()

    def begin(self) -> None:
        self._pinned = ()
        self._duel.begin()
        for order in self._faded:
            order.begin()

    def use(self, experts: Sequence[int]) -> None:
        self._recent.use(experts)
        self._pinned = experts
        self._duel.use(experts)
        for order in self._faded:
            order.use(experts)

    def add(self, copy: int) -> None:
        self._held.add(copy)
        self._recent.add(copy)
        for order in self._faded:
            order.add(copy)

    def remove(self, copy: int, due: Container[int]) -> None:
        if self._duel.due() and copy not in due:
            lost = self._duel.lost
            other = self._first(self._faded[not lost], copy, due)
            self._duel.watch(*((other, copy) if lost else (copy, other)))
        for order in self._faded:
            order.remove(copy)
        self._recent.remove(copy, due)
        self._held.discard(copy)

    def order(self, incoming: int) -> Iterable[int]:
        if self._rival.better:
            return self._recent.order(incoming)
        return self._faded[self._duel.lost].least(incoming)

    def wrong(self, copy: int) -> None:
        if self._rival.better:
            self._recent.wrong(copy)

    def judge(self, missed: int, by_lru: int) -> None:
        self._rival.use(missed, by_lru)

    def _first(self, order: Faded, copy: int, due: Container[int]) -> int:
        """The first of *order* that could go in the place of *copy*."""
        held, pinned = self._held, self._pinned
        named = order.least(copy)
        return next((c for c in named if c in held and c not in pinned and c not in due), copy)
