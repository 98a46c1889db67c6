"""How time per output token is spread: most users feel the slow ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from reports.figures.style import (
    INK,
    legend_right,
    line_style,
    lines_height,
    message,
    new_figure,
    percent_axis,
    styled,
)

#: Quantiles drawn, so that a long run makes no larger file than a short one.
QUANTILES = np.linspace(0, 1, 401)


@styled
def tpot_distribution(seconds: Mapping[str, npt.NDArray[np.float64]]) -> Figure:
    """The share of output tokens that took no longer than so many milliseconds.

    *seconds* holds, per run, one entry per output token.
    """
    drawn = {label: values for label, values in seconds.items() if len(values)}
    if not drawn:
        return message("No decode steps were recorded: there is no distribution to draw.")
    figure = new_figure(lines_height(list(drawn)))
    axes = figure.add_subplot()
    for index, (label, values) in enumerate(drawn.items()):
        style = line_style(index) | {"markevery": (10 + 7 * index, 100)}
        axes.plot(1e3 * np.quantile(values, QUANTILES), 100 * QUANTILES, label=label, **style)
    for level in (50, 90, 99):
        axes.axhline(level, color="#b0b0b0", lw=0.8, ls=(0, (3, 3)), zorder=1)
        axes.annotate(
            f"p{level}", (0, level), xycoords=("axes fraction", "data"),
            xytext=(3, -2), textcoords="offset points", va="top", fontsize=8.5, color=INK,
        )  # fmt: skip
    percent_axis(axes, "y")
    axes.set_xlabel("time per output token (ms)")
    axes.set_ylabel("output tokens (%)")
    legend_right(figure, axes)
    return figure
