"""Watching a world run: fills a recording for reports and timelines, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.moves import Move
from policies.planner import Plan
from policies.recording import Recording, StepRow
from policies.routing import Routing, Step

if TYPE_CHECKING:
    from sim.world import World

#: What a step's row reports the growth of, and where the world keeps it.
_TALLIES = (
    "attention_s",
    "experts_s",
    "host_s",
    "stall_demand_s",
    "stall_late_s",
    "idle_s",
    "accesses",
    "late",
)


class Observer:
    """Writes what *world* does into *recording*."""

    def __init__(self, world: World, recording: Recording) -> None:
        self._world = world
        self.recording = recording
        self._began: tuple[float, ...] = ()
        self._row = StepRow(0, "", 0, 0.0)
        if recording.with_spans:
            world.link.on_copy = self._copy

    def begin(self, step: Step) -> None:
        """A step begins when the GPU is free."""
        self._row = self.recording.begin(step, self._world.gpu_free_s)
        self._began = self._tallies()

    def event(
        self,
        routing: Routing,
        plan: Plan,
        attention: tuple[float, float],
        doing: str = "plan and launch",
    ) -> None:
        """An event has been served; *attention* says when its first part computed.

        *doing* is what the host did from its answer on.
        """
        recording, world = self.recording, self._world
        recording.uses[routing.experts] += 1
        row = self._row
        row.queue_moves = max(row.queue_moves, len(world.link))
        if plan.missed:
            recording.missed[plan.missed] += 1
            row.missed += len(plan.missed)
        if recording.with_spans:
            decide = world.env.now
            self.span("GPU", f"attention {routing.layer}", *attention)
            self.span("D2H", f"gate {routing.layer}", attention[1], decide)
            self.span("host", f"{doing} {routing.layer}", decide, world.host_free_s)
            if not recording.dropped_spans:
                recording.queue.append((decide, len(world.link)))
                recording.slots_used.append((decide, len(world.planner.cache)))

    def late(self, moves: list[Move]) -> None:
        """These prefetches had not landed when the gate asked."""
        total = self._world.planner.context.total
        self.recording.late[[move.copy % total for move in moves]] += 1

    def end(self) -> None:
        """The step has ended: complete its row."""
        world, row, recording = self._world, self._row, self.recording
        grown = [now - then for now, then in zip(self._tallies(), self._began, strict=True)]
        for name, value in zip(_TALLIES, grown, strict=False):
            setattr(row, name, value)
        row.demand_bytes, row.prefetch_bytes = int(grown[-3]), int(grown[-2])
        row.link_busy_s = grown[-1]
        row.end_s = world.gpu_free_s
        total = world.planner.context.total
        recording.held_steps[[copy % total for copy in world.planner.cache.slot_of]] += 1

    def span(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        """A bar of the timeline."""
        self.recording.span(lane, name, start_s, end_s)

    def on_copy(self, lane: str, what: str, copy: int, start_s: float, end_s: float) -> None:
        """A bar about one copy of an expert."""
        if self.recording.with_spans:
            name = self._world.planner.context.name(copy)
            self.recording.span(lane, f"{what} {name}", start_s, end_s)

    def _copy(self, move: Move, start_s: float, end_s: float) -> None:
        self.on_copy("H2D", "demand" if move.demand else "prefetch", move.copy, start_s, end_s)

    def _tallies(self) -> tuple[float, ...]:
        world, link = self._world, self._world.link
        values = [getattr(world, name) for name in _TALLIES]
        return (*values, link.demand_bytes, link.prefetch_bytes, link.busy_s)
