"""The link and the CPU's lanes: order, depth, cancelling, and when a copy is said to be late."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.moves import Move  # noqa: E402
from runtime.bank import SlotBank  # noqa: E402
from runtime.copier import Copier  # noqa: E402
from runtime.lanes import HostLanes, lanes_for, random_lag  # noqa: E402
from runtime.layout import ExpertLayout, LowLayout  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from tests.helpers_kernels import experts_module  # noqa: E402

CPU = torch.device("cpu")
NEVER = 10**9


class Link:
    """A copier from a store whose expert *e* is full of the number *e*, over slow lanes."""

    def __init__(self, lag=NEVER, depth=2, low=0):
        module = experts_module("concatenated", torch.float32)
        layout = ExpertLayout.of(module)
        self.store = HostStore(1, 8, layout, pin=False)
        names = [part.name for part in layout.parts]
        self.store.fill(
            (0, id, {n: torch.full_like(getattr(module, n)[id], id) for n in names})
            for id in range(8)
        )
        if low:
            self.store.add_low(LowLayout(layout, 8), CPU)
        self.bank = SlotBank(layout, 4, CPU, low_layout=self.store.low_layout, low=low)
        self.bank.full.fill_(255)
        self.lanes = HostLanes(lag=lambda: lag)
        self.copier = Copier(self.store, self.bank, self.lanes, depth)
        self.copier.issued = []

    @property
    def issued(self):
        return [move.copy for copied in self.copier.issued for move in copied.moves]

    def holds(self, slot):
        """The expert whose weights are in *slot*, None while nothing has landed there."""
        value = float(self.bank.views()["down_proj"][slot].view(-1)[0])
        return None if value != value else int(value)


def prefetch(copy, slot, victim=-1):
    return Move(copy, slot, victim, demand=False)


def demand(copy, slot, victim=-1):
    return Move(copy, slot, victim, demand=True)


def test_demand_overtakes_what_is_not_issued():
    link = Link()
    link.copier.prefetch([prefetch(1, 0), prefetch(2, 1), prefetch(3, 2)])
    assert link.issued == [1, 2]
    assert len(link.copier) == 1
    link.copier.demand([demand(4, 3)])
    assert link.issued == [1, 2, 4]
    link.copier.wait(4)
    assert [link.holds(slot) for slot in range(4)] == [1, 2, None, 4]
    link.copier.poll()
    assert link.issued == [1, 2, 4, 3]


def test_demand_that_is_awaited_together_shares_its_marks():
    link = Link()
    link.copier.prefetch([prefetch(1, 0)])
    link.copier.demand([demand(n, n - 1, victim=1) for n in (2, 3, 4)], together=True)
    assert link.issued == [1, 2, 3, 4]
    flights = link.copier.issued
    assert [len(copied.moves) for copied in flights] == [1, 3]
    assert not link.copier.pending
    assert not link.lanes.passed(flights[1].end)
    link.copier.wait(2)
    assert [link.holds(slot) for slot in range(4)] == [1, 2, 3, 4]
    size = link.store.layout.size_bytes
    assert (link.copier.demand_bytes, link.copier.prefetch_bytes) == (3 * size, size)
    link.copier.settle([2, 3, 4])
    link.copier.poll()
    assert link.copier.arriving([2, 3, 4]) == []


@pytest.mark.parametrize(("together", "each"), [(True, True), (False, False), (False, True)])
def test_copies_may_have_marks_of_their_own(together, each):
    """Where each is waited for alone, or somebody wants to know of each when it landed."""
    link = Link()
    link.copier.marks_each = each
    link.copier.demand([demand(n, n) for n in range(3)], together=together)
    assert [len(copied.moves) for copied in link.copier.issued] == [1, 1, 1]
    link.copier.wait(1)
    assert [link.holds(slot) for slot in range(3)] == [0, 1, None]


def test_what_was_issued_together_counts_as_one_on_its_way():
    link = Link(depth=2)
    link.copier.demand([demand(n, n) for n in range(3)], together=True)
    link.copier.prefetch([prefetch(4, 3), prefetch(5, 0)])
    assert link.issued == [0, 1, 2, 4]


def test_depth():
    for depth in (1, 3):
        link = Link(depth=depth)
        link.copier.prefetch([prefetch(n, n) for n in range(4)])
        assert link.issued == list(range(depth))


def test_a_wanted_prefetch_comes_next():
    link = Link(depth=1)
    link.copier.prefetch([prefetch(1, 0), prefetch(2, 1), prefetch(3, 2)])
    assert link.copier.arriving([3, 1, 7]) == [1, 3]
    assert link.issued == [1, 3]
    link.copier.wait(3)
    assert link.holds(2) == 3
    link.copier.settle([3, 1])
    assert link.copier.arriving([3, 1]) == []
    assert link.issued == [1, 3, 2]


def test_landed_is_not_late():
    link = Link(lag=0)
    link.copier.prefetch([prefetch(1, 0)])
    assert link.copier.arriving([1]) == []
    assert link.holds(0) == 1
    assert not link.copier.pending


def test_a_victim_that_waits_is_cancelled_and_one_that_flies_is_not():
    link = Link(depth=1)
    link.copier.prefetch([prefetch(1, 0), prefetch(2, 1)])
    link.copier.demand([demand(5, 1, victim=2), demand(6, 0, victim=1)])
    assert link.copier.cancelled == 1
    assert len(link.copier) == 0
    assert link.issued == [1, 5, 6]
    assert not link.copier.pending
    link.lanes.finish()
    assert (link.holds(0), link.holds(1)) == (6, 5)
    size = link.store.layout.size_bytes
    assert (link.copier.demand_bytes, link.copier.prefetch_bytes) == (2 * size, size)


def test_a_prefetch_takes_a_prefetchs_slot():
    link = Link(depth=1)
    link.copier.prefetch([prefetch(1, 0), prefetch(2, 1), prefetch(3, 1, victim=2)])
    assert link.copier.cancelled == 1
    assert set(link.copier.pending) == {1, 3}
    link.lanes.finish()
    link.copier.poll()
    link.copier.poll()
    link.lanes.finish()
    assert (link.holds(0), link.holds(1)) == (1, 3)


def test_coming_back_after_losing_the_slot_in_flight():
    """The old copy of an expert must not pass for the new one."""
    link = Link()
    link.copier.prefetch([prefetch(1, 0)])
    link.copier.demand([demand(4, 0, victim=1)])
    link.copier.prefetch([prefetch(1, 2)])
    assert link.copier.arriving([1]) == [1]
    link.copier.wait(1)
    assert (link.holds(0), link.holds(2)) == (4, 1)


def test_low_copies_carry_their_own_bytes():
    link = Link(low=2)
    low = link.store.low_layout
    link.copier.demand([demand(8 + 3, 4)])
    link.copier.prefetch([prefetch(8 + 5, 5)])
    link.lanes.finish()
    assert torch.equal(link.bank.low[0, : low.size_bytes], link.store.low[3][: low.size_bytes])
    assert torch.equal(link.bank.low[1, : low.size_bytes], link.store.low[5][: low.size_bytes])
    assert link.copier.demand_bytes == link.copier.prefetch_bytes == low.size_bytes


def test_waiting_for_what_nobody_moves_is_nothing():
    link = Link()
    link.copier.wait(3)
    link.copier.settle([3])
    assert link.issued == []


def test_host_lanes_land_when_asked_often_enough():
    lanes = HostLanes(lag=lambda: 2)
    target, source = torch.zeros(4), torch.ones(4)
    begin, end = lanes.copy(target, source)
    assert [lanes.passed(end) for _ in range(3)] == [False, False, True]
    assert target.tolist() == [1.0] * 4
    assert lanes.passed(begin)
    assert 0 < lanes.read(begin) <= lanes.read(end) <= lanes.now()


def test_host_lanes_copy_all_between_two_marks():
    lanes = HostLanes(lag=lambda: 1)
    targets = [torch.zeros(2) for _ in range(3)]
    begin, end = lanes.copy_all([(t, torch.full((2,), n + 1.0)) for n, t in enumerate(targets)])
    assert not lanes.passed(end)
    assert [float(t[0]) for t in targets] == [0.0, 0.0, 0.0]
    assert lanes.passed(end)
    assert [float(t[1]) for t in targets] == [1.0, 2.0, 3.0]
    assert 0 < lanes.read(begin) <= lanes.read(end)


def test_host_lanes_write_what_they_are_given():
    table = torch.zeros(2, 3, dtype=torch.int32)
    HostLanes().write(table, [(4, -1), (0, 7), (4, 5)])
    assert table.tolist() == [[7, 0, 0], [0, 5, 0]]


def test_host_lanes_land_in_order():
    lanes = HostLanes(lag=lambda: NEVER)
    one, two = torch.zeros(1), torch.zeros(1)
    lanes.copy(one, torch.ones(1))
    _, end = lanes.copy(two, torch.ones(1))
    assert not lanes.passed(end)
    lanes.compute_after(end)
    assert (float(one), float(two)) == (1.0, 1.0)
    # A later copy to the same place overwrites, however often the first is asked about.
    lanes.copy(one, torch.full((1,), 5.0))
    lanes.finish()
    assert float(one) == 5.0


def test_random_lag_repeats():
    draws = [[random_lag(seed, 9)() for _ in range(1)] for seed in (1, 1)]
    assert draws[0] == draws[1]
    lag = random_lag(4, 3)
    assert {lag() for _ in range(200)} == {0, 1, 2, 3}


def test_the_cpu_has_host_lanes():
    assert isinstance(lanes_for(CPU), HostLanes)


def test_the_first_of_several_can_be_on_the_link_before_the_others_are_known():
    """It belongs to their group all the same, and nobody is told of it before."""
    link, size = Link(), Link().store.layout.size_bytes
    moves = [demand(n, n) for n in range(3)]
    link.copier.hurry(moves[0])
    assert (link.issued, link.copier.demand_bytes, len(link.lanes._waiting)) == ([], 0, 1)
    link.copier.demand(moves, together=True)
    assert [len(copied.moves) for copied in link.copier.issued] == [3]
    assert (link.copier.demand_bytes, len(link.lanes._waiting)) == (3 * size, 3)
    link.copier.wait(0)
    assert [link.holds(slot) for slot in range(4)] == [0, 1, 2, None]


def test_one_that_nobody_came_back_for_is_copied_again():
    """An event whose policy raised behind its first victim came to nothing."""
    link = Link()
    link.copier.hurry(demand(1, 1))
    link.copier.demand([demand(2, 1)], together=True)
    link.copier.wait(2)
    assert link.holds(1) == 2
    link.copier.demand([demand(3, 2)], together=True)
    assert [len(copied.moves) for copied in link.copier.issued] == [1, 1]
