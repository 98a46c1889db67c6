"""The bars: FreeToken's and our time per decode step, a panel for each batch."""

from __future__ import annotations

from collections.abc import Sequence
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
    batches = sorted({row["batch"] for row in rows})
    figure = new_figure(4.2)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        mine = [row for row in rows if row["batch"] == batch]
        groups = [f"{row['slots_share']:.0%} of the experts" for row in mine]
        heights = {label: ([row[key] or 0.0 for row in mine], c) for key, label, c in _SERIES}
        bars(axes, groups, heights)
        axes.set_title(f"batch {batch}")
        axes.set_ylabel("milliseconds per decode step")
    legend_below(figure, panels[0], len(_SERIES))
    return figure


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The bars as a PNG."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(to_bytes(step_bars(rows), "png"))
