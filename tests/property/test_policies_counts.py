"""Held and missed counts equal an independent replay of the event contract."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.examples import example_model
from tests import helpers_replay as other
from tests.helpers import gpt_oss, random_trace, records, replay, sample, trace_of
from traces.trace import Trace

NAMES = sorted(other.RULES)


def ours(name: str, trace: Trace, slots: int, batch: int, pool: str) -> list[int]:
    """Missed experts per event, as the decision log has them."""
    planner = replay(name, trace, slots, batch=batch, pool=pool)
    missed = [0] * len(other.events_of(trace, batch))
    for record in records(planner):
        missed[record.number] = record.missed
    assert sum(missed) == planner.counts["missed"] == planner.counts["demand"]
    return missed


def agree(name: str, trace: Trace, slots: int, batch: int = 1, pool: str = "global") -> None:
    expected = other.missed(name, trace, slots, batch=batch, pool=pool)
    assert ours(name, trace, slots, batch, pool) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trace", ["coarse-8x2", "granular-64x8"])
@pytest.mark.parametrize(
    ("share", "batch", "pool"),
    [(0.25, 1, "global"), (0.5, 4, "global"), (0.1, 16, "global"), (0.5, 4, "layer")],
)
def test_sample_traces(name: str, trace: str, share: float, batch: int, pool: str) -> None:
    part = sample(trace, 8)
    agree(name, part, int(share * part.model.total_experts), batch, pool)


@pytest.mark.parametrize("name", ["lru", "lfu", "belady"])
@pytest.mark.parametrize("trace", ["coarse-8x2", "granular-64x8"])
def test_whole_sample_traces(name: str, trace: str) -> None:
    whole = sample(trace)
    agree(name, whole, whole.model.total_experts // 2, batch=4)


@pytest.mark.parametrize("name", ["lru", "lfu", "belady"])
@pytest.mark.parametrize(("share", "batch"), [(0.25, 1), (0.5, 1), (0.25, 3)])
def test_gpt_oss(name: str, share: float, batch: int) -> None:
    part = gpt_oss(3)
    agree(name, part, int(share * part.model.total_experts), batch)


@pytest.mark.skipif("EXPERTFLOW_SLOW" not in os.environ, reason="slow: set EXPERTFLOW_SLOW")
@pytest.mark.parametrize("name", ["lru", "lfu", "belady"])
def test_whole_gpt_oss(name: str) -> None:
    whole = gpt_oss()
    agree(name, whole, whole.model.total_experts // 2)


@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    experts=st.integers(2, 7),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    prefill=st.integers(0, 6),
    batch=st.integers(1, 4),
    pool=st.sampled_from(["global", "layer"]),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_random_traces(
    name: str,
    seed: int,
    layers: int,
    experts: int,
    lengths: list[int],
    prefill: int,
    batch: int,
    pool: str,
    data: st.DataObject,
) -> None:
    """Waves included: an event may demand more than there are slots, down to one per pool."""
    top_k = data.draw(st.integers(1, experts), "top_k")
    least = layers if pool == "layer" else 1
    slots = data.draw(st.integers(least, layers * experts), "slots")
    trace = random_trace(
        seed, layers=layers, experts=experts, top_k=top_k, lengths=lengths, prefill=prefill
    )
    agree(name, trace, slots, batch, pool)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("batch", [1, 2])
def test_static_keeps_the_most_popular(seed: int, batch: int) -> None:
    trace = random_trace(seed)
    model, events = trace.model, other.events_of(trace, batch)
    for slots in range(model.top_k, model.total_experts + 1):
        rule = other.Static(model.total_experts, events, slots, model.top_k * batch)
        cache = other.Cache(model.layers, model.experts, slots, by_layer=False)
        expected = other.missed_by(rule, events, cache, preloaded=rule.pinned)
        assert ours("static", trace, slots, batch, "global") == expected


def demand_fits(trace: Trace, slots: int) -> bool:
    return all(len(demand) <= slots for _, demand in other.events_of(trace))


@pytest.mark.parametrize("trace", [sample("coarse-8x2", 6), sample("granular-64x8", 6)])
def test_lru_holds_what_has_a_small_stack_distance(trace: Trace) -> None:
    """Mattson (1970): one pass over the stack tells the misses at every size.

    Holds where an event's demand fits: recency is then a total order by (event, id), and a
    cache of any size holds the top of it.
    """
    stack: list[int] = []
    distances: Counter[int] = Counter()
    cold = 0
    for _, demand in other.events_of(trace):
        place = {expert: i for i, expert in enumerate(stack)}
        for expert in demand:
            if expert in place:
                distances[place[expert]] += 1
            else:
                cold += 1
        asked = set(demand)
        stack = [*reversed(demand), *(expert for expert in stack if expert not in asked)]
    for slots in range(max(distances) // 4, trace.model.total_experts + 1, 37):
        if demand_fits(trace, slots):
            expected = cold + sum(n for distance, n in distances.items() if distance >= slots)
            assert replay("lru", trace, slots).counts["missed"] == expected


@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_lru_hits_grow_with_the_budget(seed: int, top_k: int) -> None:
    trace = random_trace(seed, top_k=top_k, prefill=0)
    missed = [
        replay("lru", trace, slots).counts["missed"]
        for slots in range(top_k, trace.model.total_experts + 1)
    ]
    assert missed == sorted(missed, reverse=True)


@pytest.mark.parametrize("name", ["lru", "fifo"])
def test_one_expert_too_many_in_a_cycle_and_nothing_hits(name: str) -> None:
    """The cliff: a cycle of C + 1 experts, C slots."""
    cycle = trace_of(example_model(1, 9, 1), [np.arange(90) % 9])
    assert replay(name, cycle, 8).counts["missed"] == 90
    assert replay(name, cycle, 9).counts["missed"] == 9
    # MIN keeps C - 1 of every C: first loads, then one miss in C.
    assert replay("belady", cycle, 8).counts["missed"] == 9 + 81 // 8


def test_budget_equal_to_the_experts_misses_each_once() -> None:
    trace = random_trace(1)
    seen = {expert for _, demand in other.events_of(trace) for expert in demand}
    for name in NAMES:
        assert replay(name, trace, trace.model.total_experts).counts["missed"] == len(seen)
