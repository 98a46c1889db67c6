"""The ledger holds whatever a policy does: never over budget, nothing pinned leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from policies.base import Context, Forecast, Policy, Service, Substitute
from policies.ledger import ExpertCache, LedgerError
from policies.planner import Planner
from policies.registry import POLICIES
from policies.routing import Routing, Step
from tests.helpers import Watched, random_trace, records, replay, simulate
from traces.errors import InputError
from traces.trace import MemoryTrace

CONTEXTS = [
    (Context(3, 4, 2, 5), 0),
    (Context(3, 4, 2, 7, pool="layer"), 0),
    (Context(3, 4, 2, 5), 4),
    (Context(3, 4, 2, 7, pool="layer"), 5),
]


@st.composite
def copies(draw: st.DrawFn) -> int:
    """Handles around those that exist: 12 experts, and as many low ones where there are slots."""
    return draw(st.integers(-2, 26))


class Ledger(RuleBasedStateMachine):
    """Random operations beside a model of two sets."""

    @rule(which=st.integers(0, 3))
    def start(self, which: int) -> None:
        context, low = CONTEXTS[which]
        self.cache = ExpertCache(context, low_slots=low, policy="hostile")
        self.limit, self.room = 24 if low else 12, context.slots + low
        self.held: set[int] = set()

    def __init__(self) -> None:
        super().__init__()
        self.start(0)

    @rule(pinned=st.sets(copies(), max_size=6), event=st.integers(0, 99))
    def pin(self, pinned: set[int], event: int) -> None:
        self.cache.pinned, self.cache.event = pinned, event

    @rule(copy=copies(), victims=st.lists(copies(), max_size=8))
    def place(self, copy: int, victims: list[int]) -> None:
        before = dict(self.cache.slot_of)
        try:
            placed = self.cache.place(copy, victims)
        except LedgerError as error:
            assert copy in self.held or not 0 <= copy < self.limit
            self.refused(before, copy, error)
            return
        assert 0 <= copy < self.limit
        if placed is None:
            assert self.cache.slot_of == before
            return
        slot, victim = placed
        assert self.cache.slot_of[copy] == slot
        if victim >= 0:
            assert victim in victims
            assert victim not in self.cache.pinned
            assert before[victim] == slot
            assert self.cache.pool_of(victim) == self.cache.pool_of(copy)
            self.held.remove(victim)
        self.held.add(copy)

    @rule(copy=copies())
    def evict(self, copy: int) -> None:
        before = dict(self.cache.slot_of)
        try:
            self.cache.evict(copy)
        except LedgerError as error:
            assert copy in self.cache.pinned or copy not in self.held
            self.refused(before, copy, error)
            return
        assert copy not in self.cache.pinned
        self.held.remove(copy)

    @rule(copy=copies())
    def compute(self, copy: int) -> None:
        before = dict(self.cache.slot_of)
        try:
            slot = self.cache.require(copy)
        except LedgerError as error:
            assert copy not in self.held
            self.refused(before, copy, error)
            return
        assert slot == before[copy]

    def refused(self, before: dict[int, int], copy: int, error: LedgerError) -> None:
        assert self.cache.slot_of == before
        assert "'hostile'" in str(error)
        assert f"event {self.cache.event}" in str(error)
        known = 0 <= copy < self.limit
        assert (self.cache.context.name(copy) if known else repr(copy)) in str(error)

    @invariant()
    def within_budget(self) -> None:
        assert set(self.cache.slot_of) == self.held
        slots = list(self.cache.slot_of.values())
        assert len(set(slots)) == len(slots) <= self.room
        assert all(0 <= slot < self.room for slot in slots)
        for copy in range(self.limit):
            pool = self.cache.pool_of(copy)
            there = [held for held in self.held if self.cache.pool_of(held) == pool]
            assert len(there) <= self.cache.capacity(copy)


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase


class Hostile(Policy):
    """Keeps what it holds, and does one thing wrong."""

    name = "hostile"

    def reset(self, context: Context) -> None:
        self.context = context
        self.held: dict[int, None] = {}
        self.random = np.random.default_rng(7)

    def on_load(self, copy: int) -> None:
        self.held[copy] = None

    def on_evict(self, copy: int) -> None:
        del self.held[copy]

    def victims(self, incoming: int) -> Iterable[int]:
        return list(self.held)


class Garbage(Hostile):
    def victims(self, incoming: int) -> Iterator[int]:
        yield from self.random.integers(-50, 50, 20).tolist()
        yield from self.held


class PinnedFirst(Hostile):
    def on_route(self, routing: Routing) -> None:
        self.now = routing.experts

    def victims(self, incoming: int) -> Iterator[int]:
        yield from self.now
        yield from self.held


class PrefetchesOverPinned(PinnedFirst):
    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        absent = (e for e in range(self.context.total) if e not in self.held)
        return [next(absent)] if routing.event % 3 == 0 else []


class Duplicates(Hostile):
    def victims(self, incoming: int) -> Iterator[int]:
        for copy in list(self.held):
            yield from repeat(copy, 3)

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return [3, 3, 3, *self.held, 3]


class PrefetchesAll(Hostile):
    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return range(self.context.total)

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        return range(self.context.total)


class Nobody(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return ()


class EndlessAbsent(Hostile):
    def victims(self, incoming: int) -> Iterator[int]:
        return count(10**6)


class EndlessPinned(PinnedFirst):
    def victims(self, incoming: int) -> Iterator[int]:
        while True:
            yield from self.now


class Itself(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return [incoming] * 5


class NoList(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return None  # type: ignore[return-value]


class Texts(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return ["layer 0 expert 1", *self.held]  # type: ignore[list-item]


class Lists(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return [list(self.held)]  # type: ignore[list-item]


class Floats(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return [float(copy) for copy in self.held]  # type: ignore[misc]


class NumpyVictims(Hostile):
    def victims(self, incoming: int) -> Iterable[int]:
        return np.array(list(self.held))  # type: ignore[return-value]


class Prefetching(Hostile):
    wanted: Any = ()

    def prefetch(self, routing: Routing, forecast: Forecast) -> Any:
        return self.wanted


class Serving(Hostile):
    answer: Any = None

    def serve(self, routing: Routing, missed: Sequence[int]) -> Any:
        held = [e for e in self.held if e // self.context.experts == routing.layer]
        return {e: self.answer(e, held) for e in missed} if callable(self.answer) else self.answer


class Inexact(Serving):
    exact = False
    low_share = 0.4


def watched(policy: Policy, trace: MemoryTrace, slots: int) -> Planner:
    """A run that must end well, or be refused in words that name policy and event."""
    planner = simulate(policy, trace, slots, planner=Watched).planner
    residency_follows_the_moves(planner)
    return planner


@pytest.mark.parametrize("slots", [2, 5, 9, 16])
@pytest.mark.parametrize(
    "kind",
    [Garbage, PinnedFirst, PrefetchesOverPinned, Duplicates, PrefetchesAll, NumpyVictims, Texts],
)
def test_odd_policies_work(kind: type[Policy], slots: int) -> None:
    planner = watched(kind(), random_trace(3), slots)
    assert len(planner.cache) <= slots


@pytest.mark.parametrize(
    "kind", [Nobody, EndlessAbsent, EndlessPinned, Itself, NoList, Lists, Floats]
)
def test_broken_victims_are_refused(kind: type[Policy]) -> None:
    with pytest.raises(InputError, match=r"'hostile'.*event \d+"):
        watched(kind(), random_trace(3), 5)


@pytest.mark.parametrize(
    "wanted", [[99], [-1], [18], ["expert 3"], [None], [[3]], [3.5], 7, [2.0], count(10**6)]
)
def test_broken_prefetches_are_refused(wanted: Any) -> None:
    policy = Prefetching()
    policy.wanted = wanted
    with pytest.raises(InputError, match=r"'hostile'.*event \d+"):
        watched(policy, random_trace(3), 5)


@pytest.mark.parametrize(
    "answer",
    [
        lambda expert, held: Service.SKIP,
        lambda expert, held: Service.LOW,
        lambda expert, held: Substitute(held[0] if held else 0),
        lambda expert, held: "skip",
        lambda expert, held: None,
        [1, 2],
        {17: Service.CPU},
        {"a": Service.CPU},
        lambda expert, held: Substitute("a"),  # type: ignore[arg-type]
    ],
)
def test_an_exact_policy_cannot_change_the_output(answer: Any) -> None:
    policy = Serving()
    policy.answer = answer
    with pytest.raises(InputError, match=r"'hostile'.*event \d+"):
        watched(policy, random_trace(3), 5)


def test_an_exact_policy_may_use_the_cpu() -> None:
    policy = Serving()
    policy.answer = lambda expert, held: Service.CPU
    planner = replay(policy, random_trace(3), 5)
    assert planner.counts["missed"] == planner.counts["accesses"]
    assert planner.counts["demand"] == 0


@pytest.mark.parametrize(
    "answer",
    [
        lambda expert, held: Substitute(expert),
        lambda expert, held: Substitute(999),
        lambda expert, held: Substitute((expert + 6) % 18),
    ],
)
def test_a_substitute_must_be_held_and_of_the_layer(answer: Any) -> None:
    policy = Inexact()
    policy.answer = answer
    with pytest.raises(InputError, match=r"'hostile'.*event \d+.*expert"):
        watched(policy, random_trace(3), 8)


def test_a_refusal_before_a_step_names_that_step() -> None:
    class Late(Hostile):
        def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
            return [99] if step.number == 4 else []

    with pytest.raises(InputError, match=r"event 12: 99 was to be placed"):
        watched(Late(), random_trace(3), 5)


def check_words(error: LedgerError) -> None:
    assert re.search(r"policy 'hostile', event \d+: .*(layer \d+ expert|\d+)", str(error))


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 18),
    low_share=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    pool=st.sampled_from(["global", "layer"]),
    batch=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_random_policies_work_or_are_refused(
    seed: int, slots: int, low_share: float, pool: str, batch: int
) -> None:
    class Random(Hostile):
        exact = False

        def some(self, most: int) -> list[int]:
            return self.random.integers(-1, 37, self.random.integers(0, most)).tolist()

        def victims(self, incoming: int) -> Iterable[int]:
            held = list(self.held)
            self.random.shuffle(held)
            return self.some(4) + held

        def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
            return [copy for copy in self.some(6) if 0 <= copy < 18]

        def serve(
            self, routing: Routing, missed: Sequence[int]
        ) -> Mapping[int, Service | Substitute]:
            kinds = [Service.LOAD, Service.SKIP, Service.CPU, Service.LOW]
            most = 4 if self.low_share else 3
            return {e: kinds[self.random.integers(most)] for e in missed}

    policy = Random()
    policy.low_share = low_share
    try:
        planner = replay(policy, random_trace(seed), slots, pool=pool, batch=batch)
    except LedgerError as error:
        return check_words(error)
    assert set(policy.held) == set(planner.cache.slot_of)
    assert planner.cache.full_slots + planner.cache.low_slots / 4 <= slots
    residency_follows_the_moves(planner)


def residency_follows_the_moves(planner: Planner) -> None:
    """Carrying out the logged moves, each into its slot, gives what the ledger says."""
    holder: dict[int, int] = {}
    for record in records(planner):
        for copy, slot, victim in record.moves:
            assert holder.get(slot, -1) == victim
            assert copy not in holder.values()
            holder[slot] = copy
    assert {copy: slot for slot, copy in holder.items()} == planner.cache.slot_of


@pytest.mark.parametrize("name", sorted(set(POLICIES.classes()) - {"mixed", "predictive"}))
@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_logged_moves_lead_to_the_ledgers_residency(name: str, pool: str, batch: int) -> None:
    for slots in (6, 9, 18):
        planner = replay(name, random_trace(5), slots, pool=pool, batch=batch)
        residency_follows_the_moves(planner)
        assert planner.counts["demand"] + planner.counts["prefetch"] == sum(
            len(record.moves) for record in records(planner)
        )
