"""One self-contained HTML page about a validation, with its figures and cells as files."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from reports.figures.style import to_bytes
from reports.files import write_folder
from reports.gallery import Chart
from reports.html import Picture
from reports.units import data, duration, percent
from reports.validation.cells import GPU, Cell, by_group, cache_text, cell_labels, cells_json
from reports.validation.charts import charts
from reports.validation.text import share_text
from reports.validation.verdicts import REPORTED, Verdict
from traces.errors import InputError

TEMPLATES = Path(__file__).parents[1] / "templates"

#: Title and explanation of each column of the table of cells.
COLUMNS = (
    ("decisions", "the two logs"),
    ("TPOT simulated", "mean"),
    ("TPOT measured", "mean"),
    ("error", "simulated over measured"),
    ("p50, p90, p99", "the same error"),
    ("naive", "bytes over bandwidth"),
    ("link busy", "of the stall"),
    ("link's rate", "of the profile's"),
    ("peak memory", "over predicted"),
    ("held", "simulated / measured"),
    ("missed", "simulated / measured"),
    ("demand bytes", "carried for misses"),
    ("prefetch bytes", "simulated over measured"),
)


def write_validation(
    directory: Path, cells: Sequence[Cell], verdicts: Sequence[Verdict], *, command: str = ""
) -> Path:
    """Write ``index.html``, ``figures/`` and ``cells.json`` to *directory*; return the page.

    The same arguments give the same bytes. Raises :class:`InputError` if nothing can be written.
    """
    if not cells:
        raise InputError(f"{directory}: no cells to report, expected at least one")
    drawn = charts(cells)
    files: dict[str, bytes] = {}
    for chart in drawn:
        for kind in ("svg", "png"):
            files[f"figures/{chart.name}.{kind}"] = to_bytes(chart.figure, kind)
    files["cells.json"] = cells_json(cells).encode()
    pictures = [_picture(chart, files[f"figures/{chart.name}.svg"]) for chart in drawn]
    files["index.html"] = _page(cells, verdicts, pictures, command).encode()
    write_folder(directory, files)
    return directory / "index.html"


def _picture(chart: Chart, svg: bytes) -> Picture:
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return Picture(chart.name, chart.title, chart.caption, source)


def _page(
    cells: Sequence[Cell], verdicts: Sequence[Verdict], pictures: Sequence[Picture], command: str
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    labels = cell_labels(cells)
    named = list(zip(labels, cells, strict=True))
    page = environment.get_template("validation.html.j2").render(
        style=_style(),
        title="Simulated and measured",
        lead=_lead(cells),
        failed=[verdict for verdict in verdicts if verdict.failed],
        judged=[verdict for verdict in verdicts if verdict.state != REPORTED],
        reported=[verdict for verdict in verdicts if verdict.state == REPORTED],
        columns=COLUMNS,
        groups=_groups([cell for cell in cells if not cell.failed]),
        failures=[(label, cell.failed) for label, cell in named if cell.failed],
        differences=[(label, c.first_difference) for label, c in named if c.first_difference],
        pictures=pictures,
        provenance=_provenance(named),
        command=command,
    )
    return page.replace(" %", "\u00a0%")  # a number and its sign stay on one line


def _style() -> str:
    """The look of every report: the style sheet of the page about runs."""
    page = (TEMPLATES / "report.html.j2").read_text(encoding="utf-8")
    found = re.search(r"<style>\n(.*?)</style>", page, re.DOTALL)
    assert found is not None
    return found[1]


def _lead(cells: Sequence[Cell]) -> str:
    """What was compared, in one sentence."""
    models = ", ".join(dict.fromkeys(cell.model for cell in cells))
    machines = ", ".join(dict.fromkeys(cell.machine for cell in cells if cell.machine))
    policies = ", ".join(dict.fromkeys(cell.policy for cell in cells))
    budgets = ", ".join(dict.fromkeys(cache_text(cell) for cell in cells))
    return f"{len(cells)} cells on {machines or 'no machine'}: {models}; {policies}; {budgets}"


def _groups(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Rows of cells under what they have in common."""
    return [
        (
            f"{group[0].model}, {group[0].mode}, batch {group[0].batch}",
            [(f"{cell.policy}, {cache_text(cell)}", _row(cell)) for cell in group],
        )
        for group in by_group(cells)
    ]


def _row(cell: Cell) -> list[str]:
    """The values of :data:`COLUMNS`."""
    tails = ", ".join(share_text(cell.percentile_error(name)) for name in ("p50", "p90", "p99"))
    peak = "-" if cell.gpu_peak_bytes is None else data(cell.gpu_peak_bytes)
    return [
        "same" if cell.decisions_equal else "differ",
        _seconds(cell.tpot_sim_s),
        _seconds(cell.tpot_gpu_s),
        share_text(cell.error),
        tails,
        f"{_seconds(cell.naive_s)} ({share_text(cell.naive_error)})",
        _share(cell.link_busy_of_stall),
        _share(cell.bandwidth_share),
        peak if cell.memory_error is None else f"{peak} ({share_text(cell.memory_error)})",
        _two(cell.held_sim, cell.held_gpu),
        _two(cell.missed_sim, cell.missed_gpu),
        data(cell.demand_bytes_gpu or 0) + ("" if cell.demand_bytes_equal else ", differ"),
        _prefetched(cell),
    ]


def _two(simulated: int | None, measured: int | None) -> str:
    """A count once where both worlds agree, else twice."""
    if simulated == measured:
        return f"{simulated or 0:,}"
    return f"{simulated or 0:,} / {measured or 0:,}"


def _prefetched(cell: Cell) -> str:
    if not cell.prefetch_bytes_sim and not cell.prefetch_bytes_gpu:
        return "none"
    return f"{data(cell.prefetch_bytes_gpu or 0)} ({share_text(cell.prefetch_error)})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _setting(cell: Cell) -> dict[str, str]:
    """How one cell was run."""
    return {
        "model": cell.model,
        "mode": cell.mode,
        "trace": cell.trace or "recorded live",
        "sequences": str(cell.sequences),
        "tokens": f"{cell.tokens:,} in {cell.steps:,} steps",
        "slots": f"{cell.slots:,}, pool: {cell.pool}",
        "batch": str(cell.batch),
        "forecaster": cell.forecaster or "none",
        "scheduler": cell.scheduler,
        "copies issued ahead": str(cell.depth),
        "seed": str(cell.seed),
        "compute": cell.compute or "default",
        "hardware profile": cell.hardware,
        "measured on": f"{cell.machine or 'unknown'} ({'GPU' if cell.world == GPU else 'CPU'})",
        "date": cell.date or "unknown",
        "versions": ", ".join(f"{name} {v}" for name, v in cell.versions.items()) or "unknown",
        "decisions (SHA-256)": cell.decisions_sha256_gpu or "none",
    }


def _provenance(
    named: Sequence[tuple[str, Cell]],
) -> tuple[list[tuple[str, str]], list[str], list[tuple[str, list[str]]]]:
    """Settings that all cells share, then columns and rows of those that differ."""
    settings = [_setting(cell) for _, cell in named]
    shared = {key: v for key, v in settings[0].items() if all(s[key] == v for s in settings)}
    columns = [key for key in settings[0] if key not in shared]
    rows = [
        (label, [setting[key] for key in columns])
        for (label, _), setting in zip(named, settings, strict=True)
    ]
    return list(shared.items()), columns, rows
