"""Start a process for a task, keep its log, and gather what it wrote before it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.freetoken.child import LOG, RESULT, TASK
from benchmarks.freetoken.plan import Cell, Task
from traces.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What a process wrote: the *results* of its first cells, and why it did no more, if so."""

    results: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def run(task: Task, folder: Path, timeout_s: float) -> Outcome:
    """*task* in a process of its own; its files, with all that it printed, lie in *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    (folder / TASK).write_text(json.dumps(task.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.freetoken.child", str(folder.resolve())]
    # Nothing is on the hub; to ask it would wait for a network that may not be there.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            failed = "" if process.wait(timeout_s) == 0 else _reason(folder, process.returncode)
        except subprocess.TimeoutExpired:
            failed = f"stopped after {timeout_s:.0f} s"
        finally:
            process.kill()
            process.wait()
    written: dict[str, Any] = {}
    if (folder / RESULT).is_file():
        written = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    results = written.pop("cells", [])
    if not failed and len(results) < len(task.cells):
        failed = "it ended early"
    return Outcome(results, written, failed)


def _reason(folder: Path, code: int) -> str:
    """The last line of the log of a process that left with *code*."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"left with {code}: {last}"


#: A cell, its result and the facts beside it, or why there is none.
Found = tuple[Cell, dict[str, Any], dict[str, Any]]


def run_all(task: Task, logs: Path, end: float) -> Iterator[Found]:
    """Every cell of *task*, in processes one after the other until the clock shows *end*.

    The cell at which a process fails is told with the reason under ``failed``, and the next
    process goes on behind it. One that fails before any cell of it is done would again: then
    so do all others.
    """
    cells, number = list(task.cells), 0
    while cells:
        left_s = end - time.monotonic()
        if left_s <= 0:
            yield from ((cell, {"failed": "not begun: --limit was reached"}, {}) for cell in cells)
            return
        number += 1
        folder = logs / f"{task.system}-{number}"
        outcome = run(replace(task, cells=tuple(cells)), folder, left_s)
        done = list(zip(cells, outcome.results, strict=False))
        yield from ((cell, result, outcome.facts) for cell, result in done)
        if not outcome.failed:
            return
        reason = {"failed": f"{outcome.failed} (log: {folder / LOG})"}
        lost = cells[len(done) : len(done) + 1] if done else cells
        yield from ((cell, reason, {}) for cell in lost)
        cells = cells[len(done) + len(lost) :]


def make_checkpoint(task: Task, logs: Path, timeout_s: float) -> None:
    """Have the checkpoint written; what goes wrong is an :class:`InputError`."""
    outcome = run(task, logs / task.system, timeout_s)
    if outcome.failed:
        where = logs / task.system / LOG
        raise InputError(f"{task.folder}: no checkpoint was made, {outcome.failed} (log: {where})")
