"""Waiting for a gate's answer: marked when it is launched, waited for once, marks given back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.families import find_gates  # noqa: E402
from runtime.hook import Hook  # noqa: E402
from runtime.lanes import HostLanes, Mark  # noqa: E402
from runtime.stopwatch import Stopwatch  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402


class CountedLanes(HostLanes):
    """Counts the marks that are made and given back."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Mark] = []
        self.back: list[Mark] = []

    def mark(self) -> Mark:
        self.made.append(super().mark())
        return self.made[-1]

    def recycle(self, marks: list[Mark]) -> None:
        self.back += marks


def hook_on(lanes: HostLanes, waits: list[str]) -> Hook:
    engine = SimpleNamespace(
        lanes=lanes,
        watch=Stopwatch(lanes),
        copier=SimpleNamespace(pending={}, poll=lambda: None),
        on_wait=lambda: waits.append("wait"),
        note=lambda: waits.append("answered"),
        store=None,
    )
    gates = find_gates(tiny_model("mixtral"))
    return Hook(engine, gates, None, None)  # type: ignore[arg-type]


def test_an_answer_is_marked_when_it_is_expected_and_waited_for_once() -> None:
    lanes, waits = CountedLanes(), []
    hook = hook_on(lanes, waits)
    hook.expect_answer()
    assert len(lanes.made) == 1, "before the host turned to anything else"
    hook.await_answer()
    assert (len(lanes.made), lanes.back) == (1, lanes.made)
    assert waits == ["wait", "answered"]
    # Nobody expected this one: it is marked when it is waited for.
    hook.await_answer()
    assert (len(lanes.made), lanes.back) == (2, lanes.made)


def test_marks_that_the_stopwatch_reads_are_not_given_back() -> None:
    lanes = CountedLanes()
    hook = hook_on(lanes, [])
    watch = hook.engine.watch
    watch.on = True
    watch.start()
    hook.expect_answer()
    hook.await_answer()
    assert lanes.back == []
    assert [cause for cause, _, _ in watch.stretches()] == ["attention"]
