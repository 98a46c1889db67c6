"""What decode steps as captured graphs have in common, however the graphs are cut.

At every gate the host gets the answer, plans, issues what is missed, and decides on prefetches;
the GPU computes all experts of an event from where they lie. When the one waits for the other
is what :mod:`sim.graphs` and :mod:`sim.whole_steps` say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import simpy

from policies.graph_costs import GraphCosts, UntoldChanges
from policies.moves import Move
from policies.planner import NOTHING, Plan
from policies.routing import Routing, Step

if TYPE_CHECKING:
    from sim.world import World


class CapturedSteps(ABC):
    """Carries out decode steps on the timelines of *world*, with the costs of its graphs.

    *untold* are the changes that the table of a chain of graphs has not been told.
    """

    #: From a gate's end until a host that waits has the answer, and from the end of the host's
    #: work on an event until it can read the next one.
    _answer_s: float
    _return_s: float
    #: From a copy's end until a GPU that waits for it goes on.
    _notice_s: float
    #: What any policy's events wait for the host at least: each of them, and each access.
    _least_event_s: float
    _least_access_s: float
    #: What the host does from an answer on, for the timeline.
    _doing: ClassVar[str]
    #: Whether an event's first copy is issued before the others are planned, where no prefetch
    #: waits that may have to come before it.
    _hurries: ClassVar[bool] = False
    #: Prefetches of the event before that may have landed since, though a look-up was earlier.
    _recent: Mapping[int, Move] = MappingProxyType({})

    def __init__(self, world: World, graph: GraphCosts, untold: UntoldChanges) -> None:
        self._world = world
        self._graph = graph
        self._untold = untold
        self._planning_cold = graph.planning_cold(world.planner.policy.name)

    def layers(self, step: Step, begun: Sequence[Move]) -> Generator[simpy.Event, None, None]:
        """Every event of one step; quiet ones (nothing missed or on its way) stay cheap.

        *begun* are the moves that were made before its first layer.
        """
        world, graph = self._world, self._graph
        env, pending, planner = world.env, world.link.pending, world.planner
        answer_s, return_s = self._answer_s, self._return_s
        more = graph.more_s(planner.policy.name)
        attention = graph.attention_s(step.size, step.kv_tokens) + world.following.gather_s + more
        one = graph.expert_s(1) if step.size == 1 else 0.0
        ideal_s = 0.0
        event = world.events
        self._launch_first(begun)
        for layer, experts in enumerate(step.demand):
            gate = world.gpu_free_s + attention
            decide = gate + answer_s
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
            quiet = plan is NOTHING and not pending and not self._recent
            if not quiet or not self._quiet(len(experts), gate, waited, work):
                self._serve(routing, plan, gate, seconds or dict.fromkeys(experts, one), waited)
            self._fetch(routing, moves)
            if world.observer is not None:
                world.observer.event(routing, plan, (gate - attention, gate), self._doing)
        world.events = event
        accesses = sum(map(len, step.demand))
        world.accesses += accesses
        # With everything resident another policy could do without what this one's layers have more.
        ideal_s += self._least_access_s * accesses - more * len(step.demand)
        self._finish(attention, ideal_s, len(step.demand))

    @abstractmethod
    def _quiet(self, experts: int, gate: float, waited: float, work: float) -> bool:
        """Carry out an event that misses nothing, nothing being on its way.

        Its *experts* take *work* seconds; the host *waited* for the answer of its *gate*.
        Returns False, nothing being done, where it is for :meth:`_serve` all the same.
        """

    @abstractmethod
    def _serve(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float], waited: float
    ) -> None:
        """Carry out any other event; *seconds* has the work of each expert, and may be changed."""

    def _launch_first(self, begun: Sequence[Move]) -> None:
        """The step's first graph: the GPU moves KV, if anything, until it is launched."""
        world = self._world
        start = max(world.host_free_s + self._graph.launch_s, world.gpu_free_s)
        world.host_s += start - world.gpu_free_s
        world.host_free_s = world.gpu_free_s = start

    @abstractmethod
    def _fetch(self, routing: Routing, moves: Sequence[Move]) -> None:
        """The event's computing is on its way: make its prefetches."""

    def _planned_s(self, warm_s: float, waited: float) -> float:
        """Now, after *waited* seconds, the host plans for what takes *warm_s* in warm caches."""
        cold = self._planning_cold
        return self._world.env.now + cold.longer(warm_s, cold.weight(waited))

    def _served(self, routing: Routing, plan: Plan, seconds: dict[int, float]) -> dict[int, float]:
        """The work of each copy that computes, by how *plan* serves what is missed."""
        if not plan.served:
            return seconds
        return self._world.served(routing, plan.served, seconds, self._graph.low_expert_s)

    def _issue(
        self,
        routing: Routing,
        plan: Plan,
        seconds: dict[int, float],
        waited: float,
        then: Iterable[float],
    ) -> tuple[float, list[Move]]:
        """The host plans an event of one wave, issues what it needs and does what comes *then*.

        *then* are seconds in warm caches. Returns when the host has done it all, and the
        moves that are late, which are taken out of *seconds*, by when they land.
        """
        world, link, cold = self._world, self._world.link, self._graph.cold
        decide = world.env.now
        thinking = world.thinking_s(routing, plan)
        host = self._planned_s(thinking, waited)
        late: list[Move] = []
        wanted, hurries = 0, self._hurries and bool(plan.waves)
        if link.pending:
            link.advance(decide)
            queued = len(link)
            hurries = hurries and not queued
            late = [move for move, _ in world.late_moves(seconds, decide)]
            wanted = queued - len(link)
        issue_s = world.costs.copy_issue_s
        own_s = world.costs.late_issue_s * wanted
        issuing = own_s + issue_s * sum(map(len, plan.waves))
        told = 0.0
        for part in then:
            issuing += part
            told += part
        longer = cold.longer(issuing, cold.weight(waited)) / issuing if issuing else 1.0
        host += own_s * longer
        waves = plan.waves
        if hurries:
            (first, *others), *further = waves
            begun = self._planned_s(thinking - world.move_s * len(others), waited)
            link.demand((first,), begun, issue_s * longer)
            host += issue_s * longer
            waves = [others, *further]
        for wave in waves:
            host = link.demand(wave, host, issue_s * longer)
        return host + told * longer, late

    def _await(self, moves: Iterable[Move], now: float) -> float:
        """The GPU, free at *now*, waits until all of *moves* have landed."""
        for move in moves:
            now = self._world.await_copy(move, now, self._notice_s)
        return now

    def _compute(self, start: float, work: float) -> None:
        """The GPU computes experts from *start* on."""
        world = self._world
        world.experts_s += work
        world.gpu_free_s = start + work
        if world.observer is not None and work:
            world.observer.span("GPU", "experts", start, start + work)

    def _finish(self, attention: float, ideal_s: float, layers: int) -> None:
        """The head; and the same step with everything resident: what ``compute_s`` adds up."""
        world, graph = self._world, self._graph
        dense = attention * layers + graph.head_s
        world.attention_s += dense
        world.gpu_free_s += graph.head_s
        begin = max(world.bound_host_s + graph.launch_s, world.bound_gpu_s)
        world.bound_gpu_s = begin + layers * self._least_event_s + dense + ideal_s
