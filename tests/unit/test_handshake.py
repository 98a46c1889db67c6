"""Host and device over shared memory, in any order in which the two may come."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.moves import Move
from runtime import handshake
from runtime.bank import ABSENT
from runtime.errors import OffloadError
from runtime.handshake import FAILED, NEVER, POSTED, Handshake, SharedTable, entry
from tests.helpers_handshake import CountingLanes, PretendedDriver
from tests.helpers_stress import cases, whole


@pytest.mark.parametrize("serves", [False, True])
def test_no_expert_is_read_before_it_is_there(serves):
    late = steps = 0
    for case in cases(150, seed=7):
        driver = PretendedDriver(replace(whole(case), serves=serves))
        driver.run()
        late += driver.late
        steps += driver.whole
    assert steps > 300
    assert late > 20


def run_all(count: int, seed: int) -> None:
    for case in cases(count, seed):
        PretendedDriver(whole(case)).run()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(SharedTable, "coming"), (SharedTable, "issued"), (Handshake, "serve")],
)
def test_what_the_table_is_not_told_is_found(monkeypatch, owner, name):
    """Each piece of the protocol is needed: without it outputs are wrong, or nobody goes on."""
    monkeypatch.setattr(owner, name, lambda *arguments: None)
    with pytest.raises(AssertionError, match=r"off by|computed from|wait"):
        run_all(40, seed=3)


def test_the_table_says_where_and_when():
    table = SharedTable(2, 4, 3, pin=False)
    first, second = Move(5, 1, -1, True), Move(2, 1, 5, False)
    table.coming([first])
    assert int(table.entries[1, 1]) == entry(1, NEVER)
    table.issued([first], 7)
    assert int(table.entries[1, 1]) == entry(1, 7) == table.of_slot(1)
    table.coming([second])
    assert int(table.entries[1, 1]) == entry(ABSENT, 0) == table.of_slot(ABSENT)
    assert int(table.entries[0, 2]) == entry(1, NEVER) == table.of_slot(1)
    table.issued([second], 2**31 - 3)
    assert int(table.entries[0, 2]) == entry(1, 2**31 - 3)


def test_low_precision_copies_have_tickets_but_no_entry():
    table = SharedTable(1, 4, 6, pin=False)
    low = Move(4 + 3, 5, 1, True)
    before = table.entries.clone()
    table.coming([low])
    table.issued([low], 9)
    assert table.of_slot(5) == entry(5, 9)
    assert [int(e) for e in table.entries[0]] == [int(e) for e in before[0]]


@pytest.fixture
def shake() -> Handshake:
    return Handshake(2, 4, 3, CountingLanes(0), 0.01)


def test_an_event_that_was_given_up_is_named(shake):
    shake._words[POSTED] = 1
    shake.await_answer(None)
    shake.planned()
    shake.settled()
    shake._words[FAILED] = 2
    with pytest.raises(OffloadError, match=r"^event 1 of the captured decode steps: .* given up$"):
        shake.check()
    shake.renew()
    shake.check()
    assert shake.events == 0


def test_the_host_does_not_wait_for_ever(shake, monkeypatch):
    monkeypatch.setattr(handshake, "LOOKS", 16)
    looked = []
    with pytest.raises(OffloadError, match="event 0 of the captured decode steps"):
        shake.await_answer(lambda: looked.append(1))
    assert looked
