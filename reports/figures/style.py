"""How every figure looks, and how it becomes a file."""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FixedLocator

P = ParamSpec("P")

#: Width of a figure, in inches; at 150 dots per inch the PNG is 1,500 dots wide.
WIDTH = 10.0

INK = "#1a1a1a"
FAINT = "#8a8a8a"
GRID = "#d9d9d9"

#: Fill and hatch of each cause: from dark to light, stalls in reds.
CAUSE_FILLS = {
    "attention": ("#12263f", ""),
    "experts": ("#2c6fa6", ""),
    "host": ("#9cc3e0", ""),
    "stall_demand": ("#8c1d18", "////"),
    "stall_late": ("#e8833a", "\\\\\\\\"),
    "idle": ("#e4e4e4", "xxxx"),
}

_COLOURS = ("#0d2b52", "#c2452d", "#5aa469", "#6b2f8f", "#dfa637", "#3c8fb8")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))

_RC = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "expertflow",
    "svg.fonttype": "path",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run *draw* in the project's style, whatever the user's own settings are."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _RC]):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of *width* x *height* inches that makes room for what is around its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def wrap(label: str, width: int = 24) -> str:
    """*label* on lines of at most *width* characters; a number stays beside its per cent sign."""
    return "\n".join(textwrap.wrap(label.replace(" %", "\u00a0%"), width)) or label


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the line with number *index*: no two of twelve are alike."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[(index + index // len(_COLOURS)) % len(_DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def rows_height(labels: Sequence[str], each: float = 0.36, around: float = 1.5) -> float:
    """Inches that one row per label takes, wrapped labels taking more."""
    lines = sum(max(1, wrap(label).count("\n") + 1) for label in labels)
    return around + each * len(labels) + 0.14 * (lines - len(labels))


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a bar chart from the top down; grid lines only along the values."""
    axes.set_yticks(range(len(labels)), [wrap(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def legend_below(figure: Figure, axes: Axes, columns: int) -> Legend:
    """The legend of *axes* under the figure."""
    handles, names = axes.get_legend_handles_labels()
    return figure.legend(handles, names, loc="outside lower center", ncols=columns)


def legend_right(figure: Figure, axes: Axes) -> Legend:
    """The legend of *axes* to the right of the figure, one entry under the other."""
    handles, names = axes.get_legend_handles_labels()
    wrapped = [wrap(name, 26) for name in names]
    return figure.legend(handles, wrapped, loc="outside right upper", handlelength=3.2)


def lines_height(labels: Sequence[str], least: float = 4.6) -> float:
    """Inches of a line chart whose legend to the right holds *labels*."""
    lines = sum(wrap(label, 26).count("\n") + 1 for label in labels)
    return max(least, 0.8 + 0.21 * lines)


def message(text: str, height: float = 1.6) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(height)
    figure.text(0.5, 0.5, wrap(text, 90), ha="center", va="center", color=INK, fontsize=11)
    return figure


def percent_axis(axes: Axes, which: str, top: float = 100.0) -> None:
    """Run an axis from 0 to *top* per cent (at least 100), a tick every 20."""
    top = max(top, 100.0)
    axis, limit = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    limit(0, top * 1.02)
    axis.set_major_locator(FixedLocator(list(range(0, int(top) + 1, 20))))


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of *kind* ``svg`` or ``png``; the same figure gives the same bytes."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", _RC]):
        if figure.get_layout_engine() is not None:  # lay out once, not for every file
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()
