"""Belady against exhaustive search: no schedule makes fewer moves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

from policies.examples import example_model
from tests.helpers import replay, trace_of
from tests.helpers_replay import Event, events_of
from traces.trace import MemoryTrace

State = frozenset[int]


def fewest_moves(events: list[Event], total: int, slots: int, prefetching: bool) -> int:
    """The least moves of any sequence of choices the contract allows, by trying them all."""
    costs: dict[State, int] = {frozenset(): 0}
    for _, demand in events:
        if prefetching:
            costs = _prefetched(costs, total, slots)
        after: dict[State, int] = {}
        for held, moves in costs.items():
            missed = [expert for expert in demand if expert not in held]
            for state in _placed(held, missed, frozenset(demand), slots):
                cost = moves + len(missed)
                after[state] = min(cost, after.get(state, cost))
        costs = after
    return min(costs.values())


def _placed(held: State, missed: list[int], pinned: State, slots: int) -> Iterator[State]:
    """Every outcome of placing *missed* in ascending order, in waves where it must."""
    if not missed:
        yield held
        return
    expert, rest = missed[0], missed[1:]
    if len(held) < slots:
        yield from _placed(held | {expert}, rest, pinned | {expert}, slots)
        return
    victims = held - pinned
    if not victims:
        yield from _placed(held, missed, frozenset(), slots)
    for victim in victims:
        yield from _placed((held - {victim}) | {expert}, rest, pinned | {expert}, slots)


def _prefetched(costs: dict[State, int], total: int, slots: int) -> dict[State, int]:
    """Every state that any prefetches between two events may lead to, one move each."""
    reached = dict(costs)
    for held, moves in costs.items():
        others = [expert for expert in range(total) if expert not in held]
        for count in range(1, min(slots, len(others)) + 1):
            for fetched in combinations(others, count):
                for kept in combinations(sorted(held), max(min(slots - count, len(held)), 0)):
                    state = frozenset(fetched + kept)
                    if len(state) >= len(held):
                        cost = moves + count
                        reached[state] = min(cost, reached.get(state, cost))
    return reached


def tiny(seed: int) -> tuple[MemoryTrace, int, int]:
    """A tiny trace, its slots and its batch."""
    random = np.random.default_rng(seed)
    layers, experts = [(1, 4), (1, 5), (2, 3), (2, 2), (1, 6)][seed % 5]
    top_k = int(random.integers(1, 3))
    lengths = random.integers(2, 5, size=int(random.integers(1, 3)))
    routes = [
        [[random.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(length)]
        for length in lengths
    ]
    trace = trace_of(
        example_model(layers, experts, top_k), routes, random.integers(0, 3, 2).tolist()
    )
    return trace, int(random.integers(top_k, layers * experts)), int(random.integers(1, 3))


@pytest.mark.parametrize("prefetching", [False, True])
@pytest.mark.parametrize("block", range(8))
def test_belady_makes_the_fewest_moves(block: int, prefetching: bool) -> None:
    """Of all schedules, where every event's demand fits the slots; see below where it does not."""
    for seed in range(50 * block, 50 * block + 50):
        trace, slots, batch = tiny(seed)
        events = events_of(trace, batch)
        slots = max(slots, *(len(demand) for _, demand in events))
        found = replay("belady", trace, slots, batch=batch).counts["missed"]
        assert found == fewest_moves(events, trace.model.total_experts, slots, prefetching), seed


def test_waves_leave_room_below_belady() -> None:
    """Loads go in ascending order, and the last wave stays: what it leaves behind can be chosen.

    One slot, 1 and 3 demanded together: 3 stays, unless it was prefetched before the event.
    """
    trace = trace_of(example_model(1, 5, 1), [[[[1]], [[3]], [[1]], [[2]]]], prefill=[2])
    events = events_of(trace)
    assert events == [(0, [1, 3]), (0, [1]), (0, [2])]
    assert replay("belady", trace, 1).counts["missed"] == 4
    assert fewest_moves(events, 5, 1, prefetching=False) == 4
    assert fewest_moves(events, 5, 1, prefetching=True) == 3


@pytest.mark.parametrize("block", range(4))
def test_belady_in_waves_is_never_far_from_the_fewest(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        trace, slots, batch = tiny(seed)
        events = events_of(trace, batch)
        waves = sum(len(demand) > slots for _, demand in events)
        found = replay("belady", trace, slots, batch=batch).counts["missed"]
        least = fewest_moves(events, trace.model.total_experts, slots, False)
        assert least <= found <= least + slots * waves, seed
