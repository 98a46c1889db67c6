"""What a world writes down while it runs, beyond the result: for reports and timelines."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from policies.base import Context
from policies.routing import Step

#: Spans and copies kept for a timeline; later ones are left out and counted.
MAX_SPANS = 400_000


@dataclass
class StepRow:
    """One step as it ran.

    Seconds are spans of the GPU's time, bytes went to the GPU; *queue_moves* is the longest
    the software queue of the link has been after an event.
    """

    number: int
    phase: str
    tokens: int
    start_s: float
    end_s: float = 0.0
    accesses: int = 0
    missed: int = 0
    late: int = 0
    attention_s: float = 0.0
    experts_s: float = 0.0
    host_s: float = 0.0
    stall_demand_s: float = 0.0
    stall_late_s: float = 0.0
    idle_s: float = 0.0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    link_busy_s: float = 0.0
    queue_moves: int = 0


@dataclass
class Span:
    """One bar of a timeline: what *lane* did between two moments."""

    lane: str
    name: str
    start_s: float
    end_s: float


@dataclass
class Recording:
    """Steps, per-expert tallies and, if asked, spans of one run.

    *uses*, *missed*, *late* and *held_steps* are arrays over all experts: accesses, accesses
    that were missed or late, and steps at whose end the expert held a slot. *slots_used* and
    *queue* are (seconds, value) samples.
    """

    context: Context
    with_spans: bool = False
    steps: list[StepRow] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    queue: list[tuple[float, int]] = field(default_factory=list)
    slots_used: list[tuple[float, int]] = field(default_factory=list)
    dropped_spans: int = 0

    def __post_init__(self) -> None:
        total = self.context.total
        self.uses = np.zeros(total, dtype=np.int64)
        self.missed = np.zeros(total, dtype=np.int64)
        self.late = np.zeros(total, dtype=np.int64)
        self.held_steps = np.zeros(total, dtype=np.int64)

    def begin(self, step: Step, now_s: float) -> StepRow:
        """Open the row of *step*."""
        row = StepRow(step.number, step.phase, step.size, now_s)
        self.steps.append(row)
        return row

    def span(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """Add a bar to the timeline, unless it is full or empty."""
        if not self.with_spans or end_s <= start_s:
            return
        if len(self.spans) >= MAX_SPANS:
            self.dropped_spans += 1
            return
        self.spans.append(Span(lane, name, start_s, end_s))
