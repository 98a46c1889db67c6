"""The future of a trace, for offline policies and for the bounds: when each expert comes next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from policies.batching import Batches, Block, steps
from policies.routing import Step
from traces.trace import IntArray

#: Next use of an expert that never comes again.
NEVER = 2**31 - 1


class Future:
    """All accesses of a run over *batches*, and the event at which each expert comes next.

    Six bytes per access are kept (uint16 expert, int32 next event) while there are fewer
    than 65,536 experts.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._experts: list[IntArray] = []
        self._ends: list[IntArray] = []
        total = batches.trace.model.total_experts
        self.popularity = np.zeros(total, dtype=np.int64)
        for block in batches.blocks():
            small = block.flat.astype(np.uint16) if total <= 1 << 16 else block.flat
            self._experts.append(small)
            self._ends.append(block.lengths.reshape(-1))
            self.popularity += np.bincount(block.flat, minlength=total)
        self.events = sum(len(ends) for ends in self._ends)
        self.accesses = sum(len(flat) for flat in self._experts)
        self._next_use = self._look_back(total)

    def _look_back(self, total: int) -> list[IntArray]:
        """Walk the blocks from the last to the first, knowing what comes after each."""
        coming = np.full(total, NEVER, dtype=np.int32)
        found: list[IntArray] = []
        event = self.events
        for flat, lengths in zip(reversed(self._experts), reversed(self._ends), strict=True):
            event -= len(lengths)
            at = np.repeat(np.arange(event, event + len(lengths), dtype=np.int32), lengths)
            order = np.argsort(flat, kind="stable")
            ranked, when = flat[order], at[order]
            after = np.empty_like(when)
            last = np.ones(len(ranked), dtype=bool)
            last[:-1] = ranked[1:] != ranked[:-1]
            after[:-1] = when[1:]
            after[last] = coming[ranked[last]]
            first = np.ones(len(ranked), dtype=bool)
            first[1:] = ranked[1:] != ranked[:-1]
            coming[ranked[first]] = when[first]
            result = np.empty_like(when)
            result[order] = after
            found.append(result)
        found.reverse()
        return found

    def events_over(self, slots: int) -> int:
        """Events whose demand is more than *slots*: they run in waves."""
        return sum(int((ends > slots).sum()) for ends in self._ends)

    def blocks(self) -> Iterator[Block]:
        """The run's blocks again, each with its next uses."""
        for block, next_use in zip(self._batches.blocks(), self._next_use, strict=True):
            block.next_use = next_use
            yield block

    def steps(self) -> Iterator[Step]:
        """The run's steps again, knowing what comes after each."""
        return steps(self.blocks())

    def demand(self) -> Iterator[list[int]]:
        """Every event's demand in order: a cursor that an oracle runs ahead with."""
        for flat, lengths in zip(self._experts, self._ends, strict=True):
            values = flat.tolist()
            start = 0
            for length in lengths.tolist():
                yield values[start : start + length]
                start += length
