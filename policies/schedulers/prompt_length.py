"""Prompts of similar length together, so that no prefill waits for one long prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from policies.registry import parameter, register_scheduler
from policies.scheduling import BatchScheduler
from traces.trace import TokenSequence


@register_scheduler("prompt-length")
@dataclass
class PromptLength(BatchScheduler):
    """Sorts a window of waiting sequences by prompt length and batches neighbours."""

    window: int = parameter(8, "batches that are sorted together", low=1, high=1024)

    def batches(
        self, sequences: Iterable[TokenSequence], batch: int
    ) -> Iterator[list[TokenSequence]]:
        source = iter(sequences)
        while waiting := list(islice(source, batch * self.window)):
            waiting.sort(key=lambda sequence: sequence.prefill)
            for start in range(0, len(waiting), batch):
                yield waiting[start : start + batch]
