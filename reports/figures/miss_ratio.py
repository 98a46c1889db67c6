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
    INK,
    legend_right,
    line_style,
    lines_height,
    new_figure,
    percent_axis,
    styled,
)

BELADY = "Belady (knows the future)"
THEORY = "LRU in theory (Che), independent accesses"

#: Points at which the theory's line is drawn.
THEORY_POINTS = 60


@styled
def miss_ratio_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    total: int,
    *,
    belady: Sequence[tuple[int, float]] = (),
    popularity: npt.NDArray[Any] | None = None,
    cycle: int | None = None,
) -> Figure:
    """Missed share of the accesses against the cache's share of the *total* experts.

    *curves* and *belady* hold (slots, missed ratio); *popularity*, uses per expert, gives the
    theory's line; *cycle* marks the slots that one token goes through.
    """
    figure = new_figure(lines_height([*curves, BELADY, THEORY]))
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*_percent(points, total), label=label, **line_style(index))
    if belady:
        axes.plot(*_percent(belady, total), color="black", lw=2.2, marker="*", ms=9, label=BELADY)
    if popularity is not None and popularity.any():
        theory = [(s, lru_miss_ratio(popularity, s)) for s in _sizes(total)]
        axes.plot(*_percent(theory, total), color=FAINT, ls=":", lw=2.2, label=THEORY)
    percent_axis(axes, "x")
    percent_axis(axes, "y")
    if cycle is not None and cycle < total:
        _mark_cycle(axes, 100 * cycle / total)
    axes.set_xlabel("slots (% of all experts)")
    axes.set_ylabel("accesses missed (%)")
    legend_right(figure, axes)
    return figure


def _percent(points: Sequence[tuple[int, float]], total: int) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [100 * slots / total for slots, _ in ordered], [100 * miss for _, miss in ordered]


def _sizes(total: int) -> list[int]:
    return sorted({int(s) for s in np.linspace(1, total, THEORY_POINTS).round()})


def _mark_cycle(axes: Any, share: float) -> None:
    """A line at the size below which LRU finds nothing again, named along its foot."""
    axes.axvline(share, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=1)
    axes.annotate(
        "one token's experts", (share, 0), xytext=(4, 6), textcoords="offset points",
        rotation=90, fontsize=8.5, color=INK, va="bottom", zorder=1,
    )  # fmt: skip
