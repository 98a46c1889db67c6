"""The simulated world: a SimPy process that charges time for what the planner decides.

Host and GPU are two timelines that meet at every gate: the host launches attention, reads the
gate's answer, plans, issues copies and launches the experts, then runs ahead to the next
layer; the GPU works in stream order and waits for launches and for copies that have not
landed. SimPy is the clock: one timeout per event, at the moment the host has the answer.
Decode steps that run as captured graphs have their own courses, in :mod:`sim.graphs` and
:mod:`sim.whole_steps`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import simpy

from policies.base import Service, Substitute
from policies.costs import Costs
from policies.graph_costs import UntoldChanges
from policies.moves import Move
from policies.planner import NOTHING, Plan, Planner, blame
from policies.recording import Recording
from policies.result import CAUSES
from policies.routing import DECODE, Routing, Step
from policies.whole_steps import runs_whole
from sim.arrivals import Arrival, Arrivals
from sim.captured import CapturedSteps
from sim.following import Following
from sim.graphs import GraphSteps
from sim.link import Link
from sim.observer import Observer
from sim.whole_steps import WholeSteps


class World:
    """Runs the steps of one trace under one planner and keeps time.

    After :meth:`run` the attributes hold what was measured, in seconds and counts. The GPU's
    time is split without rest: ``attention_s + experts_s + host_s + stall_demand_s +
    stall_late_s + idle_s`` is the total.
    """

    kind = "sim"

    def __init__(
        self,
        planner: Planner,
        costs: Costs,
        *,
        depth: int = 2,
        recording: Recording | None = None,
    ) -> None:
        self.env = simpy.Environment()
        self.planner = planner
        self.costs = costs
        self.link = Link(self._copy_bytes, costs.queued_copy_s, costs.idle_copy_s, depth)
        self.observer = Observer(self, recording) if recording is not None else None
        #: Host seconds per event, distinct expert, demanded move, and move that is foreseen.
        self.event_s = costs.event_s(planner.policy.name)
        self.access_s = costs.access_s(planner.policy.name)
        self.miss_s = costs.miss_s(planner.policy.name)
        self.move_s = costs.move_s(planner.policy.name)
        self.prefetch_s = costs.prefetch_s(planner.policy.name)
        self._foresee_s = costs.foresee_s(planner.policy.name)
        untold = UntoldChanges(planner.context.total)
        self._graphs = GraphSteps(self, costs.graph, untold) if costs.graph is not None else None
        self._whole = WholeSteps(self, costs.whole, untold) if costs.whole is not None else None
        self.following = Following(self)
        #: What a token scheduler has cost so far.
        self.scheduling = self.following.times
        self.host_free_s = self.gpu_free_s = self.cpu_free_s = 0.0
        self.bound_host_s = self.bound_gpu_s = 0.0
        self.attention_s = self.experts_s = self.host_s = 0.0
        self.stall_demand_s = self.stall_late_s = self.idle_s = 0.0
        self.steps = self.events = self.accesses = self.late = 0
        self.decode_tokens = self.prefill_tokens = 0
        #: Duration and tokens of every decode step, in order.
        self.decode_step_s = array("d")
        self.decode_step_tokens = array("q")
        #: Seconds of the decode steps by cause, counted once for each token of a step.
        self.decode_parts_s = [0.0] * len(CAUSES)
        self.prefill_s = 0.0
        self._error: Exception | None = None

    def run(self, steps: Iterable[Step]) -> None:
        """Simulate *steps* from time 0 to the end of the last."""
        self.env.run(until=self.env.process(self._guarded(steps)))
        if self._error is not None:
            raise blame(self.planner, self._error) from self._error
        self.link.advance(self.total_s)

    @property
    def total_s(self) -> float:
        """Seconds from the start to the end of the last step."""
        return self.gpu_free_s

    @property
    def parts_s(self) -> tuple[float, ...]:
        """The GPU's time so far by cause, in the order of :data:`policies.result.CAUSES`."""
        return (
            self.attention_s,
            self.experts_s,
            self.host_s,
            self.stall_demand_s,
            self.stall_late_s,
            self.idle_s,
        )

    @property
    def compute_bound_s(self) -> float:
        """Seconds the same steps take with every expert resident."""
        return self.bound_gpu_s

    def _guarded(self, steps: Iterable[Step]) -> Generator[simpy.Event, None, None]:
        """Keep an exception as it is: SimPy would build a new one of its class."""
        try:
            yield from self._forward(steps)
        except Exception as error:
            self._error = error

    def _forward(self, steps: Iterable[Step]) -> Generator[simpy.Event, None, None]:
        observer = self.observer
        for step in steps:
            started, parts = self.gpu_free_s, self.parts_s
            if observer is not None:
                observer.begin(step)
            begun = self._begin(step)
            captured = self._captured(step)
            if captured is not None:
                yield from captured.layers(step, begun)
            else:
                yield from self._layers(step)
            self._end(step, started, parts)
            if observer is not None:
                observer.end()

    def _captured(self, step: Step) -> CapturedSteps | None:
        """How *step* runs as captured graphs, if it does."""
        if step.phase != DECODE:
            return None
        if self._whole is not None and runs_whole(self.planner, step.size):
            return self._whole
        return self._graphs

    def _begin(self, step: Step) -> Sequence[Move]:
        """What a policy fetches before the first layer."""
        self.following.begin(step)
        moves = self.planner.begin(step)
        if moves:
            self.link.advance(self.host_free_s)
            planned = self.host_free_s + self.prefetch_s * len(moves)
            self.host_free_s = self.link.prefetch(moves, planned, self.costs.prefetch_issue_s)
        return moves

    def _layers(self, step: Step) -> Generator[simpy.Event, None, None]:
        """Every event of one step; quiet ones (nothing missed or on its way) stay cheap."""
        env, costs, pending, planner = self.env, self.costs, self.link.pending, self.planner
        attention, thinking = self._attention(step), self.event_s
        group_s = costs.group_s[step.phase]
        access_s, issue_gate_s = self.access_s, costs.issue_gate_s + self.following.issue_gather_s
        one = costs.expert_s(1) if step.size == 1 else 0.0
        ideal: list[tuple[int, float, float]] = []
        for layer, experts in enumerate(step.demand):
            if self.host_free_s > self.gpu_free_s:  # the host still issued prefetches
                self.host_s += self.host_free_s - self.gpu_free_s
                self.gpu_free_s = self.host_free_s
            gate = self.gpu_free_s + attention
            launched = self.host_free_s + issue_gate_s
            if launched > gate:
                self.host_s += launched - gate
                gate = launched
            decide = gate + costs.sync_s
            yield env.timeout(decide - env.now)

            routing = Routing(step, layer, experts, self.events + layer)
            plan, moves = planner.plan(routing), planner.prefetch()
            seconds = None if one else self.seconds(routing, costs.expert_s)
            work = len(experts) * one if seconds is None else sum(seconds.values())
            least, issued = group_s[len(experts)]
            work = work if work > least else least
            busy = work if work > issued else issued
            ideal.append((len(experts), issued, busy))
            if plan is NOTHING and not moves and not pending:
                start = decide + (thinking + access_s * len(experts))
                self.experts_s += work
                self.host_s += start - gate + busy - work
                self.host_free_s, self.gpu_free_s = start + issued, start + busy
                if self.observer is not None:
                    self.observer.span("GPU", "experts", start, start + work)
            else:
                self._serve(routing, plan, gate, seconds or dict.fromkeys(experts, one))
            self.fetch(routing, moves)
            if self.observer is not None:
                self.observer.event(routing, plan, (gate - attention, gate))
        self.events += len(step.demand)
        self.accesses += sum(map(len, step.demand))
        self._bound(attention, ideal)

    def _attention(self, step: Step) -> float:
        """GPU seconds of a layer before its gate has answered; books all layers of the step."""
        attention = self.costs.attention_s(step.size, step.kv_tokens) + self.following.gather_s
        self.attention_s += attention * len(step.demand)
        return attention

    @staticmethod
    def seconds(routing: Routing, expert_s: Callable[[int], float]) -> dict[int, float]:
        """GPU seconds of each expert of an event with several tokens."""
        return dict(zip(routing.experts, map(expert_s, routing.counts), strict=True))

    def _bound(self, attention: float, ideal: list[tuple[int, float, float]]) -> None:
        """The same step with everything resident: what ``compute_s`` adds up."""
        issue_gate_s = self.costs.issue_gate_s + self.following.issue_gather_s
        host, gpu = self.bound_host_s + issue_gate_s, self.bound_gpu_s + attention
        thinking, access_s = self.costs.sync_s + self.costs.least_event_s, self.costs.least_access_s
        for accesses, issued, busy in ideal:
            start = (host if host > gpu else gpu) + (thinking + access_s * accesses)
            host = start + issued + issue_gate_s
            gpu = start + busy + attention
        self.bound_host_s, self.bound_gpu_s = host - issue_gate_s, gpu - attention

    def _serve(self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float]) -> None:
        """An event that waits for copies or makes some."""
        self.host_free_s, now = self.waves(routing, plan, gate, seconds)
        self.gpu_free_s = self.await_cpu(now)

    def fetch(self, routing: Routing, moves: Sequence[Move]) -> None:
        """An event has been launched: the host decides on *moves* for later ones and makes them."""
        self.decide(routing, moves)
        self.issue(moves)

    def decide(self, routing: Routing, moves: Sequence[Move]) -> None:
        """The host decides on *moves* for events later than that of *routing*."""
        event_s, access_s = self._foresee_s
        looking_s = event_s + access_s * len(routing.experts) + self.prefetch_s * len(moves)
        self.host_free_s += looking_s

    def issue(self, moves: Sequence[Move]) -> None:
        """The host hands over *moves* for later events."""
        self.host_free_s = self.link.prefetch(moves, self.host_free_s, self.costs.prefetch_issue_s)

    def thinking_s(self, routing: Routing, plan: Plan) -> float:
        """What the host takes to plan an event, from its gate's answer on, in warm caches."""
        thinking = self.event_s + self.access_s * len(routing.experts)
        if plan.waves:
            thinking += self.miss_s + self.move_s * sum(map(len, plan.waves))
        return thinking

    def await_cpu(self, now: float) -> float:
        """The GPU, free at *now*, waits for experts on the CPU; returns when it goes on."""
        if self.cpu_free_s > now:
            self.idle_s += self.cpu_free_s - now
            return self.cpu_free_s
        return now

    def waves(
        self, routing: Routing, plan: Plan, gate: float, seconds: dict[int, float]
    ) -> tuple[float, float]:
        """Copy and compute an event eagerly: what is held first, the rest as it lands.

        *seconds* has the GPU time of each expert. Returns when the host has launched and the
        GPU has computed it all.
        """
        decide = self.env.now
        group_s = self.costs.group_s[routing.step.phase]
        arrivals = Arrivals(self, group_s, decide + self.thinking_s(routing, plan), gate)
        if plan.served:
            seconds = self.served(routing, plan.served, seconds)
        late = self.late_moves(seconds, decide) if self.link.pending else []
        waves = [[(move, seconds.pop(move.copy)) for move in wave] for wave in plan.waves]
        first, *further = plan.waves or [()]
        arrivals.make(first)
        arrivals.held(seconds)
        arrivals.land(late)
        arrivals.land(waves[0] if waves else ())
        for wave, loads in zip(further, waves[1:], strict=True):
            arrivals.make(wave)
            arrivals.land(loads)
        return arrivals.close()

    def late_moves(self, seconds: dict[int, float], now: float) -> list[Arrival]:
        """Prefetches that the gate asks for before they have landed, with their work.

        They come in the order in which they land and are taken out of *seconds*.
        """
        self.link.advance(now)
        pending = self.link.pending
        late = [(pending[copy], seconds.pop(copy)) for copy in tuple(seconds) if copy in pending]
        for move, _ in late:
            self.link.want(move, now)
        self.late += len(late)
        if late and self.observer is not None:
            self.observer.late([move for move, _ in late])
        return sorted(late, key=_landing)

    def bytes_of(self, move: Move) -> int:
        """Bytes that *move* carries."""
        return self._copy_bytes(move.copy)

    def _copy_bytes(self, copy: int) -> int:
        low = copy >= self.planner.context.total
        return self.costs.low_bytes if low else self.costs.full_bytes

    def await_copy(self, move: Move, now: float, notice_s: float) -> float:
        """The GPU, free at *now*, waits for *move*, which has been issued.

        Returns when it goes on: at once, or *notice_s* after the move has landed.
        """
        ready = move.land_s + notice_s
        if ready <= now:
            return now
        if self.observer is not None:
            self.observer.on_copy("GPU", "stall", move.copy, now, ready)
        if move.demand:
            self.stall_demand_s += ready - now
        else:
            self.stall_late_s += ready - now
        return ready

    def served(
        self,
        routing: Routing,
        served: Mapping[int, Service | Substitute],
        full: dict[int, float],
        low_s: Callable[[int], float] | None = None,
    ) -> dict[int, float]:
        """GPU seconds of each copy that computes; what goes to the CPU is booked there.

        *low_s* says what a low-precision copy takes, by tokens; without it, as long as a full one.
        """
        seconds = {e: s for e, s in full.items() if e not in served}
        tokens = dict(zip(routing.experts, routing.counts, strict=True))
        for expert, service in served.items():
            if service is Service.LOW:
                low = self.planner.context.low(expert)
                seconds[low] = full[expert] if low_s is None else low_s(tokens[expert])
            elif isinstance(service, Substitute):
                seconds[service.expert] = seconds.get(service.expert, 0.0) + full[expert]
            elif service is Service.CPU:
                begin = max(self.cpu_free_s, self.env.now)
                self.cpu_free_s = begin + self.costs.cpu_expert_s(tokens[expert])
                if self.observer is not None:
                    self.observer.on_copy("CPU", "expert", expert, begin, self.cpu_free_s)
        return seconds

    def _end(self, step: Step, started: float, parts: tuple[float, ...]) -> None:
        """The step's token must be known on the host before the next step begins."""
        done = max(self.gpu_free_s, self.host_free_s) + self.costs.step_s
        self.host_s += done - self.gpu_free_s
        self.gpu_free_s = self.host_free_s = done
        bound = max(self.bound_gpu_s, self.bound_host_s) + self.costs.step_s
        self.bound_gpu_s = self.bound_host_s = bound
        self.steps += 1
        if step.phase == DECODE:
            self.decode_tokens += step.size
            self.decode_step_s.append(done - started)
            self.decode_step_tokens.append(step.size)
            for i, part in enumerate(self.parts_s):
                self.decode_parts_s[i] += (part - parts[i]) * step.size
        else:
            self.prefill_tokens += step.size
            self.prefill_s += done - started


def _landing(arrival: Arrival) -> float:
    return arrival[0].land_s
