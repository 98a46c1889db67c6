"""How good the prefetches were: accuracy, coverage and timeliness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from reports.figures.style import (
    legend_below,
    message,
    name_rows,
    new_figure,
    percent_axis,
    rows_height,
    styled,
)

#: Key, legend, fill and hatch of each bar.
BARS = (
    ("accuracy", "accuracy: carried copies that were used", "#12263f", ""),
    ("coverage", "coverage: loads that a prefetch made", "#4a8fc0", "////"),
    ("timeliness", "timeliness: used copies that had landed in time", "#cfe3f1", ""),
)

NONE = "None of these runs prefetched: every expert was loaded when a gate asked for it."


@styled
def prefetch_quality(runs: Sequence[tuple[str, Mapping[str, float] | None]]) -> Figure:
    """Three bars per run, in per cent; *runs* are (label, shares), None without prefetches."""
    if all(shares is None for _, shares in runs):
        return message(NONE)
    labels = [label for label, _ in runs]
    figure = new_figure(rows_height(labels, each=0.62, around=1.5))
    axes = figure.add_subplot()
    for place, (key, name, fill, hatch) in enumerate(BARS):
        rows = [row + (place - 1) * 0.25 for row in range(len(runs))]
        widths = [100 * shares[key] if shares else 0.0 for _, shares in runs]
        axes.barh(
            rows, widths, 0.24, color=fill, hatch=hatch, edgecolor="#5b6b7a", lw=0.5, label=name
        )
        for row, width, (_, shares) in zip(rows, widths, runs, strict=True):
            if shares is not None:
                axes.annotate(
                    f"{width:.1f}", (width, row), xytext=(3, 0), textcoords="offset points",
                    va="center", fontsize=8,
                )  # fmt: skip
    for row, (_, shares) in enumerate(runs):
        if shares is None:
            axes.text(1, row, "no prefetches", va="center", fontsize=9, style="italic")
    name_rows(axes, labels)
    percent_axis(axes, "x")
    axes.set_xlim(0, 107)
    axes.set_xlabel("share (%)")
    legend_below(figure, axes, 2)
    return figure
