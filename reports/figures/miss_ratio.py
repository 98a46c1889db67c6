"""Miss-ratio curves: what each policy misses at every size of the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.che import lru_miss_ratio
from reports.figures.style import (
    FAINT,
    INK,
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
    figure = new_figure(lines_height([*names, BOUND, THEORY]))
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        style = _BOUND_STYLE if name == BELADY else line_style(index)
        line, points = _percent(curves.get(name, ()), total), _percent(marks.get(name, ()), total)
        if name in curves and name in marks:
            axes.plot(*points, **{**style, "linestyle": ""})
        bare: dict[str, Any] = {"markevery": []} if len(curves.get(name, ())) > 1 else {}
        label = BOUND if name == BELADY else name
        axes.plot(*(line if name in curves else points), label=label, **(style | bare))
    if popularity is not None and popularity.any():
        theory = [(s, lru_miss_ratio(popularity, s)) for s in _sizes(total)]
        axes.plot(*_percent(theory, total), color=FAINT, ls=":", lw=2.2, label=THEORY)
    _dress(axes, 100 * cycle / total if cycle is not None and cycle < total else None)
    legend_right(figure, axes)
    return figure


def _dress(axes: Axes, cycle: float | None) -> None:
    percent_axis(axes, "x")
    percent_axis(axes, "y")
    if cycle is not None:
        _mark_cycle(axes, cycle)
    axes.set_xlabel("slots (% of all experts)")
    axes.set_ylabel("accesses missed (%)")


def _percent(points: Points, total: int) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [100 * slots / total for slots, _ in ordered], [100 * miss for _, miss in ordered]


def _sizes(total: int) -> list[int]:
    return sorted({int(s) for s in np.linspace(1, total, THEORY_POINTS).round()})


def _mark_cycle(axes: Axes, share: float) -> None:
    """A line at the size below which LRU finds nothing again, named along its foot."""
    axes.axvline(share, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=1)
    axes.annotate(
        "one token's experts", (share, 0), xytext=(4, 6), textcoords="offset points",
        rotation=90, fontsize=8.5, color=INK, va="bottom", zorder=1,
    )  # fmt: skip
