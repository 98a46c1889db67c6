"""What a real run measured, in the words of a result."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.costs import Costs
from policies.kv_moves import SchedulingTimes
from policies.planner import Plan, Planner
from policies.recording import Recording
from policies.result import CAUSES
from policies.routing import DECODE, PREFILL, Routing, Step
from runtime.copier import Copied, Copier
from runtime.engine import Engine
from runtime.fullspeed import Cores
from runtime.stopwatch import by_cause

#: Begin and end of something, in seconds of the device's clock.
Span = tuple[float, float]


@dataclass
class Measured:
    """What only a real run can tell.

    *link_busy_of_stall* is the share of the time in which the device waited for copies during
    which the link carried some; *link_bytes_per_s* what it carried while busy. Memory is in
    bytes at its peak; *gpu_predicted_bytes* is what
    :func:`policies.memory.predicted_bytes` said. *host_speed* is how fast the host ran Python
    while the device worked: 1 is its fastest, None that nobody looked. *predictor* is what one
    beside the model cost, as ``expert_cache.stats()`` has it.
    """

    gpu_peak_bytes: int = 0
    gpu_predicted_bytes: int = 0
    host_peak_bytes: int = 0
    link_busy_of_stall: float = 0.0
    link_bytes_per_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    host_speed: float | None = None
    predictor: dict[str, Any] | None = None


#: So much later than a device that waits for a copy goes on, the copy's own mark may pass: in
#: one graph it goes by the copy's number, which is there before the mark, and by another clock.
MARKED_LATER_S = 1e-5

#: Every how many decode steps one is marked: marks cost host time of their own.
MARK_EVERY = 16


class RealWorld:
    """Adds up the steps of a run; a finished :class:`policies.outcome.World`.

    Prefill steps and one in *mark_every* decode steps (0: none; all while *recording*) are
    marked, stretch by stretch: they say by which causes the time of all steps is split. If it is
    given *cores*, the thread leaves slow ones before each step.
    Call :meth:`begin` before a step, :meth:`add` after it, :meth:`finish` at the end.
    """

    def __init__(
        self,
        engine: Engine,
        costs: Costs,
        kind: str,
        recording: Recording | None = None,
        mark_every: int = MARK_EVERY,
    ) -> None:
        self.kind = kind
        self.engine, self.costs = engine, costs
        self.planner: Planner = engine.planner
        self.link: Copier = engine.copier
        self.recording = recording
        self._mark_every = 1 if recording is not None else mark_every
        #: Where the thread looks for full speed, if it is to.
        self.cores: Cores | None = None
        self._speeds: list[float] = []
        self._marked = False
        self._open: list[Copied] = []
        self.steps = self.accesses = self.late = 0
        self.decode_tokens = self.prefill_tokens = 0
        self.prefill_step_s = array("d")
        self.scheduling = SchedulingTimes()
        self.decode_step_s = array("d")
        self.decode_step_tokens = array("q")
        #: Seconds by cause of the marked steps of each phase.
        self._parts = {phase: [0.0] * len(CAUSES) for phase in (PREFILL, DECODE)}
        self._stall_s = self._stall_busy_s = 0.0
        self._busy_s, self._bytes = 0.0, 0
        self._epoch: float | None = None
        self._link_end_s = 0.0
        self._events = (0, 0, 0)
        if recording is not None:
            engine.on_event = self._note
            self.link.marks_each = True

    @property
    def prefill_s(self) -> float:
        """Seconds of all prefill steps."""
        return sum(self.prefill_step_s)

    @property
    def total_s(self) -> float:
        """Seconds of all steps; what lies between them is not part of a run."""
        return self.prefill_s + sum(self.decode_step_s)

    @property
    def parts_s(self) -> list[float]:
        """The total by cause."""
        prefill = self._shared(PREFILL, self.prefill_s)
        decode = self._shared(DECODE, sum(self.decode_step_s))
        return [a + b for a, b in zip(prefill, decode, strict=True)]

    @property
    def decode_parts_s(self) -> list[float]:
        """The decode steps by cause, each counted once for each of its tokens."""
        times = zip(self.decode_step_s, self.decode_step_tokens, strict=True)
        return self._shared(DECODE, sum(seconds * tokens for seconds, tokens in times))

    def _shared(self, phase: str, seconds: float) -> list[float]:
        """*seconds* of a phase, split as its marked steps were; all the host's without any."""
        parts = self._parts[phase]
        whole = sum(parts)
        if not whole:
            return [seconds if cause == "host" else 0.0 for cause in CAUSES]
        return [part / whole * seconds for part in parts]

    @property
    def compute_bound_s(self) -> float:
        """Seconds in which the device computed: what is left with everything resident."""
        return sum(self.parts_s[:2])

    def begin(self, decoding: bool) -> None:
        """A step, *decoding* or not, is about to run, the device being idle: mark it or not."""
        if self.cores is not None:
            self.cores.settle()
            self.engine.on_wait = self._look
        every, decoded = self._mark_every, len(self.decode_step_s)
        self._marked = every > 0 and (not decoding or decoded % every == every // 2)
        self.engine.watch.on = self.engine.lanes.timed = self._marked
        self.link.issued = [] if self._marked else None

    def _look(self) -> None:
        """The device works and the host waits: time enough, once a step, to see how fast it is."""
        assert self.cores is not None
        self._speeds.append(self.cores.glance())
        self.engine.on_wait = None

    def _note(self, routing: Routing, plan: Plan, late: Sequence[int]) -> None:
        """One event, for the recording."""
        recording, total = self.recording, self.planner.context.total
        assert recording is not None
        recording.uses[routing.experts] += 1
        recording.missed[list(plan.missed)] += 1
        recording.late[[copy % total for copy in late]] += 1
        accesses, missed, delayed = self._events
        self._events = (
            accesses + len(routing.experts),
            missed + len(plan.missed),
            delayed + len(late),
        )

    def add(self, step: Step, seconds: float) -> None:
        """*step* is over, on the device too, and took *seconds* on the host's clock."""
        self.steps += 1
        self.accesses, self.late = self.engine.accesses, self.engine.late
        if step.phase == DECODE:
            self.decode_tokens += step.size
            self.decode_step_s.append(seconds)
            self.decode_step_tokens.append(step.size)
        else:
            self.prefill_tokens += step.size
            self.prefill_step_s.append(seconds)
        if self._marked:
            self._add_marked(step, seconds)

    def _add_marked(self, step: Step, seconds: float) -> None:
        stretches = self.engine.watch.stretches()
        parts = by_cause(stretches)
        # What no stretch covers: the host before the first mark and after the last.
        parts["host"] += max(0.0, seconds - sum(parts.values()))
        copies = self._copies()
        self._weigh_stalls(stretches, copies)
        marked = self._parts[step.phase]
        for i, cause in enumerate(CAUSES):
            marked[i] += parts[cause]
        if self.recording is not None:
            self._record(step, seconds, parts, stretches, copies)

    def _copies(self) -> list[tuple[Copied, Span]]:
        """The copies of marked steps that have landed since, with the link's time for each."""
        lanes, found, waiting = self.engine.lanes, [], []
        for copied in [*self._open, *(self.link.issued or ())]:
            if not lanes.passed(copied.end):
                waiting.append(copied)
                continue
            end = lanes.read(copied.end)
            begin = max(lanes.read(copied.begin), self._link_end_s)
            self._link_end_s = end
            found.append((copied, (begin, end)))
            self._busy_s += max(0.0, end - begin)
            self._bytes += sum(map(self.link.size_of, copied.moves))
        self._open = waiting
        lanes.recycle([copied.begin for copied, _ in found])
        return found

    def finish(self) -> None:
        """The run is over: what the link was busy for follows from all that it carried."""
        carried = self.link.demand_bytes + self.link.prefetch_bytes
        self.link.busy_s = carried * self._busy_s / self._bytes if self._bytes else 0.0

    def _weigh_stalls(
        self, stretches: list[tuple[str, float, float]], copies: list[tuple[Copied, Span]]
    ) -> None:
        spans = [span for _, span in copies]
        for cause, begin, end in stretches:
            # Where nothing landed, what was asked for was there: the mark alone took time.
            latest = end + MARKED_LATER_S
            if cause.startswith("stall") and any(begin < landed <= latest for _, landed in spans):
                self._stall_s += end - begin
                self._stall_busy_s += sum(_overlap((begin, end), span) for span in spans)

    def measured(self) -> Measured:
        """The link's figures; memory is the caller's to fill in."""
        return Measured(
            link_busy_of_stall=min(1.0, self._stall_busy_s / self._stall_s)
            if self._stall_s
            else 1.0,
            link_bytes_per_s=self._bytes / self._busy_s if self._busy_s else 0.0,
            step_s=list(self.decode_step_s),
            host_speed=statistics.mean(self._speeds) if self._speeds else None,
        )

    def _record(
        self,
        step: Step,
        seconds: float,
        parts: dict[str, float],
        stretches: list[tuple[str, float, float]],
        copies: list[tuple[Copied, Span]],
    ) -> None:
        recording, context = self.recording, self.planner.context
        assert recording is not None
        start = stretches[0][1] if stretches else 0.0
        if self._epoch is None:
            self._epoch = start
        row = recording.begin(step, start - self._epoch)
        row.accesses, row.missed, row.late = self._events
        self._events = (0, 0, 0)
        row.end_s = row.start_s + seconds
        for cause, value in parts.items():
            setattr(row, f"{cause}_s", value)
        for cause, begin, end in stretches:
            lane = "host" if cause == "host" else "GPU"
            recording.span(lane, cause, begin - self._epoch, end - self._epoch)
        for copied, (begin, end) in copies:
            [move] = copied.moves
            name = f"{'demand' if move.demand else 'prefetch'} {context.name(move.copy)}"
            recording.span("H2D", name, begin - self._epoch, end - self._epoch)
            row.link_busy_s += max(0.0, end - begin)
            size = self.link.size_of(move)
            if move.demand:
                row.demand_bytes += size
            else:
                row.prefetch_bytes += size
        recording.held_steps[[c % context.total for c in self.planner.cache.slot_of]] += 1
        recording.slots_used.append((row.end_s, len(self.planner.cache)))
        recording.queue.append((row.end_s, len(self.link)))


def _overlap(a: Span, b: Span) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
