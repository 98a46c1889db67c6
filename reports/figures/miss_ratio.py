"""Miss-ratio curves: what each policy misses at every size of the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from reports.che import lru_miss_ratio
from reports.figures.style import (
    FAINT,
    legend_right,
    line_style,
    lines_height,
    new_figure,
    percent_axis,
    styled,
)

#: The label that is drawn as the bound, and what the legend calls it.
BELADY = "belady"
BOUND = "Belady (knows the future)"
CYCLE = "the experts of one token"
THEORY = "LRU in theory (Che), independent accesses"

_BOUND_STYLE: dict[str, Any] = {"color": "black", "linewidth": 2.2, "marker": "*", "markersize": 9}

#: Points at which the theory's line is drawn.
THEORY_POINTS = 60

Points = Sequence[tuple[int, float]]


@styled
def miss_ratio_curves(
    curves: Mapping[str, Points],
    total: int,
    *,
    runs: Mapping[str, Points] | None = None,
    popularity: npt.NDArray[Any] | None = None,
    cycle: int | None = None,
) -> Figure:
    """Missed share of the accesses against the cache's share of the *total* experts.

    *curves* and *runs* hold (slots, missed ratio) by label: curves give lines, runs marks, which
    are joined where their label has no curve. *popularity*, uses per expert, gives the theory's
    line; *cycle* marks the slots that one token goes through.
    """
    marks = runs or {}
    names = list(dict.fromkeys([*marks, *curves]))
    names.sort(key=lambda name: name == BELADY)
    figure = new_figure(lines_height([*names, BOUND, THEORY, CYCLE]))
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        style = _BOUND_STYLE if name == BELADY else line_style(index)
        points = marks.get(name, ())
        if name in curves and points:
            axes.plot(*_percent(points, total), **{**style, "linestyle": ""})
        # The runs' own budgets bend the line too, or it would cut the corner at LRU's cliff.
        line = list({**dict(points), **dict(curves.get(name, ()))}.items())
        bare: dict[str, Any] = {"markevery": []} if name in curves and len(line) > 1 else {}
        label = BOUND if name == BELADY else name
        axes.plot(*_percent(line, total), label=label, **(style | bare))
    if popularity is not None and popularity.any():
        theory = [(s, lru_miss_ratio(popularity, s)) for s in _sizes(total)]
        axes.plot(*_percent(theory, total), color=FAINT, ls=":", lw=2.2, label=THEORY)
    if cycle is not None and cycle < total:
        axes.axvline(
            100 * cycle / total, color=FAINT, lw=1.2, ls=(0, (4, 3)), zorder=1, label=CYCLE
        )
    percent_axis(axes, "x")
    percent_axis(axes, "y")
    axes.set_xlabel("slots (% of all experts)")
    axes.set_ylabel("accesses missed (%)")
    legend_right(figure, axes)
    return figure


def _percent(points: Points, total: int) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [100 * slots / total for slots, _ in ordered], [100 * miss for _, miss in ordered]


def _sizes(total: int) -> list[int]:
    return sorted({int(s) for s in np.linspace(1, total, THEORY_POINTS).round()})
