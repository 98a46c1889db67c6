"""Replay on the CPU: one model and store for many runs, given back at the end."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.memory import predicted_bytes  # noqa: E402
from policies.planner import PolicyError  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime.session import ReplaySession  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.contract.test_runtime_policies import ALL, tiny_trace  # noqa: E402
from traces.errors import InputError  # noqa: E402

RAISES = """
from dataclasses import dataclass
from policies.builtin.lru import LRU

@dataclass
class Raises(LRU):
    name = "raises"

    def on_route(self, routing):
        super().on_route(routing)
        if routing.event == 7:
            raise ZeroDivisionError("by nought")
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return tiny_trace(tmp_path_factory.mktemp("session") / "tiny.parquet")


@pytest.fixture
def session(trace):
    made = ReplaySession(Setup(trace, batch=2), device="cpu", compute="fused")
    yield made
    made.close()


def test_opening_tells_of_every_expert_once(session):
    told = []
    session.open(told.append)
    assert sum(told) == ALL
    session.open(told.append)
    assert sum(told) == ALL
    spec = session.model
    assert session.real.store.size_bytes >= spec.total_experts * spec.expert_bytes


def test_runs_do_not_disturb_each_other(session):
    """Slots, table and counters begin anew; the same run gives the same counts again."""
    first, _, _ = session.run("lru", Budget(slots=5))
    session.run("mixed", Budget(slots=9))
    again, _, _ = session.run("lru", Budget(slots=5))
    for name in ("decisions_sha256", "held", "missed", "moves", "memory", "bounds"):
        ours, theirs = getattr(first, name), getattr(again, name)
        if name == "bounds":
            ours, theirs = ours["belady_missed"], theirs["belady_missed"]
        assert ours == theirs, name


def test_a_policy_that_raises_leaves_the_session_whole(session, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(RAISES)
    with pytest.raises(PolicyError, match=r"^'raises' raised ZeroDivisionError: by nought at ev"):
        session.run(f"{file}:Raises", Budget(slots=5))
    found, _, _ = session.run("lru", Budget(slots=5))
    expected, _ = Session(session.setup).run("lru", Budget(slots=5))
    assert found.decisions_sha256 == expected.decisions_sha256


def test_interrupted(session):
    def stop(steps):
        yield next(iter(steps))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run("lru", Budget(slots=5), watch=stop)
    found, _, _ = session.run("lru", Budget(slots=5))
    assert found.steps > 1


def test_closing_gives_all_back_and_opening_builds_anew(trace):
    session = ReplaySession(Setup(trace), device="cpu", compute="fused")
    session.open()
    store = session.real.store
    session.close()
    session.close()
    assert store.size_bytes == 0
    found, _, _ = session.run("lru", Budget(slots=5))
    assert found.tokens > 0
    session.close()


@pytest.mark.parametrize(
    ("setup", "budget", "message"),
    [
        ({}, Budget(slots=1), "expected at least top_k = 2"),
        ({"pool": "layer"}, Budget(slots=5), "fewer than top_k"),
        ({"sizes": "gpt-2"}, Budget(slots=5), "gpt-2"),
    ],
)
def test_mistakes_are_said_in_one_line(trace, setup, budget, message):
    with pytest.raises(InputError, match=message) as error:
        ReplaySession(Setup(trace, **setup), device="cpu").run("lru", budget)
    assert "\n" not in str(error.value)


def test_the_recording_is_of_this_run(session):
    result, recording, measured = session.run(
        "predictive", Budget(slots=9), record=True, spans=True
    )
    assert len(recording.steps) == result.steps
    assert sum(row.missed for row in recording.steps) == result.missed
    assert sum(row.late for row in recording.steps) == result.late
    assert sum(row.demand_bytes for row in recording.steps) == result.bytes["demand"]
    assert 0 <= measured.link_busy_of_stall <= 1
    assert measured.gpu_predicted_bytes == predicted_bytes(result.memory)
    assert result.memory["activations_bytes"] > 0
