"""The figures of the page, drawn from rows alone in the style of the reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import expertflow_gaps
from benchmarks.expertflow import hits, parts, published, recall_rows, scheduling, speeds
from benchmarks.expertflow.tables import is_switch_32, model_of, told_by_predictor
from reports.figures.style import INK, legend_below, line_style, new_figure, styled

#: Colours of bars that mean the same in every figure.
PAPER_LRU, PAPER, LRU, LAYERED, OURS, OURS_LAYERED = (
    "#d9d9d9", "#8a8a8a", "#9cc3e0", "#2c6fa6", "#c2452d", "#12263f",
)  # fmt: skip


def drawn(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure of everything that *folder* has rows for."""

    def rows(part: str, kind: type[Any]) -> list[Any]:
        return parts.read_rows(folder, part, kind)

    told = [rows(f"gaps-{name}", expertflow_gaps.Row) for name in ("coarse", "granular", "gpt-oss")]
    if known := [found for found in told if found]:
        yield "gaps", gap_closed(known)
    if ratios := rows("hits", hits.Row):
        yield "hits", hit_ratios(ratios)
    if fast := told_by_predictor(rows("speeds", speeds.Row)):
        yield "speeds", speed_bars([row for row in fast if row.cache != speeds.SAVING])
    if gains := rows("scheduling", scheduling.Row):
        yield "scheduling", scheduler_gain(gains)
    if named := rows("recall", recall_rows.Row):
        yield "recall", recalls(named)


def bars(
    axes: Axes, groups: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]]
) -> None:
    """Groups of bars side by side; *series* gives the heights and colour of each label."""
    width = 0.84 / len(series)
    for i, (label, (heights, colour)) in enumerate(series.items()):
        left = [g - 0.42 + (i + 0.5) * width for g in range(len(groups))]
        axes.bar(left, heights, width * 0.94, label=label, color=colour)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")


@styled
def gap_closed(traces: Sequence[Sequence[expertflow_gaps.Row]]) -> Figure:
    """A row of panels for each trace: at the gate, and counting every copy."""
    figure = new_figure(0.7 + 2.9 * len(traces))
    panels = figure.subplots(len(traces), 2, squeeze=False)
    names = list(dict.fromkeys(map(_forecaster, (r for rows in traces for r in _best(rows)))))
    for axes, rows in zip(panels, traces, strict=True):
        _gap_panel(axes[0], rows, "gap_missed", names, "missed at the gate")
        _gap_panel(axes[1], rows, "gap_moves", names, "all copies")
    fullest = max((axes[0] for axes in panels), key=lambda a: len(a.get_legend_handles_labels()[1]))
    legend_below(figure, fullest, 4)
    return figure


def _best(rows: Sequence[expertflow_gaps.Row]) -> list[expertflow_gaps.Row]:
    """By reuse where it is told."""
    told = {row.forecaster for row in rows if row.evict == "reuse"}
    return [row for row in rows if row.evict == "reuse" or row.forecaster not in told]


def _forecaster(row: expertflow_gaps.Row) -> str:
    name, _, accuracy = row.forecaster.partition(":accuracy=")
    return f"{name}, {100 * float(accuracy):.0f} % right" if accuracy else name


def _gap_panel(
    axes: Axes, rows: Sequence[expertflow_gaps.Row], what: str, names: Sequence[str], title: str
) -> None:
    cells = list(dict.fromkeys((row.batch, row.cache) for row in rows))
    for name in names:
        found = {(r.batch, r.cache): r for r in _best(rows) if _forecaster(r) == name}
        if found:
            heights = [100 * getattr(found[cell], what) for cell in cells]
            style = line_style(names.index(name)) | {"linestyle": ""}
            aside = 0.09 * (names.index(name) - len(names) / 2)
            places = [i + aside for i in range(len(cells))]
            axes.plot(places, heights, label=name, clip_on=False, **style)
    labels = [f"B {batch}\n{cache.replace('%', ' %')}" for batch, cache in cells]
    axes.set_xticks(range(len(cells)), labels)
    axes.axhline(0, color=INK, lw=0.8)
    axes.axhline(100, color=INK, lw=0.8, ls="--")
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.grid(False, axis="x")
    axes.set_title(f"{rows[0].trace}: {title}")
    axes.set_ylabel("gap closed (%)\n0: LRU, 100: Belady")


@styled
def hit_ratios(rows: Sequence[hits.Row]) -> Figure:
    """Above the paper's cells beside the same ones here; below the sample traces."""
    figure = new_figure(7.6)
    above, below = figure.subplots(2, 1)
    _papers_panel(above, [row for row in rows if is_switch_32(row)])
    _samples_panel(below, [row for row in rows if not is_switch_32(row)])
    for axes in (above, below):
        axes.set_ylim(0, 100)
        axes.set_ylabel("hit ratio (%)")
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _papers_panel(axes: Axes, rows: Sequence[hits.Row]) -> None:
    groups = []
    series: dict[str, tuple[list[float], str]] = {
        "paper: LRU": ([], PAPER_LRU),
        "paper: PLEC": ([], PAPER),
        "LRU": ([], LRU),
        "PLEC, oracle 80 % right": ([], OURS),
        "PLEC, oracle 90 % right": ([], LAYERED),
    }
    for (batch, slots), papers in published.HITS.items():
        here = {r.forecaster: r for r in rows if (r.batch, r.slots_per_layer) == (batch, slots)}
        if {"oracle:accuracy=0.8", "oracle:accuracy=0.9"} <= here.keys():
            poor, good = here["oracle:accuracy=0.8"], here["oracle:accuracy=0.9"]
            groups.append(f"batch {batch}, {slots} of 32 slots")
            heights = (papers.lru, papers.plec, poor.lru, poor.papers, good.papers)
            for (values, _), height in zip(series.values(), heights, strict=True):
                values.append(100 * height)
    bars(axes, groups, series)
    axes.set_title("Switch-32, as the paper counts")


def _samples_panel(axes: Axes, rows: Sequence[hits.Row]) -> None:
    told = [row for row in rows if row.forecaster.startswith("routing-path")]
    groups = [
        f"{r.trace.partition('-')[0]}\nB {r.batch}, {r.cache.replace('%', ' %')}" for r in told
    ]
    series = {
        "paper's count: LRU by layer": ("lru", PAPER_LRU),
        "paper's count: PLEC": ("papers", PAPER),
        "simulated: LRU, held": ("lru_held", LRU),
        "simulated: predictive, held": ("held", LAYERED),
        "simulated: predictive, landed": ("hit", OURS),
    }
    bars(
        axes,
        groups,
        {n: ([100 * getattr(r, key) for r in told], c) for n, (key, c) in series.items()},
    )
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_title("Sample traces, the predictors that ship")


@styled
def speed_bars(rows: Sequence[speeds.Row]) -> Figure:
    """A panel for each machine and model: speed over load on demand."""
    machines = list(dict.fromkeys(row.hardware for row in rows))
    models = list(dict.fromkeys(model_of(row) for row in rows))
    figure = new_figure(0.8 + 2.3 * len(models))
    panels = figure.subplots(len(models), len(machines), squeeze=False, sharey="row")
    for i, model in enumerate(models):
        for j, machine in enumerate(machines):
            axes = panels[i][j]
            here = [r for r in rows if model_of(r) == model and r.hardware == machine]
            groups = [f"B {r.batch}\n{r.cache.replace('%', ' %')}" for r in here]
            series = {
                "LRU": ([r.lru / r.on_demand for r in here], LRU),
                "LRU by layer": ([(r.lru_layer or 0.0) / r.on_demand for r in here], LAYERED),
                "predictive": ([r.predictive / r.on_demand for r in here], OURS),
                "predictive by layer": (
                    [(r.predictive_layer or 0.0) / r.on_demand for r in here],
                    OURS_LAYERED,
                ),
            }
            bars(axes, groups, series)
            axes.axhline(1, color=INK, lw=0.8)
            axes.set_title(f"{model}, {machine}", fontsize=10)
            if not j:
                axes.set_ylabel("times the speed\nof load on demand")
    legend_below(figure, panels[0][0], 4)
    return figure


@styled
def scheduler_gain(rows: Sequence[scheduling.Row]) -> Figure:
    """Speed with a scheduler over that without, by trace and share of the experts."""
    figure = new_figure(7.2)
    policies = list(dict.fromkeys(row.policy for row in rows))
    panels = figure.subplots(len(policies), 1, squeeze=False)[:, 0]
    colours = (PAPER, LRU, LAYERED, OURS)
    for axes, policy in zip(panels, policies, strict=True):
        here = [row for row in rows if row.policy == policy]
        cells = list(dict.fromkeys((row.trace, row.cache) for row in here))
        gains = {(r.trace, r.cache, r.scheduler): 100 * r.gain for r in here}
        names = dict.fromkeys(row.scheduler for row in here)
        groups = [
            f"{trace.replace('switch-base', 'Switch').partition('-8x')[0].partition('-64x')[0]}"
            f"\n{cache.replace('%', ' %')}"
            for trace, cache in cells
        ]
        series = {
            name: ([gains[(*cell, name)] for cell in cells], colour)
            for name, colour in zip(names, colours, strict=False)
        }
        bars(axes, groups, series)
        _mark_paper(axes, cells)
        axes.axhline(0, color=INK, lw=0.8)
        axes.tick_params(axis="x", labelsize=8)
        pool = ", slots divided by layer" if scheduling.POLICIES[policy] == "layer" else ""
        axes.set_title(f"{policy}{pool}, batch {here[0].batch}, {here[0].hardware}")
        axes.set_ylabel("gain in tokens/s (%)")
    legend_below(figure, panels[0], 3)
    return figure


def _mark_paper(axes: Axes, cells: Sequence[tuple[str, str]]) -> None:
    """A line across every group that the paper reports."""
    label = "paper"
    for i, (trace, _) in enumerate(cells):
        papers = published.SCHEDULER.get(trace)
        if papers:
            gain = 100 * (papers.with_it / papers.without - 1)
            axes.hlines(gain, i - 0.44, i + 0.44, color=INK, lw=2, label=label)
            label = "_"


@styled
def recalls(rows: Sequence[recall_rows.Row]) -> Figure:
    """A row for each trace: recall by layer, and batch recall."""
    traces = list(dict.fromkeys(row.trace for row in rows))
    names = list(dict.fromkeys(row.method for row in rows))
    figure = new_figure(0.9 + 3.2 * len(traces))
    panels = figure.subplots(len(traces), 2, squeeze=False, sharey=True)
    for axes, trace in zip(panels, traces, strict=True):
        for row in (row for row in rows if row.trace == trace):
            style = line_style(names.index(row.method))
            layers = [(i, 100 * v) for i, v in enumerate(row.by_layer) if v is not None]
            axes[0].plot(*zip(*layers, strict=True), label=row.method, **style)
            axes[1].plot(
                range(len(row.batch)), [100 * v for v in row.batch.values()], label=row.method,
                **style,
            )  # fmt: skip
            axes[1].set_xticks(range(len(row.batch)), list(row.batch))
        least = published.RECALL_64 if trace.startswith("granular") else published.RECALL
        axes[1].axhline(100 * least, color=INK, lw=1, ls=":")
        axes[0].set_title(f"{trace}: by layer, batch 1")
        axes[1].set_title(f"{trace}: batch recall (dotted: paper, {100 * least:.0f} %)")
        axes[0].set_ylabel("recall at top-k (%)")
        axes[0].set_xlabel("layer")
        axes[1].set_xlabel("batch")
        axes[0].set_ylim(0, 100)
    legend_below(figure, panels[0][0], 6)
    return figure
