"""One process: does its task, and writes what it found after every cell.

``python -m benchmarks.freetoken.child FOLDER``: the task lies in FOLDER, and so will the result.
A failure leaves with 1 and its traceback on standard error, which is a log file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.freetoken.plan import CHECKPOINT, OURS, Task
from traces.errors import InputError, kind_and_line

#: What lies in a process's folder: its task is given, the others are written by it.
TASK, RESULT, LOG = "task.json", "result.json", "log"

_PACKAGES = ("torch", "transformers", "triton", "numpy", "freetoken", "flashlib")
#: Optional packages that FreeToken is faster with, if they are there.
_EXTRAS = ("flashinfer", "sgl_kernel", "triton_kernels")


def versions() -> dict[str, str]:
    """Of what takes part here; optional packages only if they are there."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {name: "there" for name in _EXTRAS if importlib.util.find_spec(name)}


def results(task: Task) -> Iterator[dict[str, Any]]:
    """Those of the system that *task* names."""
    # Each knows libraries that the other need not have.
    if task.system == OURS:
        from benchmarks.freetoken import ours

        yield from ours.results(task)
    else:
        from benchmarks.freetoken import theirs

        yield from theirs.results(task)


def _facts(task: Task) -> dict[str, Any]:
    """The machine and the versions, once the GPU may be asked."""
    from benchmarks.side_by_side.memory import machine_facts

    return {"machine": machine_facts(task.device), "versions": versions()}


def run(folder: Path) -> None:
    """Do the task that lies in *folder*."""
    task = Task.from_dict(json.loads((folder / TASK).read_text(encoding="utf-8")))
    found: dict[str, Any] = {"cells": []}
    if task.system == CHECKPOINT:
        from benchmarks.freetoken.checkpoint import make

        make(task)
        _write(folder / RESULT, found)
        return
    for cell, result in zip(task.cells, results(task), strict=False):
        print(cell, result, flush=True)
        found["cells"].append(result)
        found |= _facts(task)
        _write(folder / RESULT, found)


def _write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(path)


def main(folder: str) -> int:
    """Exit code 1, and the reason on the last line, if anything failed."""
    try:
        run(Path(folder))
    except Exception as error:
        traceback.print_exc()
        reason = str(error) if isinstance(error, InputError) else kind_and_line(error)
        print(reason, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    # Engines leave threads and process groups behind that may wait for each other.
    os._exit(code)
