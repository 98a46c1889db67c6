"""The planner: the event contract, once for both worlds.

It classifies an event's demand against the ledger, asks the policy, and answers with a
:class:`Plan` of moves. A world carries the plan out and keeps time; it decides nothing.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index

import numpy as np

from policies.base import Context, Forecaster, Policy, Service, Substitute, spares_cpu
from policies.budget import divide_budget
from policies.decisions import DecisionLog
from policies.ledger import ExpertCache, LedgerError
from policies.moves import Move
from policies.routing import PREFILL, Routing, Step
from traces.errors import InputError, kind_and_line, raised_line

#: Functions in which a plug-in's answer is taken apart -> the hook that gave it.
_ASKERS = {
    "place": "victims",
    "_place": "victims",
    "prefetch": "prefetch",
    "_prefetch": "prefetch or plan_step",
    "_serve": "serve",
    "_checked": "serve",
    "_wanted": "a forecast",
}

#: Service codes of the decision log.
_CODES = {Service.LOW: 1, Service.SKIP: 2, Service.CPU: 3}

_SERVICES = Service, Substitute


class PolicyError(InputError):
    """A policy or forecaster that a user wrote failed in mid-run; names it and the event."""


class Plan:
    """What one event needs: moves in waves.

    *missed* experts were not held; *waves* are the moves that must land before (or while)
    each part of the demand computes, the first wave computing what is held as well;
    *served* says how missed experts that are not loaded are served.
    """

    __slots__ = ("missed", "served", "waves")

    def __init__(
        self,
        missed: Sequence[int] = (),
        waves: Sequence[Sequence[Move]] = (),
        served: Mapping[int, Service | Substitute] | None = None,
    ) -> None:
        self.missed = missed
        self.waves = waves
        self.served = served

    @property
    def whole(self) -> bool:
        """Whether the device can compute the demand in one go: one wave, none by the CPU."""
        return len(self.waves) <= 1 and Service.CPU not in (self.served or {}).values()


#: The plan of an event that holds all of its demand.
NOTHING = Plan()


class Planner:
    """Runs one policy over one ledger, event by event.

    An event is planned in two stages: :meth:`plan` says what its computing needs, and once
    that is on its way :meth:`prefetch` what to fetch for later events, which nothing waits for.
    """

    def __init__(
        self,
        policy: Policy,
        context: Context,
        forecaster: Forecaster | None = None,
        *,
        low_bytes_share: float = 0.0,
        log: DecisionLog | None = None,
    ) -> None:
        pools = context.layers if context.pool == "layer" else 1
        full, low = divide_budget(context.slots, policy.low_share, low_bytes_share, pools)
        self.policy = policy
        self.context = context = replace(context, low_slots=low)
        self.forecaster = forecaster
        self.log = log or DecisionLog()
        self.cache = ExpertCache(context, full_slots=full, low_slots=low, policy=policy.name)
        self._slot_of = self.cache.slot_of
        self._prefetches = type(policy).prefetch is not Policy.prefetch
        #: Whether the policy says how what is missed is served, and never leaves any to the CPU.
        self.serves, self.spares_cpu = type(policy).serve is not Policy.serve, spares_cpu(policy)
        self._inexact = not policy.exact
        #: Whether :meth:`begin` may answer with moves.
        self.begins = type(policy).plan_step is not Policy.plan_step
        #: Whether anything is left to do when an event's demand is planned.
        self._follows = self._prefetches or self.serves or self._inexact
        self._on_load, self._on_evict = policy.on_load, policy.on_evict
        self._on_route, self._victims = policy.on_route, policy.victims
        self._ledger_place = self.cache.place
        self._waiting: set[int] = set()
        #: Called with an event's first demanded move before the others are planned, if set: it
        #: takes part in the first wave, whatever comes.
        self.on_first: Callable[[Move], None] | None = None
        #: The event whose prefetches have not been asked for, its record so far, and how what
        #: was missed is served.
        self._routing: Routing | None = None
        self._record: list[int] = []
        self._served: Mapping[int, Service | Substitute] | None = None
        #: Prefetches a policy may name at once: every copy of every expert, twice over.
        self._patience = 4 * context.total + 64
        self.counts: Counter[str] = Counter()
        self.quality: defaultdict[str, float] = defaultdict(float)
        #: Low-precision copies that a prefill event computes together, at most: what must be
        #: raised to full precision for it.
        self.low_together = 0
        try:
            policy.reset(context)
            if forecaster is not None:
                forecaster.reset(context)
        except Exception as error:
            raise blame(self, error) from error

    @property
    def unused(self) -> int:
        """Prefetched copies that hold a slot and have not been used."""
        return len(self._waiting)

    @property
    def unused_low(self) -> int:
        """Those of them at low precision."""
        return sum(map(self.context.is_low, self._waiting))

    def begin(self, step: Step) -> Sequence[Move]:
        """The prefetches a policy wants before the step's first layer."""
        self.cache.event = step.number * self.context.layers
        forecast = self.forecaster.on_step(step) if self.forecaster else ()
        wanted = self.policy.plan_step(step, forecast)
        if not wanted:
            return ()
        self.cache.pinned = ()
        record = [-5, step.number]
        moves = self._prefetch(wanted, record)
        if moves:
            self.log.add(record)
        return moves

    def plan(self, routing: Routing) -> Plan:
        """Classify, tell, serve and place for one event; :meth:`prefetch` must follow."""
        if self._routing is not None:
            raise RuntimeError(f"event {self._routing.event}: its prefetches were not asked for")
        experts = routing.experts
        slot_of = self._slot_of
        self.cache.event = routing.event
        missed = [e for e in experts if e not in slot_of]
        self._on_route(routing)
        if self._waiting:
            self._waiting.difference_update(experts)
        if self._follows:
            self._routing, self._record, self._served = routing, [], None
        if not missed:
            return NOTHING
        record = [-1, routing.event, len(missed)]
        plan = self._place_demand(routing, missed, record)
        if self._follows:
            self._record, self._served = record, plan.served
        else:
            self.log.add(record)
        return plan

    def prefetch(self) -> Sequence[Move]:
        """What is fetched for later events, once the event that was planned is computing."""
        routing = self._routing
        if routing is None:
            return ()
        self._routing, record, missed = None, self._record, bool(self._record)
        moves: Sequence[Move] = ()
        if self._prefetches:
            forecast = self.forecaster.on_route(routing) if self.forecaster else ()
            wanted = self.policy.prefetch(routing, forecast)
            if wanted:
                if not missed:
                    self.cache.pinned = set(routing.experts)
                    record += (-1, routing.event, 0)
                record.append(-3)
                moves = self._prefetch(wanted, record)
        if missed or moves:
            self.log.add(record)
        if self._inexact or self._served:
            self._tally(routing, self._served or {})
        return moves

    def _place_demand(self, routing: Routing, missed: list[int], record: list[int]) -> Plan:
        self.cache.pinned = set(routing.experts)
        loads, served = missed, None
        if self.serves:
            loads, served, missed = self._serve(routing, missed, record)
            if routing.step.phase == PREFILL:
                self._note_low(served.values(), loads)
        self.counts["missed"] += len(missed)
        self.counts["demand"] += len(loads)
        return Plan(missed, self._waves(loads, record) if loads else (), served)

    def _serve(
        self, routing: Routing, missed: list[int], record: list[int]
    ) -> tuple[list[int], dict[int, Service | Substitute], list[int]]:
        """Split what is not held at full precision: copies to load, other services, missed.

        An expert that the policy is content to use at low precision is held if its
        low-precision copy is, and counts as missed otherwise.
        """
        answer = self.policy.serve(routing, missed) or {}
        loads: list[int] = []
        truly: list[int] = []
        served: dict[int, Service | Substitute] = {}
        for expert in missed:
            service = answer.get(expert, Service.LOAD)
            if service is Service.LOAD:
                loads.append(expert)
                truly.append(expert)
                continue
            record += (-4, expert, self._checked(expert, service))
            served[expert] = service
            if service is Service.LOW:
                copy = self.context.low(expert)
                self._waiting.discard(copy)
                if copy in self._slot_of:
                    continue
                loads.append(copy)
            truly.append(expert)
        if len(served) < len(answer) and any(e not in missed for e in answer):
            stray = next(e for e in answer if e not in missed)
            raise self._refusal(f"serves expert {stray!r}, which was not missed")
        pinned = set(routing.experts)
        for expert, service in served.items():
            if service is Service.LOW:
                pinned.add(self.context.low(expert))
            elif isinstance(service, Substitute):
                pinned.add(service.expert)
        self.cache.pinned = pinned
        return loads, served, truly

    def _note_low(self, services: Iterable[Service | Substitute], loads: Sequence[int]) -> None:
        """What is held computes together, what is loaded in groups as it lands: all, at most."""
        low = sum(service is Service.LOW for service in services)
        loaded = sum(map(self.context.is_low, loads))
        self.low_together = max(self.low_together, low - loaded, loaded)

    def _checked(self, expert: int, service: object) -> int:
        """The code of *service*, which may be one for *expert*."""
        if not isinstance(service, _SERVICES):
            raise self._refusal(f"serves an expert by {service!r}, expected a Service")
        if self.policy.exact and service is not Service.CPU:
            raise self._refusal(
                f"would change the output ({service}) of {self.context.name(expert)}, "
                "but declares exact = True"
            )
        if service is Service.CPU and self.spares_cpu:
            raise self._refusal("leaves an expert to the CPU, but declares uses_cpu = False")
        if isinstance(service, Service):
            return _CODES[service]
        same = service.expert // self.context.experts == expert // self.context.experts
        if not same:
            raise self._refusal(f"substitutes {self.context.name(expert)} across layers")
        self.cache.require(service.expert)
        return 16 + service.expert

    def _waves(self, loads: list[int], record: list[int]) -> list[list[Move]]:
        """Place *loads* in ascending order; what finds no slot waits for the next wave."""
        waves: list[list[Move]] = []
        wave: list[Move] = []
        place, on_first = self._place, self.on_first
        computing: set[int] | None = None
        for copy in sorted(loads) if self.serves else loads:
            move = place(copy, record, True)
            if move is None:
                waves.append(wave)
                wave = []
                record.append(-2)
                self.cache.pinned = computing = set()
                move = place(copy, record, True)
                if move is None:
                    raise self._refusal(f"names no victim for {self.context.name(copy)}")
            if on_first is not None and not waves:
                on_first(move)
            on_first = None
            if computing is not None:
                computing.add(copy)
            wave.append(move)
        waves.append(wave)
        return waves

    def _place(self, copy: int, record: list[int], demand: bool) -> Move | None:
        placed = self._ledger_place(copy, self._victims(copy))
        if placed is None:
            return None
        slot, victim = placed
        if victim >= 0:
            victim = index(victim)
            self._on_evict(victim)
            if victim in self._waiting:
                self._waiting.discard(victim)
                self.counts["unused"] += 1
                self.counts["unused_low"] += self.context.is_low(victim)
        self._on_load(copy)
        record += (copy, slot, victim)
        return Move(copy, slot, victim, demand)

    def _prefetch(self, wanted: Iterable[int], record: list[int]) -> list[Move]:
        moves = []
        patience = self._patience
        for copy in wanted:
            patience -= 1
            if patience < 0:
                raise self._refusal("names prefetches without end")
            if copy in self._slot_of:
                continue
            if type(copy) is not int and not isinstance(copy, np.integer):
                raise self._refusal(f"asks for {copy!r} ahead of time, expected an expert's number")
            move = self._place(copy, record, False)
            if move is not None:
                self._waiting.add(copy)
                moves.append(move)
                self.counts["prefetch_low"] += self.context.is_low(copy)
        self.counts["prefetch"] += len(moves)
        return moves

    def _tally(self, routing: Routing, served: Mapping[int, Service | Substitute]) -> None:
        """The gate weight of an event, and how much of it was *served* in which way."""
        quality = self.quality
        if self._inexact:
            weights = routing.token_weights
            size = routing.step.size if weights is None else float(weights.sum(dtype="float64"))
            quality["weight"] += size
        if not served:
            return
        base = routing.layer * self.context.experts
        weights_of = routing.weights_of([expert - base for expert in served])
        for service, weight in zip(served.values(), weights_of, strict=True):
            kind = "substitute" if isinstance(service, Substitute) else service.value
            quality[kind] += 1
            quality[f"{kind}_weight"] += weight

    def _refusal(self, what: str) -> LedgerError:
        return LedgerError(f"policy {self.policy.name!r}, event {self.cache.event}: {what}")


def blame(planner: Planner, error: Exception) -> Exception:
    """What to raise for *error*: one line where the user's own plug-in is at fault."""
    if isinstance(error, InputError):
        return error
    theirs = {
        getattr(sys.modules.get(type(plugin).__module__), "__file__", None): plugin.name
        for plugin in (planner.policy, planner.forecaster)
        if plugin is not None and not type(plugin).__module__.startswith("policies.")
    }
    step, layer = divmod(planner.cache.event, planner.context.layers)
    when = f"at event {planner.cache.event} (step {step}, layer {layer})"
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename in theirs:
            return PolicyError(raised_line(theirs[frame.filename], error, when, frame))
    if theirs and frames and frames[-1].name in _ASKERS:
        names, hook = " or ".join(map(repr, theirs.values())), _ASKERS[frames[-1].name]
        what = kind_and_line(error)
        return PolicyError(f"{names} gave an answer of no use in {hook} {when}: {what}")
    return error


def run_counts(planner: Planner, steps: Iterable[Step]) -> int:
    """Replay *steps* without any clock; return the number of missed accesses."""
    event = 0
    for step in steps:
        planner.begin(step)
        for layer, experts in enumerate(step.demand):
            planner.plan(Routing(step, layer, experts, event))
            planner.prefetch()
            planner.counts["accesses"] += len(experts)
            event += 1
    return planner.counts["missed"]
