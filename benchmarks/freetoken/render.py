"""The rows as tables of docs/performance.md, and what the goals say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.expertflow.page import put_into
from benchmarks.expertflow.tables import markdown
from benchmarks.freetoken.plan import OFFLOAD
from benchmarks.freetoken.rows import Row
from policies.result import read_json
from traces.errors import InputError

#: Names of the marked places of the page.
GRAPH, GPT_OSS = "freetoken", "gpt-oss"
#: Largest share of FreeToken's time that ``lru`` and the best policy are to take, by the share of
#: slots.
GOALS = {1.0: (0.95, None), 0.5: (0.90, 0.70), 0.25: (0.85, 0.65)}

_HEAD = (
    "routing", "batch", "slots", "FreeToken", "ours, `lru`", "ours, best exact policy",
    "missed per token: FreeToken", "`lru`", "best (and prefetched)",
)  # fmt: skip
_CELLS_HEAD = (
    "policy", "batch", "slots", "simulated", "measured", "error", "link alone", "decisions",
)  # fmt: skip


def fill(page: Path, rows: Sequence[Row], figure: str, cells: Path | None) -> None:
    """Put the tables into *page*; *figure* is the picture's path from there.

    Without *cells*, a list that ``simctl validate --cells`` wrote, gpt-oss stays as it is.
    """
    found = {GRAPH: section(rows, figure)}
    if cells is not None:
        found[GPT_OSS] = gpt_oss_section(cells)
    put_into(page, found)


def section(rows: Sequence[Row], figure: str) -> str:
    """Machine, table, figure and what failed."""
    lines = [_about(rows), "", *markdown(_HEAD, [_line(row) for row in rows])]
    lines += ["", f"![Time per decode step, ours and FreeToken's]({figure})"]
    failed = [
        f"- {label}, {row['routing']} routing, batch {row['batch']}, {row['slots_share']:.0%}: "
        + _without_log(reason)
        for row in rows
        for label, reason in row["failed"].items()
    ]
    return "\n".join([*lines, *(["", *failed] if failed else [])])


def _without_log(reason: str) -> str:
    """A log lies on the machine that ran, not where the page is read."""
    return reason.partition(" (log: ")[0]


def _about(rows: Sequence[Row]) -> str:
    """Each machine and its software in a sentence."""
    told = []
    for row in rows:
        machine, versions = row.get("machine") or {}, row.get("versions") or {}
        facts = [row["model"], machine.get("device", "unknown device")]
        facts += [f"driver {machine['driver']}"] if machine.get("driver") else []
        facts += [f"{name} {version}" for name, version in versions.items()]
        told.append(", ".join(facts) + f"; {row.get('date', 'undated')}.")
    return " ".join(dict.fromkeys(told))


def _line(row: Row) -> list[str]:
    goal, best_goal = GOALS.get(row["slots_share"], (None, None))
    theirs = row["freetoken_ms"]
    policy = f" `{row['best_policy']}`" if row["best_policy"] else ""
    backend = min(row[OFFLOAD], key=lambda name: row[OFFLOAD][name]["ms"], default="")
    return [
        row["routing"],
        str(row["batch"]),
        f"{row['slots']:,} ({row['slots_share']:.0%})",
        _ms(theirs) + (" (fused)" if backend == "fused" else ""),
        _ms(row["lru_ms"]) + _against(row["lru_ms"], theirs, goal),
        _ms(row["best_ms"]) + policy + _against(row["best_ms"], theirs, best_goal),
        _count(row["freetoken_missed_per_token"]),
        _count(row["lru_missed_per_token"]),
        _count(row["best_missed_per_token"]) + _fetched(row["best_prefetched_per_token"]),
    ]


def _ms(value: float | None) -> str:
    return "not run" if value is None else f"{value:#.3g}".rstrip(".") + " ms"


def _against(value: float | None, theirs: float | None, goal: float | None) -> str:
    """*value* over *theirs*, and the goal that it is to stay within."""
    if value is None or theirs is None:
        return ""
    share = value / theirs
    if goal is None:
        return f", {share:.2f} x"
    return f", {share:.2f} x (goal {goal:.2f}{'' if share <= goal else ', **missed**'})"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _fetched(value: float | None) -> str:
    return f" ({value:.1f})" if value else ""


def gpt_oss_section(path: Path) -> str:
    """Our runtime against our simulator on gpt-oss-20b, from the cells of a validation."""
    cells = read_json(path, "cells of a validation")
    if not isinstance(cells, list):
        raise InputError(f"{path}: no list found, expected the cells of a validation")
    chosen = [cell for cell in cells if "gpt-oss-20b" in cell.get("model", "")]
    if not chosen:
        raise InputError(f"{path}: {len(cells)} cells, none of gpt-oss-20b, expected some")
    facts = dict.fromkeys(
        f"{cell['model']}, {cell.get('machine') or 'unknown machine'}; {cell.get('date') or ''}."
        for cell in chosen
    )
    ordered = sorted(chosen, key=lambda c: (c["batch"], -c["cache"], c["policy"]))
    return "\n".join(["\n".join(facts), "", *markdown(_CELLS_HEAD, list(map(_cell, ordered)))])


def _cell(cell: dict[str, Any]) -> list[str]:
    if cell.get("failed"):
        end = ["", "failed", "", "", cell["failed"]]
    else:
        equal = {True: "equal", False: "**differ**", None: "not judged"}[cell["decisions_equal"]]
        error = cell.get("error")
        times = [_s(cell["tpot_sim_s"]), _s(cell["tpot_gpu_s"])]
        told = "" if error is None else f"{100 * error:+.1f} %"
        end = [*times, told, _s(cell.get("naive_s")), equal]
    return [f"`{cell['policy']}`", str(cell["batch"]), f"{cell['cache']:.0%}", *end]


def _s(value: float | None) -> str:
    return "" if value is None else _ms(1e3 * value)
