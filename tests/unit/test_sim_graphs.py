"""Decode steps as captured graphs: chains worked out by hand, and what a profile must say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from policies.base import Context, Forecast
from policies.batching import Batches
from policies.builtin.lru import LRU
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.examples import example_model
from policies.forecasters.oracle import Oracle
from policies.future import Future
from policies.graph_costs import GraphCosts, facts_of
from policies.hardware import HardwareProfile
from policies.planner import Planner
from policies.recording import Recording
from policies.registry import POLICIES
from policies.routing import Step
from sim.world import World
from tests.helpers import BUSY, machine, random_trace, simulate, trace_of
from tests.helpers_whole import whole
from tests.helpers_world import captured
from traces.model import ModelSpec
from traces.sizes import dimensions, model_sizes, resize, size_names
from traces.trace import MemoryTrace

GRAPHS = captured(machine(sync_s=1.7e-5, event_s=2.3e-5, copy_issue_s=5e-6, step_s=9e-5))


def chain_s(profile: HardwareProfile, policy: str) -> float:
    """What lies between a gate and the launch of the next graph when nothing is missed."""
    host = profile.host
    event_s = host.policy_event_s.get(policy, host.event_s)
    event_s += 2 * host.policy_access_s.get(policy, host.access_s)
    return host.gate_sync_s + event_s + host.graph_launch_s


def one_layer(experts: list[list[int]]) -> MemoryTrace:
    return trace_of(example_model(1, 8, 2), [np.array(experts).reshape(-1, 1, 2)])


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_quiet_step_is_a_serial_chain(policy: str) -> None:
    """The second step holds what it needs: launch, attention, chain, experts, end."""
    world = simulate(policy, one_layer([[0, 1], [0, 1]]), 4, GRAPHS)
    graph = world.costs.graph
    assert graph is not None
    expected = graph.launch_s + graph.attention_s(1, 2) + chain_s(GRAPHS, policy)
    expected += 2 * graph.expert_s(1) + GRAPHS.host.step_s
    assert world.decode_step_s[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("looking_s", [1e-9, 1e-2])
def test_the_gpu_works_while_prefetches_are_decided(looking_s: float) -> None:
    """A step is no longer for it, unless it takes longer than what the GPU does meanwhile."""
    looking = replace(GRAPHS.host, policy_foresee_event_s={"predictive": looking_s})
    looking = replace(looking, policy_foresee_access_s={})
    profile = replace(GRAPHS, host=looking)
    world = simulate("predictive", one_layer([[0, 1], [0, 1]]), 4, profile, forecaster=Oracle())
    graph = world.costs.graph
    assert graph is not None
    attention = graph.attention_s(1, 2) + graph.more_s("predictive")
    expected = graph.launch_s + attention + chain_s(GRAPHS, "predictive")
    expected += max(2 * graph.expert_s(1), looking_s) + GRAPHS.host.step_s
    assert world.decode_step_s[1] == pytest.approx(expected, rel=1e-12)


def test_missed_experts_are_planned_issued_and_awaited_before_the_graph_runs() -> None:
    """The first step loads two: the later lands one idle and one queued copy after its issue.

    A miss takes the host a while before its first copy, and the graph a while to notice.
    """
    world = simulate("lru", one_layer([[0, 1]]), 4, GRAPHS)
    costs, host = world.costs, GRAPHS.host
    graph = costs.graph
    assert graph is not None
    issued = graph.launch_s + graph.attention_s(1, 1) + host.gate_sync_s
    issued += host.policy_event_s["lru"] + 2 * host.policy_access_s["lru"] + 2 * host.move_s
    issued += host.miss_s
    landed = issued + costs.idle_copy_s(3000) + costs.queued_copy_s(3000)
    landed += GRAPHS.link.wake_s
    launched = issued + 2 * host.copy_issue_s + host.graph_launch_s
    launched += host.table_tell_s + 2 * host.table_update_s
    assert landed > launched, "the copies should be what is waited for"
    assert world.stall_demand_s == pytest.approx(landed - launched, rel=1e-12)
    assert world.total_s == pytest.approx(landed + 2 * graph.expert_s(1) + host.step_s, rel=1e-12)


def test_the_table_is_told_in_one_call() -> None:
    graph = GraphCosts(GRAPHS, example_model(1, 8, 2))
    host = GRAPHS.host
    told = [graph.table_s(changes) for changes in (0, 1, 300)]
    assert told[0] == 0.0
    assert told[1:] == pytest.approx(
        [host.table_tell_s + host.table_update_s, host.table_tell_s + 300 * host.table_update_s]
    )


@pytest.mark.parametrize("miss_s", [0.0, 2e-3])
def test_a_policy_has_its_own_time_for_an_event_that_misses(miss_s: float) -> None:
    """Once, however many it misses; and not where nothing is missed."""
    mine = replace(GRAPHS, host=replace(GRAPHS.host, policy_miss_s={"lru": miss_s}))
    trace = one_layer([[0, 1], [0, 1], [1, 2]])
    ours, plain, other = (
        simulate(name, trace, 8, profile)
        for name, profile in (("lru", mine), ("lru", GRAPHS), ("fifo", mine))
    )
    more = miss_s - GRAPHS.host.miss_s
    assert ours.decode_step_s[0] - plain.decode_step_s[0] == pytest.approx(more)
    assert ours.decode_step_s[1] == pytest.approx(plain.decode_step_s[1])
    assert ours.decode_step_s[2] - plain.decode_step_s[2] == pytest.approx(more)
    assert other.costs.miss_s("fifo") == GRAPHS.host.miss_s
    assert other.total_s == simulate("fifo", trace, 8, GRAPHS).total_s


def test_layers_take_longer_under_a_policy_whose_graphs_have_more_kernels() -> None:
    """Every layer of a decode step, as the policy is told; no bound knows of it."""
    layer_s = 3e-4
    software = replace(GRAPHS.software, policy_layer_s={"lru": layer_s})
    slower = replace(GRAPHS, software=software)
    trace = random_trace(9, prefill=0)
    ours, plain = (simulate("lru", trace, 18, profile) for profile in (slower, GRAPHS))
    assert ours.attention_s - plain.attention_s == pytest.approx(layer_s * ours.events)
    quiet = (simulate("lru", one_layer([[0, 1], [0, 1]]), 4, p) for p in (slower, GRAPHS))
    steps = [world.decode_step_s[1] for world in quiet]
    assert steps[0] - steps[1] == pytest.approx(layer_s)
    assert ours.compute_bound_s == pytest.approx(plain.compute_bound_s, rel=1e-12)
    others = [simulate("fifo", trace, 18, profile).total_s for profile in (slower, GRAPHS)]
    assert others[0] == others[1]
    for costs, more in ((ours.costs, layer_s), (plain.costs, 0.0)):
        assert costs.layer_s("lru") - plain.costs.layer_s("lru") == pytest.approx(more)


@pytest.mark.parametrize("mine", [{}, {"lru": 0.0}, {"lru": 0.8}])
def test_a_cold_host_launches_later_too(mine: dict[str, float]) -> None:
    """The host waits while the GPU works; then planning, by policy, and the launch take longer."""
    slow = replace(GRAPHS, software=replace(GRAPHS.software, layer_floor_s={"any": 1e-2}))
    host = replace(slow.host, cold_share=0.3, cold_after_s=1e-4, policy_cold_share=mine)
    trace = one_layer([[0, 1], [0, 1]])
    worlds = [simulate("lru", trace, 4, replace(slow, host=h)) for h in (host, slow.host)]
    graph = worlds[0].costs.graph
    assert graph is not None
    # From the step's first launch until its gate has answered.
    waited = graph.attention_s(1, 2) + host.gate_sync_s - host.return_s
    planned = chain_s(slow, "lru") - host.gate_sync_s - host.graph_launch_s
    expected = graph.planning_cold("lru").weight(waited) * planned
    expected += graph.cold.weight(waited) * host.graph_launch_s
    longer = worlds[0].decode_step_s[1] - worlds[1].decode_step_s[1]
    assert longer == pytest.approx(expected, rel=1e-9)
    assert graph.planning_cold("lru").share == mine.get("lru", 0.3)
    assert graph.planning_cold("fifo") == graph.cold


class Ahead(LRU):
    """Fetches two experts before the first layer."""

    name = "ahead"

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        return (0, 1)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("depth", "queued"), [(1, 1), (2, 0)])
def test_an_event_issues_itself_what_it_wants_from_the_queue(
    depth: int, queued: int, share: float
) -> None:
    """Before the table is told; a cold host issues, tells and launches more slowly at first."""
    host = replace(
        GRAPHS.host, cold_share=share, cold_most_s=3e-5, policy_cold_share={"ahead": 0.0}
    )
    profile = replace(GRAPHS, host=host)
    world = simulate(Ahead(), one_layer([[0, 1]]), 4, profile, depth=depth)
    costs, graph = world.costs, world.costs.graph
    assert graph is not None
    waited = graph.attention_s(1, 1) + host.gate_sync_s
    launched = 2 * (host.prefetch_s + host.prefetch_issue_s) + host.graph_launch_s + waited
    launched += host.event_s + 2 * host.access_s
    issuing = queued * host.late_issue_s + graph.table_s(2) + host.graph_launch_s
    launched += graph.cold.longer(issuing, graph.cold.weight(waited))
    landed = 2 * host.prefetch_s + costs.idle_copy_s(3000) + costs.queued_copy_s(3000)
    landed += GRAPHS.link.wake_s
    assert world.late == 2
    assert issuing > host.cold_most_s
    assert world.stall_late_s == pytest.approx(landed - launched, rel=1e-12)
    assert world.total_s == pytest.approx(landed + 2 * graph.expert_s(1) + host.step_s, rel=1e-12)


def test_prefetches_are_issued_as_other_copies_where_nothing_else_is_said() -> None:
    host = replace(GRAPHS.host, prefetch_issue_s=0.0, late_issue_s=0.0)
    plain, own = (
        Costs(replace(GRAPHS, host=h), example_model(1, 8, 2)) for h in (host, GRAPHS.host)
    )
    assert plain.prefetch_issue_s == plain.late_issue_s == host.copy_issue_s
    assert (own.prefetch_issue_s, own.late_issue_s) == (5.9e-6, 3.3e-6)


def test_prefill_stays_eager() -> None:
    trace = random_trace(5, lengths=(3,), prefill=3)
    assert simulate("fifo", trace, 9, replace(GRAPHS, software=BUSY.software)).steps == 1
    eager = replace(GRAPHS, host=replace(GRAPHS.host, graph_launch_s=0.0))
    totals = [simulate("fifo", trace, 9, profile).total_s for profile in (GRAPHS, eager)]
    assert totals[0] == totals[1]


def test_an_event_in_waves_is_eager_and_its_graph_follows() -> None:
    """One slot for two experts: copy, compute, copy, compute, then the launch."""
    bare = captured(machine())
    bare = replace(bare, host=replace(bare.host, policy_event_s={}, access_s=0.0, move_s=0.0))
    wake_s, miss_s = bare.link.wake_s, bare.host.miss_s
    world = simulate("fifo", one_layer([[0, 1]]), 1, bare)
    graph, copy_s = world.costs.graph, world.costs.idle_copy_s(3000)
    assert graph is not None
    expected = 2 * graph.launch_s + graph.table_s(2) + graph.attention_s(1, 1)
    expected += miss_s + 2 * (copy_s + wake_s + graph.expert_s(1))
    assert world.total_s == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_policy_has_its_own_time(graphs: bool) -> None:
    """Per event and per move, in both modes; bounds take the least of all policies."""
    host = GRAPHS.host if graphs else replace(GRAPHS.host, graph_launch_s=0.0)
    slow = replace(
        host,
        policy_event_s={"lru": 1e-3},
        policy_access_s={"lru": 3e-3},
        policy_move_s={"lru": 2e-3},
    )
    trace = random_trace(6, prefill=0)
    worlds = [
        simulate(name, trace, 18, replace(GRAPHS, host=h))
        for name, h in (("lru", slow), ("lru", host), ("fifo", slow))
    ]
    moves = worlds[0].planner.counts["demand"]
    more = (1e-3 - host.policy_event_s["lru"]) * worlds[0].events + (2e-3 - host.move_s) * moves
    more += (3e-3 - host.policy_access_s["lru"]) * worlds[0].accesses
    least = worlds[1].costs.least_event_s
    if graphs:
        assert worlds[0].total_s - worlds[1].total_s == pytest.approx(more, rel=1e-9)
    assert worlds[0].total_s > worlds[1].total_s
    assert worlds[0].compute_bound_s == worlds[2].compute_bound_s
    assert least == host.policy_event_s["lru"]


@pytest.mark.parametrize("way", [captured, whole])
def test_spans_do_not_overlap(way: Callable[[HardwareProfile], HardwareProfile]) -> None:
    trace = random_trace(7)
    policy = POLICIES.build("predictive")
    model = trace.model
    costs = Costs(way(BUSY), model)
    context = Context(model.layers, model.experts, model.top_k, 5, layer_s=costs.layer_s())
    forecaster = Oracle(accuracy=0.8, horizon=4)
    planner = Planner(policy, context, forecaster, log=DecisionLog())
    future = Future(Batches(trace, 2))
    forecaster.reveal(future.demand())
    recording = Recording(planner.context, with_spans=True)
    world = World(planner, costs, recording=recording)
    world.run(future.steps())
    assert {span.lane for span in recording.spans} >= {"GPU", "host", "H2D", "D2H"}
    for lane in ("GPU", "host", "H2D"):
        bars = sorted((s.start_s, s.end_s) for s in recording.spans if s.lane == lane)
        for (_, end), (start, _) in pairwise(bars):
            assert start >= end - 1e-12, lane


def test_floors_and_reads_add() -> None:
    profile = captured(machine(expert_s=1e-4))
    model = replace(example_model(2, 8, 2), dense_params=10_000, kv_bytes_per_token=400)
    graph = GraphCosts(profile, model)
    rate = profile.gpu.memory_bytes_per_s
    dense_s = 5_000 * model.param_bytes / (0.8 * rate)
    assert graph.attention_s(1, 7) == pytest.approx(1.9e-5 + dense_s + 7 * 200 / (0.3 * rate))
    whole = GraphCosts(profile, model, cache_tokens=50)
    expected = 1.9e-5 + dense_s + 2 * 50 * 200 / (0.3 * rate)
    assert whole.attention_s(2, 7) == pytest.approx(expected)
    slow = replace(profile.software, kv_token_s={"any": 3e-9})
    serial = GraphCosts(replace(profile, software=slow), model, cache_tokens=50)
    assert serial.attention_s(2, 7) == pytest.approx(expected + 50 * 3e-9)
    plain = replace(profile, software=replace(profile.software, kv_efficiency={}))
    expected = 1.9e-5 + dense_s + 7 * 200 / (0.8 * rate)
    assert GraphCosts(plain, model).attention_s(1, 7) == pytest.approx(expected)
    assert graph.expert_s(1) == pytest.approx(1e-4 / profile.expert.fused_efficiency)
    assert graph.head_s == 0.0


def test_several_tokens_have_a_floor_of_their_own() -> None:
    profile = captured(machine(expert_s=1e-4))
    model = example_model(2, 8, 2)
    one, same = (GraphCosts(profile, model).attention_s(n, 0) for n in (1, 2))
    assert same == one
    software = replace(profile.software, several_floor_s={"any": 3e-5})
    several = GraphCosts(replace(profile, software=software), model)
    assert several.attention_s(1, 0) == one
    assert several.attention_s(2, 0) == pytest.approx(one + 3e-5 - several.floor_s)


def test_low_copies_are_read_at_a_rate_of_their_own() -> None:
    profile = captured(machine(expert_s=1e-4))
    model = example_model(2, 8, 2)
    unknown = GraphCosts(profile, model)
    assert [unknown.low_expert_s(n) for n in (1, 3)] == [unknown.expert_s(n) for n in (1, 3)]
    expert = replace(profile.expert, low_efficiency={"4": 0.5}, low_token_share=0.25)
    measured = replace(profile, expert=expert)
    graph = GraphCosts(measured, model, low_bits=4)
    read_s = model.expert_bytes_at(4) / (0.5 * profile.gpu.memory_bytes_per_s)
    assert graph.low_expert_s(1) == pytest.approx(read_s)
    assert graph.low_expert_s(5) == pytest.approx(2 * read_s)
    other = GraphCosts(measured, model, low_bits=8)
    assert other.low_expert_s(1) == other.expert_s(1)


FAMILIES = {
    "mixtral": "mixtral", "qwen1.5": "qwen2_moe", "qwen3": "qwen3_moe", "olmoe": "olmoe",
    "deepseek-v2": "deepseek_v2", "deepseek-v3": "deepseek_v3", "gpt-oss": "gpt_oss",
    "switch": "any",
}  # fmt: skip


@pytest.mark.parametrize("name", size_names())
def test_a_sizes_name_tells_family_and_head(name: str) -> None:
    model, dims = model_sizes(name), dimensions(name)
    routed = resize(replace(model, name="mine", layers=model.layers // 2), model)
    family = next(family for part, family in FAMILIES.items() if name.startswith(part))
    table = dims.vocabulary * dims.hidden
    for spec, share in ((model, 1.0), (routed, (model.layers // 2) / model.layers)):
        facts = facts_of(spec)
        assert facts.family == family
        assert facts.head_params == pytest.approx(table * share)
        assert facts.idle_params == (0 if dims.tied else facts.head_params)
        assert facts.head_params + facts.idle_params < spec.dense_params


def test_an_unknown_name_tells_nothing() -> None:
    model: ModelSpec = example_model(2, 8, 2)
    assert facts_of(replace(model, name="my own")).family == "any"
    assert facts_of(replace(model, name="tiny OLMoE with a head")).head_params == 0


def test_a_family_has_its_own_floor() -> None:
    software = replace(GRAPHS.software, layer_floor_s={"any": 1e-5, "olmoe": 3e-5})
    profile = replace(GRAPHS, software=software)
    floors = [GraphCosts(profile, model_sizes(n)).floor_s for n in ("olmoe", "qwen3-30b")]
    assert floors == [3e-5, 1e-5]
