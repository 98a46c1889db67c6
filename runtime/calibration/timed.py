"""Runs of the runtime as they were timed: what each event did, and when the host did its part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runtime.eventclock import ANSWERED, LAUNCHED, Times


class EventCounts(NamedTuple):
    """What one event did.

    *demand* and *prefetch* are moves, *changes* the entries of the table of experts that its
    graph had to be told of, *apart* whether its experts were computed before its graph; *late*
    are prefetches that were still on their way when it asked, *issued* those that it issued.
    """

    accesses: int
    demand: int
    prefetch: int
    changes: int
    apart: bool = False
    late: int = 0
    issued: int = 0

    @property
    def quiet(self) -> bool:
        """Whether the host had nothing to do but to plan, and the device nothing to wait for."""
        return not (self.demand or self.prefetch or self.changes or self.apart or self.late)


class TimedRun(NamedTuple):
    """One run: *counts* of each event by step, *times* [steps, layers, 4] and steps' seconds."""

    policy: str
    counts: Sequence[Sequence[EventCounts]]
    times: Times
    step_s: Sequence[float]

    def from_step(self, first: int) -> TimedRun:
        """The same without its first steps."""
        return self._replace(
            counts=self.counts[first:], times=self.times[first:], step_s=self.step_s[first:]
        )


def quiet_layer_s(times: Times, quiet: Callable[[int, int], bool] = lambda s, e: True) -> float:
    """Median seconds from a launch to the next answer of the same step: the device's layer.

    *quiet* tells, by step and event, whose graph waited for nothing.
    """
    lengths = (times[:, 1:, ANSWERED] - times[:, :-1, LAUNCHED]).tolist()
    kept = [
        length
        for step, row in enumerate(lengths)
        for event, length in enumerate(row)
        if quiet(step, event)
    ]
    return statistics.median(kept) if kept else math.nan


def layer_s(run: TimedRun) -> float:
    """The device's seconds of a layer of *run*: events that moved nothing. NaN without any."""
    return quiet_layer_s(run.times, lambda step, event: run.counts[step][event].quiet)
