"""What a GPU measured, read from ``gpu.json`` beside the other rows, if it is there.

``benchmarks/expertflow_gpu.py`` writes it: where and when, and rows by part. Of a row *policy*
and *batch* must be there; one that failed or was skipped says so instead of figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.expertflow.tables import GB, markdown, percent, speed
from policies.result import read_json
from traces.errors import InputError

FILE = "gpu.json"
ABSENT = "Not measured yet: `gpu.json` is not there."

Row = Mapping[str, Any]

#: What a row cannot do without.
NEEDED: dict[str, type[Any]] = {"policy": str, "batch": int}


class Column(NamedTuple):
    """A column of a table: its head, and what a row shows in it."""

    head: str
    show: Callable[[Row], str]


def _number(name: str, digits: int = 2, scale: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """Shows *name*, times *scale*; nothing where it is not known."""

    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value * scale:,.{digits}f}{unit}"

    return show


def _share(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{percent(value)} %"

    return show


def _speed(name: str) -> Callable[[Row], str]:
    return lambda row: speed(row.get(name))


def _whose(row: Row) -> str:
    name = str(row.get("sizes") or row.get("model") or "")
    routing, stand_in = row.get("routing"), row.get("stand_in")
    return name + (f" ({routing})" if routing else "") + (" (stand-in)" if stand_in else "")


def _policy(row: Row) -> str:
    told = row.get("told")
    return str(row["policy"]) + (f" ({told})" if told else "")


def _cache(row: Row) -> str:
    return str(row.get("cache", "")).replace("%", " %")


WHOSE, POLICY = Column("sizes (routing)", _whose), Column("policy", _policy)
BATCH, CACHE = Column("B", lambda row: str(row["batch"])), Column("cache", _cache)
SPEED = (
    Column("tokens/s", _speed("tokens_per_s_gpu")),
    Column("simulated", _speed("tokens_per_s_sim")),
)

#: The tables by part of the file: their title and columns.
TABLES: dict[str, tuple[str, tuple[Column, ...]]] = {
    "speed": (
        "Speed",
        (WHOSE, POLICY, BATCH, CACHE, *SPEED,
         Column("over LRU", _number("over_lru_gpu", unit="x")),
         Column("simulated", _number("over_lru_sim", unit="x")),
         Column("over load on demand", _number("over_demand_gpu", unit="x")),
         Column("simulated", _number("over_demand_sim", unit="x"))),
    ),
    "memory": (
        "Memory",
        (WHOSE, POLICY, BATCH, CACHE,
         Column("GPU peak", _number("gpu_peak_bytes", scale=1 / GB, unit=" GB")),
         Column("predicted", _number("gpu_predicted_bytes", scale=1 / GB, unit=" GB")),
         Column("saved", _share("saved_gpu")), *SPEED),
    ),
    "predictor": (
        "The predictor beside the model",
        (Column("model", _whose), POLICY, BATCH, *SPEED,
         Column("share of a step", _share("predictor_share")),
         Column("host us", _number("host_us", 0)), Column("waited us", _number("wait_us", 0)),
         Column("step us", _number("pass_us", 0)),
         Column("over LRU", _number("over_lru_gpu", unit="x"))),
    ),
    "scheduler": (
        "The token scheduler",
        (WHOSE, POLICY, Column("scheduler", lambda row: str(row.get("scheduler", ""))), BATCH,
         CACHE, *SPEED, Column("division ms", _number("division_ms_gpu")),
         Column("moved GB", _number("moved_bytes", scale=1 / GB)),
         Column("experts", _number("distinct_experts", 1)),
         Column("in file order", _number("distinct_in_file_order", 1))),
    ),
}  # fmt: skip


def read(folder: Path) -> dict[str, Any] | None:
    """The measurements; None where there are none, an input error where they are no such file."""
    path = folder / FILE
    if not path.is_file():
        return None
    found = read_json(path, "GPU measurements")
    if not isinstance(found, Mapping) or not isinstance(found.get("parts"), Mapping):
        raise InputError(f"{path}: has no object 'parts', expected GPU measurements")
    for name in ("machine", "date"):
        if not isinstance(found.get(name), str):
            raise InputError(f"{path}: {name!r} is {found.get(name)!r}, expected text")
    for part, rows in found["parts"].items():
        if not isinstance(rows, list):
            raise InputError(f"{path}: part {part!r} is {rows!r:.40}, expected a list of rows")
        for number, row in enumerate(rows):
            _check(row, f"{path}: {part}, row {number}")
    return dict(found)


def _check(row: object, where: str) -> None:
    for name, kind in NEEDED.items():
        value = row.get(name) if isinstance(row, Mapping) else None
        if not isinstance(value, kind):
            raise InputError(f"{where}: {name!r} is {value!r}, expected {kind.__name__}")


def table(folder: Path) -> list[str]:
    """The measurements as tables under a line that says on what, or that there are none."""
    found = read(folder)
    if found is None:
        return [ABSENT]
    lines = [f"Measured: {found['machine']}; {found['date']}."]
    for part, (title, columns) in TABLES.items():
        rows = found["parts"].get(part, [])
        lines += _part(title, columns, rows) if rows else []
    return lines


def _part(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """One part's table, and below it the rows that are not in it."""
    absent = Counter(why for row in rows if (why := _why_absent(row)))
    shown = [row for row in rows if not _why_absent(row)]
    lines = ["", f"**{title}**"]
    if shown:
        cells = [[column.show(row) for column in columns] for row in shown]
        lines += ["", *markdown([column.head for column in columns], cells)]
    for why, count in absent.items():
        lines += ["", f"Not measured: {count} of {len(rows)} cells ({why})."]
    return lines


def _why_absent(row: Row) -> str:
    """Why a cell has no figures; nothing if it has."""
    return str(row.get("failed") or row.get("skipped") or "")
