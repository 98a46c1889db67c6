"""Time per output token, stacked by cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reports.figures.style import (
    CAUSE_FILLS,
    legend_below,
    message,
    name_rows,
    new_figure,
    rows_height,
    styled,
)

#: What each cause is called in the legend.
NAMES = {
    "attention": "attention and other dense parts",
    "experts": "experts",
    "host": "host (launches, planning)",
    "stall_demand": "stall: expert missed",
    "stall_late": "stall: prefetch late",
    "idle": "idle (experts on the CPU)",
}


@styled
def time_per_token(bars: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """One bar per run, as long as its mean time per output token.

    *bars* are (label, seconds per token by cause).
    """
    totals = [sum(parts.values()) for _, parts in bars]
    if not any(totals):
        return message("No decode steps in this trace: there is no time per output token.")
    labels = [label for label, _ in bars]
    figure = new_figure(rows_height(labels, around=1.6))
    axes = figure.add_subplot()
    starts = [0.0] * len(bars)
    for cause, (fill, hatch) in CAUSE_FILLS.items():
        widths = [1e3 * parts[cause] for _, parts in bars]
        if not any(widths):
            continue
        axes.barh(
            range(len(bars)), widths, 0.72, starts,
            color=fill, hatch=hatch, edgecolor="white", linewidth=0.6, label=NAMES[cause],
        )  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for row, total in enumerate(totals):
        axes.annotate(
            f"{1e3 * total:.2f} ms", (1e3 * total, row),
            xytext=(5, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    name_rows(axes, labels)
    axes.set_xlim(0, 1.12e3 * max(totals))
    axes.set_xlabel("mean time per output token (ms)")
    drawn = len(axes.get_legend_handles_labels()[0])
    legend_below(figure, axes, 2 if drawn == 4 else 3)
    return figure
