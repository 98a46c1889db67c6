"""Decode steps as captured graphs, one from each gate to the next.

The chain from gate to gate is serial: the host reads the gate's answer, plans, issues the
missed copies, tells the graph where experts lie, and replays it; the GPU begins when it is
launched and has noticed that the last copy which the event demands has landed, computes all
experts together, and goes on with the next layer up to its gate. Meanwhile the host decides on
prefetches and issues them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.graph_costs import GraphCosts, UntoldChanges
from policies.moves import Move
from policies.planner import Plan
from policies.routing import Routing
from sim.captured import CapturedSteps

if TYPE_CHECKING:
    from sim.world import World


class GraphSteps(CapturedSteps):
    """Decode steps as chains of graphs, one launch for each layer."""

    _doing = "plan and launch"

    def __init__(self, world: World, graph: GraphCosts, untold: UntoldChanges) -> None:
        super().__init__(world, graph, untold)
        costs = world.costs
        self._answer_s, self._return_s = costs.sync_s, graph.return_s
        self._notice_s = costs.wake_s
        self._least_event_s = costs.sync_s + costs.least_event_s + graph.launch_s
        self._least_access_s = costs.least_access_s

    def _launch_first(self, begun: Sequence[Move]) -> None:
        self._untold.fetched(begun)
        super()._launch_first(begun)

    def _fetch(self, routing: Routing, moves: Sequence[Move]) -> None:
        if moves:
            self._untold.fetched(moves)
        self._world.fetch(routing, moves)

    def _quiet(self, experts: int, gate: float, waited: float, work: float) -> bool:
        if self._untold.count:
            return False
        world = self._world
        start = world.env.now + self._quiet_s(experts, waited)
        world.host_s += start - gate
        world.host_free_s = start
        self._compute(start, work)
        return True

    def _quiet_s(self, experts: int, waited: float) -> float:
        """From the answer to the launch of an event for which nothing is to be done."""
        world, graph, cold = self._world, self._graph, self._planning_cold
        thinking = cold.longer(world.event_s + world.access_s * experts, cold.weight(waited))
        return thinking + graph.cold.longer(graph.launch_s, graph.cold.weight(waited))

    def _serve(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float], waited: float
    ) -> None:
        """An event that waits for copies or makes some.

        One graph takes all experts of an event together. Where they do not fit together, or
        some are computed by the CPU, they are computed eagerly and the graph follows.
        """
        world, graph = self._world, self._graph
        update_s = graph.table_s(self._untold.told(plan, len(routing.experts)))
        if plan.whole:
            self._fused(routing, plan, gate, (update_s, waited), seconds)
        else:
            host, now = world.waves(routing, plan, gate, seconds)
            now = world.await_cpu(now)
            launched = max(host, now) + update_s + graph.launch_s
            world.host_s += launched - now
            world.host_free_s = world.gpu_free_s = launched

    def _fused(
        self,
        routing: Routing,
        plan: Plan,
        gate: float,
        telling: tuple[float, float],
        seconds: dict[int, float],
    ) -> None:
        """All experts of an event in one graph, which waits for every copy it reads.

        *telling* is what a warm host takes to tell the graph where they lie, and how long it
        has waited before.
        """
        world, (update_s, waited) = self._world, telling
        seconds = self._served(routing, plan, seconds)
        work = sum(seconds.values())
        then = update_s, self._graph.launch_s
        launched, awaited = self._issue(routing, plan, seconds, waited, then)
        for wave in plan.waves:
            awaited += wave
        world.host_s += launched - gate
        world.host_free_s = launched
        self._compute(self._await(awaited, launched), work)
