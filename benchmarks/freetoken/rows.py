"""The JSON list: an object for each routing, batch and share of slots, filled cell by cell."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.freetoken.plan import FUSED, LRU, OFFLOAD, OURS, Cell, Task
from traces.errors import InputError
from traces.writing import replacing

Row = dict[str, Any]

#: The first keys of every row, in this order; they follow from the measurements behind them.
FIRST = (
    "model", "routing", "batch", "slots_share", "freetoken_ms", "lru_ms", "best_ms", "best_policy",
)  # fmt: skip
#: What rows must share to be measured in the same run.
_SETUP = ("shape", "prompt", "steps", "seed", "machine", "versions", "date")


def model_name(task: Task) -> str:
    """What the rows of *task* call the model."""
    shape = task.shape
    return f"Qwen3-30B-A3B, {shape.layers} layers" if shape.hidden == 2048 else "tiny"


def setup_of(task: Task, cell: Cell, facts: dict[str, Any]) -> dict[str, Any]:
    """What a measurement of *cell* depends on, beside what the row is called."""
    return {
        "shape": task.to_dict()["shape"],
        "prompt": task.prompt,
        "steps": cell.steps,
        "seed": task.seed,
        "machine": facts.get("machine", {}),
        "versions": facts.get("versions", {}),
        "date": datetime.now(UTC).date().isoformat(),
    }


def add(rows: list[Row], task: Task, cell: Cell, result: Row, facts: dict[str, Any]) -> str:
    """Put what *cell* came to into its row, which is made or begun anew if need be.

    A row is begun anew where another machine, day or setting measured it. Returns what is to
    be said of that, or nothing.
    """
    name = model_name(task)
    share = round(cell.slots / task.shape.total, 6)
    key = (name, task.routing, cell.batch, share)
    row = next((row for row in rows if _key(row) == key), None)
    setup = setup_of(task, cell, facts)
    told = ""
    if row is not None and facts and (apart := _apart(row, setup)):
        told = f"{task.routing} routing, batch {cell.batch}, {share:.0%}: "
        told += f"measured before with another {apart}, begun anew"
        rows.remove(row)
        row = None
    if row is None:
        row = dict.fromkeys(FIRST)
        row |= {"model": name, "routing": task.routing, "batch": cell.batch}
        row |= {"slots_share": share, "slots": cell.slots}
        row |= {OFFLOAD: {}, OURS: {}, "failed": {}}
        rows.append(row)
        rows.sort(key=lambda row: (*_key(row)[:-1], -row["slots_share"]))
    if facts:
        row |= setup
    _put(row, task, cell, result)
    derive(row)
    return told


def _key(row: Row) -> tuple[str, str, int, float]:
    return row["model"], row["routing"], row["batch"], row["slots_share"]


def _apart(row: Row, setup: dict[str, Any]) -> str:
    """The first of the settings that *row* was measured with and *setup* has not."""
    known = [name for name in _SETUP if name in row]
    return next((name for name in known if row[name] != setup[name]), "")


def _put(row: Row, task: Task, cell: Cell, result: Row) -> None:
    """One measurement, or why there is none, beside the others of its row."""
    ours = task.system == OURS
    part, name = (OURS, cell.policy) if ours else (OFFLOAD, _backend(task))
    label = f"ours, {name}" if ours else f"FreeToken, {name}"
    row["failed"].pop(label, None)
    row[part].pop(name, None)
    if "failed" in result:
        row["failed"][label] = result["failed"]
    else:
        row[part][name] = result


def _backend(task: Task) -> str:
    return "fused" if task.system == FUSED else "offload"


def derive(row: Row) -> None:
    """Work out the first keys: FreeToken's faster backend, our LRU, our fastest policy."""
    theirs, ours = row[OFFLOAD], row[OURS]
    best = min(ours, key=lambda name: ours[name]["ms"], default=None)
    row["freetoken_ms"] = min((found["ms"] for found in theirs.values()), default=None)
    row["lru_ms"] = ours[LRU]["ms"] if LRU in ours else None
    row["best_ms"] = ours[best]["ms"] if best else None
    row["best_policy"] = best
    row["freetoken_missed_per_token"] = theirs.get("offload", {}).get("missed_per_token")
    row["lru_missed_per_token"] = ours.get(LRU, {}).get("missed_per_token")
    row["best_missed_per_token"] = ours[best]["missed_per_token"] if best else None
    row["best_prefetched_per_token"] = ours[best]["prefetched_per_token"] if best else None


def read(path: Path) -> list[Row]:
    """The rows in *path*; what is not such a list is an :class:`InputError`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}, expected rows of this benchmark") from None
    keys = set(FIRST) | {OFFLOAD, OURS, "failed"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and keys <= set(r) for r in rows):
        raise InputError(f"{path}: no list of rows found, expected objects with {', '.join(FIRST)}")
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """The list, in a file that appears only when it is whole."""
    text = json.dumps(list(rows), indent=1)
    text = re.sub(r"\{([^{}]*)\}", lambda found: "{" + " ".join(found[1].split()) + "}", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
