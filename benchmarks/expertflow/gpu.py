"""What a GPU measured, read from ``gpu.json`` beside the other rows, if it is there.

::

    {"machine": "NVIDIA H200, driver 570.1, torch 2.13.0", "date": "2026-11-27",
     "rows": [{"sizes": "mixtral-8x7b", "routing": "coarse-8x2", "policy": "predictive",
               "forecaster": "routing-path", "batch": 1, "cache": "25%", "slots": 16,
               "tokens_per_s": 27.1, "gpu_peak_bytes": 6.4e9, "full_bytes": 2.4e10,
               "simulated_tokens_per_s": 26.0, "predictor_share": 0.03}]}

Of a row, *sizes*, *policy*, *batch*, *cache*, *tokens_per_s* and *gpu_peak_bytes* must be there.
*full_bytes* is the memory of everything resident, from which the saving follows;
*predictor_share* is the predictor's part of a step's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.expertflow.tables import GB, markdown, percent, speed
from policies.result import read_json
from traces.errors import InputError

FILE = "gpu.json"
ABSENT = "Not measured yet: `gpu.json` is not there."
NEEDED: dict[str, type[Any] | tuple[type[Any], ...]] = {
    "sizes": str,
    "policy": str,
    "batch": int,
    "cache": str,
    "tokens_per_s": (int, float),
    "gpu_peak_bytes": (int, float),
}


def read(folder: Path) -> dict[str, Any] | None:
    """The measurements; None where there are none, an input error where they are no such file."""
    path = folder / FILE
    if not path.is_file():
        return None
    found = read_json(path, "GPU measurements")
    if not isinstance(found, Mapping) or not isinstance(found.get("rows"), list):
        raise InputError(f"{path}: has no list 'rows', expected GPU measurements")
    for name in ("machine", "date"):
        if not isinstance(found.get(name), str):
            raise InputError(f"{path}: {name!r} is {found.get(name)!r}, expected text")
    for number, row in enumerate(found["rows"]):
        for name, kind in NEEDED.items():
            value = row.get(name) if isinstance(row, Mapping) else None
            if not isinstance(value, kind):
                raise InputError(f"{path}: row {number}: {name!r} is {value!r}, expected one")
    return dict(found)


def table(folder: Path) -> list[str]:
    """The measurements as a table under a line that says on what, or that there are none."""
    found = read(folder)
    if found is None:
        return [ABSENT]
    head = (
        "sizes (routing)", "policy", "B", "cache", "GPU peak", "saved", "tokens/s", "simulated",
        "error", "predictor's share of a step",
    )  # fmt: skip
    lines = markdown(head, [_line(row) for row in found["rows"]])
    return [f"Measured: {found['machine']}; {found['date']}.", "", *lines]


def _line(row: Mapping[str, Any]) -> list[str]:
    routing, told = row.get("routing"), row.get("forecaster")
    peak, whole = row["gpu_peak_bytes"], row.get("full_bytes")
    measured, simulated = row["tokens_per_s"], row.get("simulated_tokens_per_s")
    share = row.get("predictor_share")
    return [
        row["sizes"] + (f" ({routing})" if routing else ""),
        row["policy"] + (f" ({told})" if told else ""),
        str(row["batch"]),
        row["cache"].replace("%", " %"),
        f"{peak / GB:.2f} GB",
        f"{percent(1 - peak / whole)} %" if whole else "",
        speed(measured),
        speed(simulated),
        f"{100 * (measured / simulated - 1):+.1f} %" if simulated else "",
        f"{percent(share)} %" if share is not None else "",
    ]
