"""Two worlds written apart, from the same contract: the same decisions, moves and seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import Context, Forecaster, Policy
from policies.batching import Batches
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.forecasters.oracle import Oracle
from policies.future import Future
from policies.hardware import HardwareProfile
from policies.planner import Planner
from policies.registry import POLICIES
from sim.world import World
from tests.helpers import landing_in_groups, machine, random_trace
from tests.helpers_whole import WholeMachine, whole
from tests.helpers_world import captured
from traces.trace import MemoryTrace

PROFILES = {
    "copies and experts": machine(),
    "slow host": machine(
        sync_s=1.13e-4, event_s=2.7e-4, copy_issue_s=6.1e-5, launch_s=3.3e-5, attention_kernels=2,
        group_kernels=3, kernel_min_s=1.7e-5, step_s=2.9e-4, idle_extra_s=3.7e-4,
    ),
    "slow link": machine(copy_s=7.3e-3, idle_extra_s=1.9e-3, event_s=1.1e-5, copy_issue_s=3e-6),
    "fast link": machine(copy_s=1.7e-4, expert_s=3.1e-4, event_s=9e-6, sync_s=1.3e-5),
}  # fmt: skip
WHOLE = {f"{name}, whole": whole(profile) for name, profile in PROFILES.items()}
PROFILES |= {f"{name}, graphs": captured(profile) for name, profile in PROFILES.items()}
PROFILES |= WHOLE
# What events issue themselves is not hidden behind copies that are faster than their issue.
LATE = captured(machine(copy_s=5.3e-4, expert_s=1.1e-3, event_s=9e-6, sync_s=1.3e-5))
PROFILES["slow issue, graphs"] = replace(LATE, host=replace(LATE.host, late_issue_s=2.3e-3))
# The host can have planned an event, and its copies have landed, before the GPU looks them up.
SLOW_NOTICE = whole(machine(copy_s=1.1e-5, expert_s=1.3e-5), notice_s=1.7e-4, follow_s=0.0)
PROFILES["slow notice, whole"] = SLOW_NOTICE
PROFILES["slow answer, whole"] = whole(machine(copy_s=3.1e-4), answer_s=2.9e-4, publish_s=4.3e-5)


def planner_of(
    policy: Policy, trace: MemoryTrace, slots: int, batch: int, accuracy: float, costs: Costs
) -> tuple[Planner, Future]:
    model = trace.model
    context = Context(
        model.layers,
        model.experts,
        model.top_k,
        slots,
        batch=batch,
        transfer_s=costs.queued_copy_s(costs.full_bytes),
        layer_s=costs.layer_s(policy.name),
    )
    future = Future(Batches(trace, batch))
    forecaster: Forecaster | None = None
    if policy.forecasts:
        forecaster = Oracle(accuracy=accuracy, horizon=5)
    planner = Planner(policy, context, forecaster, log=DecisionLog())
    if forecaster is not None:
        forecaster.reveal(future.demand())
    return planner, future


@pytest.mark.parametrize("name", ["lru", "belady", "predictive", "eager"])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 18),
    batch=st.integers(1, 3),
    depth=st.integers(1, 3),
    accuracy=st.sampled_from([0.3, 0.7, 1.0]),
    dense_params=st.sampled_from([1000, 30_000]),
    together=st.sampled_from([1, 2, 3, 100]),
)
@settings(max_examples=25, deadline=None)
def test_worlds_agree(
    name: str,
    profile: HardwareProfile,
    seed: int,
    slots: int,
    batch: int,
    depth: int,
    accuracy: float,
    dense_params: int,
    together: int,
) -> None:
    """``eager`` fetches all that is forecast, so that much is stale in the queue and cancelled."""
    text = "predictive:caution=0,margin=0,confidence=0,protect=false" if name == "eager" else name
    trace = random_trace(seed)
    costs = Costs(profile, replace(trace.model, dense_params=dense_params))
    with landing_in_groups(together * costs.full_bytes, 2 * together * costs.full_bytes):
        planner, future = planner_of(POLICIES.build(text), trace, slots, batch, accuracy, costs)
        world = World(planner, costs, depth=depth)
        world.run(future.steps())
        planner, future = planner_of(POLICIES.build(text), trace, slots, batch, accuracy, costs)
        other = WholeMachine(planner, costs, depth).run(future.steps())

    assert planner.log.sha256() == world.planner.log.sha256()
    assert world.total_s == pytest.approx(other.total_s, rel=1e-9)
    assert world.late == other.late
    assert world.link.cancelled == other.cancelled
    assert world.link.demand_bytes + world.link.prefetch_bytes == other.bytes
