"""Where a step's time goes: marks, and what is told of a step only once it is over."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

from runtime.lanes import HostLanes, Mark
from runtime.stopwatch import Stopwatch, by_cause


class Clock(HostLanes):
    """Marks at 0, 1, 2 ... seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._at = 0.0

    def mark(self) -> Mark:
        mark = super().mark()
        mark.at_s = self._at
        self._at += 1.0
        return mark


@pytest.fixture
def watch() -> Stopwatch:
    made = Stopwatch(Clock())
    made.on = True
    made.start()
    return made


def test_stretches_lie_between_marks(watch):
    watch.split("host")
    watch.split("attention")
    assert watch.stretches() == [("host", 0.0, 1.0), ("attention", 1.0, 2.0)]
    assert watch.stretches() == []


def test_what_is_told_later_parts_what_was_split(watch):
    watch.defer(lambda: [("host", 0.25, 0.5), ("stall_late", 0.5, 0.5), ("stall_demand", 0.5, 3.0)])
    watch.split("attention")
    found = watch.stretches()
    assert found == [
        ("attention", 0.0, 0.25), ("host", 0.25, 0.5), ("attention", 0.5, 0.5),
        ("stall_demand", 0.5, 1.0), ("attention", 1.0, 1.0),
    ]  # fmt: skip
    seconds = by_cause(found)
    assert sum(seconds.values()) == 1.0
    assert seconds["attention"] == 0.25
    # It was told of that step alone.
    watch.start()
    watch.split("attention")
    assert watch.stretches() == [("attention", 2.0, 3.0)]


def test_a_watch_that_is_off_marks_nothing():
    watch = Stopwatch(Clock())
    watch.start()
    assert watch.split("host") is None
    assert watch.stretches() == []
