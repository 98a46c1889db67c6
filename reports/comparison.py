"""Text for terminals: runs side by side, with what there is to win at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.result import Result
from reports.labels import WORLDS, budget_text, by_setting, model_name, series_labels, sizes_note
from reports.metrics import (
    belady_missed_ratio,
    below_cycle,
    limit_share,
    moves_made,
    token_cycle,
    token_time,
)
from reports.units import count, data, duration, percent, significant

#: Narrowest and widest room for labels, in characters; a longer one gets a line of its own.
LABEL_WIDTHS = (20, 34)

#: Title and width of each column of figures.
COLUMNS = (
    ("held %", 7),
    ("missed/tok", 11),
    ("moves/tok", 10),
    ("TPOT ms", 8),
    ("tok/s", 8),
    ("stall ms", 9),
    ("link %", 7),
    ("vs lru", 7),
    ("gap", 7),
)

NOTES = """\
held %      accesses whose expert had a slot when the gate asked
missed/tok  experts that had none, per token; moves/tok counts every copy, prefetches too
stall ms    per output token, the GPU waiting for a missed expert or a late prefetch{rough}
vs lru      tokens per second against LRU with the same budget
gap         share of the time per token between LRU and Belady that is won; prefetching can
            win more than all of it, since Belady loads on demand
"""

ROUGH = """
            (by the stalls' share of the whole run, prompts included)"""


def compare_table(results: Sequence[Result]) -> str:
    """Policies and budgets side by side: LRU, the policies, Belady, and the bounds.

    Runs are grouped by what they have in common (trace, hardware, batch) and by budget.
    """
    if not results:
        return "no results\n"
    blocks = []
    for alike in by_setting(results):
        blocks.append(_headline(alike[0]))
        blocks += [_block(rows) for rows in _by_budget(alike)]
    rough = any(token_time(result).whole_run for result in results)
    return "\n\n".join([*blocks, NOTES.format(rough=ROUGH if rough else "")])


@dataclass(frozen=True)
class _Row:
    """A run under its label."""

    label: str
    result: Result

    @property
    def rank(self) -> int:
        """LRU first, Belady last, the others in between as they were given."""
        return {"lru": 0, "belady": 2}.get(self.result.policy["name"], 1)


def _headline(result: Result) -> str:
    model = result.model
    lines = [
        f"{result.trace}: {model_name(result)}, {model['layers']} layers x {model['experts']} "
        f"experts, top-{model['top_k']}, {count(result.tokens)} tokens"
    ]
    if note := sizes_note(result):
        lines.append(note)
    lines.append(
        f"{result.hardware['name']} ({result.hardware['kind']}), "
        f"{WORLDS.get(result.world, result.world)}, batch {result.batch}, pool: {result.pool}, "
        f"seed {result.seed}"
    )
    return "\n".join(lines)


def _by_budget(results: Sequence[Result]) -> list[list[_Row]]:
    """Rows with one budget, budgets rising."""
    groups: dict[int, list[_Row]] = {}
    for label, result in zip(series_labels(results), results, strict=True):
        groups.setdefault(result.slots, []).append(_Row(label, result))
    return [sorted(groups[slots], key=lambda row: row.rank) for slots in sorted(groups)]


def _block(rows: Sequence[_Row]) -> str:
    first = rows[0].result
    least, most = LABEL_WIDTHS
    width = max([least, *(len(row.label) for row in rows if len(row.label) <= most)])
    experts = data(first.memory["slots_bytes"])
    lines = [
        f"{budget_text(first)} of the experts: {count(first.slots)} slots, {experts}",
        _line("", [name for name, _ in COLUMNS], width),
    ]
    lru, belady = _named(rows, "lru"), _named(rows, "belady")
    lines += [_line(row.label, _cells(row.result, lru, belady), width) for row in rows]
    if belady is None:
        lines.append(_line("belady (counts only)", _belady_cells(first), width))
    lines += _limits(rows)
    if below_cycle(first):
        lines.append(
            f"  WARNING: fewer slots than one token's {token_cycle(first)} experts "
            f"({first.model['layers']} x {first.model['top_k']}): LRU's cliff"
        )
    return "\n".join(lines)


def _named(rows: Sequence[_Row], name: str) -> Result | None:
    return next((row.result for row in rows if row.result.policy["name"] == name), None)


def _line(label: str, cells: Sequence[str], width: int) -> str:
    padded = "".join(f"{cell:>{room}}" for cell, (_, room) in zip(cells, COLUMNS, strict=True))
    if len(label) > width:
        label = f"{label}\n  "
        padded = " " * width + padded
    return f"  {label:<{width}}{padded}".rstrip()


def _cells(result: Result, lru: Result | None, belady: Result | None) -> list[str]:
    tokens = max(result.tokens, 1)
    tpot, speed = result.time["tpot_s"]["mean"], result.time["tokens_per_s"]
    faster = "-"
    if lru is not None and lru.time["tokens_per_s"]:
        faster = f"{speed / lru.time['tokens_per_s']:.2f} x"
    return [
        f"{100 * result.held_ratio:.1f}",
        significant(result.missed / tokens),
        significant(moves_made(result) / tokens),
        significant(1e3 * tpot),
        significant(speed),
        significant(1e3 * token_time(result).stall_s),
        f"{100 * result.link['utilisation']:.1f}",
        faster,
        _gap(result, lru, belady),
    ]


def _gap(result: Result, lru: Result | None, belady: Result | None) -> str:
    """The share won of the time per token between LRU and Belady."""
    if lru is None or belady is None:
        return "-"
    slow, fast = (r.time["tpot_s"]["mean"] for r in (lru, belady))
    if slow - fast < 1e-6 * slow:
        return "-"
    return percent((slow - result.time["tpot_s"]["mean"]) / (slow - fast), 0)


def _belady_cells(result: Result) -> list[str]:
    moves = significant(result.bounds["belady_missed"] / max(result.tokens, 1))
    held = f"{100 * (1 - belady_missed_ratio(result)):.1f}"
    return [held, moves, moves, *["-"] * (len(COLUMNS) - 3)]


def _limits(rows: Sequence[_Row]) -> list[str]:
    """What nobody can beat, and how near the best exact run comes."""
    first = rows[0].result
    bounds = first.bounds
    lines = [
        f"  bounds: compute {duration(bounds['compute_s'])}, transfer "
        f"{duration(bounds['transfer_s'])} ({count(bounds['belady_missed'])} moves); no exact run "
        f"below {duration(first.limit_s)}"
    ]
    online = [
        row
        for row in rows
        if row.result.policy.get("exact", True) and not row.result.policy.get("offline", False)
    ]
    if online:
        best = min(online, key=lambda row: row.result.time["total_s"])
        lines.append(
            f"  best exact policy without hindsight: {best.label}, "
            f"{duration(best.result.time['total_s'])}, {percent(limit_share(best.result))} of the "
            "limit's speed"
        )
    inexact = [row.label for row in rows if not row.result.policy.get("exact", True)]
    if inexact:
        lines.append(f"  not exact (may change the output): {', '.join(inexact)}")
    return lines
