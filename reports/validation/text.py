"""Text for terminals: one row per cell, then the verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from reports.units import percent, significant
from reports.validation.cells import GPU, Cell, by_group, cache_text
from reports.validation.verdicts import Limits, Verdict, signed

#: Narrowest room for a policy and its budget, in characters.
LABEL_WIDTH = 22

#: Title and width of each column.
COLUMNS = (
    ("decisions", 11),
    ("held %", 8),
    ("sim ms", 9),
    ("real ms", 9),
    ("error", 9),
    ("p50", 9),
    ("p90", 9),
    ("p99", 9),
    ("naive", 9),
    ("stall %", 9),
    ("link %", 8),
    ("GiB", 7),
)

NOTES = """\
decisions   whether the decision logs of both worlds are the same, byte for byte
sim, real   mean time per output token, simulated and measured
error       of the simulated mean: simulated over measured, less 1
p50 ...     the same error of these percentiles; naive: of bytes over bandwidth alone
stall %     share of the real time per token in which the GPU waits for copies; link %: of that
            time, while the link copied; GiB: peak GPU memory"""


def cells_table(cells: Sequence[Cell], verdicts: Sequence[Verdict]) -> str:
    """Every cell and every verdict."""
    blocks = [_block(group) for group in by_group(cells)]
    notes = [note for cell in cells for note in _notes(cell)]
    if notes:
        blocks.append("\n".join(notes))
    return "\n\n".join([*blocks, NOTES, verdict_lines(verdicts)])


def verdict_lines(verdicts: Sequence[Verdict]) -> str:
    """One line per verdict, its state first."""
    names = max(len(verdict.name) for verdict in verdicts)
    lines = []
    for verdict in verdicts:
        expected = f"  (expected: {verdict.expected})" if verdict.expected else ""
        lines.append(f"{verdict.state:<15}{verdict.name:<{names + 2}}{verdict.found}{expected}")
    return "\n".join(lines)


def _block(cells: Sequence[Cell]) -> str:
    first = cells[0]
    where = "one GPU" if first.world == GPU else f"the {first.world.upper()}"
    title = f"{first.model}, {first.mode}, batch {first.batch}: simulated ({first.hardware})"
    title += f" and measured on {first.machine or where}"
    labels = [f"{cell.policy} {cache_text(cell)}" for cell in cells]
    width = max([LABEL_WIDTH, *map(len, labels)])
    lines = [title, _line("", [name for name, _ in COLUMNS], width)]
    for label, cell in zip(labels, cells, strict=True):
        lines.append(f"  {label:<{width}} FAILED" if cell.failed else _row(label, cell, width))
    return "\n".join(lines)


def _row(label: str, cell: Cell, width: int) -> str:
    held = (cell.held_gpu or 0) / (cell.accesses_gpu or 1)
    peak = "-" if cell.gpu_peak_bytes is None else significant(cell.gpu_peak_bytes / 2**30)
    cells = [
        "same" if cell.decisions_equal else "DIFFER",
        f"{100 * held:.1f}",
        milliseconds(cell.tpot_sim_s),
        milliseconds(cell.tpot_gpu_s),
        *(share_text(cell.percentile_error(name) if name else cell.error)
          for name in ("", "p50", "p90", "p99")),
        share_text(cell.naive_error),
        "-" if cell.stall_share is None else f"{100 * cell.stall_share:.1f}",
        "-" if cell.link_busy_of_stall is None else f"{100 * cell.link_busy_of_stall:.1f}",
        peak,
    ]  # fmt: skip
    return _line(label, cells, width)


def _line(label: str, cells: Sequence[str], width: int) -> str:
    padded = "".join(f"{cell:>{room}}" for cell, (_, room) in zip(cells, COLUMNS, strict=True))
    return f"  {label:<{width}}{padded}".rstrip()


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, ``-`` where there are none."""
    return "-" if seconds is None else significant(1e3 * seconds)


def share_text(share: float | None) -> str:
    """A signed share, ``-`` where there is none."""
    return "-" if share is None else signed(share)


def _notes(cell: Cell) -> list[str]:
    """What a row has no room for: why a cell failed, where decisions part, unequal bytes."""
    name = f"{cell.model}, batch {cell.batch}, {cell.policy} {cache_text(cell)}"
    if cell.failed:
        return [f"{name} failed: {cell.failed}"]
    notes = []
    if cell.first_difference:
        notes.append(f"{name}: decisions differ {cell.first_difference}")
    if not cell.demand_bytes_equal:
        notes.append(
            f"{name}: demand bytes differ: simulated {cell.demand_bytes_sim:,}, "
            f"measured {cell.demand_bytes_gpu:,}"
        )
    if abs(cell.prefetch_error) > Limits.prefetch:
        notes.append(
            f"{name}: prefetch bytes {percent(cell.prefetch_error, 2)} apart: simulated "
            f"{cell.prefetch_bytes_sim:,}, measured {cell.prefetch_bytes_gpu:,}"
        )
    return notes
