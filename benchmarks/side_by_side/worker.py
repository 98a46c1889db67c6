"""One system in one process: set up, warm up, measure, write what came out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.side_by_side.memory import machine_facts, memory_peaks
from benchmarks.side_by_side.model import make_model
from benchmarks.side_by_side.plan import REFERENCE, System, Task
from benchmarks.side_by_side.systems import Runner, Unavailable, check_available, set_up
from benchmarks.side_by_side.tokens import forced_tokens
from traces.errors import first_line


def _timed(device: str, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What *call* returns, and the seconds until the device had done it.

    A user who chooses the next token waits just so, once for each.
    """
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


class _Pass:
    """One text fed to a runner: the logits after each step, and what each step took."""

    def __init__(self, runner: Runner, task: Task, ids: Tensor, decode: int) -> None:
        prompt = task.prompt_tokens
        runner.restart()
        self.before = runner.counts()
        logits, self.prefill_s = _timed(task.device, lambda: runner.forward(ids[:, :prompt]))
        self.logits = [logits]
        self.steps_s: list[float] = []
        self.between = runner.counts()
        for at in range(prompt, prompt + decode):
            token = ids[:, at : at + 1]
            logits, seconds = _timed(task.device, lambda token=token: runner.forward(token))  # type: ignore[misc]
            self.logits.append(logits)
            self.steps_s.append(seconds)
        self.after = runner.counts()

    def counted(self, key: str) -> tuple[int | None, int | None]:
        """*key* over the prefill and over all decode steps, None if the system does not count."""
        counts = [told.get(key) for told in (self.before, self.between, self.after)]
        if any(count is None for count in counts):
            return None, None
        first, second, third = (int(count) for count in counts if count is not None)
        return second - first, third - second


def _statistics(steps_s: list[float]) -> dict[str, float]:
    """Median, mean and 90th percentile in seconds."""
    return {
        "median": float(np.median(steps_s)),
        "mean": float(np.mean(steps_s)),
        "p90": float(np.quantile(steps_s, 0.9)),
    }


def measure(task: Task) -> tuple[dict[str, Any], Tensor]:
    """Run one system: its figures, and the logits float32 [1 + decoded, vocabulary].

    The first pass, over another text, is the cold one; the second is measured. What no figure
    of ours names is kept as the system tells it, under ``told``.
    """
    system = System.parse(task.system)
    check_available(system, task.device)
    start = time.perf_counter()
    warm, text = forced_tokens(task)
    runner = set_up(system, task)
    setup_s = time.perf_counter() - start
    cold = _Pass(runner, task, warm, task.warmup_tokens)
    hot = _Pass(runner, task, text, task.decode_tokens)
    missed_prefill, missed_decode = hot.counted("missed")
    figures = {
        "setup_s": setup_s,
        "cold_prefill_s": cold.prefill_s,
        "prefill_s": hot.prefill_s,
        "tpot_s": _statistics(hot.steps_s),
        "steps_s": [round(seconds, 7) for seconds in hot.steps_s],
        "missed_prefill": missed_prefill,
        "missed_decode": missed_decode,
        "prefetched_decode": hot.counted("prefetched")[1],
        **memory_peaks(task.device),
        "machine": machine_facts(task.device),
        "told": hot.after.get("told"),
    }
    logits = torch.cat(hot.logits).float().cpu()
    runner.close()
    return figures, logits


def reference(task: Task) -> tuple[dict[str, Any], Tensor]:
    """Logits of the whole text in float32, in one pass and by transformers' plainest kernel."""
    start = time.perf_counter()
    model = make_model(task, torch.float32)
    model.set_experts_implementation("eager")
    _, text = forced_tokens(task)
    text = text[:, : task.prompt_tokens + task.decode_tokens]
    output = model(input_ids=text, use_cache=False, logits_to_keep=task.decode_tokens + 1)
    figures = {"setup_s": time.perf_counter() - start, "machine": machine_facts(task.device)}
    return figures, output.logits[0].float().cpu()


def work(task: Task, logits_file: Path) -> dict[str, Any]:
    """Run *task*; whatever fails becomes a status and a reason of one line."""
    # For a cache that grows with every token, cuDNN would build a new plan for every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if task.device == "cuda" and not torch.cuda.is_available():
        return {"status": "no device", "reason": "PyTorch sees no CUDA device"}
    try:
        with torch.no_grad():
            run = reference if task.system == REFERENCE else measure
            figures, logits = run(task)
    except Unavailable as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
    np.save(logits_file, logits.numpy())
    return {"status": "ok", **figures}
