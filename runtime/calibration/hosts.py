"""Host costs from whole runs of the runtime: arithmetic on step times and known counts.

The time of a decode step is a sum: what the model's graphs take, what every step and every
answer and launch take, and what the host does between an answer and the next launch. The
last is fitted here. What policy and planner take when they are replayed alone
(:class:`.fits.Thinking`) says how a policy's time divides over events, experts and moves.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from runtime.calibration.fits import Floats, Thinking, nonnegative

#: Steps that miss the first fit by more than so many times the median miss are left out.
OUTLIER = 5.0


class StepCounts(NamedTuple):
    """What one decode step did.

    *demand* and *prefetch* are moves, *waiting* the events that missed something, *updated*
    those before which the table of experts changed.
    """

    events: int
    accesses: int
    demand: int
    prefetch: int
    waiting: int
    updated: int


class TimedRun(NamedTuple):
    """Steps of one run, with their seconds on the host's clock."""

    policy: str
    batch: int
    counts: Sequence[StepCounts]
    seconds: Sequence[float]


class HostCosts(NamedTuple):
    """What the host takes in a run beside what planners take alone, in seconds.

    *engine_s* per event, *issue_s* per demanded copy, *update_s* per change of the table;
    *slower* says by policy how many times as long planning takes as when it is replayed
    alone. *missed* is the median share of a step's time by which the fit is off.
    """

    engine_s: float
    issue_s: float
    update_s: float
    slower: dict[str, float]
    missed: float


class Quiet(NamedTuple):
    """What a step takes without the host's work: *rest_s* once, *layer_s* per layer by batch.

    A layer's part is its graph with its experts, the answer's way to the host and the launch.
    """

    rest_s: float
    layer_s: Mapping[int, float]

    def step_s(self, run: TimedRun, counts: StepCounts) -> float:
        """Seconds of one step of *run* with a host that takes no time."""
        return self.rest_s + counts.events * self.layer_s[run.batch]


def planning_s(thinking: Thinking, counts: StepCounts) -> float:
    """Seconds of policy and planner in one step, as replayed alone."""
    moves = counts.demand + counts.prefetch
    return (
        counts.events * thinking.event_s
        + counts.accesses * thinking.access_s
        + moves * thinking.move_s
    )


def fit_host(
    runs: Sequence[TimedRun],
    quiet: Quiet,
    thinking: Mapping[str, Thinking],
    before_s: float = 0.0,
) -> HostCosts:
    """The host's costs that explain the times of *runs*, in which copies hardly take any.

    *before_s* of every event that misses anything is known already, from :func:`miss_s`. Least
    squares of relative misses, no part below 0, outliers left out.
    """
    names = sorted({run.policy for run in runs})
    rows, values, whole = [], [], []
    for run in runs:
        at = names.index(run.policy)
        for counts, seconds in zip(run.counts, run.seconds, strict=True):
            planned = [0.0] * len(names)
            planned[at] = planning_s(thinking[run.policy], counts)
            rows.append([counts.events, counts.demand, counts.updated, *planned])
            values.append(seconds - quiet.step_s(run, counts) - before_s * counts.waiting)
            whole.append(seconds)
    found, missed = _robust(np.array(rows, float), np.array(values), np.array(whole))
    engine_s, issue_s, update_s, *slower = found
    return HostCosts(engine_s, issue_s, update_s, dict(zip(names, slower, strict=True)), missed)


def _robust(columns: Floats, values: Floats, whole: Floats) -> tuple[list[float], float]:
    """Coefficients, and the median of the misses as shares of *whole*."""
    kept = np.ones(len(values), dtype=bool)
    for _ in range(2):
        found = nonnegative(columns[kept] / whole[kept, None], values[kept] / whole[kept])
        off = np.abs(values - columns @ found) / whole
        median = float(np.median(off[kept]))
        kept = off <= OUTLIER * max(median, 1e-9)
    return found.tolist(), median


def rest_of_step(depths: Sequence[int], step_s: Sequence[float]) -> float:
    """Seconds of a step outside its layers, from quiet steps of models of several depths."""
    slope, rest = np.polyfit(np.asarray(depths, float), np.asarray(step_s, float), 1)
    return max(float(rest), 1e-6) if slope > 0 else 1e-6


class Waits(NamedTuple):
    """Seconds of an event's first copy and of each further one, of waking up, of a launch."""

    first_s: float
    next_s: float
    wake_s: float
    launch_s: float


def miss_s(
    runs: Sequence[TimedRun],
    quiet: Quiet,
    thinking: Mapping[str, Thinking],
    host: HostCosts,
    waits: Waits,
) -> tuple[float, float]:
    """Host seconds before the first copy of an event that misses anything, and what is off.

    From *runs* without prefetches whose copies take far longer than issuing them: what such
    an event takes beyond planning, its copies and waking up; the launch is over by then. The
    second figure is a median share of a step.
    """
    event_s = waits.first_s - waits.next_s + waits.wake_s - waits.launch_s
    left, waiting, whole = [], [], []
    for run in runs:
        for counts, seconds in zip(run.counts, run.seconds, strict=True):
            known = quiet.step_s(run, counts) + counts.events * host.engine_s
            known += host.slower.get(run.policy, 1.0) * planning_s(thinking[run.policy], counts)
            known += counts.waiting * event_s + counts.demand * waits.next_s
            if counts.waiting:
                left.append((seconds - known) / counts.waiting)
                waiting.append(counts.waiting)
                whole.append(seconds)
    if not left:
        return 0.0, 0.0
    found = max(statistics.median(left), 0.0)
    off = (
        abs(one - found) * count / seconds
        for one, count, seconds in zip(left, waiting, whole, strict=True)
    )
    return found, statistics.median(off)


def in_profile(thinking: Thinking, slower: float, engine_s: float) -> Thinking:
    """*thinking* as it is in a run: its parts are longer, an event has the engine's work too."""
    return thinking._replace(
        event_s=engine_s + slower * thinking.event_s,
        access_s=slower * thinking.access_s,
        move_s=slower * thinking.move_s,
    )


def typical(slower: Mapping[str, float]) -> float:
    """How much slower planning is in a run for a policy that was not run."""
    return statistics.median(slower.values()) if slower else 1.0
