"""Entries of the device's table of experts that each graph has to be told of."""

from __future__ import annotations

from policies.base import Service, Substitute
from policies.graph_costs import UntoldChanges
from policies.moves import Move
from policies.planner import NOTHING, Plan

#: Experts that have an entry; higher copies are low-precision ones.
TOTAL = 10


def test_a_move_changes_two_entries_and_a_prefetch_is_told_with_the_next_graph() -> None:
    untold = UntoldChanges(TOTAL)
    plan = Plan([1], [[Move(1, 0, 2, True)]])
    assert untold.told(plan, 2) == 2
    untold.fetched([Move(3, 1, 4, False), Move(5, 2, -1, False)])
    assert untold.count == 3
    assert untold.told(NOTHING, 2) == 3
    assert untold.told(NOTHING, 2) == 0


def test_what_is_read_from_elsewhere_is_put_right_behind_its_event() -> None:
    untold = UntoldChanges(TOTAL)
    served = {1: Service.LOW, 2: Substitute(3)}
    # A low copy has no entry of its own; the expert that it stands for has.
    assert untold.told(Plan([1, 2], [[Move(TOTAL + 1, 0, TOTAL + 4, True)]], served), 4) == 2
    assert untold.told(NOTHING, 2) == 2


def test_what_is_left_out_or_computed_elsewhere_changes_nothing() -> None:
    untold = UntoldChanges(TOTAL)
    assert untold.told(Plan([1, 2], (), {1: Service.SKIP, 2: Service.SKIP}), 4) == 0
    assert untold.count == 0


def test_an_event_computed_before_its_graph_is_hidden_from_it() -> None:
    untold = UntoldChanges(TOTAL)
    plan = Plan([1], (), {1: Service.CPU})
    assert not plan.whole
    assert untold.told(plan, 4) == 4
    assert untold.told(NOTHING, 2) == 4


def test_moves_before_a_step_are_told_with_its_first_event() -> None:
    untold = UntoldChanges(TOTAL)
    untold.fetched([Move(1, 0, -1, False), Move(2, 1, 7, False)])
    assert untold.told(NOTHING, 2) == 3
