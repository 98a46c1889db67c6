"""Start one worker process for each system and gather what they write."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import child
from benchmarks.side_by_side.agreement import Logits, agreement
from benchmarks.side_by_side.plan import REFERENCE, YARDSTICK, Task
from traces.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
#: How often a worker is looked at.
POLL_S = 0.05


def _available_bytes() -> int | None:
    """Memory that the machine could still hand out, None on a system without ``/proc``."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


@contextmanager
def _started(task: Task, folder: Path) -> Iterator[BaseProcess]:
    """A worker that is gone when the block is left, however it is left."""
    process = child.context(task.device).Process(target=child.run, args=(str(folder),))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _watch(process: BaseProcess, timeout_s: float) -> tuple[bool, int | None]:
    """Wait for *process*: whether it ended in time, and by how much available memory fell."""
    end = time.monotonic() + timeout_s
    before = least = _available_bytes()
    while process.is_alive():
        if time.monotonic() > end:
            return False, None
        now = _available_bytes()
        if now is not None and least is not None:
            least = min(least, now)
        process.join(POLL_S)
    return True, None if before is None or least is None else before - least


def _last_line(log: Path) -> str:
    if not log.exists():
        return "it printed nothing"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


def run_task(task: Task, timeout_s: float) -> tuple[dict[str, Any], Logits | None]:
    """One system in a process of its own: its result, and its logits if it came through."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / child.TASK).write_text(json.dumps(task.to_dict()))
        with _started(task, folder) as process:
            ended, fell_bytes = _watch(process, timeout_s)
            code = process.exitcode
        out, logits = folder / child.RESULT, folder / child.LOGITS
        result: dict[str, Any]
        if not ended:
            result = {"status": "timeout", "reason": f"stopped after {timeout_s:.0f} s"}
        elif not out.exists():
            reason = f"left with {code}: {_last_line(folder / child.LOG)}"
            result = {"status": "failed", "reason": reason}
        else:
            result = json.loads(out.read_text())
            result["host_fell_bytes"] = fell_bytes
        result["wall_s"] = time.monotonic() - start
        return result, np.load(logits) if logits.exists() else None


def run_all(
    tasks: Sequence[Task],
    timeout_s: float,
    limit_s: float,
    tell: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run *tasks* one after the other; *tell* is given all rows whenever one is added.

    The float32 reference and the yardstick are compared with as soon as they are there: they
    come first. After *limit_s* seconds in all the rest are not begun. A machine without the
    device asked for is an :class:`InputError`.
    """
    start, rows = time.monotonic(), list[dict[str, Any]]()
    kept: dict[str, Logits] = {}
    for task in tasks:
        if time.monotonic() - start >= limit_s:
            reason = f"the limit of {limit_s:.0f} s for all systems was reached"
            result, logits = {"status": "not run", "reason": reason}, None
        else:
            result, logits = run_task(task, timeout_s)
        if result["status"] == "no device":
            raise InputError(f"--device {task.device}: {result['reason']}, expected one")
        if logits is not None and task.system in (REFERENCE, YARDSTICK):
            kept[task.system] = logits
        row = {"system": task.system, "decode_tokens": task.decode_tokens, **result}
        if logits is not None and task.system != REFERENCE:
            row["agreement"] = agreement(logits, kept.get(REFERENCE), kept.get(YARDSTICK))
        rows.append(row)
        tell(rows)
    return rows
