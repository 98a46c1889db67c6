"""The simulated world a second time: slow, and as SimPy's tutorials would have it.

One process for every copy, which waits for one of *depth* places and then for the engine; the
host and the GPU are processes of their own that hand work to each other through events.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import simpy

from policies.costs import Costs
from policies.moves import Move
from policies.planner import Planner
from policies.routing import Routing, Step

Flow = Generator[simpy.Event, object, None]


class Transfer:
    """One copy on its way."""

    def __init__(self, machine: Machine, move: Move, urgent: bool) -> None:
        self.machine = machine
        self.move = move
        self.landed = machine.env.event()
        self.issued = False
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
        idle = machine.engine.count == 0
        machine.bytes += machine.costs.full_bytes
        with machine.engine.request() as turn:
            yield turn
            copy_s = machine.costs.idle_copy_s if idle else machine.costs.queued_copy_s
            yield machine.env.timeout(copy_s(machine.costs.full_bytes))
        machine.places.release(request)
        self.landed.succeed()


class Machine:
    """Host, GPU and link under one planner; exact policies at full precision only."""

    def __init__(self, planner: Planner, costs: Costs, depth: int) -> None:
        self.env = simpy.Environment()
        self.planner, self.costs = planner, costs
        self.places = simpy.PriorityResource(self.env, capacity=depth)
        self.engine = simpy.Resource(self.env)
        self.on_the_way: dict[int, Transfer] = {}
        self.bytes = self.cancelled = self.late = 0
        self.total_s = 0.0

    def run(self, steps: Iterable[Step]) -> Machine:
        self.env.run(self.env.process(self.host(steps)))
        self.total_s = self.env.now
        return self

    def host(self, steps: Iterable[Step]) -> Flow:
        """The host's one thread; *gpu* is when all work given to the GPU so far is done."""
        gpu: simpy.Event = self.env.timeout(0)
        event = 0
        for step in steps:
            yield from self.submit(self.planner.begin(step), urgent=False)
            for layer, experts in enumerate(step.demand):
                attention = self.costs.attention_s(step.size, step.kv_tokens)
                gate = self.env.process(self.after(gpu, attention))
                yield self.env.timeout(self.costs.issue_gate_s)
                yield gate
                yield self.env.timeout(self.costs.sync_s)
                routing = Routing(step, layer, experts, event)
                done = self.env.event()
                yield from self.serve(routing, done)
                gpu = done
                event += 1
            yield gpu
            yield self.env.timeout(self.costs.step_s)

    def after(self, before: simpy.Event, seconds: float) -> Flow:
        yield before
        yield self.env.timeout(seconds)

    def serve(self, routing: Routing, done: simpy.Event) -> Flow:
        """One event on the host: plan, copy, launch, prefetch. *done* follows on the GPU."""
        plan = self.planner.plan(routing)
        seconds = {
            expert: self.costs.expert_s(tokens)
            for expert, tokens in zip(routing.experts, routing.counts, strict=True)
        }
        missed = set(plan.missed)
        waiting = [self.on_the_way[e] for e in seconds if e not in missed and self.flies(e)]
        for transfer in waiting:
            self.late += 1
            if not transfer.issued:
                transfer.process.interrupt("wanted")
        held = [e for e in seconds if e not in missed and not self.flies(e)]
        yield self.env.timeout(self.costs.event_s)
        least, launches = self.costs.group_s[len(held)]
        ready = max(sum(seconds[e] for e in held), least)
        for number, wave in enumerate(plan.waves or [()]):
            start = self.env.now
            transfers = waiting + (yield from self.submit(wave, urgent=True))
            work = {t.landed: seconds[t.move.copy] for t in transfers}
            computed = self.env.process(self.compute(start, ready, work))
            launches += self.costs.issue_alone_s * len(transfers)
            yield self.env.timeout(launches)
            if number < len(plan.waves) - 1:
                yield computed
            ready, launches, waiting = 0.0, 0.0, []
        self.env.process(self.finish(computed, done))
        yield from self.submit(plan.prefetch, urgent=False)

    def finish(self, computed: simpy.Event, done: simpy.Event) -> Flow:
        """The GPU is done once it has computed what has all been launched."""
        yield computed
        done.succeed()

    def compute(self, start: float, ready: float, work: dict[simpy.Event, float]) -> Flow:
        """What is there first, then the rest as it lands."""
        end = start + ready
        if end > self.env.now:
            yield self.env.timeout(end - self.env.now)
        while work:
            yield self.env.any_of(list(work))
            for landed in [event for event in work if event.processed]:
                yield self.env.timeout(max(work.pop(landed), self.costs.least_alone_s))

    def flies(self, expert: int) -> bool:
        transfer = self.on_the_way.get(expert)
        return transfer is not None and not transfer.landed.triggered

    def submit(
        self, moves: Sequence[Move], urgent: bool
    ) -> Generator[simpy.Event, object, list[Transfer]]:
        """Hand copies to the link, one after the other; what their slots held is dead."""
        made = []
        for move in moves:
            victim = self.on_the_way.pop(move.victim, None)
            if victim is not None and not victim.issued and not victim.landed.triggered:
                victim.process.interrupt("cancelled")
            made.append(Transfer(self, move, urgent))
            if not urgent:
                self.on_the_way[move.copy] = made[-1]
            yield self.env.timeout(self.costs.copy_issue_s)
        return made
