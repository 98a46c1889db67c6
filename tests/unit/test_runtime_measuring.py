"""What a real run counts as waiting for copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.moves import Move  # noqa: E402
from policies.routing import DECODE, Step  # noqa: E402
from runtime.copier import Copied  # noqa: E402
from runtime.handshake import Handshake  # noqa: E402
from runtime.lanes import HostLanes, Mark  # noqa: E402
from runtime.measuring import RealWorld  # noqa: E402
from runtime.stopwatch import Stopwatch, by_cause  # noqa: E402


def at(seconds):
    mark = Mark(0)
    mark.at_s = seconds
    return mark


def measured(stretches, copies):
    """Of one step: its stretches of the computing lane, and copies by when and how many."""
    issued = [
        Copied([Move(n, n, -1, demand=True) for n in range(count)], at(begin), at(end))
        for begin, end, count in copies
    ]
    engine = SimpleNamespace(
        planner=None,
        copier=SimpleNamespace(issued=None, size_of=lambda move: 100),
        watch=SimpleNamespace(on=False, stretches=lambda: stretches),
        lanes=HostLanes(),
        accesses=4,
        late=0,
    )
    world = RealWorld(engine, costs=None, kind="a test", mark_every=1)
    world.begin(decoding=True)
    engine.copier.issued += issued
    world.add(Step(0, DECODE, 1), 10.0)
    return world.measured()


def test_a_stall_counts_for_what_the_link_carried_in_it():
    stretches = [("host", 0.0, 1.0), ("stall_demand", 1.0, 5.0), ("experts", 5.0, 6.0)]
    found = measured(stretches, [(2.0, 5.0, 1)])
    assert found.link_busy_of_stall == pytest.approx(3 / 4)
    assert found.link_bytes_per_s == pytest.approx(100 / 3)


def test_a_stall_in_which_no_copy_landed_does_not_count():
    """What was asked for had landed before, or is carried for later: the mark alone took time."""
    stretches = [("stall_late", 0.0, 1.0), ("stall_demand", 1.0, 5.0), ("stall_late", 5.0, 7.0)]
    found = measured(stretches, [(2.0, 5.0, 1), (5.0, 8.0, 1)])
    assert found.link_busy_of_stall == pytest.approx(3 / 4)
    assert measured(stretches, [(7.0, 9.0, 1)]).link_busy_of_stall == 1.0


def test_copies_that_share_their_marks_carry_all_of_their_bytes():
    found = measured([("stall_demand", 1.0, 5.0)], [(1.0, 3.0, 4), (3.0, 5.0, 1)])
    assert found.link_busy_of_stall == pytest.approx(1.0)
    assert found.link_bytes_per_s == pytest.approx(500 / 4)


def test_a_device_that_goes_on_by_a_copys_number_is_a_moment_ahead_of_its_mark():
    """The step is one graph: its stall ends before the mark behind the copy has passed."""
    stall = [("host", 0.0, 1.0), ("stall_demand", 1.0, 5.0 - 4e-6), ("attention", 5.0, 6.0)]
    assert measured(stall, [(2.0, 5.0, 1)]).link_busy_of_stall == pytest.approx(3 / 4)
    # One that lands well behind it is another event's.
    assert measured(stall, [(2.0, 5.1, 1)]).link_busy_of_stall == 1.0


class ClockedLanes(HostLanes):
    """Lanes whose marks are read as they are, some of a device's."""

    def count_landings(self):
        return torch.zeros(1, dtype=torch.int32)


def test_a_step_in_one_graph_is_parted_by_the_stamps_of_its_gates():
    """Host from answer to plan, stall from there until all has landed, the rest as it was."""
    shake = Handshake(2, 8, 8, ClockedLanes(), 1.0)
    epoch = 1_790_000_000_123_456_789
    shake._origin_ns = epoch
    gates = [(1000, 2000, 9000, 59_000), (99_000, 100_000, 101_000, 101_050)]
    for layer, stamps in enumerate(gates):
        shake.stamps[layer] = torch.tensor(stamps) + epoch
    watch = Stopwatch(shake._lanes)
    watch.on = True
    watch._last, shake._lanes.mark = at(0.0), lambda: at(2e-4)
    watch.split("attention")
    watch.defer(lambda: shake.waits(["stall_demand", "stall_late"]))
    parts = by_cause(watch.stretches())
    assert parts["host"] == pytest.approx(8e-6 + 2e-6, abs=1e-12)
    assert parts["stall_demand"] == pytest.approx(50e-6, abs=1e-12)
    assert parts["stall_late"] == pytest.approx(50e-9, abs=1e-12)
    assert sum(parts.values()) == pytest.approx(2e-4)
