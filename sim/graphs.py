"""Decode steps as captured graphs, one from each gate to the next.

The chain from gate to gate is serial: the host reads the gate's answer, plans, issues the
missed copies, tells the graph where experts lie, and replays it; the GPU begins when it is
launched and has noticed that the last copy which the event demands has landed, computes all
experts together, and goes on with the next layer up to its gate. Meanwhile the host decides on
prefetches and issues them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import simpy

from policies.graph_costs import GraphCosts, UntoldChanges
from policies.moves import Move
from policies.planner import NOTHING, Plan
from policies.routing import Routing, Step

if TYPE_CHECKING:
    from sim.world import World


class GraphSteps:
    """Carries out decode steps on the timelines of *world*, with the costs of its graphs."""

    def __init__(self, world: World, graph: GraphCosts) -> None:
        self._world = world
        self._graph = graph
        self._untold = UntoldChanges(world.planner.context.total)
        self._planning_cold = graph.planning_cold(world.planner.policy.name)

    def layers(self, step: Step, begun: Sequence[Move]) -> Generator[simpy.Event, None, None]:
        """Every event of one step; quiet ones (nothing missed or on its way) stay cheap.

        *begun* are the moves that were made before its first layer.
        """
        world, graph = self._world, self._graph
        env, pending, planner = world.env, world.link.pending, world.planner
        sync_s = world.costs.sync_s
        return_s = graph.return_s
        more = graph.more_s(planner.policy.name)
        attention = graph.attention_s(step.size, step.kv_tokens) + world.following.gather_s + more
        one = graph.expert_s(1) if step.size == 1 else 0.0
        ideal_s = 0.0
        event = world.events
        self._launch_first(begun)
        for layer, experts in enumerate(step.demand):
            gate = world.gpu_free_s + attention
            decide = gate + sync_s
            back = world.host_free_s + return_s
            waited = decide - back
            if back > decide:  # the host still issued prefetches
                decide = back
            yield env.timeout(decide - env.now)

            routing = Routing(step, layer, experts, event)
            plan, moves = planner.plan(routing), planner.prefetch()
            event += 1
            seconds = None if one else world.seconds(routing, graph.expert_s)
            work = len(experts) * one if seconds is None else sum(seconds.values())
            ideal_s += work
            if plan is NOTHING and not pending and not self._untold.count:
                start = decide + self._quiet_s(len(experts), waited)
                world.host_s += start - gate
                self._compute(start, start, work)
            else:
                self._serve(routing, plan, gate, seconds or dict.fromkeys(experts, one), waited)
            self._untold.fetched(moves)
            world.fetch(routing, moves)
            if world.observer is not None:
                world.observer.event(routing, plan, (gate - attention, gate))
        world.events = event
        accesses = sum(map(len, step.demand))
        world.accesses += accesses
        # With everything resident another policy could do without what this one's layers have more.
        ideal_s += world.costs.least_access_s * accesses - more * len(step.demand)
        self._finish(attention, ideal_s, len(step.demand))

    def _quiet_s(self, experts: int, waited: float) -> float:
        """From the answer to the launch of an event for which nothing is to be done."""
        world, graph, cold = self._world, self._graph, self._planning_cold
        thinking = cold.longer(world.event_s + world.access_s * experts, cold.weight(waited))
        return thinking + graph.cold.longer(graph.launch_s, graph.cold.weight(waited))

    def _launch_first(self, begun: Sequence[Move]) -> None:
        """The graph up to the first gate: the GPU moves KV, if anything, until it is launched."""
        world = self._world
        self._untold.fetched(begun)
        start = max(world.host_free_s + self._graph.launch_s, world.gpu_free_s)
        world.host_s += start - world.gpu_free_s
        world.host_free_s = world.gpu_free_s = start

    def _serve(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float], waited: float
    ) -> None:
        """An event that waits for copies or makes some; the host *waited* for its answer.

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
        world, graph, (update_s, waited) = self._world, self._graph, telling
        decide = world.env.now
        cold = self._planning_cold
        host = decide + cold.longer(world.thinking_s(routing, plan), cold.weight(waited))
        if plan.served:
            seconds = world.served(routing, plan.served, seconds, self._graph.low_expert_s)
        work = sum(seconds.values())
        awaited: list[Move] = []
        wanted = 0
        if world.link.pending:
            world.link.advance(decide)
            queued = len(world.link)
            awaited = [move for move, _ in world.late_moves(seconds, decide)]
            wanted = queued - len(world.link)
        issue_s = world.costs.copy_issue_s
        own_s = world.costs.late_issue_s * wanted
        issuing = own_s + issue_s * sum(map(len, plan.waves)) + update_s + graph.launch_s
        longer = graph.cold.longer(issuing, graph.cold.weight(waited)) / issuing
        host += own_s * longer
        for wave in plan.waves:
            host = world.link.demand(wave, host, issue_s * longer)
            awaited += wave
        launched = now = host + (update_s + graph.launch_s) * longer
        world.host_s += launched - gate
        for move in awaited:
            if world.ready_s(move) > now:
                now = world.stall(move, now)
        self._compute(launched, now, work)

    def _compute(self, launched: float, start: float, work: float) -> None:
        """The GPU computes an event's experts from *start* on."""
        world = self._world
        world.experts_s += work
        world.host_free_s, world.gpu_free_s = launched, start + work
        if world.observer is not None:
            world.observer.span("GPU", "experts", start, start + work)

    def _finish(self, attention: float, ideal_s: float, layers: int) -> None:
        """The head; and the same step with everything resident: what ``compute_s`` adds up."""
        world, graph = self._world, self._graph
        dense = attention * layers + graph.head_s
        world.attention_s += dense
        world.gpu_free_s += graph.head_s
        waiting = world.costs.sync_s + world.costs.least_event_s + graph.launch_s
        begin = max(world.bound_host_s + graph.launch_s, world.bound_gpu_s)
        world.bound_gpu_s = begin + layers * waiting + dense + ideal_s
