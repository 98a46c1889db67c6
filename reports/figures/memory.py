"""Speed against GPU memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.figures.style import legend_right, line_style, lines_height, new_figure, styled

LIMIT = "limit of exact policies (compute, transfer)"


@styled
def speed_against_memory(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    limit: Sequence[tuple[float, float]],
    *,
    prompts: bool = False,
) -> Figure:
    """Tokens per second against GPU memory.

    *curves* and *limit* (which may be empty) hold (GiB, tokens per second); *prompts* says
    that the tokens of prompts are counted in. Above the limit no exact policy gets; between two
    budgets that of the larger one is drawn, since more memory never lowers it.
    """
    figure = new_figure(lines_height([*curves, LIMIT]))
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*_columns(points), label=label, **line_style(index))
    top = 1.12 * max(speed for points in (*curves.values(), limit) for _, speed in points)
    if limit:
        _draw_limit(axes, limit, top)
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    axes.set_xlabel("GPU memory: dense part, KV cache and slots (GiB)")
    what = "tokens per second, prompts included" if prompts else "output tokens per second"
    axes.set_ylabel(what)
    legend_right(figure, axes)
    return figure


def _draw_limit(axes: Axes, limit: Sequence[tuple[float, float]], top: float) -> None:
    memory, speed = _columns(limit)
    axes.step(
        memory, speed, where="pre", color="black", lw=1.4, ls="--", marker="_", ms=16, mew=2.4,
        label=LIMIT,
    )  # fmt: skip
    axes.fill_between(
        memory, speed, top, step="pre", facecolor="#f0f0f0", edgecolor="#c4c4c4", hatch="///",
        lw=0, zorder=0,
    )  # fmt: skip


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [gib for gib, _ in ordered], [speed for _, speed in ordered]
