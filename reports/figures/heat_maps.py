"""Heat maps over layers and experts: what is demanded, and what is held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from reports.figures.style import new_figure, styled, wrap

Grid = npt.NDArray[Any]

#: Inches of each row of panels.
ROW_HEIGHT = 2.1


@styled
def heat_maps(popularity: Grid, residency: Mapping[str, Grid]) -> Figure:
    """How often each expert is demanded and, per run, how often it is held.

    *popularity* [layers, experts] is the share of steps that demand the expert, each of
    *residency* the share of steps at whose end it holds a slot.
    """
    runs = len(residency)
    rows = math.ceil(runs / _columns(runs))
    if runs == 1:
        figure = new_figure(3.2)
        left, right = figure.subfigures(1, 2, squeeze=False).reshape(-1)
    else:
        figure = new_figure(2.6 + 0.3 + ROW_HEIGHT * rows)
        heights = [2.6, 0.3 + ROW_HEIGHT * rows]
        left, right = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).reshape(-1)
    axes = left.subplots()
    demanded = _draw(axes, popularity, "demanded", top=None)
    left.colorbar(demanded, ax=axes, label="demanded in % of steps")
    _draw_runs(right, residency)
    return figure


def _columns(runs: int) -> int:
    """Panels beside each other."""
    return 2 if runs in (2, 4) else min(runs, 3)


def _draw_runs(figure: SubFigure, residency: Mapping[str, Grid]) -> None:
    """One panel per run, all on one scale."""
    columns = _columns(len(residency))
    rows = math.ceil(len(residency) / columns)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).reshape(-1)
    for place, (label, grid) in zip(axes, residency.items(), strict=False):
        held = _draw(place, grid, f"held: {label}", top=100.0)
        place.label_outer()
    for unused in axes[len(residency) :]:
        unused.set_visible(False)
    # An axes above an unused one is the last of its column.
    for place in axes[max(len(residency) - columns, 0) : len(residency)]:
        place.set_xlabel("expert")
        place.tick_params(labelbottom=True)
    figure.colorbar(held, ax=list(axes), label="held at the end of % of steps", aspect=30)


def _draw(axes: Axes, grid: Grid, title: str, top: float | None) -> AxesImage:
    image = axes.imshow(
        100 * grid, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    axes.grid(False)
    axes.set_title(wrap(title, 38), fontsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 8, 10]))
    return image
