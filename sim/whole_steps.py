"""Decode steps as one captured graph each, with a handshake at every gate.

The GPU runs ahead of the host by up to one event. It posts a gate's answer, waits until the
host has settled the event before, looks up where its experts lie, and goes on if all have
landed; else it computes what is there, and waits for the plan of its own event and for the
copies it lacks. The host follows: it plans, issues, tells what changed, and then decides on
prefetches; nothing is launched between a step's layers (:mod:`policies.whole_steps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.graph_costs import UntoldChanges
from policies.moves import Move
from policies.planner import Plan
from policies.routing import Routing
from policies.whole_costs import WholeCosts
from policies.whole_steps import awaits_plan
from sim.captured import CapturedSteps

if TYPE_CHECKING:
    from sim.world import World


class WholeSteps(CapturedSteps):
    """Decode steps as one graph each, launched once."""

    _doing = "plan"
    _hurries = True

    def __init__(self, world: World, costs: WholeCosts, untold: UntoldChanges) -> None:
        super().__init__(world, costs, untold)
        self._answer_s, self._return_s = costs.answer_s, costs.follow_s
        self._notice_s, self._publish_s = costs.notice_s, costs.publish_s
        self._handshake_s = self._least_event_s = costs.handshake_s
        self._least_access_s = 0.0
        self._awaits_plan = awaits_plan(world.planner)
        #: When the GPU knows that the event before is settled.
        self._settled_s = 0.0

    def _launch_first(self, begun: Sequence[Move]) -> None:
        if begun:
            self._untold.kept(begun)
            self._world.host_free_s += self._publish_s
        self._recent = {}
        super()._launch_first(begun)
        self._settled_s = self._world.gpu_free_s + self._notice_s

    def _fetch(self, routing: Routing, moves: Sequence[Move]) -> None:
        world = self._world
        world.decide(routing, moves)
        if moves:
            self._untold.kept(moves)
            world.host_free_s += self._publish_s
        # The table says what is to come before it is issued.
        self._settled_s = world.host_free_s + self._notice_s
        recent: dict[int, Move] = {}
        for move in moves:
            recent.pop(move.victim, None)
            recent[move.copy] = move
        self._recent = recent
        world.issue(moves)

    def _quiet(self, experts: int, gate: float, waited: float, work: float) -> bool:
        world = self._world
        planned = self._planned_s(world.event_s + world.access_s * experts, waited)
        world.host_free_s = planned
        self._begin(gate, self._look_up_s(gate, planned), work)
        return True

    def _look_up_s(self, gate: float, planned: float) -> float:
        """When the GPU looks up where the experts of *gate* lie, *planned* by the host then."""
        seen = planned + self._notice_s if self._awaits_plan else self._settled_s
        return seen if seen > gate else gate

    def _begin(self, gate: float, look_up: float, work: float) -> None:
        """The GPU computes what it finds at *look_up*."""
        start = look_up + self._handshake_s
        self._world.host_s += start - gate
        self._compute(start, work)

    def _serve(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float], waited: float
    ) -> None:
        """An event that waits for copies or makes some, or while some are on their way."""
        for wave in plan.waves:
            self._untold.kept(wave)
        if plan.whole:
            self._fused(routing, plan, gate, seconds, waited)
        else:
            self._in_waves(routing, plan, gate, seconds)

    def _fused(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float], waited: float
    ) -> None:
        """What is there at once, what the look-up did not find when all of it has landed."""
        world, notice_s = self._world, self._notice_s
        seconds = self._served(routing, plan, seconds)
        # The host may find landed what the GPU, which looked earlier, did not.
        coming = {**self._recent, **world.link.pending}
        asked = [coming[copy] for copy in seconds if copy in coming]
        telling_s = self._publish_s if plan.waves or plan.served else 0.0
        planned, _ = self._issue(routing, plan, dict(seconds), waited, (telling_s,))
        world.host_free_s = planned
        told, look_up = planned + notice_s, self._look_up_s(gate, planned)
        lacking = [move for move in asked if move.land_s + notice_s > look_up]
        lacking.sort(key=_landing)
        for wave in plan.waves:
            lacking += [m for m in wave if max(m.land_s + notice_s, told) > look_up]
        later = sum(seconds.pop(move.copy) for move in lacking)
        self._begin(gate, look_up, sum(seconds.values()))
        if lacking:
            now = self._await(lacking, self._await_host(told))
            self._compute(now, later)

    def _await_host(self, until: float) -> float:
        """The GPU waits for what it sees of the host only then; returns when it goes on."""
        world = self._world
        if until <= world.gpu_free_s:
            return world.gpu_free_s
        world.host_s += until - world.gpu_free_s
        return until

    def _in_waves(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float]
    ) -> None:
        """A policy has refused slots that it could have given up: wave by wave, as if eager."""
        world = self._world
        host, world.gpu_free_s = world.waves(routing, plan, gate, seconds)
        world.host_free_s = host + self._publish_s
        now = self._await_host(world.host_free_s + self._notice_s)
        world.host_s += self._handshake_s
        world.gpu_free_s = now + self._handshake_s


def _landing(move: Move) -> float:
    return move.land_s
