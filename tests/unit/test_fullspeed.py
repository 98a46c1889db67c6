"""Cores at full speed: found by timing, left again, and asked before every step."""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest
import torch

from runtime import fullspeed
from runtime.fullspeed import Cores, at_full_speed


class Machine:
    """Cores with a speed each; *slow* is what a neighbour does to them."""

    def __init__(self, slow: Collection[int], cores: int = 4) -> None:
        self.slow, self.cores = set(slow), range(cores)
        self.at, self.moves = 0, [tuple(self.cores)]

    def work_s(self) -> float:
        return 2.0 if self.at in self.slow else 1.0

    def move(self, cores: Collection[int]) -> None:
        self.moves.append(tuple(cores))
        self.at = min(cores)

    def watch(self) -> Cores:
        return Cores(self.work_s, lambda: self.cores, self.move)


def test_stays_on_a_core_at_full_speed() -> None:
    machine = Machine(slow={0, 1, 3})
    cores = machine.watch()
    with cores.chosen():
        cores.settle()
        assert machine.at == 2
        before = len(machine.moves)
        assert cores.settle() == 1.0
        assert len(machine.moves) == before


def test_leaves_a_core_that_becomes_slow_and_says_how_slow_it_was() -> None:
    machine = Machine(slow=())
    cores = machine.watch()
    with cores.chosen():
        cores.settle()
        machine.slow = {machine.at}
        assert cores.settle() == 0.5
        assert machine.at not in machine.slow
        assert cores.settle() == 1.0


def test_looks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, now = Machine(slow=()), [100.0]
    cores = machine.watch()
    monkeypatch.setattr(fullspeed.time, "perf_counter", lambda: now[0])
    with cores.chosen():
        cores.settle_at_times()
        machine.slow = {machine.at}
        now[0] += fullspeed.EVERY_S / 2
        cores.settle_at_times()
        assert machine.at in machine.slow
        now[0] += fullspeed.EVERY_S
        cores.settle_at_times()
        assert machine.at not in machine.slow


def test_a_glance_tells_the_speed_and_stays() -> None:
    machine = Machine(slow=())
    cores = machine.watch()
    with cores.chosen():
        cores.settle()
        before = machine.at
        assert cores.glance() == 1.0
        machine.slow = {before}
        assert cores.glance() == 0.5
        assert machine.at == before


def test_all_slow_is_as_good_as_it_gets() -> None:
    machine = Machine(slow=())
    cores = machine.watch()
    with cores.chosen():
        machine.slow = set(machine.cores)
        before = len(machine.moves)
        assert cores.settle() == 0.5
        assert len(machine.moves) - before == len(machine.cores)


def test_all_cores_are_allowed_again_even_after_an_error() -> None:
    machine = Machine(slow={0})
    cores = machine.watch()
    with pytest.raises(KeyError), cores.chosen(), cores.chosen():
        _settle_and_fail(cores)
    assert machine.moves[-1] == tuple(machine.cores)
    # Outside, speeds are told and nothing moves.
    machine.at, before = 0, len(machine.moves)
    assert cores.settle() == 0.5
    assert len(machine.moves) == before


def _settle_and_fail(cores: Cores) -> None:
    cores.settle()
    raise KeyError


def test_an_inner_block_gives_nothing_back() -> None:
    machine = Machine(slow={0})
    cores = machine.watch()
    with cores.chosen():
        with cores.chosen():
            cores.settle()
        assert machine.moves[-1] != tuple(machine.cores)
    assert machine.moves[-1] == tuple(machine.cores)


def test_an_interrupt_is_no_neighbour() -> None:
    times = iter([1.0, 1.0, 1.0, 9.0, 1.0, 9.0, 9.0, 1.0])
    cores = Cores(lambda: next(times), lambda: (), lambda _: None)
    assert cores.speed() == 1.0
    assert cores.speed() == 1.0
    assert cores.glance() == 1.0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot choose cores here")
def test_the_real_thing_leaves_the_thread_as_it_was() -> None:
    before = os.sched_getaffinity(0)
    cores = Cores()
    with cores.chosen():
        assert 0 < cores.settle() <= 1
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_with_the_cpu_as_the_device_nothing_moves() -> None:
    with at_full_speed(torch.device("cpu")) as cores:
        assert cores is None
