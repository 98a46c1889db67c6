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
from typing import Any, NamedTuple

import numpy as np

from policies.graph_costs import Cold
from runtime.calibration.fits import Floats, line, nonnegative
from runtime.calibration.timed import EventCounts, TimedRun, layer_s
from runtime.eventclock import ANSWERED, FETCHED, LAUNCHED, PLANNED

#: Kinds of events that miss the first fit by more than so many times the median miss are left out.
OUTLIER = 6.0

#: An event counts as at most so many times the median of its kind. Means, not medians, because a
#: run consists of all of its events; a pause of the host is not the policy's.
CLIP = 10.0

#: The wait from which on it counts; the shares of the host's time that are tried for it, and for
#: how long after a wait the host is cold.
COLD_AFTER_S = 1e-4
COLD_SHARES = tuple(i / 20 for i in range(31))
COLD_MOST_S = (2e-5, 4e-5, 8e-5, 1.6e-4, 1.0)

#: A wait behind which a host is cold, if it ever is: a policy with none is taken to be as ``lru``.
LONG_S = 1e-3

#: At most so many rounds settle the time of a warm host and how much longer a cold one takes: to
#: this share of it.
ROUNDS, SETTLED = 12, 1e-4

#: Borders between waits that make events of another kind.
WAITS_S = (2.5e-4, 4e-4, 7e-4, 1.2e-3, 2.5e-3, 6e-3)


class Planning(NamedTuple):
    """Seconds of policy and planner in a run: per event, expert and demanded move.

    An event that misses anything takes *miss_s* more. Once the event has been launched,
    *prefetch_s* per prefetch, and *foresee_event_s* and *foresee_access_s* however many they
    are. *residual_s* is the median miss of the first fit. Until its plan an event takes a warm
    host so long; *cold* says what a wait adds.
    """

    event_s: float
    access_s: float
    miss_s: float
    move_s: float
    prefetch_s: float
    foresee_event_s: float = 0.0
    foresee_access_s: float = 0.0
    residual_s: float = 0.0
    cold: Cold = Cold()

    def seconds(self, counts: EventCounts) -> float:
        """What an event takes from its answer to its plan."""
        missing_s = self.miss_s + counts.demand * self.move_s if counts.demand else 0.0
        return self.event_s + counts.accesses * self.access_s + missing_s

    def foreseeing_s(self, counts: EventCounts) -> float:
        """What it takes from its launch until its prefetches are decided on."""
        looking_s = self.foresee_event_s + counts.accesses * self.foresee_access_s
        return looking_s + counts.prefetch * self.prefetch_s


class HostCosts(NamedTuple):
    """What the host takes between an answer and the launch behind it, in seconds.

    *planning* by policy; then *launching_s*, the launch itself, *first_s* before the first
    demanded copy and *issue_s* for each, *tell_s* if the table has changed and *change_s* for
    each entry, *late_s* for each prefetch that the event has to issue. *missed* is the median
    miss of this part as a share of it. These are a warm host's; *cold* says what a wait adds.
    *return_s* passes from the end of an event's work until the host can read the next answer,
    *prefetch_s* more for each prefetch that it hands over.
    """

    planning: dict[str, Planning]
    launching_s: float
    first_s: float
    issue_s: float
    tell_s: float
    change_s: float
    late_s: float
    missed: float
    cold: Cold = Cold()
    return_s: float = 0.0
    prefetch_s: float = 0.0

    def launching(self, counts: EventCounts) -> float:
        """What an event takes a warm host from its plan on."""
        issued_s = self.first_s + self.issue_s * counts.demand if counts.demand else 0.0
        told_s = self.tell_s + self.change_s * counts.changes if counts.changes else 0.0
        return self.launching_s + issued_s + told_s + self.late_s * counts.issued


def fit_host(runs: Sequence[TimedRun]) -> HostCosts:
    """The host's costs that explain its work in *runs*."""
    names = sorted({run.policy for run in runs})
    by_policy = {name: [run for run in runs if run.policy == name] for name in names}
    thought = {n: _means(of, ANSWERED, PLANNED, _planned_kind) for n, of in by_policy.items()}
    ahead = {n: _means(of, LAUNCHED, FETCHED, _fetched_kind) for n, of in by_policy.items()}
    launched = _means(runs, PLANNED, LAUNCHED, _launched_kind)
    cold = _coldness(launched)
    found, off = _robust(launched, cold)
    launching_s, first_s, issue_s, tell_s, change_s, late_s = found.tolist()
    missed = float(np.median(off / np.maximum(launched.seconds, 1e-7)))
    colds = {name: _coldness(kinds) for name, kinds in thought.items() if _has_waits(kinds)}
    others = colds.get("lru", Cold())
    planning = {
        name: _planning(kinds, ahead[name], colds.get(name, others))
        for name, kinds in thought.items()
    }
    return_s, prefetch_s = fit_return(runs)
    return HostCosts(
        planning,
        launching_s,
        first_s,
        issue_s,
        tell_s,
        change_s,
        late_s,
        missed=missed,
        cold=cold,
        return_s=return_s,
        prefetch_s=prefetch_s,
    )


def fit_return(
    runs: Sequence[TimedRun], begin: int = LAUNCHED, device_s: float | None = None
) -> tuple[float, float]:
    """Seconds from prefetches decided on to the next answer, and what each of them adds.

    From events whose answer was there before: the host was late, because the device takes no
    longer than *device_s* (by default a layer) from *begin* on. A line through the medians
    by the number of prefetches, as one of them may have waited for a large copy besides.
    Nothing if there are none.
    """
    groups: dict[int, list[float]] = {}
    for run in runs:
        late_s = layer_s(run) if device_s is None else device_s
        for counts, times in zip(run.counts, run.times.tolist(), strict=True):
            for one, now, after in zip(counts, times, times[1:], strict=False):
                busy = now[FETCHED] - now[begin] > late_s
                if busy and one.prefetch and not (one.demand or one.apart or one.late):
                    groups.setdefault(one.prefetch, []).append(after[ANSWERED] - now[FETCHED])
    if not groups:
        return 0.0, 0.0
    weights = [float(len(found)) for found in groups.values()]
    found = line(list(groups), [statistics.median(g) for g in groups.values()], weights)
    return found.alpha, found.beta


def _planned_kind(one: EventCounts) -> tuple[int, ...]:
    """What planning an event depends on."""
    return one.accesses, one.demand > 0, one.demand


def _launched_kind(one: EventCounts) -> tuple[int, ...]:
    """What launching depends on, once an event is planned."""
    return one.demand > 0, one.demand, one.changes > 0, one.changes, one.issued


def _fetched_kind(one: EventCounts) -> tuple[int, ...]:
    """What deciding on prefetches depends on, once an event is launched."""
    return one.accesses, one.prefetch


def _planning(kinds: _Kinds, ahead: _Kinds, cold: Cold) -> Planning:
    """What one policy takes from an answer to its plan, and *ahead*, then to its prefetches.

    The second follows at once: no wait makes it longer.
    """
    found, off = _robust(kinds, cold)
    event_s, access_s, miss_s, move_s = found.tolist()
    foresee_event_s, foresee_access_s, prefetch_s = _robust(ahead, Cold())[0].tolist()
    return Planning(
        event_s,
        access_s,
        miss_s,
        move_s,
        prefetch_s,
        foresee_event_s,
        foresee_access_s,
        residual_s=float(np.median(off)),
        cold=cold,
    )


class _Kinds(NamedTuple):
    """Events of one kind each: its numbers, mean seconds and wait, the root of how many."""

    kinds: list[tuple[int, ...]]
    seconds: Floats
    waits_s: Floats
    weights: Floats

    def fit(self, cold: Cold, kept: Any = slice(None)) -> tuple[Floats, Floats]:
        """The parts of a warm host's time that explain those *kept*, and what all would take."""
        columns = np.array([(1.0, *map(float, kind)) for kind in self.kinds])
        longer, told = np.ones(len(columns)), self.seconds
        colder = [cold.weight(wait_s) for wait_s in self.waits_s.tolist()]
        for _ in range(ROUNDS):
            # Relative to what is told, not to what was measured: a kind that happened to be
            # quick must not weigh more than one that happened to be slow.
            weights = (self.weights / np.maximum(told, 1e-7))[kept]
            scaled = columns[kept] * (longer[kept] * weights)[:, None]
            found = nonnegative(scaled, self.seconds[kept] * weights)
            warm = np.maximum(columns @ found, 1e-9)
            before, told = told, np.array(list(map(cold.longer, warm.tolist(), colder)))
            longer = told / warm
            if np.allclose(told, before, rtol=SETTLED, atol=0.0):
                break
        return found, told


def _means(
    runs: Sequence[TimedRun],
    begin: int,
    end: int,
    kind_of: Callable[[EventCounts], tuple[int, ...]],
) -> _Kinds:
    """Means of the stretch from *begin* to *end*, by kind and by how long the host waited before.

    Events computed apart are left out, and those of the first layer, whose wait is not known.
    A kind weighs as the root of its events, and, in a fit, relative to its length.
    """
    groups: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for run in runs:
        stretches = (run.times[:, 1:, end] - run.times[:, 1:, begin]).tolist()
        waits = (run.times[:, 1:, ANSWERED] - run.times[:, :-1, FETCHED]).tolist()
        for counts, row, waited in zip(run.counts, stretches, waits, strict=True):
            for one, seconds, wait_s in zip(counts[1:], row, waited, strict=True):
                if not one.apart:
                    kind = (*kind_of(one), int(np.searchsorted(WAITS_S, wait_s)))
                    groups.setdefault(kind, []).append((seconds, wait_s))
    seconds = np.array([_mean([s for s, _ in found]) for found in groups.values()])
    waits_s = np.array([statistics.fmean(w for _, w in found) for found in groups.values()])
    weights = np.sqrt([float(len(found)) for found in groups.values()])
    kinds = [kind[:-1] for kind in groups]
    return _Kinds(kinds, seconds, waits_s, weights)


def _mean(values: Sequence[float]) -> float:
    """The mean of *values*, of which none counts as more than :data:`CLIP` medians."""
    most = CLIP * max(statistics.median(values), 1e-9)
    return statistics.fmean(min(value, most) for value in values)


def _has_waits(kinds: _Kinds) -> bool:
    """Whether *kinds* tell what a wait does: some waited for long, some did not."""
    return bool(kinds.waits_s.max() > LONG_S > kinds.waits_s.min())


def _coldness(kinds: _Kinds) -> Cold:
    """What waits cost, as far as *kinds* tell."""
    tried = (Cold(share, COLD_AFTER_S, most) for share in COLD_SHARES for most in COLD_MOST_S)
    return min(tried, key=lambda cold: _missed(kinds, cold))


def _missed(kinds: _Kinds, cold: Cold) -> float:
    """The squares that a fit of *kinds* misses if waits cost what *cold* says."""
    _, told = kinds.fit(cold)
    return float((((told / np.maximum(kinds.seconds, 1e-7) - 1) * kinds.weights) ** 2).sum())


def _robust(kinds: _Kinds, cold: Cold) -> tuple[Floats, Floats]:
    """Least squares without negatives, and what it misses of each kind's seconds.

    Rare kinds may have been met only when the host paused: what is far off is left out.
    """
    kept = np.ones(len(kinds.seconds), dtype=bool)
    for _ in range(3):
        found, told = kinds.fit(cold, kept)
        off = np.abs(kinds.seconds - told)
        missed = off / np.maximum(kinds.seconds, 1e-7)
        kept = missed <= OUTLIER * max(float(np.median(missed)), 1e-6)
    return found, off


def more_layer_s(runs: Sequence[TimedRun], plain_s: float) -> dict[str, float]:
    """By policy, what the device's layer takes in *runs* beyond *plain_s*, that of a plain policy.

    Where a policy reads gate weights or has copies at low precision, graphs have more kernels.
    Of several runs the shortest layer counts: what else makes one longer is not the policy's.
    """
    found: dict[str, float] = {}
    for run in runs:
        more = layer_s(run) - plain_s
        if not math.isnan(more):
            found[run.policy] = max(min(more, found.get(run.policy, more)), 0.0)
    return found


def rest_of_step(runs: Sequence[TimedRun], host: HostCosts) -> float:
    """Mean seconds of a step outside its layers: before the first graph and after the last answer.

    From the steps of *runs* whose last event moved nothing; a step begins with a launch. What
    the first event takes longer than *host* says is the step's: its code was used a step ago.
    """
    rests = []
    for run in runs:
        layer, planning = layer_s(run), host.planning[run.policy]
        for counts, times, whole in zip(run.counts, run.times.tolist(), run.step_s, strict=True):
            first, last = counts[0], counts[-1]
            if last.demand or last.prefetch or first.apart or math.isnan(layer):
                continue
            first_s = planning.seconds(first) + host.launching(first)
            inside = first_s + times[-1][LAUNCHED] - times[0][LAUNCHED]
            rests.append(whole - inside - layer - host.launching_s)
    return max(_mean(rests), 1e-6) if rests else 1e-6


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
    counts, seconds, weights = _waiting(runs, host)
    if not counts:
        return Misses(0.0, 0.0, 0.0)
    found = line(counts, seconds, weights)
    known = layer + first_s
    off = [
        abs(found.alpha + found.beta * n - took) / took
        for n, took in zip(counts, seconds, strict=True)
    ]
    return Misses(max(found.alpha - known, 0.0), found.beta, statistics.median(off))


def _waiting(
    runs: Sequence[TimedRun], host: HostCosts
) -> tuple[list[int], list[float], list[float]]:
    """Numbers of copies waited for; seconds from the first to the next answer; weights."""
    groups: dict[int, list[float]] = {}
    for run in runs:
        planning, answered = host.planning[run.policy], run.times[:, :, ANSWERED]
        lengths = (answered[:, 2:] - answered[:, 1:-1]).tolist()
        waits = (answered[:, 1:-1] - run.times[:, :-2, FETCHED]).tolist()
        # Of the first layer the wait is not known, of the last no answer follows.
        for counts, row, waited in zip(run.counts, lengths, waits, strict=True):
            for one, length, wait_s in zip(counts[1:-1], row, waited, strict=True):
                if one.demand and not one.apart:
                    cold = planning.cold
                    known = cold.longer(planning.seconds(one), cold.weight(wait_s))
                    known += host.first_s + host.issue_s
                    groups.setdefault(one.demand, []).append(length - known)
    seconds = [_mean(found) for found in groups.values()]
    return list(groups), seconds, [float(len(found)) for found in groups.values()]
