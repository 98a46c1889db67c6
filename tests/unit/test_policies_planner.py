"""Planning in two stages: what an event's computing needs, then what is fetched for later ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest

from policies.base import Context, Forecast, Service, Substitute
from policies.builtin.lru import LRU
from policies.decisions import DecisionLog
from policies.planner import NOTHING, Planner
from policies.routing import DECODE, PREFILL, Routing, Step


class Eager(LRU):
    """Wants *wanted* behind every event, and says when it is asked."""

    name = "eager"

    def __init__(self, wanted: Iterable[int]) -> None:
        self.wanted = wanted
        self.asked = 0

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        self.asked += 1
        return self.wanted


class Sparing(LRU):
    """Serves all that is missed at low precision, expert 7 aside."""

    name = "sparing"
    exact = False
    low_share = 0.5

    def serve(self, routing: Routing, missed: Sequence[int]) -> Mapping[int, Service | Substitute]:
        return {expert: Service.LOW for expert in missed if expert != 7}


def planner_of(policy: LRU, slots: int = 4) -> Planner:
    """A planner over one layer of 8 experts."""
    return Planner(policy, Context(1, 8, 2, slots), log=DecisionLog(keep=True))


def event(number: int, experts: list[int], phase: str = DECODE) -> Routing:
    step = Step(number, phase, 1)
    step._experts = np.array([[experts]])
    return Routing(step, 0, experts, number)


def test_a_policy_is_asked_for_prefetches_when_the_rest_is_planned() -> None:
    policy = Eager([2, 3])
    planner = planner_of(policy)
    plan = planner.plan(event(0, [0, 1]))
    assert [move.copy for move in plan.waves[0]] == [0, 1]
    assert policy.asked == 0
    assert [(move.copy, move.slot) for move in planner.prefetch()] == [(2, 2), (3, 3)]
    assert policy.asked == 1
    assert planner.prefetch() == ()
    assert policy.asked == 1
    planner.log.sha256()
    assert list(planner.log.numbers or ()) == [-1, 0, 2, 0, 0, -1, 1, 1, -1, -3, 2, 2, -1, 3, 3, -1]


def test_a_quiet_event_is_logged_for_its_prefetches_alone() -> None:
    policy = Eager(())
    planner = planner_of(policy)
    planner.plan(event(0, [0, 1]))
    planner.prefetch()
    planner.log.sha256()
    known = len(planner.log.numbers or ())
    for number, wanted in ((1, []), (2, [0, 1]), (3, [5])):
        policy.wanted = wanted
        assert planner.plan(event(number, [0, 1])) is NOTHING
        planner.prefetch()
    planner.log.sha256()
    assert list(planner.log.numbers or ())[known:] == [-1, 3, 0, -3, 5, 2, -1]


def test_what_computes_is_still_pinned_when_prefetches_are_decided() -> None:
    """Two slots, both read by the event: nothing can be fetched until the next one."""
    planner = planner_of(Eager([5]), slots=2)
    planner.plan(event(0, [0, 1]))
    assert planner.prefetch() == []
    planner.plan(event(1, [1]))
    assert [(move.copy, move.victim) for move in planner.prefetch()] == [(5, 0)]


def test_prefetches_must_be_asked_for() -> None:
    """To leave them out would be another policy's decisions."""
    planner = planner_of(Eager([5]))
    planner.plan(event(0, [0]))
    with pytest.raises(RuntimeError, match="event 0: its prefetches were not asked for"):
        planner.plan(event(1, [1]))
    lru = planner_of(LRU())
    for number in range(2):
        lru.plan(event(number, [number]))
    assert lru.prefetch() == ()


@pytest.mark.parametrize(
    ("phase", "events", "together"),
    [
        # At full precision; landing, in one group at most; held, at once; both, the larger counts.
        (PREFILL, [[7]], 0),
        (PREFILL, [[0, 1, 2]], 3),
        (PREFILL, [[0], [0, 1, 2]], 2),
        (PREFILL, [[0, 1], [1, 2, 7]], 2),
        (PREFILL, [[0, 1, 2], [0, 1, 2, 3]], 3),
        (DECODE, [[0, 1, 2], [0, 1, 2]], 0),
    ],
)
def test_low_copies_that_prompts_compute_together_are_counted(
    phase: str, events: list[list[int]], together: int
) -> None:
    planner = Planner(Sparing(), Context(1, 8, 2, 4), low_bytes_share=0.25)
    assert planner.cache.low_slots == 8
    for number, experts in enumerate(events):
        planner.plan(event(number, experts, phase))
        planner.prefetch()
    assert planner.low_together == together


def test_an_events_first_move_is_told_before_the_others_are_planned() -> None:
    """Of the first wave alone, and of no prefetch."""
    asked: list[int] = []

    class Asked(LRU):
        def victims(self, incoming: int) -> Iterable[int]:
            asked.append(incoming)
            return super().victims(incoming)

    planner, told = planner_of(Asked()), []
    planner.on_first = lambda move: told.append((move.copy, list(asked)))
    for number, experts in enumerate(([0, 1, 2], [0, 1], [0, 3, 4, 5, 6])):
        planner.plan(event(number, experts))
        planner.prefetch()
    assert told == [(0, [0]), (3, [0, 1, 2, 3])]
