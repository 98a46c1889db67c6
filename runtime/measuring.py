"""What a real run measured, in the words of a result."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.costs import Costs
from policies.planner import Plan, Planner
from policies.recording import Recording
from policies.result import CAUSES
from policies.routing import DECODE, Routing, Step
from runtime.copier import Copied, Copier
from runtime.engine import Engine
from runtime.stopwatch import by_cause

#: Begin and end of something, in seconds of the device's clock.
Span = tuple[float, float]


@dataclass
class Measured:
    """What only a real run can tell.

    *link_busy_of_stall* is the share of the time in which the device waited for copies during
    which the link carried some; *link_bytes_per_s* what it carried while busy. Memory is in
    bytes at its peak; *gpu_predicted_bytes* sums slots, dense part, keys and values.
    """

    gpu_peak_bytes: int = 0
    gpu_predicted_bytes: int = 0
    host_peak_bytes: int = 0
    link_busy_of_stall: float = 0.0
    link_bytes_per_s: float = 0.0
    step_s: list[float] = field(default_factory=list)


class RealWorld:
    """Adds up the steps of a run; a finished :class:`policies.outcome.World`."""

    def __init__(
        self, engine: Engine, costs: Costs, kind: str, recording: Recording | None = None
    ) -> None:
        self.kind = kind
        self.engine, self.costs = engine, costs
        self.planner: Planner = engine.planner
        self.link: Copier = engine.copier
        if engine.watch.on:
            self.link.issued = []
        self.recording = recording
        self.steps = self.accesses = self.late = 0
        self.decode_tokens = self.prefill_tokens = 0
        self.prefill_s = 0.0
        self.decode_step_s = array("d")
        self.decode_step_tokens = array("q")
        self.decode_parts_s = [0.0] * len(CAUSES)
        self._parts = [0.0] * len(CAUSES)
        self._total_s = 0.0
        self._stall_s = self._stall_busy_s = 0.0
        self._bytes = 0
        self._epoch: float | None = None
        self._link_end_s = 0.0
        self._events = (0, 0, 0)
        if recording is not None:
            engine.on_event = self._note

    @property
    def total_s(self) -> float:
        """Seconds of all steps; what lies between them is not part of a run."""
        return self._total_s

    @property
    def parts_s(self) -> list[float]:
        """The total by cause."""
        return self._parts

    @property
    def compute_bound_s(self) -> float:
        """Seconds in which the device computed: what is left with everything resident."""
        return sum(self._parts[:2])

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
        stretches = self.engine.watch.stretches()
        parts = by_cause(stretches)
        # What no stretch covers: the host before the first mark and after the last.
        parts["host"] += max(0.0, seconds - sum(parts.values()))
        copies = self._copies()
        self._weigh_stalls(stretches, copies)
        values = [parts[cause] for cause in CAUSES]
        self._parts = [a + b for a, b in zip(self._parts, values, strict=True)]
        self._total_s += seconds
        self.steps += 1
        self.accesses, self.late = self.engine.accesses, self.engine.late
        if step.phase == DECODE:
            self.decode_tokens += step.size
            self.decode_step_s.append(seconds)
            self.decode_step_tokens.append(step.size)
            for i, value in enumerate(values):
                self.decode_parts_s[i] += value * step.size
        else:
            self.prefill_tokens += step.size
            self.prefill_s += seconds
        if self.recording is not None:
            self._record(step, seconds, parts, stretches, copies)

    def _copies(self) -> list[tuple[Copied, Span]]:
        """The copies issued since the last step, with the link's time for each."""
        lanes, found = self.engine.lanes, []
        waiting = []
        for copied in self.link.issued or ():
            if not lanes.passed(copied.end):
                waiting.append(copied)
                continue
            end = lanes.read(copied.end)
            begin = max(lanes.read(copied.begin), self._link_end_s)
            self._link_end_s = end
            found.append((copied, (begin, end)))
            self.link.busy_s += max(0.0, end - begin)
            self._bytes += self.link.size_of(copied.move)
        if self.link.issued is not None:
            self.link.issued = waiting
        lanes.recycle([copied.begin for copied, _ in found])
        return found

    def _weigh_stalls(
        self, stretches: list[tuple[str, float, float]], copies: list[tuple[Copied, Span]]
    ) -> None:
        spans = [span for _, span in copies]
        for cause, begin, end in stretches:
            if cause.startswith("stall"):
                self._stall_s += end - begin
                self._stall_busy_s += sum(_overlap((begin, end), span) for span in spans)

    def explain(self, timed: RealWorld) -> None:
        """Split this run's time as *timed* did, which ran some of the same steps with marks.

        Marks cost host time that a run without them does not spend: times are taken from the
        one, shares from the other.
        """
        whole = sum(timed.parts_s) or 1.0
        self._parts = [part / whole * self._total_s for part in timed.parts_s]
        decoded = sum(timed.decode_parts_s) or 1.0
        times = zip(self.decode_step_s, self.decode_step_tokens, strict=True)
        total = sum(seconds * tokens for seconds, tokens in times)
        self.decode_parts_s = [part / decoded * total for part in timed.decode_parts_s]
        carried = self.link.demand_bytes + self.link.prefetch_bytes
        rate = timed._bytes / timed.link.busy_s if timed.link.busy_s else 0.0
        self.link.busy_s = carried / rate if rate else 0.0
        self._bytes = carried
        self._stall_s, self._stall_busy_s = timed._stall_s, timed._stall_busy_s

    def measured(self) -> Measured:
        """The link's figures; memory is the caller's to fill in."""
        return Measured(
            link_busy_of_stall=min(1.0, self._stall_busy_s / self._stall_s)
            if self._stall_s
            else 1.0,
            link_bytes_per_s=self._bytes / self.link.busy_s if self.link.busy_s else 0.0,
            step_s=list(self.decode_step_s),
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
            move = copied.move
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
