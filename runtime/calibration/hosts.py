"""Host costs from single events of whole runs: arithmetic on moments and known counts.

Between a gate's answer and the launch of the next graph the host works and the device idles:
what lies between the two is policy, planner, copies issued and the table of experts changed.
Between that launch and the next answer the device works, and waits for copies, while policy and
planner decide on prefetches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.bank import FEW
from runtime.calibration.fits import Floats, line, nonnegative
from runtime.eventclock import ANSWERED, FETCHED, LAUNCHED, PLANNED, Times

#: Kinds of events that miss the first fit by more than so many times the median miss are left out.
OUTLIER = 6.0


class EventCounts(NamedTuple):
    """What one event did.

    *demand* and *prefetch* are moves, *changes* the entries of the table of experts that its
    graph had to be told of, *apart* whether its experts were computed before its graph.
    """

    accesses: int
    demand: int
    prefetch: int
    changes: int
    apart: bool = False

    @property
    def quiet(self) -> bool:
        """Whether the host had nothing to do but to plan."""
        return not (self.demand or self.prefetch or self.changes or self.apart)


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


class Planning(NamedTuple):
    """Seconds of policy and planner in a run: per event, expert and demanded move.

    Once the event has been launched, *prefetch_s* per prefetch, and *foresee_event_s* and
    *foresee_access_s* however many they are. *residual_s* is the median miss of the first fit.
    """

    event_s: float
    access_s: float
    move_s: float
    prefetch_s: float
    foresee_event_s: float = 0.0
    foresee_access_s: float = 0.0
    residual_s: float = 0.0

    def seconds(self, counts: EventCounts) -> float:
        """What an event takes from its answer to its plan."""
        return self.event_s + counts.accesses * self.access_s + counts.demand * self.move_s

    def foreseeing_s(self, counts: EventCounts) -> float:
        """What it takes from its launch until its prefetches are decided on."""
        looking_s = self.foresee_event_s + counts.accesses * self.foresee_access_s
        return looking_s + counts.prefetch * self.prefetch_s


class HostCosts(NamedTuple):
    """What the host takes between an answer and the launch behind it, in seconds.

    *planning* by policy; then *launching_s* once, *issue_s* per demanded copy and *change_s*
    per entry of the table. The launch itself is not in them. *missed* is the median miss of
    the second part as a share of it.
    """

    planning: dict[str, Planning]
    launching_s: float
    issue_s: float
    change_s: float
    missed: float


def capped(changes: int) -> int:
    """Entries that cost as single writes: many go to the device together instead."""
    return min(changes, FEW + 1)


def fit_host(runs: Sequence[TimedRun], launch_s: float) -> HostCosts:
    """The host's costs that explain its work in *runs*; *launch_s* of each event is known."""
    names = sorted({run.policy for run in runs})
    planning = {name: _fit_planning([r for r in runs if r.policy == name]) for name in names}
    kinds = _medians(runs, PLANNED, LAUNCHED, lambda one: (one.demand, capped(one.changes)))
    columns = [(1.0, *map(float, kind)) for kind in kinds.kinds]
    found, off = _robust(columns, np.maximum(kinds.seconds - launch_s, 0.0), kinds.weights)
    launching_s, issue_s, change_s = found.tolist()
    missed = float(np.median(off / kinds.seconds))
    return HostCosts(planning, launching_s, issue_s, change_s, missed)


def _fit_planning(runs: Sequence[TimedRun]) -> Planning:
    """What one policy takes from an answer to its plan, and then to its prefetches."""
    kinds = _medians(runs, ANSWERED, PLANNED, lambda one: (one.accesses, one.demand))
    found, off = _fit(kinds)
    event_s, access_s, move_s = found.tolist()
    ahead = _medians(runs, LAUNCHED, FETCHED, lambda one: (one.accesses, one.prefetch))
    foresee_event_s, foresee_access_s, prefetch_s = _fit(ahead)[0].tolist()
    return Planning(
        event_s,
        access_s,
        move_s,
        prefetch_s,
        foresee_event_s,
        foresee_access_s,
        residual_s=float(np.median(off)),
    )


class _Kinds(NamedTuple):
    """Events of one kind each: its numbers, median seconds, and what it weighs in a fit."""

    kinds: list[tuple[int, ...]]
    seconds: Floats
    weights: Floats


def _fit(kinds: _Kinds) -> tuple[Floats, Floats]:
    """A constant and a part for each of the numbers of *kinds*; and what that misses."""
    columns = [(1.0, *map(float, kind)) for kind in kinds.kinds]
    return _robust(columns, kinds.seconds, kinds.weights)


def _medians(
    runs: Sequence[TimedRun],
    begin: int,
    end: int,
    kind_of: Callable[[EventCounts], tuple[int, ...]],
) -> _Kinds:
    """Medians of the stretch from *begin* to *end*; events computed apart are left out.

    A kind weighs as the root of its events, and relative to its length.
    """
    groups: dict[tuple[int, ...], list[float]] = {}
    for run in runs:
        stretches = (run.times[:, :, end] - run.times[:, :, begin]).tolist()
        for counts, row in zip(run.counts, stretches, strict=True):
            for one, seconds in zip(counts, row, strict=True):
                if not one.apart:
                    groups.setdefault(kind_of(one), []).append(seconds)
    seconds = np.array([statistics.median(found) for found in groups.values()])
    weights = np.sqrt([float(len(found)) for found in groups.values()])
    return _Kinds(list(groups), seconds, weights / np.maximum(seconds, 1e-7))


def _robust(
    rows: Sequence[tuple[float, ...]], values: Floats, weights: Floats
) -> tuple[Floats, Floats]:
    """Least squares without negatives, and what it misses of each of *values*.

    Rare kinds may have been met only when the host paused: what is far off is left out.
    """
    columns, kept = np.array(rows, float), np.ones(len(values), dtype=bool)
    for _ in range(3):
        found = nonnegative((columns * weights[:, None])[kept], (values * weights)[kept])
        off = np.abs(values - columns @ found)
        share = off / np.maximum(values, 1e-7)
        kept = share <= OUTLIER * max(float(np.median(share)), 1e-6)
    return found, off


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


def rest_of_step(run: TimedRun, launch_s: float) -> float:
    """Seconds of a step outside its layers: before the first graph and after the last answer.

    From the steps of *run* that moved nothing; a step begins with a launch.
    """
    layer, rests = layer_s(run), []
    for counts, times, whole in zip(run.counts, run.times, run.step_s, strict=True):
        if all(one.quiet for one in counts):
            inside = float(times[-1, LAUNCHED] - times[0, ANSWERED])
            rests.append(whole - inside - layer - launch_s)
    return max(statistics.median(rests), 1e-6) if rests else 1e-6


class Misses(NamedTuple):
    """What an event that misses takes: *start_s* beyond what is known, then *copy_s* each.

    *missed* is the median share of such an event by which that is off.
    """

    start_s: float
    copy_s: float
    missed: float


def fit_misses(runs: Sequence[TimedRun], layer: float, host: HostCosts, first_s: float) -> Misses:
    """From *runs* without prefetches whose copies take far longer than issuing them.

    Known are planning, the first issue, the device's *layer* and *first_s*: by how much the
    first copy takes longer than those behind it, and the wake behind the last. What copies
    take is fitted too: it need not be what it was when they were measured alone.
    """
    kinds = _medians_of_waiting(runs, host)
    if not kinds.kinds:
        return Misses(0.0, 0.0, 0.0)
    found = line([kind[0] for kind in kinds.kinds], kinds.seconds.tolist(), kinds.weights.tolist())
    known = layer + first_s
    off = [
        abs(found.alpha + found.beta * kind[0] - seconds) / seconds
        for kind, seconds in zip(kinds.kinds, kinds.seconds.tolist(), strict=True)
    ]
    return Misses(max(found.alpha - known, 0.0), found.beta, statistics.median(off))


def _medians_of_waiting(runs: Sequence[TimedRun], host: HostCosts) -> _Kinds:
    """By the number of copies waited for: seconds from the first copy to the next answer."""
    groups: dict[tuple[int, ...], list[float]] = {}
    for run in runs:
        planning = host.planning[run.policy]
        lengths = run.times[:, 1:, ANSWERED] - run.times[:, :-1, ANSWERED]
        for counts, row in zip(run.counts, lengths.tolist(), strict=True):
            for one, length in zip(counts, row, strict=False):
                if one.demand and not one.apart:
                    before = planning.seconds(one) + host.issue_s
                    groups.setdefault((one.demand,), []).append(length - before)
    seconds = np.array([statistics.median(found) for found in groups.values()])
    weights = np.array([float(len(found)) for found in groups.values()])
    return _Kinds(list(groups), seconds, weights)
