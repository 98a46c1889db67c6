"""``predictive`` beside ``lru`` in every cell that was run: the slowest, and those too slow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import expertflow_gaps
from benchmarks.expertflow import parts, speeds

#: What ``predictive`` may lose against ``lru``, as a ratio of speeds.
LEAST = 0.98


class Pair(NamedTuple):
    """Speed of ``predictive`` over that of ``lru`` in one cell, and which cell it is."""

    speed: float
    cell: str


def pairs(folder: Path) -> list[Pair]:
    """Every comparison in the same kind of pools that *folder* has, the slowest first."""
    found = []
    for part in ("gaps-coarse", "gaps-granular", "gaps-gpt-oss"):
        for row in parts.read_rows(folder, part, expertflow_gaps.Row):
            words = f"h200-pcie5, B {row.batch}, {row.cache}, {row.forecaster}, {row.evict}"
            sizes = row.sizes or row.trace
            found.append(Pair(row.speed, f"{row.trace}, {sizes}, {words}"))
    for row in parts.read_rows(folder, "speeds", speeds.Row):
        words = f"{row.hardware}, B {row.batch}, {row.slots} slots, {row.forecaster}, reuse"
        found.append(Pair(row.vs_lru, f"{row.trace}, {row.sizes}, {words}"))
        if row.vs_lru_layer is not None:
            found.append(
                Pair(row.vs_lru_layer, f"{row.trace}, {row.sizes}, {words}, pools by layer")
            )
    return sorted(found)


def slower(found: Sequence[Pair]) -> list[Pair]:
    """Those that are slower than they may be."""
    return [pair for pair in found if pair.speed < LEAST]


def sentence(found: Sequence[Pair]) -> str:
    """The verdict in a sentence."""
    if not found:
        return "predictive against lru: no cells"
    least, bad = found[0], slower(found)
    verdict = f"{len(bad)} below {LEAST}" if bad else f"none below {LEAST}"
    return (
        f"`predictive` against `lru` in {len(found)} cells: {verdict}; "
        f"the slowest {least.speed:.3f}x ({least.cell})"
    )
