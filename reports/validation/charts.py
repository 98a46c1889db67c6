"""Which figures a set of cells has, with the words that say how to read each one."""

from __future__ import annotations

from collections.abc import Sequence

from reports.gallery import Chart
from reports.validation.cells import Cell, by_group, cell_labels
from reports.validation.figures import (
    Point,
    both_breakdowns,
    predicted_against_measured,
    signed_errors,
    step_distributions,
)

#: Cells whose steps are drawn one by one.
MOST_PANELS = 6


def charts(cells: Sequence[Cell]) -> list[Chart]:
    """Every figure that the cells which ran allow."""
    ran = [cell for cell in cells if not cell.failed]
    drawn = [_scatter(ran)]
    models = _by_model(ran)
    for number, alike in enumerate(models, start=1):
        drawn.append(_errors(alike, number, len(models)))
    groups = by_group(ran)
    for number, group in enumerate(groups, start=1):
        drawn.append(_breakdown(group, number, len(groups)))
    if any(cell.step_quantiles_sim_s and cell.step_quantiles_gpu_s for cell in ran):
        drawn.append(_steps(ran))
    return drawn


def _by_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells together that are of one model in one mode."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.mode), []).append(cell)
    return list(groups.values())


def _labels(cells: Sequence[Cell]) -> list[str]:
    """Labels in which a batch and its number stay on one line."""
    return [label.replace("batch ", "batch\u00a0") for label in cell_labels(cells)]


def _points(cells: Sequence[Cell]) -> list[tuple[Cell, Point]]:
    """The cells with a time in both worlds, as points."""
    return [
        (cell, Point(label, cell.tpot_gpu_s, cell.tpot_sim_s, cell.naive_s))
        for label, cell in zip(_labels(cells), cells, strict=True)
        if cell.tpot_gpu_s and cell.tpot_sim_s
    ]


def _group_name(cell: Cell, cells: Sequence[Cell]) -> str:
    """What the cells of one group have in common, as far as it is not common to all."""
    words = [cell.model]
    if len({other.batch for other in cells}) > 1:
        words.append(f"batch\u00a0{cell.batch}")
    if len({other.mode for other in cells}) > 1:
        words.append(cell.mode)
    return ", ".join(words)


def _scatter(cells: Sequence[Cell]) -> Chart:
    series: dict[str, list[Point]] = {}
    for cell, point in _points(cells):
        series.setdefault(_group_name(cell, cells), []).append(point)
    caption = (
        "One mark per cell (a policy at a budget): the mean time per output token that was "
        "measured, and what the simulator says for the same run. On the line both are equal; the "
        "bands are 5 % and 10 % to either side. Both axes are logarithmic."
    )
    title = "Simulated against measured"
    return Chart("scatter", title, caption, predicted_against_measured(series))


def _errors(cells: Sequence[Cell], number: int, models: int) -> Chart:
    caption = (
        "Per cell, how far the simulated mean time per output token is off: to the right the "
        "simulator is slower than the machine, to the left faster. On the right, on its own "
        "axis, the naive estimate: the bytes that decoding moved over the link's bandwidth."
    )
    figure = signed_errors([point for _, point in _points(cells)])
    title = f"Signed errors: {cells[0].model}, {cells[0].mode}" if models > 1 else "Signed errors"
    return Chart(f"errors-{number}", title, caption, figure)


def _breakdown(group: Sequence[Cell], number: int, groups: int) -> Chart:
    labels = _labels(group)
    rows = [
        (label, cell.parts_sim_s, cell.parts_gpu_s)
        for label, cell in zip(labels, group, strict=True)
    ]
    title = "Time per output token by cause"
    if groups > 1:
        title += f": {group[0].model}, {group[0].mode}, batch {group[0].batch}"
    caption = (
        "Above what the simulator says, below what was measured. A part that is longer in one "
        "world than in the other is the term of the simulation to look at. Stalls are hatched."
    )
    return Chart(f"breakdown-{number}", title, caption, both_breakdowns(rows))


def _steps(cells: Sequence[Cell]) -> Chart:
    """The cells that are furthest off, each from another group where there are enough."""
    known = [c for c in cells if c.step_quantiles_sim_s and c.step_quantiles_gpu_s]
    ranked = [sorted(group, key=_size, reverse=True) for group in by_group(known)]
    depth = max(map(len, ranked))
    order = [group[i] for i in range(depth) for group in ranked if i < len(group)]
    chosen = order[:MOST_PANELS]
    panels = [
        (label, cell.step_quantiles_sim_s, cell.step_quantiles_gpu_s)
        for label, cell in zip(_labels(chosen), chosen, strict=True)
    ]
    caption = (
        "The share of decode steps that took no longer than so many milliseconds, simulated and "
        "measured, for the cells with the largest errors, from as many groups as there are."
    )
    return Chart("steps", "How step times are spread", caption, step_distributions(panels))


def _size(cell: Cell) -> float:
    return abs(cell.error or 0.0)
