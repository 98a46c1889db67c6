"""Which figures a set of runs has, with the words that say how to read each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from policies.recording import Recording
from policies.result import Result
from policies.routing import DECODE
from reports.figures.bounds import Standing, against_bounds
from reports.figures.distribution import tpot_distribution
from reports.figures.heat_maps import heat_maps
from reports.figures.link import bin_link, link_over_time
from reports.figures.memory import speed_against_memory
from reports.figures.miss_ratio import miss_ratio_curves
from reports.figures.prefetch import prefetch_quality
from reports.figures.token_time import time_per_token
from reports.labels import by_setting, labels, series_labels
from reports.metrics import (
    GIB,
    belady_missed_ratio,
    full_gpu_bytes,
    gpu_bytes,
    limit_tokens_per_s,
    missed_ratio,
    resident_tokens_per_s,
    token_cycle,
    token_time,
    tokens_per_s,
    total_experts,
)

P = TypeVar("P")

#: Label -> (slots, missed ratio) of each point of a miss-ratio curve.
Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Chart:
    """A figure with its file name (no suffix), its title and how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Runs:
    """Results, the recordings of some of them by index, and extra miss-ratio curves."""

    results: Sequence[Result]
    recordings: Mapping[int, Recording]
    curves: Curves

    @property
    def named(self) -> list[tuple[str, Result]]:
        """Every run under its label."""
        return list(zip(labels(self.results), self.results, strict=True))

    @property
    def recorded(self) -> list[tuple[str, Recording]]:
        """The runs that were recorded, under their labels."""
        names = labels(self.results)
        return [(names[i], self.recordings[i]) for i in sorted(self.recordings)]


def charts(
    results: Sequence[Result],
    recordings: Mapping[int, Recording] | None = None,
    curves: Curves | None = None,
) -> list[Chart]:
    """Every figure that the runs allow; those over time need recordings (by result index)."""
    runs = Runs(results, recordings or {}, curves or {})
    drawn = [_token_time(runs), _bounds(runs), _memory(runs), _prefetch(runs)]
    if len({total_experts(r) for r in results}) == 1:
        drawn.insert(2, _miss_ratio(runs))
    if runs.recordings:
        drawn += [_distribution(runs), _link(runs)]
        shapes = {(r.context.layers, r.context.experts) for r in runs.recordings.values()}
        if len(shapes) == 1:
            drawn.append(_heat_maps(runs))
    return drawn


def _by_series(results: Sequence[Result], points: Sequence[P]) -> dict[str, list[P]]:
    """The points of runs that differ in nothing but their budget, under one label."""
    series: dict[str, list[P]] = {}
    for label, point in zip(series_labels(results), points, strict=True):
        series.setdefault(label, []).append(point)
    return series


def _token_time(runs: Runs) -> Chart:
    times = [token_time(r, runs.recordings.get(i)) for i, r in enumerate(runs.results)]
    names = labels(runs.results)
    caption = (
        "One bar per run, as long as its mean time per output token (TPOT); the parts say what "
        "the GPU did or waited for in that time. Stalls (hatched) are what a better policy can "
        "win; host time is what a better runtime can win."
    )
    if any(time.whole_run for time in times):
        caption += (
            " Where only the breakdown of the whole run is known, its shares, prompts included, "
            "are laid over the TPOT."
        )
    bars = [(name, time.parts_s) for name, time in zip(names, times, strict=True)]
    return Chart("token-time", "Time per output token by cause", caption, time_per_token(bars))


def _bounds(runs: Runs) -> Chart:
    standings = [
        Standing(
            name,
            r.bounds["compute_s"],
            r.bounds["transfer_s"],
            r.time["total_s"],
            bool(r.policy.get("exact", True)),
        )
        for name, r in runs.named
    ]
    caption = (
        "Each run's whole time over two bounds: computing with every expert on the GPU, and "
        "moving the least number of experts (Belady's) at link speed. The black line is the "
        "larger of the two: no exact run on the GPU alone can end before it. What lies between "
        "the line and the end of the bar is all that there is to win."
    )
    return Chart("bounds", "Against the bounds", caption, against_bounds(standings))


def _miss_ratio(runs: Runs) -> Chart:
    first = runs.results[0]
    alike = len(by_setting(runs.results)) == 1
    own = _by_series(runs.results, [(r.slots, missed_ratio(r)) for r in runs.results])
    if alike:
        own["belady"] = sorted({(r.slots, belady_missed_ratio(r)) for r in runs.results})
    popularity = None
    if runs.recordings and alike:
        popularity = next(iter(runs.recordings.values())).uses
    figure = miss_ratio_curves(
        runs.curves,
        total_experts(first),
        runs=own,
        popularity=popularity,
        cycle=token_cycle(first) if first.pool == "global" else None,
    )
    caption = (
        "The share of accesses whose expert had no slot, against the size of the cache: lower is "
        "better, and a line's slope is what more memory buys. Marks are the runs of this report, "
        "lines without marks are replays (of a long trace, of its first steps). Belady misses "
        "least of all that load on demand; a policy that prefetches can lie below it, for more "
        "moves. The dashed upright marks the experts that one token goes through: with fewer "
        "slots, LRU has given every expert away before its layer comes round again."
    )
    if popularity is not None:
        caption += (
            " The dotted line is what Che's approximation expects of LRU if experts were drawn "
            "independently by their popularity: above it the order of the layers hurts, below it "
            "tokens repeat their predecessors' experts."
        )
    return Chart("miss-ratio", "Miss-ratio curves", caption, figure)


def _memory(runs: Runs) -> Chart:
    points = [(gpu_bytes(r) / GIB, tokens_per_s(r)) for r in runs.results]
    speed = _by_series(runs.results, points)
    limit = {}
    if len(by_setting(runs.results)) == 1:
        limit = {gpu_bytes(r) / GIB: limit_tokens_per_s(r) for r in runs.results}
        limit |= {full_gpu_bytes(r) / GIB: resident_tokens_per_s(r) for r in runs.results}
    prompts = any(r.time["prefill_s"] > 0 for r in runs.results)
    caption = "Tokens per second over the whole run, against all the GPU memory that the run needs."
    if limit:
        caption += (
            " The hatched area above the limit is out of reach for exact policies with that "
            "memory: computing or Belady's moves alone would take longer. It ends at the memory "
            "that holds every expert; between two budgets that of the larger one is drawn."
        )
    if prompts:
        caption += " The tokens of prompts are counted in, since the whole run is timed."
    figure = speed_against_memory(speed, sorted(limit.items()), prompts=prompts)
    return Chart("memory", "Speed against GPU memory", caption, figure)


def _prefetch(runs: Runs) -> Chart:
    bars = [(name, r.prefetch if r.moves["prefetch"] else None) for name, r in runs.named]
    caption = (
        "Accuracy: of the prefetched copies that crossed the link, those that were used before "
        "they were evicted. Coverage: of all loads that the demand needed, those a prefetch had "
        "made. Timeliness: of the used ones, those that had landed when the gate asked. Low "
        "accuracy wastes the link, low coverage leaves stalls, low timeliness makes late ones."
    )
    title = "Prefetch accuracy, coverage and timeliness"
    return Chart("prefetch", title, caption, prefetch_quality(bars))


def _distribution(runs: Runs) -> Chart:
    seconds = {name: _token_seconds(recording) for name, recording in runs.recorded}
    caption = (
        "The share of output tokens that took no longer than the time below. A steep line is a "
        "steady run; where it bends to the right, some tokens stall. The dashed lines mark the "
        "median, the 90th and the 99th percentile."
    )
    title = "Spread of time per output token"
    return Chart("distribution", title, caption, tpot_distribution(seconds))


def _token_seconds(recording: Recording) -> npt.NDArray[np.float64]:
    """Seconds of every output token: each of a batch takes as long as its step."""
    rows = [row for row in recording.steps if row.phase == DECODE]
    took = np.array([row.end_s - row.start_s for row in rows], dtype=np.float64)
    return np.repeat(took, np.array([row.tokens for row in rows], dtype=np.int64))


def _link(runs: Runs) -> Chart:
    series = [bin_link(name, rec.steps, rec.queue) for name, rec in runs.recorded]
    caption = (
        "The host-to-device link over the run: the share of time it copies, what it carries (on "
        "demand, and by prefetch on top), and how many moves wait in the queue (no panel if none "
        "ever does). A copy counts in the step that issued it. A link near "
        "100 % is the bottleneck; one that idles beside stalls leaves room for prefetching."
    )
    return Chart("link", "Link utilisation and queue", caption, link_over_time(series))


def _heat_maps(runs: Runs) -> Chart:
    held = {}
    for name, recording in runs.recorded:
        shape = (recording.context.layers, recording.context.experts)
        held[name] = recording.held_steps.reshape(shape) / max(len(recording.steps), 1)
    first = next(iter(runs.recordings.values()))
    uses = first.uses.reshape(first.context.layers, -1) / max(len(first.steps), 1)
    caption = (
        "Layers from top to bottom, experts from left to right. First how often the steps demand "
        "each expert, then per run how often it holds a slot at the end of a step. A policy "
        "that follows popularity repeats the first picture; a dark row is a layer that starves."
    )
    return Chart("heat-maps", "Popularity and residency", caption, heat_maps(uses, held))
