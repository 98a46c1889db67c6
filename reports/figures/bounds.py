"""Where each run stands against what no exact run can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from reports.figures.style import legend_below, name_rows, new_figure, rows_height, styled


@dataclass(frozen=True)
class Standing:
    """One run's time and its two bounds; *exact* says whether the bounds bind it."""

    label: str
    compute_s: float
    transfer_s: float
    total_s: float
    exact: bool = True

    @property
    def limit_s(self) -> float:
        """The larger bound."""
        return max(self.compute_s, self.transfer_s)


#: Name, fill, hatch and place of each bar in its row.
_BARS = (
    ("total_s", "this run", "#2c6fa6", "", -0.2, 0.38),
    ("compute_s", "compute: every expert on the GPU", "#12263f", "", 0.1, 0.18),
    ("transfer_s", "transfer: Belady's moves at link speed", "#e8b04a", "////", 0.3, 0.18),
)


@styled
def against_bounds(runs: Sequence[Standing]) -> Figure:
    """Seconds of each run over its two bounds; a line marks the limit, the larger of the two."""
    labels = [run.label for run in runs]
    figure = new_figure(rows_height(labels, each=0.62, around=1.5))
    axes = figure.add_subplot()
    for field, name, fill, hatch, shift, height in _BARS:
        axes.barh(
            [row + shift for row in range(len(runs))], [getattr(run, field) for run in runs],
            height, color=fill, hatch=hatch, edgecolor="white", lw=0.5, label=name,
        )  # fmt: skip
    rows = range(len(runs))
    axes.vlines(
        [run.limit_s for run in runs], [row - 0.42 for row in rows], [row + 0.42 for row in rows],
        color="black", lw=2, label="limit: the larger bound",
    )  # fmt: skip
    for row, run in enumerate(runs):
        text = f"{run.limit_s / run.total_s:.0%} of the limit's speed" if run.total_s else ""
        if not run.exact:
            text = "not exact: may pass the limit"
        axes.annotate(
            text.replace("%", " %"), (max(run.total_s, run.limit_s), row - 0.2), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    name_rows(axes, labels)
    axes.set_xlim(0, 1.3 * max(max(run.total_s, run.limit_s) for run in runs))
    axes.set_xlabel("time of the whole run (s)")
    legend_below(figure, axes, 2)
    return figure
