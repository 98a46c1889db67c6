"""On what a cell was measured: machine, versions and day."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from functools import cache
from typing import Any

from reports.validation.cells import GPU

#: Distributions whose versions a cell names, where they are installed.
VERSIONED = ("expertflow-lab", "torch", "transformers", "triton", "numpy", "simpy")


def surroundings(world: str) -> dict[str, Any]:
    """The fields *machine*, *versions* and *date* of a cell that ran in *world*."""
    today = datetime.date.today().isoformat()
    return {"machine": machine(world), "versions": dict(versions()), "date": today}


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """Python and the distributions that a measurement depends on."""
    found = [("Python", platform.python_version())]
    for name in VERSIONED:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


@cache
def machine(world: str) -> str:
    """The device in words: the GPU with its driver, or the CPU's kind and cores."""
    from runtime.doctor import examine

    facts = examine()
    gpu = facts["gpu"]
    if world != GPU or not gpu["gpus"]:
        return f"{platform.machine()} CPU, {facts['cores']} cores"
    words = [str(gpu["gpus"][0]["name"])]
    words += [f"{name} {gpu[key]}" for name, key in (("driver", "driver"), ("CUDA", "cuda"))
              if gpu[key]]  # fmt: skip
    return ", ".join(words)
