"""When held experts are expected to be used next: the order in which ``predictive`` evicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from policies.base import Context, Reuse
from traces.trace import FloatArray


class _Ranking(NamedTuple):
    """Held copies from the nearest next use to the farthest, with its times.

    Those that go are taken off the end. *whole* if there are no others in the pool.
    """

    copies: list[int]
    times: list[float]
    whole: bool


class NextUse:
    """Held experts by the expected time of their next use, farthest first.

    Time is in tokens: layer l of L comes at s + l / L in step s, and next at s + 1 + l / L. An
    expert that nobody foresees for this step is expected at s + 1 + l / L + R, where R is how
    many tokens will pass it by: the sum over t of the chance that the first t tokens do not use
    it, up to the longest window. One that is foreseen at time f with chance p is expected at
    p * f + (1 - p) * (s + 1 + l / L + R). What windows do not tell
    is left to recency: for each token since its last use, at most as many as the longest window,
    an expert counts *age* tokens farther, and the least recent of equals goes first.
    """

    #: How many of the farthest are sorted at first.
    FEW = 24

    def __init__(self, context: Context, age: float, held: Iterable[int]) -> None:
        total, self._layers, self._experts = context.total, context.layers, context.experts
        self._by_layer = context.pool == "layer"
        self._age = age
        self._again = 1.0 + np.repeat(np.arange(self._layers), self._experts) / self._layers
        self._far = self._again
        self._longest = 0.0
        self._odds, self._when = np.zeros(total), np.zeros(total)
        self._last = np.full(total, -np.inf)
        self._held = np.zeros(total, dtype=bool)
        self._held[list(held)] = True
        self._ask: Callable[[], Reuse | None] | None = None
        self._known = False
        self._now = 0
        self._new: list[int] = []
        self._ranking: dict[int, _Ranking] = {}

    def begin(self, event: int, ask: Callable[[], Reuse | None] | None) -> None:
        """A step begins with *event*; what is used after it, *ask* tells when it is needed."""
        self._now = event
        self._ask, self._known = ask, False
        self._forget_ranking()

    def use(self, event: int, experts: Sequence[int]) -> None:
        """*event* uses *experts*."""
        self._now = event
        self._last[experts] = event
        self._forget_ranking()

    def _forget_ranking(self) -> None:
        """Times have changed, and what was new can be ranked."""
        self._ranking.clear()
        self._new.clear()

    def foresee(self, expert: int, event: int, chance: float) -> None:
        """*expert* will be used at *event* with *chance*."""
        self._odds[expert] = chance
        self._when[expert] = event / self._layers
        if self._ranking and self._held[expert]:
            self._ranking.clear()

    def foresee_all(
        self, experts: Sequence[int], events: Sequence[int], chances: Sequence[float]
    ) -> None:
        """:meth:`foresee` of several held experts, each of them once."""
        count = len(experts)
        where = np.fromiter(experts, np.intp, count)
        self._odds[where] = np.fromiter(chances, float, count)
        self._when[where] = np.fromiter(events, float, count) / self._layers
        self._ranking.clear()

    def forget(self, expert: int) -> None:
        """What was foreseen of *expert* is over."""
        self._odds[expert] = 0.0

    def add(self, expert: int) -> None:
        """*expert* is held now; until the next event only waves give it up."""
        self._held[expert] = True
        self._new.append(expert)

    def remove(self, expert: int) -> None:
        """*expert* is held no longer."""
        self._held[expert] = False
        ranking = self._ranking.get(expert // self._experts if self._by_layer else 0)
        if ranking is not None and ranking.copies and ranking.copies[-1] == expert:
            ranking.copies.pop()
            ranking.times.pop()

    @property
    def known(self) -> bool:
        """Whether anything is known of this step: if not, :meth:`order` has no meaning."""
        if self._ask is not None:
            reuse, self._ask = self._ask(), None
            if reuse is not None:
                self._known = True
                self._longest = float(reuse.windows[-1])
                self._far = self._now // self._layers + self._again + expected_wait(reuse)
        return self._known

    def order(self, incoming: int) -> Iterator[int]:
        """The pool of *incoming*, the farthest next use first."""
        ranking = self._ranked(incoming)
        yield from reversed(ranking.copies)
        if not ranking.whole:
            yield from reversed(self._ranked(incoming, whole=True).copies)
        yield from tuple(self._new)

    def after(self, incoming: int) -> Iterator[int]:
        """Those of :meth:`order` that are expected to be used later than *incoming* is."""
        odds, far = float(self._odds[incoming]), float(self._far[incoming])
        limit = far - odds * (far - float(self._when[incoming]))
        ranking = self._ranked(incoming)
        while True:
            for copy, time in zip(reversed(ranking.copies), reversed(ranking.times), strict=True):
                if time <= limit:
                    return
                yield copy
            if ranking.whole:
                return
            ranking = self._ranked(incoming, whole=True)

    def _ranked(self, incoming: int, *, whole: bool = False) -> _Ranking:
        """The ranking of the pool of *incoming*, all of it if *whole*, from this event."""
        pool = incoming // self._experts if self._by_layer else 0
        ranking = self._ranking.get(pool)
        if ranking is None or (not ranking.whole and (whole or not ranking.copies)):
            ranking = self._ranking[pool] = self._rank(pool, None if whole else self.FEW)
        return ranking

    def _rank(self, pool: int, few: int | None) -> _Ranking:
        """The *few* farthest of *pool* (and their equals), or all."""
        first = pool * self._experts
        held = self._held[first : first + self._experts] if self._by_layer else self._held
        copies = held.nonzero()[0] + first
        last, times = self._last.take(copies), self._far.take(copies)
        times -= self._odds.take(copies) * (times - self._when.take(copies))
        times += self._age * np.minimum((self._now - last) / self._layers, self._longest)
        # What the event itself uses stays, unless it runs in waves.
        times[last == self._now] = -np.inf
        whole = few is None or len(copies) <= few
        if not whole:
            far = (times >= np.partition(times, -few)[-few]).nonzero()[0]  # type: ignore[operator]
            copies, times, last = copies.take(far), times.take(far), last.take(far)
        order = np.lexsort((-last, times))
        return _Ranking(copies.take(order).tolist(), times.take(order).tolist(), whole)


def expected_wait(reuse: Reuse) -> FloatArray:
    """How many tokens are expected to pass each expert by before one uses it, [L * E].

    The mean of the time until use, cut off at the longest window: the sum over t of 1 - F(t),
    with the chances F of use within t tokens, straight between the windows and from F(0) = 0.
    """
    steps, weights = _weights(tuple(reuse.windows))
    wait: FloatArray = steps - weights @ reuse.chances
    return wait


@cache
def _weights(windows: tuple[int, ...]) -> tuple[int, FloatArray]:
    """The tokens of the longest of *windows*, and what the chances of each add up with."""
    known = np.array([0, *windows], dtype=float)
    steps = np.arange(1, int(known[-1]) + 1)
    weights = [np.interp(steps, known, unit).sum() for unit in np.eye(len(known))[1:]]
    return len(steps), np.asarray(weights, np.float32)
