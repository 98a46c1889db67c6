"""The host-to-device link over time: how busy, with what, and what waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from policies.recording import StepRow
from reports.figures.style import message, new_figure, styled, wrap

Floats = npt.NDArray[np.float64]

#: Bins that a run's time is cut into.
BINS = 120

BUSY, DEMAND, PREFETCH, QUEUE = "#2c6fa6", "#8c1d18", "#e8b04a", "#12263f"


@dataclass(frozen=True)
class LinkSeries:
    """One run's link in bins of time: *edges_s* has one more entry than the rest."""

    label: str
    edges_s: Floats
    utilisation: Floats
    demand_bytes_per_s: Floats
    prefetch_bytes_per_s: Floats
    queue_moves: Floats


def bin_link(
    label: str, steps: Sequence[StepRow], queue: Sequence[tuple[float, int]] = (), bins: int = BINS
) -> LinkSeries:
    """Cut the time of *steps* into *bins*; what a step did is spread evenly over it.

    *queue* holds (seconds, moves) samples; without them the moves that each step left count.
    """
    bins = max(1, min(bins, len(steps)))
    bounds = np.array([steps[0].start_s, *(row.end_s for row in steps)])
    edges = np.linspace(bounds[0], bounds[-1], bins + 1)
    if queue:
        times = np.array([bounds[0], *(at for at, _ in queue), bounds[-1]])
        waiting = np.array([0, *(moves for _, moves in queue)])
    else:
        times, waiting = bounds, np.array([row.queue_moves for row in steps])
    return LinkSeries(
        label,
        edges,
        _rate([row.link_busy_s for row in steps], bounds, edges),
        _rate([row.demand_bytes for row in steps], bounds, edges),
        _rate([row.prefetch_bytes for row in steps], bounds, edges),
        _rate(waiting * np.diff(times), times, edges),
    )


def _rate(amounts: npt.ArrayLike, times: Floats, edges: Floats) -> Floats:
    """Per second and bin, what grew by *amounts* between *times*."""
    grown = np.concatenate([[0.0], np.cumsum(amounts)])
    binned: Floats = np.diff(np.interp(edges, times, grown)) / np.diff(edges)
    return binned


@styled
def link_over_time(series: Sequence[LinkSeries]) -> Figure:
    """Utilisation, traffic by cause and queue: a panel each for one run, a row for each of many.

    The queue has no panel if nothing ever waited at the end of a step.
    """
    if not any(s.utilisation.any() for s in series):
        return message("Nothing crossed the link: every expert that was asked for was held.")
    one = len(series) == 1
    count = 3 if any(s.queue_moves.any() for s in series) else 2
    prefetch = any(s.prefetch_bytes_per_s.any() for s in series)
    figure = new_figure(0.9 + 1.7 * count if one else 1.1 + 1.15 * len(series))
    grid = figure.subplots(
        count if one else len(series), 1 if one else count, squeeze=False, sharex=True,
        sharey=False if one else "col",
    )  # fmt: skip
    panels = grid.T if one else grid
    for row, run in zip(panels, series, strict=True):
        _draw_run(row, run)
        for axes, top in zip(row, _tops(series), strict=False):
            axes.set_ylim(0, 1.05 * top)
        if not one:
            row[0].set_ylabel(wrap(run.label, 16), fontsize=8.5)
    _name_panels(panels[0], one, "traffic (GB/s)" if prefetch else "demand traffic (GB/s)")
    for axes in grid[-1]:
        axes.set_xlabel("time since the start (s)")
    grid[0, 0].set_xlim(min(s.edges_s[0] for s in series), max(s.edges_s[-1] for s in series))
    if prefetch:
        handles, names = panels[0][1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def _tops(series: Sequence[LinkSeries]) -> tuple[float, float, float]:
    """The largest value of each panel over all runs."""
    busy = max(100 * float(s.utilisation.max()) for s in series)
    both = max(float((s.demand_bytes_per_s + s.prefetch_bytes_per_s).max()) for s in series)
    return max(busy, 100.0), both / 1e9, max(float(s.queue_moves.max()) for s in series)


def _draw_run(row: Sequence[Axes], run: LinkSeries) -> None:
    busy, traffic = row[:2]
    busy.stairs(100 * run.utilisation, run.edges_s, fill=True, color=BUSY)
    demand = run.demand_bytes_per_s / 1e9
    both = demand + run.prefetch_bytes_per_s / 1e9
    traffic.stairs(demand, run.edges_s, fill=True, color=DEMAND, label="demand")
    traffic.stairs(
        both, run.edges_s, baseline=demand, fill=True, facecolor=PREFETCH, edgecolor="#6b4a00",
        hatch="////", lw=0, label="prefetch (on top of demand)",
    )  # fmt: skip
    for queue in row[2:]:
        queue.stairs(run.queue_moves, run.edges_s, color=QUEUE, lw=1.4, baseline=None)


def _name_panels(first: Sequence[Axes], one: bool, traffic: str) -> None:
    titles = ("link busy (%)", traffic, "queued moves (mean)")
    for axes, title in zip(first, titles, strict=False):
        if one:
            axes.set_ylabel(title)
        else:
            axes.set_title(title)
