"""From sequences to steps: which tokens run together, and what each layer then demands.

The rule (both worlds): sequences are taken *batch* at a time, in file order unless a scheduler
arranges them. All prompts of a batch are prefilled in one step; decode step j takes every live
sequence's j-th decode token; the next sequences start when the batch is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from policies.routing import DECODE, PREFILL, Step
from policies.schedule import GroupedStep, Schedule, Seating
from policies.scheduling import BatchScheduler, FileOrder, TokenScheduler
from traces.trace import FloatArray, IntArray, TokenSequence, Trace

#: Accesses that one block may hold: bounds the memory of a run, not its result.
BLOCK_ACCESSES = 1 << 19


@dataclass
class Block:
    """Consecutive steps of equal width, as arrays.

    *experts* is [n, T, L, k]; *flat* lists the demand of every event one after the other,
    *lengths* [n, L] says how long each is, *counts* the tokens per expert (None: all one).
    A decode step of a token scheduler is a block of its own, *seating* says how it lies.
    """

    phase: str
    experts: IntArray
    flat: IntArray
    lengths: IntArray
    counts: IntArray | None
    members: list[TokenSequence]
    spans: list[slice]
    weights: FloatArray | None = None
    ahead: tuple[IntArray, ...] = ()
    next_use: IntArray | None = field(default=None)
    seating: Seating | None = None


class SeatedStep(Step):
    """A decode step of a token scheduler."""

    __slots__ = ("seating",)

    def __init__(self, number: int, phase: str, size: int, seating: Seating) -> None:
        super().__init__(number, phase, size)
        self.seating = seating


@dataclass(frozen=True)
class Batches:
    """What runs: the sequences of *trace*, *batch* at a time, as *scheduler* arranges them.

    A token scheduler's decode steps are those of *schedule*, which it needs.
    """

    trace: Trace
    batch: int = 1
    scheduler: BatchScheduler = field(default_factory=FileOrder)
    columns: Collection[str] | None = None
    schedule: Schedule | None = None

    def members(self) -> Iterator[list[TokenSequence]]:
        """The sequences of each batch."""
        return self.scheduler.batches(self.trace.sequences(self.columns), self.batch)

    def blocks(self) -> Iterator[Block]:
        """Every step of the run, as blocks."""
        experts = self.trace.model.experts
        if not isinstance(self.scheduler, TokenScheduler):
            for members in self.members():
                yield from _prefill(members, experts)
                yield from _decode(members, experts)
            return
        if self.schedule is None:
            raise ValueError(f"scheduler {self.scheduler.name!r}: the run has no schedule")
        for unit, grouped in zip(self.units(), self.schedule.units, strict=True):
            for members in unit:
                yield from _prefill(members, experts)
            yield from _grouped([m for members in unit for m in members], grouped, experts)

    def units(self) -> Iterator[list[list[TokenSequence]]]:
        """The batches that decode together: one, or a token scheduler's unit."""
        size = self.scheduler.unit if isinstance(self.scheduler, TokenScheduler) else 1
        source = iter(self.members())
        while unit := list(islice(source, size)):
            yield unit

    def decode_shapes(self) -> set[tuple[int, int]]:
        """Every (first row in the KV cache, number of sequences) of a decode step."""
        if self.schedule is not None:
            return self.schedule.decode_shapes()
        shapes: set[tuple[int, int]] = set()
        for members in self.members():
            decoded = [len(m) - m.prefill for m in members]
            shapes |= {(0, sum(1 for d in decoded if d >= end)) for end in decoded if end}
        return shapes

    def steps(self) -> Iterator[Step]:
        """Every step of the run."""
        return steps(self.blocks())

    def peak_kv_tokens(self) -> int:
        """Most tokens whose keys and values are held at once."""
        return max(
            sum(int(m.positions[-1]) + 1 for members in unit for m in members)
            for unit in self.units()
        )


def _prefill(members: list[TokenSequence], experts: int) -> Iterator[Block]:
    prompts = [m for m in members if m.prefill]
    if prompts:
        spans = [slice(0, m.prefill) for m in prompts]
        chosen = np.concatenate([m.experts[: m.prefill] for m in prompts])[None]
        yield _block(PREFILL, chosen, prompts, spans, experts)


def _decode(members: list[TokenSequence], experts: int) -> Iterator[Block]:
    """Cut the decode steps where a sequence ends, so that every block is rectangular."""
    done = 0
    for end in sorted({len(m) - m.prefill for m in members}):
        live = [m for m in members if len(m) - m.prefill >= end]
        per_step = sum(m.experts[0].size for m in live)
        limit = max(1, BLOCK_ACCESSES // max(per_step, members[0].experts.shape[1] * experts // 8))
        while done < end:
            upto = min(end, done + limit)
            spans = [slice(m.prefill + done, m.prefill + upto) for m in live]
            chosen = np.stack([m.experts[s] for m, s in zip(live, spans, strict=True)], axis=1)
            yield _block(DECODE, chosen, live, spans, experts)
            done = upto


def _grouped(
    members: list[TokenSequence], grouped: Sequence[GroupedStep], experts: int
) -> Iterator[Block]:
    """The decode steps of a unit's *members* as they were scheduled, a block each."""
    for step in grouped:
        inside = [members[i] for i in step.members.tolist()]
        spans = [slice(m.prefill + step.round, m.prefill + step.round + 1) for m in inside]
        chosen = np.stack([m.experts[s] for m, s in zip(inside, spans, strict=True)], axis=1)
        block = _block(DECODE, chosen, inside, spans, experts)
        block.seating = step.seating
        yield block


def _block(
    phase: str,
    chosen: IntArray,
    members: list[TokenSequence],
    spans: list[slice],
    experts: int,
) -> Block:
    flat, lengths, counts = demand_of(chosen, experts)
    block = Block(phase, chosen, flat, lengths, counts, members, spans)
    join = np.concatenate if phase == PREFILL else np.stack
    first = members[0]
    if first.weights is not None:
        parts = [m.weights[s] for m, s in zip(members, spans, strict=True)]  # type: ignore[index]
        block.weights = join(parts)[None] if phase == PREFILL else np.stack(parts, axis=1)
    if first.ahead:
        block.ahead = tuple(
            join([m.ahead[d][s] for m, s in zip(members, spans, strict=True)])[None]
            if phase == PREFILL
            else np.stack([m.ahead[d][s] for m, s in zip(members, spans, strict=True)], axis=1)
            for d in range(len(first.ahead))
        )
    return block


def demand_of(chosen: IntArray, experts: int) -> tuple[IntArray, IntArray, IntArray | None]:
    """Distinct experts of every event of *chosen* [n, T, L, k], ascending.

    Returns them flat, their number per event [n, L], and the tokens per expert (None when a
    step has one token, which chooses each of its experts once).
    """
    n, width, layers, k = chosen.shape
    offsets = (np.arange(layers, dtype=np.int32) * experts)[:, None]
    keys = chosen.astype(np.int32) + offsets
    if width == 1:
        flat = np.sort(keys[:, 0], axis=-1).reshape(-1)
        return flat, np.full((n, layers), k, dtype=np.int64), None
    span = layers * experts
    rows = np.arange(n, dtype=np.int64)[:, None] * span
    tally = np.bincount((keys.reshape(n, -1) + rows).reshape(-1), minlength=n * span)
    used = np.flatnonzero(tally)
    lengths = np.bincount(used // experts, minlength=n * layers).reshape(n, layers)
    return (used % span).astype(np.int32), lengths, tally[used]


def steps(source: Iterator[Block]) -> Iterator[Step]:
    """The steps of *source*, numbered from 0."""
    number = 0
    for block in source:
        demand = _nested(block.flat, block.lengths)
        counts = None if block.counts is None else _nested(block.counts, block.lengths)
        future = None if block.next_use is None else _nested(block.next_use, block.lengths)
        details = _Details(block)
        for i, per_layer in enumerate(demand):
            width, seating = block.experts.shape[1], block.seating
            if seating is None:
                step = Step(number, block.phase, width)
            else:
                step = SeatedStep(number, block.phase, width, seating)
            step.demand = per_layer
            step._experts = block.experts[i]
            step._counts = counts[i] if counts else None
            step._next_use = future[i] if future else None
            details.fill(step, i)
            number += 1
            yield step


class _Details:
    """What else a block knows of its steps: ids, positions, weights, next gates."""

    def __init__(self, block: Block) -> None:
        self.block = block
        members, spans = block.members, block.spans
        pairs = list(zip(members, spans, strict=True))
        self.prefill = block.phase == PREFILL
        self.positions = self._rows([m.positions[s] for m, s in pairs])
        self.kv_tokens = (self.positions.astype(np.int64) + 1).sum(axis=1).tolist()
        has_ids = all(m.tokens is not None for m in members)
        self.tokens = self._rows([m.tokens[s] for m, s in pairs]) if has_ids else None  # type: ignore[index]
        widths = [s.stop - s.start if self.prefill else 1 for s in spans]
        self.sequences = np.repeat([m.id for m in members], widths)

    def _rows(self, parts: list[IntArray]) -> IntArray:
        return np.concatenate(parts)[None] if self.prefill else np.stack(parts, axis=1)

    def fill(self, step: Step, i: int) -> None:
        step.kv_tokens = self.kv_tokens[i]
        step.positions = self.positions[i]
        step.sequence_ids = self.sequences
        if self.tokens is not None:
            step.token_ids = self.tokens[i]
        if self.block.weights is not None:
            step._weights = self.block.weights[i]
        if self.block.ahead:
            step._ahead = tuple(guess[i] for guess in self.block.ahead)


def _nested(flat: IntArray, lengths: IntArray) -> list[list[list[int]]]:
    """Cut *flat* into one list per event, one list of those per step."""
    n, layers = lengths.shape
    if lengths.size and (lengths == lengths[0, 0]).all():
        nested: list[list[list[int]]] = flat.reshape(n, layers, int(lengths[0, 0])).tolist()
        return nested
    values = flat.tolist()
    ends = np.cumsum(lengths.reshape(-1)).tolist()
    starts = [0, *ends[:-1]]
    events = [values[a:b] for a, b in zip(starts, ends, strict=True)]
    return [events[i * layers : (i + 1) * layers] for i in range(n)]
