"""The engine event by event: waves, substitutes, low precision, and what the table says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import numpy as np  # noqa: E402

from policies.base import Context, Service, Substitute  # noqa: E402
from policies.builtin.lru import LRU  # noqa: E402
from policies.moves import Move  # noqa: E402
from policies.planner import NOTHING, Planner  # noqa: E402
from policies.routing import DECODE, Routing, Step  # noqa: E402
from runtime.bank import ABSENT, SlotBank  # noqa: E402
from runtime.engine import Engine  # noqa: E402
from runtime.eventclock import EventClock  # noqa: E402
from runtime.lanes import HostLanes  # noqa: E402
from tests.helpers import landing_in_groups  # noqa: E402
from tests.helpers_stress import store_of  # noqa: E402

EXPERTS = 6
NEVER = 10**9


class Scripted(LRU):
    """Serves by *services*, and prefetches *fetch* before the first layer."""

    name = "scripted"
    exact = False
    low_bits = 4

    def __init__(self, services=None, fetch=(), low_share=0.0):
        self.services, self.fetch = services or {}, fetch
        self.low_share = low_share

    def serve(self, routing, missed):
        return {e: self.services[e] for e in missed if e in self.services}

    def plan_step(self, step, forecast):
        return self.fetch


class Run:
    """An engine on the CPU whose copies land only when somebody waits for them."""

    def __init__(self, policy, slots, lag=NEVER, layers=2, lanes=None):
        bits = policy.low_bits if policy.low_share else 0
        store = store_of(layers, EXPERTS, bits)
        low = store.low_layout
        share = low.size_bytes / store.layout.size_bytes if low else 0.0
        self.planner = Planner(policy, Context(layers, EXPERTS, 2, slots), low_bytes_share=share)
        cache = self.planner.cache
        bank = SlotBank(
            store.layout, cache.full_slots, torch.device("cpu"), low_layout=low,
            low=cache.low_slots,
        )  # fmt: skip
        self.lanes = lanes or HostLanes(lag=lambda: lag)
        self.engine = Engine(self.planner, store, bank, self.lanes)
        self.steps = 0
        self.layers = layers

    def begin(self):
        step = Step(self.steps, DECODE, 1)
        step._experts = np.zeros((1, self.layers, 2), dtype=np.int16)
        self.steps += 1
        self.engine.start()
        self.engine.begin(step)
        return step

    def event(self, step, layer, ids):
        """What each call to compute would have read: {expert: slot} by the table."""
        engine = self.engine
        experts = [layer * EXPERTS + id for id in ids]
        routing = Routing(step, layer, experts, engine.events)
        plan, late = engine.decide(routing)
        groups = []

        def compute():
            row = engine.table.slots[layer].tolist()
            groups.append({id: row[id] for id in ids if row[id] != ABSENT})

        def cpu(on_cpu):
            groups.append({e % EXPERTS: "cpu" for e in on_cpu})

        engine.in_groups(routing, plan, late, compute, cpu)
        engine.after(plan, late)
        return SimpleNamespace(plan=plan, late=late, groups=groups)

    def each_once(self, found, ids):
        """That every expert was computed exactly once."""
        seen = [id for group in found.groups for id in group]
        assert sorted(seen) == sorted(ids), found.groups


def groups_of(run, count=1):
    """Within, groups have *count* experts at the least and at the most."""
    size = count * run.engine.bank.layout.size_bytes
    return landing_in_groups(size, size)


@pytest.mark.parametrize("together", [1, 2])
def test_held_first_then_groups_as_they_land(together):
    run = Run(LRU(), slots=4)
    with groups_of(run, together):
        step = run.begin()
        first = run.event(step, 0, [1, 3])
        assert first.groups == ([{1: 0}, {3: 1}] if together == 1 else [{1: 0, 3: 1}])
        run.event(step, 1, [0])
        second = run.event(run.begin(), 0, [1, 2, 3])
        assert second.groups == [{1: 0, 3: 1}, {2: 3}]
        third = run.event(run.begin(), 0, [1, 2, 3])
        assert third.plan is NOTHING
        assert third.groups == [{1: 0, 2: 3, 3: 1}]
    assert run.engine.accesses == 2 + 1 + 3 + 3


def test_a_group_is_issued_and_awaited_together():
    run = Run(LRU(), slots=6)
    run.engine.copier.issued = []
    with groups_of(run, 2):
        found = run.event(run.begin(), 0, [0, 1, 2, 3, 4])
    # The first has what is left in front, which is less than a group.
    assert [sorted(group) for group in found.groups] == [[0, 1, 2], [3, 4]]
    assert [len(copied.moves) for copied in run.engine.copier.issued] == [3, 2]
    assert run.engine.copier.prefetches == 0


class Noting(HostLanes):
    """Notes copies, calls' marks and what the copy lane waits for."""

    def __init__(self, said):
        super().__init__(lag=lambda: NEVER)
        self.said, self.marks = said, []

    def mark(self):
        self.marks.append(super().mark())
        self.said.append("call")
        return self.marks[-1]

    def copy(self, target, source):
        self.said.append("copy")
        return super().copy(target, source)

    def copy_after(self, mark):
        self.said.append(f"after {self.marks.index(mark)}")

    def copy_after_compute(self):
        self.said.append("after all")


class Naming(LRU):
    """Says which victims it is asked for."""

    def __init__(self, said):
        self.said = said

    def victims(self, incoming):
        self.said.append(f"victim for {incoming}")
        return super().victims(incoming)


def test_only_an_early_event_has_its_first_copy_before_others_are_planned():
    """And no prefetch may wait in the queue, which it might have to come behind."""
    said = []
    run = Run(Naming(said), slots=6, lanes=Noting(said))
    engine, step = run.engine, run.begin()
    for early, experts in ((True, [0, 1]), (False, [2, 3])):
        plan, late = engine.decide(
            Routing(step, 0, experts, engine.events), together=True, early=early
        )
        engine.after(plan, late)
    assert said == [
        "victim for 0", "copy", "victim for 1", "copy",
        "victim for 2", "victim for 3", "copy", "copy",
    ]  # fmt: skip
    said.clear()
    engine.copier.prefetch([Move(copy, copy - 2, -1, demand=False) for copy in (6, 7, 8)])
    assert len(engine.copier) == 3
    engine.decide(Routing(step, 1, [9, 10], engine.events), together=True, early=True)
    assert said[:2] == ["victim for 9", "victim for 10"]


def test_a_wave_waits_for_the_calls_that_read_its_slots_and_no_others():
    said = []
    run = Run(LRU(), slots=3, lanes=Noting(said))
    with groups_of(run):
        run.event(run.begin(), 0, [5])
        assert said == ["copy"]
        said.clear()
        found = run.event(run.begin(), 0, [0, 1, 2, 3, 5])
    assert [[move.slot for move in wave] for wave in found.plan.waves] == [[1, 2], [1, 2]]
    # What is held, then 0 and 1; 2 takes the slot of 0, and 3 that of 1.
    first, second = ["copy", "copy", "call", "call", "call"], ["after 1", "copy", "after 2", "copy"]
    assert said == [*first, *second, "call", "call"]
    run.each_once(found, [0, 1, 2, 3, 5])


def test_waves_compute_everything_once():
    run = Run(LRU(), slots=2)
    found = run.event(run.begin(), 0, [0, 1, 2, 3, 4])
    assert len(found.plan.waves) == 3
    run.each_once(found, [0, 1, 2, 3, 4])
    again = run.event(run.begin(), 0, [3, 4])
    run.each_once(again, [3, 4])


def test_a_substitute_whose_slot_goes_to_a_later_wave():
    """Who was read from another's slot must not be computed again when that slot is refilled."""
    run = Run(Scripted({2: Substitute(1)}, fetch=(1,)), slots=1)
    found = run.event(run.begin(), 0, [0, 2, 4])
    assert [len(wave) for wave in found.plan.waves] == [0, 1, 1]
    run.each_once(found, [0, 2, 4])


def test_a_low_copy_whose_slot_goes_to_a_later_wave():
    services = dict.fromkeys(range(EXPERTS), Service.LOW)
    policy = Scripted(services, low_share=0.5)
    policy.low_bits = 8
    run = Run(policy, slots=2)
    low_slots = run.planner.cache.low_slots
    assert 0 < low_slots < EXPERTS
    found = run.event(run.begin(), 0, list(range(EXPERTS)))
    assert len(found.plan.waves) == -(-EXPERTS // low_slots)
    run.each_once(found, list(range(EXPERTS)))


def test_a_late_copy_that_stands_in_for_several_lands_once():
    run = Run(Scripted({2: Substitute(1), 3: Substitute(1)}, fetch=(1,)), slots=4)
    found = run.event(run.begin(), 0, [1, 2, 3])
    assert found.late == [1]
    assert run.engine.late == 1
    assert found.groups == [{1: 0, 2: 0, 3: 0}]


def test_borrowing_ends_with_the_event():
    run = Run(Scripted({2: Substitute(1)}, fetch=(1,)), slots=3)
    run.event(run.begin(), 0, [1, 2])
    run.engine.table.flush()
    assert run.engine.table.slots[0].tolist() == [ABSENT, 0] + [ABSENT] * 4


def test_skipped_and_cpu():
    run = Run(Scripted({0: Service.SKIP, 1: Service.CPU}), slots=3)
    found = run.event(run.begin(), 0, [0, 1, 2])
    assert found.groups == [{2: 0}, {1: "cpu"}]
    assert not found.plan.whole


def test_late_prefetches_count_once_and_are_waited_for():
    run = Run(Scripted(fetch=(0, 7, 8)), slots=5)
    step = run.begin()
    found = run.event(step, 0, [0, 1])
    assert found.late == [0]
    # What was fetched ahead and what is missed are never one group.
    assert found.groups == [{0: 0}, {1: 3}]
    found = run.event(step, 1, [1, 2])
    assert run.engine.late == 1 + len(found.late)
    run.each_once(found, [1, 2])


def test_hidden_experts_come_back():
    run = Run(LRU(), slots=4)
    step = run.begin()
    routing = Routing(step, 0, [1, 2], 0)
    plan, late = run.engine.decide(routing)
    run.engine.in_groups(routing, plan, late, lambda: None, lambda experts: None)
    run.engine.hide(routing)
    assert run.engine.table.slots[0].tolist() == [ABSENT] * EXPERTS
    run.engine.after(plan, late)
    run.engine.table.flush()
    assert run.engine.table.slots[0].tolist() == [ABSENT, 0, 1] + [ABSENT] * 3


def test_the_device_works_when_prefetches_are_decided():
    """A policy is asked for them once the event has been launched."""
    said = []

    class Looking(LRU):
        def prefetch(self, routing, forecast):
            said.append("asked")
            return [4]

    run = Run(Looking(), slots=4)
    routing = Routing(run.begin(), 0, [1, 2], 0)
    plan, late = run.engine.decide(routing)
    run.engine.in_groups(routing, plan, late, lambda: said.append("computed"), None)
    assert set(said) == {"computed"}
    run.engine.after(plan, late)
    assert said[-1] == "asked"
    assert run.engine.copier.pending.keys() == {4}


def test_an_event_has_the_prefetches_that_it_finds_on_their_way_and_issues():
    """Two are on their way, the third waits in the queue until its event asks for it."""
    run = Run(Scripted(fetch=(1, 2, 3)), slots=4)
    clock = run.engine.clock = EventClock()
    step = run.begin()
    run.event(step, 0, [1, 3, 4])
    run.event(step, 1, [0])
    assert (list(clock.late), list(clock.issued)) == ([2, 0], [1, 0])
    assert run.engine.late == 2
    assert run.engine.copier.prefetches == 3
    clock.take(1)
    assert not clock.late
    assert not clock.issued
