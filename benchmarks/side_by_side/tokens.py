"""The tokens that every system is given: drawn at random, but repeated as text repeats them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.side_by_side.plan import Task

#: Zipf's exponent: token ``r`` of the vocabulary is drawn in proportion to ``1 / (r + 1)``.
ZIPF = 1.0
#: How often a token repeats an earlier one of the same text instead of being drawn, ...
REPEAT = 0.25
#: ... and how many tokens back that one lies at most.
BACK = 64


def draw_text(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Token ids int64 [length] with the frequencies and the bursts of text.

    Zipf's law alone repeats the frequent words; what a text is about comes back too.
    """
    frequencies = torch.arange(1, vocabulary + 1, dtype=torch.float64) ** -ZIPF
    ids = torch.multinomial(frequencies, length, replacement=True, generator=generator)
    repeats = torch.rand(length, generator=generator) < REPEAT
    distances = torch.rand(length, generator=generator)
    for at in range(1, length):
        if repeats[at]:
            ids[at] = ids[at - 1 - int(distances[at] * min(at, BACK))]
    return ids


def forced_tokens(task: Task) -> tuple[Tensor, Tensor]:
    """Token ids int64 [1, prompt + warm-up] and [1, prompt + forced] on the task's device.

    Drawn on the CPU, and all *forced_tokens* of them however few are decoded: a system that is
    given fewer steps reads the beginning of the same text.
    """
    generator = torch.Generator().manual_seed(task.seed + 1)
    vocabulary = task.shape.vocab
    text = draw_text(task.prompt_tokens + task.forced_tokens, vocabulary, generator)
    warm = draw_text(task.prompt_tokens + task.warmup_tokens, vocabulary, generator)
    return warm[None].to(task.device), text[None].to(task.device)
