"""Figures of a validation: what was predicted against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from reports.figures.style import (
    CAUSE_FILLS,
    INK,
    legend_below,
    legend_right,
    line_style,
    lines_height,
    message,
    name_rows,
    new_figure,
    percent_axis,
    rows_height,
    styled,
    wrap,
)
from reports.figures.token_time import NAMES

#: Fill of the bands within 5 % and within 10 %, and their limits.
BANDS = ((0.10, "#eceff3"), (0.05, "#d3dde8"))

SIMULATED, MEASURED, NAIVE = "#2c6fa6", "#c2452d", "#dfa637"

#: How far the axis of errors goes at least, as a share.
LEAST_REACH = 0.12


@dataclass(frozen=True)
class Point:
    """Mean seconds per output token: *measured_s*, *simulated_s*, and the naive estimate."""

    label: str
    measured_s: float
    simulated_s: float
    naive_s: float | None = None

    @property
    def error(self) -> float:
        """Simulated over measured, less 1."""
        return self.simulated_s / self.measured_s - 1

    @property
    def naive_error(self) -> float | None:
        """Naive over measured, less 1."""
        return None if self.naive_s is None else self.naive_s / self.measured_s - 1


@styled
def predicted_against_measured(series: Mapping[str, Sequence[Point]]) -> Figure:
    """Simulated over measured time per token, one mark per cell, with bands of 5 and 10 %."""
    points = [point for group in series.values() for point in group]
    if not points:
        return message("No cell has both a simulated and a measured time per output token.")
    figure = new_figure(lines_height([*series, "", ""], least=5.6))
    axes = figure.add_subplot()
    values = [1e3 * s for p in points for s in (p.measured_s, p.simulated_s)]
    low, high = 0.8 * min(values), 1.25 * max(values)
    ends = np.array([low, high])
    for width, fill in BANDS:
        axes.fill_between(
            ends, ends * (1 - width), ends * (1 + width), color=fill, lw=0, zorder=0,
            label=f"within {width:.0%}".replace("%", " %"),
        )  # fmt: skip
    axes.plot(ends, ends, color=INK, lw=1, label="equal")
    for index, (label, group) in enumerate(series.items()):
        style = line_style(index) | {"linestyle": "none", "markersize": 7}
        axes.plot(
            [1e3 * p.measured_s for p in group], [1e3 * p.simulated_s for p in group],
            label=label, **style,
        )  # fmt: skip
    for set_scale, set_limits in (
        (axes.set_xscale, axes.set_xlim), (axes.set_yscale, axes.set_ylim)
    ):  # fmt: skip
        set_scale("log")
        set_limits(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(FuncFormatter(_few(high / low)))
    axes.tick_params(which="minor", pad=5)  # as far from the axis as the longer major ticks
    axes.set_aspect("equal")
    axes.set_xlabel("measured: mean time per output token (ms)")
    axes.set_ylabel("simulated (ms)")
    legend_right(figure, axes)
    return figure


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _few(span: float) -> Callable[[float, int | None], str]:
    """Names for minor ticks: those of 2 and 5 only, unless the axis is short."""

    def text(value: float, _: int | None = None) -> str:
        first = round(value / 10 ** np.floor(np.log10(value)), 6)
        return f"{value:g}" if first in (2, 5) or span < 3 else ""

    return text


@styled
def signed_errors(points: Sequence[Point]) -> Figure:
    """Signed error of every cell; beside it, on its own axis, that of the naive estimate."""
    if not points:
        return message("No cell has both a simulated and a measured time per output token.")
    labels = [point.label for point in points]
    figure = new_figure(rows_height(labels, each=0.3, around=1.5))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    errors = [point.error for point in points]
    reach = max([LEAST_REACH, *(1.1 * abs(error) for error in errors)])
    for width, fill in BANDS:
        left.axvspan(-100 * width, 100 * width, color=fill, lw=0, zorder=0)
    left.barh(range(len(points)), [100 * e for e in errors], 0.66, color=SIMULATED)
    for row, error in enumerate(errors):
        _tag(left, row, error)
    left.set_xlim(-118 * reach, 118 * reach)
    left.set_xlabel("simulator: simulated over measured, less 1 (%)")
    naive = [100 * (point.naive_error or 0.0) for point in points]
    right.barh(range(len(points)), naive, 0.66, color=NAIVE, hatch="//", edgecolor="white", lw=0.4)
    right.set_xlabel("bytes over bandwidth alone (%)")
    right.set_xlim(min(-100.0, 1.1 * min(naive)), max(20.0, 1.1 * max(naive)))
    for axes in (left, right):
        axes.axvline(0, color=INK, lw=1)
    name_rows(left, labels)
    right.tick_params(axis="y", length=0)
    right.grid(False, axis="y")
    right.spines["left"].set_visible(False)
    return figure


def _tag(axes: Axes, row: int, error: float) -> None:
    """The error in figures at the end of its bar."""
    side = 1 if error >= 0 else -1
    axes.annotate(
        f"{100 * error:+.1f}", (100 * error, row),
        xytext=(4 * side, 0), textcoords="offset points", va="center", fontsize=8.5,
        ha="left" if side > 0 else "right",
    )  # fmt: skip


@styled
def both_breakdowns(
    rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]],
) -> Figure:
    """Seconds per output token by cause: (label, simulated, measured), one bar under the other."""
    if not any(sum(parts.values()) for _, *both in rows for parts in both):
        return message("No decode steps in these cells: there is no time per output token.")
    labels = [label for label, _, _ in rows]
    figure = new_figure(rows_height(labels, each=0.58, around=1.7))
    axes = figure.add_subplot()
    most = max(sum(parts.values()) for _, *both in rows for parts in both)
    for row, (_, simulated, measured) in enumerate(rows):
        for shift, name, parts in ((-0.19, "simulated", simulated), (0.19, "measured", measured)):
            _stack(axes, row + shift, parts)
            axes.annotate(
                f"{1e3 * sum(parts.values()):.2f} ms {name}",
                (1e3 * sum(parts.values()), row + shift), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=8.5,
            )  # fmt: skip
    name_rows(axes, labels)
    axes.set_xlim(0, 1.28e3 * most)
    axes.set_xlabel("mean time per output token (ms)")
    drawn = [c for c in CAUSE_FILLS if any(parts.get(c) for _, *both in rows for parts in both)]
    figure.legend(
        [_patch(cause) for cause in drawn], [NAMES[cause] for cause in drawn],
        loc="outside lower center", ncols=2 if len(drawn) == 4 else 3,
    )  # fmt: skip
    return figure


def _patch(cause: str) -> Patch:
    """The fill of *cause* for a legend."""
    fill, hatch = CAUSE_FILLS[cause]
    return Patch(facecolor=fill, hatch=hatch, edgecolor="white", linewidth=0.5)


def _stack(axes: Axes, row: float, parts: Mapping[str, float]) -> None:
    start = 0.0
    for cause, (fill, hatch) in CAUSE_FILLS.items():
        width = 1e3 * parts.get(cause, 0.0)
        if width > 0:
            axes.barh(
                row, width, 0.34, start, color=fill, hatch=hatch, edgecolor="white", linewidth=0.5
            )
        start += width


@styled
def step_distributions(
    panels: Sequence[tuple[str, Sequence[float], Sequence[float]]],
) -> Figure:
    """Share of decode steps that took no longer: (label, simulated, measured) quantiles each.

    The quantiles are evenly spaced from 0 to 1, in seconds.
    """
    if not panels:
        return message("No decode steps in these cells: there is no distribution to draw.")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(0.8 + 2.9 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (label, simulated, measured) in zip(grid.flat, panels, strict=False):
        for seconds, name, colour, dash in (
            (measured, "measured", MEASURED, "-"),
            (simulated, "simulated", SIMULATED, (0, (4, 1.5))),
        ):
            shares = np.linspace(0, 100, len(seconds))
            axes.plot(1e3 * np.array(seconds), shares, color=colour, ls=dash, label=name)
        percent_axis(axes, "y")
        axes.set_title(wrap(label, 34), fontsize=9.5)
        axes.set_xlim(left=0)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("decode step (ms)")
    for axes in grid[:, 0]:
        axes.set_ylabel("steps (%)")
    legend_below(figure, grid[0][0], 2)
    figure.align_labels()
    return figure
