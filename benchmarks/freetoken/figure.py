"""The bars: FreeToken's and our time per decode step, a panel for each routing and batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.expertflow.figures import LRU, OURS, PAPER, bars
from benchmarks.freetoken.rows import Row
from reports.figures.style import legend_below, new_figure, styled, to_bytes
from traces.writing import replacing

#: Key of a row, label and colour of each bar of a group.
_SERIES = (
    ("freetoken_ms", "FreeToken 0.1.2", PAPER),
    ("lru_ms", "ours, lru", LRU),
    ("best_ms", "ours, best exact policy", OURS),
)


@styled
def step_bars(rows: Sequence[Row]) -> Figure:
    """One group of bars for each share of slots; what was not measured has none."""
    routings = sorted({row["routing"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    figure = new_figure(0.7 + 3.5 * len(routings))
    panels = figure.subplots(len(routings), len(batches), squeeze=False).ravel()
    for axes, (routing, batch) in zip(panels, product(routings, batches), strict=True):
        mine = [row for row in rows if (row["routing"], row["batch"]) == (routing, batch)]
        groups = [f"{row['slots_share']:.0%} of the experts" for row in mine]
        heights = {label: ([row[key] or 0.0 for row in mine], c) for key, label, c in _SERIES}
        bars(axes, groups, heights)
        axes.set_title(f"{routing} routing, batch {batch}")
        axes.set_ylabel("milliseconds per decode step")
    legend_below(figure, panels[0], len(_SERIES))
    return figure


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The bars as a PNG."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(to_bytes(step_bars(rows), "png"))
