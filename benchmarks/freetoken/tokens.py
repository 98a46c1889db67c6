"""The tokens that both systems are given, and the part of a run that counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.freetoken.plan import RANDOM, Cell, Task
from benchmarks.side_by_side.tokens import draw_text


def texts(task: Task, cell: Cell) -> Tensor:
    """Token ids int64 [B, prompt + steps + 1] on the CPU; a larger batch begins with a smaller's.

    The last token is not decoded: it is what the last step is made to choose.
    """
    length = task.prompt + cell.steps + 1
    draw = _draw_evenly if task.routing == RANDOM else draw_text
    drawn = [
        draw(length, task.shape.vocab, torch.Generator().manual_seed(1000 * task.seed + row))
        for row in range(cell.batch)
    ]
    return torch.stack(drawn)


def _draw_evenly(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Token ids int64 [length], each as likely as any other."""
    return torch.randint(vocabulary, (length,), generator=generator)


def counted_from(steps: int) -> int:
    """The first decode step that counts: until then the slots fill."""
    return steps // 2


def times_ms(steps_s: list[float]) -> dict[str, float]:
    """Median and 90th percentile of the last half of *steps_s*, in milliseconds."""
    last = 1e3 * np.array(steps_s[counted_from(len(steps_s)) :])
    return {"ms": float(np.median(last)), "p90_ms": float(np.quantile(last, 0.9))}
