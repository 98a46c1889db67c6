"""What time must obey: bounds, limits that can be worked out by hand, and its own bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import Context, Forecast, Policy
from policies.examples import EXPERT_BYTES, example_model
from policies.forecasters.oracle import Oracle
from policies.hardware import HardwareProfile
from policies.link_times import CopyTable, Direction
from policies.registry import POLICIES
from policies.routing import Routing
from sim.world import World
from tests.helpers import BUSY, landing_in_groups, machine, random_trace, replay, simulate, trace_of
from tests.helpers_replay import events_of
from tests.helpers_whole import whole
from tests.helpers_world import captured
from traces.trace import MemoryTrace

EXACT = ["belady", "fifo", "lfru", "lfu", "lru", "predictive", "static"]
DEMAND_ONLY = ["belady", "fifo", "lfru", "lfu", "lru"]

#: Ways in which decode steps run.
WAYS = {"eager": BUSY, "graphs": captured(BUSY), "whole": whole(BUSY)}


def without_cache_reads(trace: MemoryTrace) -> MemoryTrace:
    """The same with attention that takes the same time for every token."""
    return MemoryTrace(replace(trace.model, kv_bytes_per_token=0), trace.items)


def with_copies(profile: HardwareProfile, share: float) -> HardwareProfile:
    """*profile* with copies that take *share* of their time."""

    def faster(table: CopyTable) -> CopyTable:
        return CopyTable(table.sizes_bytes, tuple(share * s for s in table.seconds))

    h2d = profile.link.h2d
    way = Direction(faster(h2d.isolated), faster(h2d.queued))
    return replace(profile, link=replace(profile.link, h2d=way))


def run(name: str, trace: MemoryTrace, slots: int, batch: int, seed: int = 0) -> World:
    forecaster = Oracle(accuracy=0.8, horizon=4) if name == "predictive" else None
    return simulate(name, trace, slots, BUSY, batch=batch, forecaster=forecaster)


@pytest.mark.parametrize("profile", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", [*EXACT, "mixed"])
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 18),
    batch=st.integers(1, 3),
    copy_share=st.sampled_from([1.0, 1e-9]),
)
@settings(max_examples=25, deadline=None)
def test_the_breakdown_is_the_total_and_no_bound_is_beaten(
    name: str, profile: HardwareProfile, seed: int, slots: int, batch: int, copy_share: float
) -> None:
    profile = with_copies(profile, copy_share)
    trace = random_trace(seed)
    forecaster = Oracle(accuracy=0.8, horizon=4) if POLICIES.build(name).forecasts else None
    world = simulate(name, trace, slots, profile, batch=batch, forecaster=forecaster)
    assert sum(world.parts_s) == pytest.approx(world.total_s, rel=1e-9)
    assert min(world.parts_s) >= 0
    steps_s = world.prefill_s + sum(world.decode_step_s)
    assert steps_s == pytest.approx(world.total_s, rel=1e-9)
    if name != "mixed":
        assert world.total_s >= world.compute_bound_s * (1 - 1e-12)
        if all(len(demand) <= slots for _, demand in events_of(trace, batch)):
            fewest = replay("belady", trace, slots, batch=batch).counts["missed"]
            assert world.total_s >= fewest * profile.link.h2d.copy_s(3000, queued=True)
    size = world.costs.full_bytes
    if name in EXACT:
        counts = world.planner.counts
        assert world.link.demand_bytes == counts["demand"] * size
        carried = counts["prefetch"] - world.link.cancelled - len(world.link)
        assert world.link.prefetch_bytes == carried * size


@pytest.mark.parametrize("name", EXACT)
def test_the_link_is_never_busier_than_the_run_is_long(name: str) -> None:
    """Copies still on their way at the end count for what they did until then."""
    for seed in range(5):
        world = run(name, random_trace(seed), 5, 1)
        assert world.link.busy_s <= world.total_s + 2 * world.costs.idle_copy_s(3000)


@pytest.mark.parametrize("profile", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", DEMAND_ONLY)
def test_with_room_for_all_a_second_pass_is_compute_bound(
    name: str, profile: HardwareProfile
) -> None:
    """Under the policy that thinks least, where policies differ in that."""
    host = replace(profile.host, policy_event_s={}, policy_access_s={})
    profile = replace(profile, host=host)
    once, twice = random_trace(1, lengths=(20,)), random_trace(1, lengths=(20,))
    twice = MemoryTrace(twice.model, [*once.items, *once.items])
    first, both = (simulate(name, trace, 18, profile) for trace in (once, twice))
    assert both.planner.counts["missed"] == first.planner.counts["missed"] > 0
    assert both.total_s - first.total_s == pytest.approx(
        both.compute_bound_s - first.compute_bound_s, rel=1e-9
    )


@pytest.mark.parametrize("name", DEMAND_ONLY)
@pytest.mark.parametrize("batch", [1, 2])
def test_free_copies_take_no_time(name: str, batch: int) -> None:
    world = simulate(name, random_trace(2), 4, machine(copy_s=1e-15), batch=batch)
    assert world.planner.counts["missed"] > 0
    assert world.total_s == pytest.approx(world.compute_bound_s, rel=1e-9)


@pytest.mark.parametrize("name", DEMAND_ONLY)
def test_one_expert_per_event_is_a_serial_sum(name: str) -> None:
    """Nothing overlaps: attention, then the copy, then the expert."""
    trace = random_trace(3, top_k=1, prefill=0)
    world = simulate(name, trace, 4, machine(idle_extra_s=3e-4))
    events, missed = world.events, world.planner.counts["missed"]
    expected = world.attention_s + events * world.costs.expert_s(1)
    expected += missed * world.costs.idle_copy_s(3000)
    assert world.total_s == pytest.approx(expected, rel=1e-12)
    assert world.stall_demand_s == pytest.approx(missed * world.costs.idle_copy_s(3000))


@pytest.mark.parametrize("together", [1, 2, 4, 8])
@pytest.mark.parametrize(("copy_s", "expert_s"), [(1e-3, 1e-4), (1e-4, 1e-3)])
@pytest.mark.parametrize("slots", [40, 8])
def test_groups_of_loads_and_experts_are_a_two_stage_pipeline(
    slots: int, copy_s: float, expert_s: float, together: int
) -> None:
    """n equal stages of g experts: g * (t1 + t2 + (n - 1) * max(t1, t2))."""
    trace = trace_of(example_model(1, 40, 8), [np.arange(40).reshape(5, 1, 8)])
    with landing_in_groups(together * EXPERT_BYTES, together * EXPERT_BYTES):
        world = simulate("lru", trace, slots, machine(copy_s=copy_s, expert_s=expert_s))
    event = together * (copy_s + expert_s + (8 // together - 1) * max(copy_s, expert_s))
    assert world.total_s == pytest.approx(world.attention_s + 5 * event, rel=1e-12)


@pytest.mark.parametrize(("slots", "together"), [(2, 1), (4, 2), (8, 2), (8, 4)])
def test_waves_follow_each_other_on_the_link_without_a_gap(slots: int, together: int) -> None:
    """With a slot for two groups one lands while the other computes, whatever must make room."""
    trace = trace_of(example_model(1, 32, 32), [np.arange(32).reshape(1, 1, 32)])
    with landing_in_groups(together * EXPERT_BYTES, together * EXPERT_BYTES):
        world = simulate("lru", trace, slots, machine(copy_s=1e-3, expert_s=9e-4))
    event = 32 * 1e-3 + together * 9e-4
    assert world.total_s == pytest.approx(world.attention_s + event, rel=1e-12)


@pytest.mark.parametrize("way", [lambda eager: eager, whole], ids=["eager", "whole"])
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 18), batch=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_faster_link_is_never_slower_for_demand_only(
    way: Callable[[HardwareProfile], HardwareProfile], seed: int, slots: int, batch: int
) -> None:
    trace = random_trace(seed)
    profiles = [
        way(machine(copy_s=copy_s, event_s=1e-5)) for copy_s in (3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
    ]
    totals = [simulate("lru", trace, slots, profile, batch=batch).total_s for profile in profiles]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("name", [*EXACT, "mixed"])
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 18), batch=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_decisions_do_not_depend_on_how_steps_run(
    name: str, seed: int, slots: int, batch: int
) -> None:
    """Only time does: a profile tells policies the same, with one graph a step or with a chain."""
    worlds = []
    for profile in (WAYS["graphs"], WAYS["whole"]):
        forecaster = Oracle(accuracy=0.8, horizon=4) if POLICIES.build(name).forecasts else None
        trace = random_trace(seed)
        worlds.append(simulate(name, trace, slots, profile, batch=batch, forecaster=forecaster))
    chain, one = worlds
    assert one.planner.log.sha256() == chain.planner.log.sha256()
    assert one.events == chain.events
    assert one.planner.counts == chain.planner.counts


def test_bounds_do_not_depend_on_the_policy_and_fall_with_the_budget() -> None:
    trace = random_trace(4)
    bounds = {round(run(name, trace, 7, 2).compute_bound_s, 15) for name in EXACT}
    assert len(bounds) == 1
    fewest = [replay("belady", trace, slots).counts["missed"] for slots in range(6, 19)]
    assert fewest == sorted(fewest, reverse=True)


class Lookahead(Policy):
    """Keeps expert 0, and fetches what is demanded exactly *distance* events from now."""

    name = "lookahead"
    forecasts = True

    def __init__(self, distance: int) -> None:
        self.distance = distance

    def reset(self, context: Context) -> None:
        self.held: dict[int, None] = {}

    def on_load(self, copy: int) -> None:
        self.held[copy] = None

    def on_evict(self, copy: int) -> None:
        del self.held[copy]

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return [e for ahead, named, _ in forecast if ahead == self.distance for e in named]

    def victims(self, incoming: int) -> Iterable[int]:
        return [copy for copy in self.held if copy]


@pytest.mark.parametrize("distance", [1, 2, 3, 5])
@pytest.mark.parametrize("load", [0.6, 1.7, 2.5, 3.1, 7.9])
def test_perfect_forecasts_leave_the_stall_that_theory_says(distance: int, load: float) -> None:
    """A new expert every tenth event, known *distance* events before: load - distance * compute.

    *load* is the copy in units of an event's compute.
    """
    route = np.zeros(400, dtype=int)
    route[9::10] = fresh = np.arange(1, 41)
    trace = without_cache_reads(trace_of(example_model(1, 41, 1), [route]))
    event_s = simulate("lru", trace, 41, machine(copy_s=1e-15)).total_s / 400
    world = simulate(
        Lookahead(distance), trace, 3, machine(copy_s=load * event_s),
        forecaster=Oracle(horizon=distance),
    )  # fmt: skip
    stall_s = max(0.0, load - distance) * event_s
    assert world.planner.counts["missed"] == 1
    assert world.late == (len(fresh) if stall_s else 0)
    assert world.stall_late_s == pytest.approx(len(fresh) * stall_s, rel=1e-9)


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("load", [0.5, 0.9, 1.5, 3.0])
def test_a_new_expert_at_every_event_is_bound_by_the_slower_of_link_and_gpu(
    distance: int, load: float
) -> None:
    """However far one looks ahead, a saturated link leaves load - compute at every event."""
    trace = without_cache_reads(trace_of(example_model(1, 600, 1), [np.arange(1, 501)]))
    event_s = simulate("lru", trace, 600, machine(copy_s=1e-15)).total_s / 500
    profile = machine(copy_s=load * event_s)
    world = simulate(Lookahead(distance), trace, 8, profile, forecaster=Oracle(horizon=distance))
    assert world.total_s / 500 == pytest.approx(max(1.0, load) * event_s, rel=0.01)
    stalled = world.stall_late_s + world.stall_demand_s
    assert stalled / 500 == pytest.approx(max(0.0, load - 1) * event_s, abs=0.01 * event_s)
