"""Which decode steps run as one graph each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest

from policies.base import Context, Policy, Service, Substitute, spares_cpu
from policies.builtin.lru import LRU
from policies.builtin.mixed import Mixed
from policies.ledger import LedgerError
from policies.planner import Planner
from policies.registry import POLICIES
from policies.whole_steps import awaits_plan, runs_whole
from tests.helpers import random_trace, replay

Served = Mapping[int, Service | Substitute] | None


def planner(policy: Policy, slots: int, pool: str = "global", low_share: float = 0.25) -> Planner:
    context = Context(3, 6, 2, slots, pool=pool)
    return Planner(policy, context, low_bytes_share=low_share)


@pytest.mark.parametrize(
    ("slots", "pool", "tokens", "expected"),
    [
        (2, "global", 1, True),
        (3, "global", 2, False),
        (4, "global", 2, True),
        (5, "global", 100, False),
        (6, "global", 100, True),  # no event demands more than a layer has
        (6, "layer", 1, True),
        (11, "layer", 2, False),  # the last layers have three each
        (12, "layer", 2, True),
        (17, "layer", 9, False),
        (18, "layer", 9, True),
    ],
)
def test_the_demand_must_fit(slots: int, pool: str, tokens: int, expected: bool) -> None:
    assert runs_whole(planner(LRU(), slots, pool), tokens) == expected


def test_low_slots_must_fit_as_well() -> None:
    """Ten slots, of which two or five make room for others of half the size."""
    assert runs_whole(planner(Mixed(low_share=0.2), 10, low_share=0.5), 2)
    few = planner(Mixed(low_share=0.1), 10, low_share=0.5)
    assert few.cache.low_slots == 2
    assert not runs_whole(few, 2)
    assert runs_whole(few, 1)
    most = planner(Mixed(low_share=0.8), 10, low_share=0.5)
    assert most.cache.full_slots == 2
    assert not runs_whole(most, 2)


class Plain(LRU):
    """Serves by itself without a word about the CPU."""

    name = "plain"

    def serve(self, routing: object, missed: Sequence[int]) -> Served:
        return {expert: Service.CPU for expert in missed}


class Says(Plain):
    """The same, and claims not to."""

    name = "says"
    uses_cpu: ClassVar[bool] = False


class Replaces(Mixed):
    """What mixed says of its own ``serve`` does not hold for this one."""

    name = "replaces"

    def serve(  # type: ignore[override]
        self, routing: object, missed: Sequence[int]
    ) -> Mapping[int, Service | Substitute]:
        return {expert: Service.CPU for expert in missed}


class Tuned(Mixed):
    """Serves as mixed does."""

    name = "tuned"


class Admits(LRU):
    """Says that it may, and has no ``serve`` that would."""

    name = "admits"
    uses_cpu: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(Plain(), False), (Says(), True), (Replaces(), False), (Tuned(), True), (Admits(), False)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_policy_that_serves_must_say_that_it_spares_the_cpu(
    policy: Policy, expected: bool
) -> None:
    assert spares_cpu(policy) == expected
    assert runs_whole(planner(policy, 18), 1) == expected


@pytest.mark.parametrize("name", POLICIES.classes())
def test_every_policy_that_comes_along_spares_the_cpu(name: str) -> None:
    policy = POLICIES.build(name)
    assert spares_cpu(policy)
    assert awaits_plan(planner(policy, 18)) == (name == "mixed")


def test_a_policy_is_held_to_what_it_says() -> None:
    """An exact one too: the CPU changes no output."""
    with pytest.raises(LedgerError, match=r"'says', event 0: .* declares uses_cpu = False"):
        replay(Says(), random_trace(1), 6)
    assert replay(Plain(), random_trace(1), 6).counts["demand"] == 0


def test_a_policy_that_refuses_victims_has_no_whole_steps() -> None:
    policy = LRU()
    policy.refuses_victims = True
    assert not runs_whole(planner(policy, 18), 1)
