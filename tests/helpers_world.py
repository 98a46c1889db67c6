"""The simulated world a second time: slow, and as SimPy's tutorials would have it.

One process for every copy, which waits for one of *depth* places and then for the engine; the
host and the GPU are processes of their own that hand work to each other through events.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import simpy

from policies.base import Service
from policies.costs import Costs
from policies.hardware import HardwareProfile
from policies.landing import landing_groups
from policies.moves import Move
from policies.planner import Plan, Planner
from policies.routing import DECODE, Routing, Step

Flow = Generator[simpy.Event, object, None]


def captured(profile: HardwareProfile) -> HardwareProfile:
    """*profile* with decode steps as captured graphs, and a time for everything they need."""
    host = replace(
        profile.host,
        graph_launch_s=6.1e-6,
        table_update_s=4.3e-6,
        table_tell_s=1.9e-5,
        move_s=2.7e-6,
        prefetch_s=1.7e-6,
        miss_s=8.3e-6,
        prefetch_issue_s=5.9e-6,
        late_issue_s=3.3e-6,
        access_s=1.3e-6,
        policy_access_s={"lru": 7e-7, "predictive": 2.1e-6},
        policy_miss_s={"predictive": 1.4e-5},
        policy_event_s={"lru": 1.1e-5, "predictive": 4.7e-5},
        policy_move_s={"predictive": 3.9e-6},
        policy_prefetch_s={"predictive": 5.3e-6},
        policy_foresee_event_s={"predictive": 2.9e-5},
        policy_foresee_access_s={"predictive": 3.7e-6},
    )
    floors = {"any": 1.9e-5}
    software = replace(
        profile.software,
        prompt_kernels=profile.software.expert_kernels_fixed and 5,
        layer_floor_s=floors,
        dense_efficiency=0.8,
        kv_efficiency={"any": 0.3},
        policy_layer_s={"predictive": 3.3e-6},
    )
    link = replace(profile.link, wake_s=5.9e-6)
    expert = replace(profile.expert, fused_efficiency=0.7, fused_token_share=0.2)
    return replace(profile, host=host, link=link, software=software, expert=expert)


class Transfer:
    """One copy on its way."""

    def __init__(
        self, machine: Machine, move: Move, urgent: bool, free: simpy.Event | None = None
    ) -> None:
        self.machine = machine
        self.move = move
        self.landed = machine.env.event()
        #: A stream that waits for it has noticed.
        self.noticed = machine.env.event()
        self.landed_s = float("inf")
        #: When the GPU can know of it, if not from the start.
        self.told: simpy.Event | None = None
        self.issued = False
        #: The how manieth to be issued.
        self.rank = 10**9
        #: Its slot is read no more.
        self.free = free
        self.urgent = urgent
        self.process = machine.env.process(self.cross())

    def cross(self) -> Flow:
        machine = self.machine
        while not self.issued:
            request = machine.places.request(priority=0 if self.urgent else 1)
            try:
                yield request
            except simpy.Interrupt as reason:
                if not request.triggered:
                    request.cancel()
                    if reason.cause == "cancelled":
                        machine.cancelled += 1
                        return
                    self.urgent = True
                    continue
            self.issued = True
            machine.issues += 1
            self.rank = machine.issues
        idle = machine.engine.count == 0
        machine.bytes += machine.costs.full_bytes
        with machine.engine.request() as turn:
            yield turn
            if self.free is not None and not self.free.processed:
                yield self.free
                idle = True
            copy_s = machine.costs.idle_copy_s if idle else machine.costs.queued_copy_s
            yield machine.env.timeout(copy_s(machine.costs.full_bytes))
        machine.places.release(request)
        self.landed_s = machine.env.now
        self.landed.succeed()
        yield machine.env.timeout(machine.costs.wake_s)
        self.noticed.succeed()


class Machine:
    """Host, GPU and link under one planner; exact policies at full precision only."""

    def __init__(self, planner: Planner, costs: Costs, depth: int) -> None:
        self.env = simpy.Environment()
        self.planner, self.costs = planner, costs
        self.event_s = costs.event_s(planner.policy.name)
        self.access_s = costs.access_s(planner.policy.name)
        self.miss_s = costs.miss_s(planner.policy.name)
        #: Prefetches that the present event had to issue itself.
        self.wanted = 0
        self.move_s = costs.move_s(planner.policy.name)
        self.prefetch_s = costs.prefetch_s(planner.policy.name)
        self.foresee_event_s, self.foresee_access_s = costs.foresee_s(planner.policy.name)
        self.places = simpy.PriorityResource(self.env, capacity=depth)
        self.engine = simpy.Resource(self.env)
        self.on_the_way: dict[int, Transfer] = {}
        self.bytes = self.cancelled = self.late = self.issues = 0
        #: Entries of the device's table that have changed since it was told.
        self.untold = 0
        self.total_s = 0.0

    def run(self, steps: Iterable[Step]) -> Machine:
        self.env.run(self.env.process(self.host(steps)))
        self.total_s = self.env.now
        return self

    def host(self, steps: Iterable[Step]) -> Flow:
        """The host's one thread; each step is over when the GPU has done all of it."""
        event = 0
        for step in steps:
            moves = self.planner.begin(step)
            yield self.env.timeout(self.prefetch_s * len(moves))
            yield from self.submit(moves, urgent=False)
            routings = [
                Routing(step, layer, experts, event + layer)
                for layer, experts in enumerate(step.demand)
            ]
            event += len(routings)
            if self.costs.graph is not None and step.phase == DECODE:
                yield from self.decode(step, routings, moves)
            else:
                yield from self.launches(step, routings)
            yield self.env.timeout(self.costs.step_s)

    def decode(self, step: Step, routings: Sequence[Routing], begun: Sequence[Move]) -> Flow:
        """A decode step, where these run as captured graphs."""
        yield from self.replays(step, routings, begun)

    def launches(self, step: Step, routings: Sequence[Routing]) -> Flow:
        """A step launched kernel by kernel; *gpu* is when all work given to it is done."""
        gpu: simpy.Event = self.env.timeout(0)
        attention = self.costs.attention_s(step.size, step.kv_tokens)
        for routing in routings:
            gate = self.env.process(self.after(gpu, attention))
            yield self.env.timeout(self.costs.issue_gate_s)
            yield gate
            yield self.env.timeout(self.costs.sync_s)
            gpu = self.env.event()
            yield from self.serve(routing, gpu)
        yield gpu

    def replays(self, step: Step, routings: Sequence[Routing], begun: Sequence[Move]) -> Flow:
        """A step replayed graph by graph; the GPU goes on to the next gate by itself.

        The table knows nothing of the moves *begun* before it, nor of later prefetches.
        """
        graph = self.costs.graph
        attention = graph.attention_s(step.size, step.kv_tokens)
        attention += self.costs.profile.software.policy_layer_s.get(self.planner.policy.name, 0.0)
        yield self.env.timeout(graph.launch_s)
        answer = self.env.process(self.after(self.env.timeout(0), attention + self.costs.sync_s))
        self.untold += self.entries(begun)
        for routing in routings:
            yield answer
            last = routing is routings[-1]
            then = graph.head_s if last else attention + self.costs.sync_s
            plan = self.planner.plan(routing)
            if len(plan.waves) > 1 or Service.CPU in (plan.served or {}).values():
                done = self.env.event()
                yield from self.eager(routing, plan, done, graph.expert_s)
                yield done
                hidden = len(routing.experts)
                yield self.env.timeout(self.telling_s(hidden) + graph.launch_s)
                answer = self.env.process(self.after(self.env.timeout(0), then))
                self.untold = hidden
            else:
                needed = yield from self.fused(routing, plan)
                self.untold = 0
                work = sum(map(graph.expert_s, routing.counts))
                answer = self.env.process(self.after(self.env.all_of(needed), work + then))
            self.untold += self.entries((yield from self.look_ahead(routing)))
        yield answer

    def entries(self, moves: Iterable[Move]) -> int:
        """An expert that comes has an entry of the table, and one that goes."""
        return sum(1 if move.victim < 0 else 2 for move in moves)

    def telling_s(self, entries: int) -> float:
        """All in one call."""
        host = self.costs.profile.host
        return entries * host.table_update_s + (host.table_tell_s if entries else 0.0)

    def fused(
        self, routing: Routing, plan: Plan
    ) -> Generator[simpy.Event, object, list[simpy.Event]]:
        """The host up to the launch of an event's graph; returns what its GPU part awaits."""
        graph = self.costs.graph
        waiting = self.late_ones(routing, plan)
        yield self.env.timeout(self.thinking(routing, plan))
        yield self.env.timeout(self.costs.late_issue_s * self.wanted)
        for wave in plan.waves:
            waiting += yield from self.submit(wave, urgent=True)
        demanded = [move for wave in plan.waves for move in wave]
        yield self.env.timeout(self.telling_s(self.untold + self.entries(demanded)))
        yield self.env.timeout(graph.launch_s)
        return [transfer.noticed for transfer in waiting]

    def thinking(self, routing: Routing, plan: Plan) -> float:
        """From the answer to the first copy."""
        seconds = self.event_s + self.access_s * len(routing.experts)
        seconds += self.move_s * sum(map(len, plan.waves))
        return seconds + (self.miss_s if plan.waves else 0.0)

    def look_ahead(self, routing: Routing) -> Generator[simpy.Event, object, Sequence[Move]]:
        """The host decides on prefetches while the GPU works, and issues them."""
        moves = yield from self.choose(routing)
        yield from self.submit(moves, urgent=False)
        return moves

    def choose(self, routing: Routing) -> Generator[simpy.Event, object, Sequence[Move]]:
        """The host decides on prefetches."""
        moves = self.planner.prefetch()
        seconds = self.foresee_event_s + self.foresee_access_s * len(routing.experts)
        yield self.env.timeout(seconds + self.prefetch_s * len(moves))
        return moves

    def after(self, before: simpy.Event, seconds: float) -> Flow:
        yield before
        yield self.env.timeout(seconds)

    def serve(self, routing: Routing, done: simpy.Event) -> Flow:
        """One event on the host: plan, copy, launch, prefetch. *done* follows on the GPU."""
        plan = self.planner.plan(routing)
        yield from self.eager(routing, plan, done, self.costs.expert_s)
        yield from self.look_ahead(routing)

    def late_ones(self, routing: Routing, plan: Plan) -> list[Transfer]:
        """Held experts still on their way; those that are not issued become urgent."""
        missed = set(plan.missed)
        held = [e for e in routing.experts if e not in missed]
        waiting = [self.on_the_way[e] for e in held if self.flies(e)]
        self.wanted = sum(not transfer.issued for transfer in waiting)
        for transfer in waiting:
            self.late += 1
            if not transfer.issued:
                transfer.process.interrupt("wanted")
        return sorted(waiting, key=lambda transfer: transfer.rank)

    def eager(
        self,
        routing: Routing,
        plan: Plan,
        done: simpy.Event,
        expert_s: Callable[[int], float],
    ) -> Flow:
        """The experts of one event: what is held together, the rest in groups as they land."""
        seconds = {
            expert: expert_s(tokens)
            for expert, tokens in zip(routing.experts, routing.counts, strict=True)
        }
        missed = set(plan.missed)
        waiting = self.late_ones(routing, plan)
        held = [e for e in seconds if e not in missed and not self.flies(e)]
        yield self.env.timeout(self.thinking(routing, plan))
        group_s = self.costs.group_s[routing.step.phase]
        #: The GPU's last call, and the one that computed an expert.
        call: simpy.Event = self.env.timeout(0)
        calls: dict[int, simpy.Event] = {}
        for number, wave in enumerate(plan.waves or [()]):
            groups: list[list[Transfer]] = []
            free: list[simpy.Event] = []
            for moves in self.cut(wave):
                free += [calls[move.victim] for move in moves if move.victim in calls]
                after = self.env.all_of(free) if free else None
                groups.append((yield from self.submit(moves, urgent=True, free=after)))
            if number == 0:
                groups = [*([[]] if held else []), *self.cut(waiting), *groups]
            for group in groups:
                experts = [t.move.copy for t in group] or held
                least, launching = group_s[len(experts)]
                work = max(sum(seconds[e] for e in experts), least)
                launched = self.env.timeout(launching)
                needed = [call, *(t.noticed for t in group)]
                call = self.env.process(self.compute(needed, work, launched))
                calls |= dict.fromkeys(experts, call)
                yield launched
        self.env.process(self.finish(call, done))

    def cut(self, arriving: Sequence[Any]) -> list[Sequence[Any]]:
        """In groups by their number: here all copies are of one size."""
        counts = landing_groups([self.costs.full_bytes] * len(arriving))
        ends = list(accumulate(counts))
        return [arriving[end - count : end] for count, end in zip(counts, ends, strict=True)]

    def finish(self, computed: simpy.Event, done: simpy.Event) -> Flow:
        """The GPU is done once it has computed what has all been launched."""
        yield computed
        done.succeed()

    def compute(self, needed: Sequence[simpy.Event], work: float, launched: simpy.Event) -> Flow:
        """One call: all that it needs, then the work, which no launch of it may outlast."""
        yield self.env.all_of(needed)
        yield self.env.timeout(work)
        yield launched

    def flies(self, expert: int) -> bool:
        transfer = self.on_the_way.get(expert)
        return transfer is not None and not transfer.landed.triggered

    def submit(
        self, moves: Sequence[Move], urgent: bool, free: simpy.Event | None = None
    ) -> Generator[simpy.Event, object, list[Transfer]]:
        """Hand copies to the link, one after the other; what their slots held is dead."""
        made = []
        for move in moves:
            victim = self.on_the_way.pop(move.victim, None)
            if victim is not None and not (victim.issued or victim.urgent):
                victim.process.interrupt("cancelled")
            made.append(Transfer(self, move, urgent, free))
            if not urgent:
                self.on_the_way[move.copy] = made[-1]
            costs = self.costs
            yield self.env.timeout(costs.copy_issue_s if urgent else costs.prefetch_issue_s)
        return made
