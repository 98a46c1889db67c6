"""Carries out what the planner decides: copies, table changes, waiting, the order of computing.

The engine is the real world's half of the event contract. It knows nothing of models: whoever
drives it (the eager hook, the layer graphs) says what a gate answered and how to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from policies.base import Service, Substitute
from policies.landing import cut
from policies.moves import Move
from policies.planner import NOTHING, Plan, Planner, blame
from policies.routing import Routing, Step
from runtime.arrivals import Arrivals, Compute
from runtime.bank import ABSENT, ExpertTable, SlotBank
from runtime.copier import Copier
from runtime.eventclock import EventClock
from runtime.lanes import Lanes
from runtime.stopwatch import Stopwatch
from runtime.store import HostStore

#: Compute these experts of the event on the CPU and add what comes out.
OnCpu = Callable[[Sequence[int]], None]


class Engine:
    """One planner, its store, slots and link on one device.

    Drive it with :meth:`start` and :meth:`begin` for each step, then for each layer
    :meth:`decide` with the gate's answer, one of :meth:`at_once` and :meth:`in_groups`, and
    :meth:`after` once all has been launched, then :meth:`end`.
    """

    def __init__(
        self, planner: Planner, store: HostStore, bank: SlotBank, lanes: Lanes, depth: int = 2
    ) -> None:
        self.planner, self.store, self.bank, self.lanes = planner, store, bank, lanes
        context = planner.context
        self.table = ExpertTable(context.layers, context.experts, lanes)
        self.copier = Copier(store, bank, lanes, depth)
        self.watch = Stopwatch(lanes)
        self.events = self.accesses = self.late = self.steps = 0
        #: Experts of all layers: a copy's number, less this if it is at low precision, is its
        #: expert's.
        self.total = context.total
        self._borrowed: list[int] = []
        #: Where every copy lies, moves of later waves not yet made: the ledger is ahead of it.
        self._slot: dict[int, int] = {}
        #: Called with moves when they are decided, before anybody is told that they are issued,
        #: if set.
        self.on_place: Callable[[Sequence[Move]], None] | None = None
        #: Notes an event's moments, if anybody wants to know.
        self.clock: EventClock | None = None
        #: Called when the host begins to wait for an answer, if set.
        self.on_wait: Callable[[], None] | None = None
        #: Called with (routing, plan, late copies) of each event, if set.
        self.on_event: Callable[[Routing, Plan, Sequence[int]], None] | None = None

    def _raise_blamed(self, error: Exception) -> NoReturn:
        """What a user's plug-in raised names the plug-in and the event."""
        blamed = blame(self.planner, error)
        if blamed is error:
            raise error
        raise blamed from error

    def note(self) -> None:
        """One of an event's moments: answered, planned, launched, and prefetches decided."""
        if self.clock is not None:
            self.clock.note()

    def start(self) -> None:
        """A step starts: what is launched from now on is part of it."""
        self.lanes.enter()
        self.watch.start()

    def begin(self, step: Step) -> None:
        """Make the prefetches that the path forecast of *step* asks for."""
        try:
            moves = self.planner.begin(step)
        except Exception as error:
            self._raise_blamed(error)
        if moves:
            # Their slots may have been read by the last layer of the step before.
            self.lanes.copy_after_compute()
            self._place(moves)
            self.copier.prefetch(moves)
        else:
            self.copier.poll()

    def decide(
        self, routing: Routing, *, together: bool = False, early: bool = False
    ) -> tuple[Plan, list[int]]:
        """The plan of an event, and the held copies that are still on their way.

        The moves of its first wave are issued, its table entries are noted. With *together*
        a plan that is whole goes to :meth:`at_once`, which waits for all copies or none. With
        *early* all of its demand is one wave, whose first copy is issued while the others are
        planned, unless prefetches wait in the queue, one of which may have to come before it.
        """
        waiting = len(self.copier)
        self.planner.on_first = self.copier.hurry if early and not waiting else None
        try:
            plan = self.planner.plan(routing)
        except Exception as error:
            self._raise_blamed(error)
        self.note()
        issued = self.copier.prefetches
        self.events += 1
        self.accesses += len(routing.experts)
        needed: Sequence[int] = routing.experts
        if plan.served or (plan is not NOTHING and self.copier.pending):
            needed = self._used(routing, plan)
        late = self.copier.arriving(needed) if self.copier.pending else []
        self.late += len(late)
        if plan.waves:
            self._demand_first(plan.waves[0], together=together and plan.whole)
        if self.clock is not None:
            self.clock.late.append(len(late))
            self.clock.issued.append(self.copier.prefetches - issued)
        if self.on_event is not None:
            self.on_event(routing, plan, late)
        return plan, late

    def at_once(self, plan: Plan, late: Sequence[int]) -> None:
        """Let the computing lane wait for the whole demand; the table is ready after this.

        Only for plans of one wave that need no CPU (``plan.whole``).
        """
        self.table.flush()
        self.watch.split("host")
        if late:
            for copy in late:
                self.copier.wait(copy)
            self.watch.split("stall_late")
        if plan.waves:
            # They land in the order in which they were issued, or share their marks.
            self.copier.wait(plan.waves[0][-1].copy)
            self.watch.split("stall_demand")

    def in_groups(
        self, routing: Routing, plan: Plan, late: Sequence[int], compute: Compute, cpu: OnCpu
    ) -> None:
        """Compute held experts first, then the others in groups as they land, wave by wave.

        What makes a group is decided in :mod:`policies.landing`.
        """
        if plan is NOTHING and not late:
            self.table.flush()
            self.watch.split("host")
            compute()
            self.watch.split("experts")
            return
        first, *further = plan.waves or [()]
        demanded = [move.copy for move in first]
        # Its entries are shown call by call; in the end the table says what it should.
        self._borrowed += routing.experts
        arrivals = Arrivals(self, routing.experts, compute, waves=bool(further))
        arrivals.held([*late, *demanded])
        arrivals.land(late, "stall_late")
        arrivals.land(demanded, "stall_demand")
        for wave in further:
            arrivals.make(wave)
            arrivals.land([move.copy for move in wave], "stall_demand")
        arrivals.close()
        on_cpu = [e for e, s in (plan.served or {}).items() if s is Service.CPU]
        if on_cpu:
            cpu(on_cpu)
            self.watch.split("idle")

    def hide(self, routing: Routing) -> None:
        """All of this event has been computed: until :meth:`after`, the table holds none."""
        for expert in routing.experts:
            self.table.set(expert, ABSENT)
            self._borrowed.append(expert)
        self.table.flush()

    def after(
        self, plan: Plan, late: Sequence[int], settled: Callable[[], None] | None = None
    ) -> None:
        """An event's computing has been launched: tidy up, then decide and make its prefetches.

        The device is at work meanwhile: what a policy thinks here nobody waits for. *settled* is
        called once all is decided, before copies are issued.
        """
        self.copier.settle(late)
        for wave in plan.waves:
            self.copier.settle(move.copy for move in wave)
        for expert in self._borrowed:
            self.table.set(expert, self._slot.get(expert, ABSENT))
        self._borrowed.clear()
        try:
            moves = self.planner.prefetch()
        except Exception as error:
            self._raise_blamed(error)
        self.note()
        if moves:
            self._place(moves)
        if settled is not None:
            settled()
        if moves:
            if len(plan.waves) > 1:
                self.lanes.copy_after_compute()
            self.copier.prefetch(moves)

    def end(self) -> None:
        """The step's last event has been launched."""
        self.steps += 1

    def demand(self, moves: Sequence[Move]) -> None:
        """Make missed experts' *moves*, whose slots are free of readers; they land together."""
        self.copier.demand(moves, together=True, place=self._place)

    def slot_of(self, copy: int) -> int:
        """The slot of *copy*, which is there or on its way."""
        return self._slot[copy]

    def _demand_first(self, wave: Sequence[Move], *, together: bool) -> None:
        """Make the moves of an event's first wave, in the groups in which they are computed."""
        for group in [wave] if together else cut(wave, self.copier.size_of):
            self.demand(group)

    def _place(self, moves: Sequence[Move]) -> None:
        """Note who is read from where once *moves* have been made."""
        if self.on_place is not None:
            self.on_place(moves)
        for move in moves:
            self._slot.pop(move.victim, None)
            self._slot[move.copy] = move.slot
            if 0 <= move.victim < self.total:
                self.table.set(move.victim, ABSENT)
            if move.copy < self.total:
                self.table.set(move.copy, move.slot)
            elif move.demand:
                self._borrow(move.copy - self.total, move.slot)

    def _borrow(self, expert: int, slot: int) -> None:
        """For this event alone *expert* is read from *slot*."""
        self.table.set(expert, slot)
        self._borrowed.append(expert)

    def _used(self, routing: Routing, plan: Plan) -> list[int]:
        """The copies that an event reads on the device, other than those it loads."""
        missed = set(plan.missed)
        used = [e for e in routing.experts if e not in missed]
        slot_of = self._slot
        for expert, service in (plan.served or {}).items():
            if isinstance(service, Substitute):
                used.append(service.expert)
                self._borrow(expert, slot_of[service.expert])
            elif service is Service.LOW:
                copy = self.planner.context.low(expert)
                if expert in used:
                    used.remove(expert)
                if copy in slot_of:
                    used.append(copy)
                    self._borrow(expert, slot_of[copy])
        loading = {move.copy for wave in plan.waves for move in wave}
        # Once each: several experts may have the same substitute.
        return [copy for copy in dict.fromkeys(used) if copy not in loading]
