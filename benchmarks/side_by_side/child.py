"""Processes for the workers, each forked from one that has imported the libraries already.

Importing torch and transformers takes longer than most systems take to decode. The process that
is forked has done nothing else: no model, no CUDA, no threads of its own.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

#: What every system needs; what belongs to one system is imported by its worker.
PRELOAD = ("torch", "transformers.models.qwen3_moe.modeling_qwen3_moe")
#: What lies in a worker's folder: its task is given, the others are written by it.
TASK, RESULT, LOGITS, LOG = "task.json", "result.json", "logits.npy", "log"


def _write_to(file: str | Path) -> None:
    """Let all output of this process, that of C libraries too, go to *file*."""
    target = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)


def _open_cuda() -> None:
    """Initialise CUDA as a worker does; ends with an error where that fails."""
    _write_to(os.devnull)
    import torch

    cuda: Any = torch.cuda
    cuda.init()


def run(folder: str) -> None:
    """Be the worker of the task that lies in *folder*."""
    place = Path(folder)
    _write_to(place / LOG)
    from benchmarks.side_by_side.plan import Task
    from benchmarks.side_by_side.worker import work

    task = Task.from_dict(json.loads((place / TASK).read_text()))
    result = work(task, place / LOGITS)
    (place / RESULT).write_text(json.dumps(result, default=str))


@functools.cache
def context(device: str) -> ForkServerContext | SpawnContext:
    """Where the workers for *device* come from; started once.

    A library that touches CUDA while it is imported spoils it for every fork. PyTorch asks NVML
    instead if it is told to; should CUDA fail in a fork all the same, each worker is a new
    interpreter.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(list(PRELOAD))
    if device == "cuda":
        probe = forking.Process(target=_open_cuda)
        probe.start()
        probe.join()
        if probe.exitcode != 0:
            return multiprocessing.get_context("spawn")
    return forking
