"""Decode steps as one graph each: handshakes worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from policies.base import Forecast, Service, Substitute
from policies.builtin.lru import LRU
from policies.costs import Costs
from policies.examples import example_model
from policies.hardware import HardwareProfile
from policies.routing import Routing, Step
from policies.whole_costs import WholeCosts
from sim.world import World
from tests.helpers import machine, random_trace, simulate, trace_of
from tests.helpers_whole import WHOLE, whole
from tests.helpers_world import captured
from traces.trace import MemoryTrace

PLAIN = machine(sync_s=1.7e-5, event_s=2.3e-5, copy_issue_s=5e-6, step_s=9e-5)
CHAIN, PROFILE = captured(PLAIN), whole(PLAIN)
HOST = PROFILE.host


def with_layers(experts: Sequence[object], layers: int = 1) -> MemoryTrace:
    """One sequence of decode steps; *experts* [steps, layers, 2], or [steps, 2] for one layer."""
    route = np.array(experts).reshape(-1, layers, 2)
    return trace_of(example_model(layers, 8, 2), [route])


def with_host(profile: HardwareProfile, **figures: object) -> HardwareProfile:
    return replace(profile, host=replace(profile.host, **figures))  # type: ignore[arg-type]


def costs_of(world: World) -> WholeCosts:
    assert world.costs.whole is not None
    return world.costs.whole


def think_s(policy: str = "lru") -> float:
    """From the answer on, where nothing is missed of two experts."""
    event_s = HOST.policy_event_s.get(policy, HOST.event_s)
    return event_s + 2 * HOST.policy_access_s.get(policy, HOST.access_s)


def test_policies_are_told_the_same_of_a_layer() -> None:
    """What they decide must not depend on how steps run."""
    model = example_model(2, 8, 2)
    assert Costs(PROFILE, model).context("lru", 4) == Costs(CHAIN, model).context("lru", 4)


@pytest.mark.parametrize("profile", [PLAIN, CHAIN, PROFILE])
def test_what_policies_are_told_does_not_depend_on_the_length_of_a_cache(
    profile: HardwareProfile,
) -> None:
    """A runtime and a simulation of what it recorded know different lengths."""
    model = example_model(2, 8, 2)
    one, other = (Costs(profile, model, cache_tokens=n) for n in (0, 4096))
    assert one.context("lru", 4) == other.context("lru", 4)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_gpu_does_not_wait_where_nothing_is_missed(layers: int) -> None:
    """Second step: one launch, then layers and handshakes; the host keeps up beside it."""
    world = simulate("lru", with_layers([[[0, 1]] * layers] * 2, layers), 2 * layers, PROFILE)
    costs = costs_of(world)
    layer_s = costs.attention_s(1, 2) + WHOLE.handshake_s + 2 * costs.expert_s(1)
    expected = WHOLE.launch_s + layers * layer_s + HOST.step_s
    assert think_s() < 2 * costs.expert_s(1)
    assert world.decode_step_s[1] == pytest.approx(expected, rel=1e-12)
    assert world.planner.counts["missed"] == 2 * layers


def test_the_gpu_is_at_most_one_event_ahead_of_a_slow_host() -> None:
    """Its gates wait until the event before is settled; the step ends with the host."""
    slow_s = 5e-3
    profile = with_host(PROFILE, policy_event_s={"lru": slow_s}, policy_access_s={"lru": 0.0})
    trace = with_layers([[[0, 1]] * 3] * 2, 3)
    world, first = (simulate("lru", t, 6, profile) for t in (trace, with_layers([[[0, 1]] * 3], 3)))
    costs = costs_of(world)
    work_s = WHOLE.handshake_s + 2 * costs.expert_s(1)
    gate = WHOLE.launch_s + costs.attention_s(1, 2)
    settled = gate + WHOLE.answer_s + slow_s
    settled += WHOLE.follow_s + slow_s
    # The last gate waited for this one, and the host has one more event to go.
    assert settled + WHOLE.notice_s + work_s < settled + WHOLE.follow_s + slow_s
    end = settled + WHOLE.follow_s + slow_s
    assert world.decode_step_s[1] == pytest.approx(end + HOST.step_s, rel=1e-12)
    waited = world.decode_step_s[1] - 3 * costs.attention_s(1, 2) - 6 * costs.expert_s(1)
    assert world.host_s - first.host_s == pytest.approx(waited, rel=1e-9)


def test_missed_experts_are_planned_published_and_awaited() -> None:
    world = simulate("lru", with_layers([[0, 1]]), 4, PROFILE)
    costs, graph = world.costs, costs_of(world)
    gate = WHOLE.launch_s + graph.attention_s(1, 1)
    issued = gate + WHOLE.answer_s + think_s() + HOST.miss_s + 2 * HOST.move_s
    planned = issued + 2 * HOST.copy_issue_s + WHOLE.publish_s + WHOLE.notice_s
    # The first copy is on the link before the second is planned.
    landed = issued - HOST.move_s + costs.idle_copy_s(3000) + costs.queued_copy_s(3000)
    landed += WHOLE.notice_s
    assert world.stall_demand_s == pytest.approx(landed - planned, rel=1e-12)
    assert world.host_s == pytest.approx(WHOLE.launch_s + planned - gate + HOST.step_s, rel=1e-12)
    assert world.total_s == pytest.approx(landed + 2 * graph.expert_s(1) + HOST.step_s, rel=1e-12)


@pytest.mark.parametrize("expert_s", [1e-4, 5e-3])
def test_what_is_held_is_computed_while_the_missed_lands(expert_s: float) -> None:
    """Once in the shadow of the copy, once longer than it."""
    profile = whole(machine(expert_s=expert_s, step_s=9e-5))
    world = simulate("lru", with_layers([[0, 1], [0, 2]]), 4, profile)
    graph = costs_of(world)
    gate = WHOLE.launch_s + graph.attention_s(1, 2)
    landed = gate + WHOLE.answer_s + think_s() + HOST.miss_s + HOST.move_s
    landed += world.costs.idle_copy_s(3000) + WHOLE.notice_s
    held = gate + WHOLE.handshake_s + graph.expert_s(1)
    assert (held > landed) == (expert_s > 1e-3)
    expected = max(held, landed) + graph.expert_s(1) + HOST.step_s
    assert world.decode_step_s[1] == pytest.approx(expected, rel=1e-12)


class Ahead(LRU):
    """Fetches two experts before the first layer."""

    name = "ahead"

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        return (0, 1)


@pytest.mark.parametrize(("depth", "queued"), [(1, 1), (2, 0)])
def test_a_late_prefetch_is_awaited(depth: int, queued: int) -> None:
    """The host issues what still waits in the queue, and nothing is new in the table."""
    world = simulate(Ahead(), with_layers([[0, 1]]), 4, PROFILE, depth=depth)
    costs, graph = world.costs, costs_of(world)
    launched = 2 * (HOST.prefetch_s + HOST.prefetch_issue_s) + WHOLE.publish_s + WHOLE.launch_s
    planned = launched + graph.attention_s(1, 1) + WHOLE.answer_s + think_s("ahead")
    planned += queued * HOST.late_issue_s + WHOLE.notice_s
    landed = 2 * HOST.prefetch_s + costs.idle_copy_s(3000) + costs.queued_copy_s(3000)
    landed += WHOLE.notice_s
    assert world.late == 2
    assert world.stall_late_s == pytest.approx(landed - planned, rel=1e-12)
    assert world.total_s == pytest.approx(landed + 2 * graph.expert_s(1) + HOST.step_s, rel=1e-12)


def test_a_prefetch_that_lands_in_time_is_not_awaited() -> None:
    profile = whole(machine(copy_s=1e-6, step_s=9e-5))
    world = simulate(Ahead(), with_layers([[0, 1]]), 4, profile)
    graph = costs_of(world)
    launched = 2 * (HOST.prefetch_s + HOST.prefetch_issue_s) + WHOLE.publish_s + WHOLE.launch_s
    expected = launched + graph.attention_s(1, 1) + WHOLE.handshake_s + 2 * graph.expert_s(1)
    assert world.late == world.stall_late_s == 0
    assert world.total_s == pytest.approx(expected + HOST.step_s, rel=1e-12)


def test_what_lands_between_look_up_and_answer_waits_for_the_plan() -> None:
    """The GPU looked too early; the host, whose answer comes late, finds nothing amiss."""
    answer_s = 5e-3
    profile = whole(PLAIN, answer_s=answer_s)
    world = simulate(Ahead(), with_layers([[0, 1]]), 4, profile)
    graph = costs_of(world)
    launched = 2 * (HOST.prefetch_s + HOST.prefetch_issue_s) + WHOLE.publish_s + WHOLE.launch_s
    told = launched + graph.attention_s(1, 1) + answer_s + think_s("ahead") + WHOLE.notice_s
    assert world.late == world.stall_late_s == 0
    assert world.total_s == pytest.approx(told + 2 * graph.expert_s(1) + HOST.step_s, rel=1e-12)


class Asked(LRU):
    """Has a say in how experts are served, and has all of them loaded."""

    name = "asked"
    uses_cpu: ClassVar[bool] = False

    def serve(
        self, routing: Routing, missed: Sequence[int]
    ) -> Mapping[int, Service | Substitute] | None:
        return None


def test_where_a_policy_serves_every_gate_waits_for_its_own_plan() -> None:
    world = simulate(Asked(), with_layers([[0, 1], [0, 1]]), 4, PROFILE)
    graph = costs_of(world)
    expected = WHOLE.launch_s + graph.attention_s(1, 2) + WHOLE.answer_s + think_s("asked")
    expected += WHOLE.notice_s + WHOLE.handshake_s + 2 * graph.expert_s(1) + HOST.step_s
    assert world.decode_step_s[1] == pytest.approx(expected, rel=1e-12)


def test_a_cold_host_plans_for_longer() -> None:
    cold = with_host(PROFILE, cold_share=0.3, policy_cold_share={"asked": 0.8})
    trace = with_layers([[0, 1], [0, 1]])
    worlds = [simulate(Asked(), trace, 4, profile) for profile in (cold, PROFILE)]
    graph = costs_of(worlds[0])
    waited = graph.attention_s(1, 2) + WHOLE.answer_s - WHOLE.follow_s
    longer = graph.planning_cold("asked").weight(waited) * think_s("asked")
    assert worlds[0].decode_step_s[1] - worlds[1].decode_step_s[1] == pytest.approx(longer)


class Unsaid(Asked):
    """Serves by itself, and does not say that it spares the CPU."""

    name = "unsaid"

    def serve(
        self, routing: Routing, missed: Sequence[int]
    ) -> Mapping[int, Service | Substitute] | None:
        return {expert: Service.CPU for expert in missed[1:]}


def test_steps_that_cannot_run_whole_run_as_a_chain() -> None:
    """Too few slots for the demand, or a policy that may use the CPU."""
    trace = random_trace(3, lengths=(6, 6), prefill=0)
    for policy, slots, batch in ((LRU(), 3, 2), (Unsaid(), 18, 1)):
        worlds = [simulate(policy, trace, slots, p, batch=batch) for p in (PROFILE, CHAIN)]
        assert worlds[0].total_s == worlds[1].total_s
        assert worlds[0].compute_bound_s == worlds[1].compute_bound_s


def test_a_run_may_change_from_chain_to_whole() -> None:
    """Of two sequences one ends; the other's tokens need no more than there is room for."""
    trace = random_trace(3, lengths=(3, 7), prefill=0)
    ours, chain = (simulate("lru", trace, 3, p, batch=2) for p in (PROFILE, CHAIN))
    assert list(ours.decode_step_tokens) == [2, 2, 2, 1, 1, 1, 1]
    assert ours.decode_step_s[:2] == chain.decode_step_s[:2]
    assert ours.decode_step_s[3:] != chain.decode_step_s[3:]


class Refuses(LRU):
    """Keeps expert 0 as long as anything else is pinned with it: waves where none need be."""

    name = "refuses"

    def reset(self, context: object) -> None:
        super().reset(context)  # type: ignore[arg-type]
        self.asked = 0

    def victims(self, incoming: int) -> Iterable[int]:
        self.asked += 1
        return () if self.asked % 2 else super().victims(incoming)


def test_a_policy_that_refuses_slots_is_simulated_all_the_same() -> None:
    trace = random_trace(4, prefill=0)
    ours, chain = (simulate(Refuses(), trace, 3, p) for p in (PROFILE, CHAIN))
    assert ours.planner.log.sha256() == chain.planner.log.sha256()
    assert any(-2 in numbers for numbers in [ours.planner.log.numbers or ()])
    assert sum(ours.parts_s) == pytest.approx(ours.total_s, rel=1e-9)
    assert ours.total_s >= ours.compute_bound_s


def test_figures_that_are_not_given_are_those_of_a_chain() -> None:
    model = example_model(2, 8, 2)
    bare = whole(PLAIN, launch_s=0.0, layer_floor_s={})  # type: ignore[arg-type]
    costs = Costs(bare, model)
    assert costs.whole is not None
    assert costs.graph is not None
    assert costs.whole.launch_s == HOST.graph_launch_s
    for tokens in (1, 2):
        assert costs.whole.attention_s(tokens, 5) == costs.graph.attention_s(tokens, 5)
    own = Costs(PROFILE, model).whole
    assert own is not None
    assert own.attention_s(1, 5) - costs.graph.attention_s(1, 5) == pytest.approx(1.1e-5 - 1.9e-5)
    assert own.several_floor_s == own.floor_s == 1.1e-5
    several = replace(PROFILE.software, several_floor_s={"any": 7e-5})
    theirs = Costs(replace(PROFILE, software=several), model).whole
    assert theirs is not None
    assert (theirs.floor_s, theirs.several_floor_s) == (1.1e-5, 7e-5)
    assert Costs(CHAIN, model).whole is None
