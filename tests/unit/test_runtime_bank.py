"""The slot bank and the table: a fixed number of slots, and who is read from where."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.bank import ABSENT, ExpertTable, SlotBank  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.lanes import HostLanes  # noqa: E402
from runtime.layout import ExpertLayout, LowLayout  # noqa: E402
from tests.helpers_kernels import experts_module  # noqa: E402

CPU = torch.device("cpu")
LAYOUT = ExpertLayout.of(experts_module("gpt-oss", torch.bfloat16))
LOW = LowLayout(LAYOUT, 4)


def test_slots_are_the_ledgers():
    bank = SlotBank(LAYOUT, 3, CPU, low_layout=LOW, low=2)
    assert bank.size_bytes == 3 * LAYOUT.stride_bytes + 2 * LOW.stride_bytes
    for slot in range(5):
        target = bank.target(slot)
        assert len(target) == (LAYOUT.size_bytes if slot < 3 else LOW.size_bytes)
        target.fill_(slot + 1)
    assert bank.full[:, 0].tolist() == [1, 2, 3]
    assert bank.low[:, 0].tolist() == [4, 5]
    with pytest.raises(IndexError):
        bank.target(5)
    # What lies between the end of an expert and the next is nobody's.
    assert int(bank.full[:, LAYOUT.size_bytes :].sum()) == 0


def test_views_are_in_place():
    bank = SlotBank(LAYOUT, 2, CPU)
    assert bank.low is None
    views = bank.views()
    part = LAYOUT.part("down_proj_bias")
    bank.target(1).view(torch.bfloat16)[part.first] = 2.5
    assert views["down_proj_bias"].shape == (2, *part.shape)
    assert float(views["down_proj_bias"][1].view(-1)[0]) == 2.5


def test_freeing_lets_go():
    bank = SlotBank(LAYOUT, 2, CPU, low_layout=LOW, low=1)
    bank.free()
    assert bank.size_bytes == 0
    with pytest.raises(IndexError):
        bank.target(0)


def test_no_room(monkeypatch):
    def refuse(*shape, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(OffloadError, match=r"^7 slots of 0\.0 MiB need .* on cpu: out of memory, "):
        SlotBank(LAYOUT, 7, CPU)


def test_another_error_is_not_dressed_up(monkeypatch):
    def refuse(*shape, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        SlotBank(LAYOUT, 7, CPU)


def test_changes_show_when_flushed():
    table = ExpertTable(2, 4, HostLanes())
    assert table.slots.tolist() == [[ABSENT] * 4] * 2
    table.set(5, 3)
    table.set(1, 0)
    assert table.slot(5) == 3
    assert table.slot(2) == ABSENT
    assert table.slots.tolist() == [[ABSENT] * 4] * 2
    table.flush()
    assert table.slots.tolist() == [[ABSENT, 0, ABSENT, ABSENT], [ABSENT, 3, ABSENT, ABSENT]]
    table.set(5, 2)
    table.set(5, 3)
    table.flush()
    assert table.slot(5) == int(table.slots[1, 1]) == 3


def test_only_what_changes_is_written_and_all_of_it_at_once():
    class Noting(HostLanes):
        def __init__(self):
            super().__init__()
            self.calls = []

        def write(self, target, values):
            self.calls.append(sorted(values))
            super().write(target, values)

    lanes = Noting()
    table = ExpertTable(3, 5, lanes)
    draw, expected, calls = random.Random(2), [ABSENT] * 15, []
    for _ in range(200):
        before = list(expected)
        for expert in draw.choices(range(15), k=draw.randint(0, 20)):
            expected[expert] = draw.randint(-1, 1)
            table.set(expert, expected[expert])
        table.flush()
        changed = [(e, now) for e, now in enumerate(expected) if now != before[e]]
        calls += [changed] if changed else []
        assert table.slots.view(-1).tolist() == expected
        assert lanes.calls == calls
