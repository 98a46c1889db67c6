"""Keeps measurements on processor cores that run at full speed.

Two threads of the hardware share a core: while a neighbour uses the other one, be it another
program or another virtual machine, Python takes about twice as long. Which cores are shared
changes several times a second, so that a run of seconds would measure its neighbours.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

#: A core is at full speed while the same work takes at most so many times the least ever seen;
#: beside a neighbour it takes about twice as long.
TOLERANCE = 1.4

#: Rounds of the work that is timed: some 10 microseconds.
ROUNDS = 60

#: The shortest of so many counts: an interrupt is no neighbour.
TRIES = 3

#: The same for a glance. The first finds its code in no cache, after other work.
GLANCES = 2

#: How often a thread that is not measured looks whether its core is slow, in seconds: neighbours
#: come and go several times a second, and a look takes some 50 microseconds.
EVERY_S = 0.05

#: Elements of an operation that torch shares out among its threads.
SHARED_OUT = 2**20


class Cores:
    """The processor cores that the calling thread may use.

    *settle* moves that thread to one at full speed. Where a system does not let threads
    choose (all but Linux), speeds are told and nothing moves.
    """

    def __init__(
        self,
        work_s: Callable[[], float] | None = None,
        allowed: Callable[[], Collection[int]] | None = None,
        move: Callable[[Collection[int]], None] | None = None,
    ) -> None:
        self._work_s = work_s or _work_s
        self._allowed = allowed or _allowed
        self._move = move or _move
        self._best_s = math.inf
        self._at = 0
        self._next_s = 0.0

    def speed(self, tries: int = TRIES) -> float:
        """How fast this thread runs now: 1 is the fastest ever seen, half is 0.5."""
        seconds = min(self._work_s() for _ in range(tries))
        self._best_s = min(self._best_s, seconds)
        return self._best_s / seconds

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside, :meth:`settle` may move this thread; behind it all cores are allowed again.

        Blocks may lie within each other: the outermost gives the cores back.
        """
        if self._cores:
            yield
            return
        self._cores: Sequence[int] = sorted(self._allowed())
        # Threads begin where their maker may run: torch's must not all begin on one core.
        torch.ones(SHARED_OUT).add_(1)
        try:
            for _ in self._cores:
                self._next()
                self.speed()
            yield
        finally:
            cores, self._cores = self._cores, ()
            if cores:
                self._move(cores)

    _cores: Sequence[int] = ()

    def settle(self) -> float:
        """Go to a core at full speed; how fast the thread was when it was asked to.

        Tries every core once, beginning with the present one, and stays on the last if none
        is at full speed.
        """
        found = speed = self.speed()
        for _ in self._cores:
            if speed * TOLERANCE >= 1:
                break
            self._next()
            speed = self.speed()
        return found

    def settle_at_times(self) -> None:
        """:meth:`settle`, unless that was done a moment ago."""
        now = time.perf_counter()
        if now >= self._next_s:
            self._next_s = now + EVERY_S
            self.settle()

    def glance(self) -> float:
        """How fast the thread runs, for moments in which there is nothing else to do.

        It stays where it is: on another core its code is in no cache, and from event to
        event that costs more than a neighbour does.
        """
        return self.speed(GLANCES)

    def _next(self) -> None:
        self._at = (self._at + 1) % len(self._cores)
        self._move([self._cores[self._at]])


@functools.cache
def _cores() -> Cores:
    """Those of this process: the fastest ever seen is the same for all measurements."""
    return Cores()


@contextmanager
def at_full_speed(device: torch.device) -> Iterator[Cores | None]:
    """Cores to :meth:`Cores.settle` on inside, where *device* has lanes of its own.

    None with the CPU as the device: there all cores compute, and Python is the least of it.
    """
    if device.type != "cuda":
        yield None
        return
    with _cores().chosen():
        yield _cores()


class _Item:
    """Something to make, as policies and planner do."""

    __slots__ = ("first", "second")

    def __init__(self, first: int, second: int) -> None:
        self.first, self.second = first, second


def _work_s() -> float:
    """Seconds of a little Python of the kind that policies are made of."""
    begun = time.perf_counter()
    kept: dict[int, _Item] = {}
    for i in range(ROUNDS):
        kept[i & 31] = _Item(i, i + 1)
        if not i % 7:
            kept.pop(i & 31)
    return time.perf_counter() - begun


def _allowed() -> Collection[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()


def _move(cores: Collection[int]) -> None:
    os.sched_setaffinity(0, cores)
