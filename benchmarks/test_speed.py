"""How fast the simulator is: events per second on one core, and what a run costs in all.

pytest benchmarks                                  synthetic trace in gpt-oss-20b's shape
pytest benchmarks --routing traces/x.parquet       a recorded one
pytest benchmarks --benchmark-json speed.json && python benchmarks/table.py speed.json
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from policies.base import Context
from policies.budget import Budget
from policies.planner import Planner, run_counts
from policies.registry import POLICIES
from policies.session import Setup, no_garbage_collection
from sim.session import Session


@pytest.fixture(scope="module")
def session(trace: Path) -> Session:
    """The trace in memory, with its future, so that only the run is timed."""
    session = Session(Setup(trace=str(trace)))
    session.belady_missed(session.slots(Budget(cache="100%")))
    return session


def _events(session: Session) -> int:
    return session.stored.tokens * session.model.layers


def _report(benchmark: BenchmarkFixture, session: Session, **more: object) -> None:
    benchmark.extra_info["events"] = _events(session)
    benchmark.extra_info["events_per_s"] = round(_events(session) / benchmark.stats["min"])
    benchmark.extra_info.update(more)


@pytest.mark.parametrize("cache", ["25%", "50%"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lfru", "belady", "predictive"])
def test_run(benchmark: BenchmarkFixture, session: Session, policy: str, cache: str) -> None:
    """A run with timing; the bound, which is a run of its own, is worked out before."""
    session.belady_missed(session.slots(Budget(cache=cache)))
    benchmark.group = f"run at {cache}"
    benchmark.pedantic(session.run, (policy, Budget(cache=cache)), rounds=3)
    _report(benchmark, session)


@pytest.mark.parametrize("experts", [32, 128, 512])
def test_cost_does_not_grow_with_slots(
    benchmark: BenchmarkFixture, tmp_path: Path, experts: int
) -> None:
    """The same demand per event among 4 and 16 times as many experts and slots."""
    import simctl

    path = tmp_path / "wide.parquet"
    words = f"trace synth {path} --experts {experts} --sequences 20 --prompt 0 --decode 200"
    assert simctl.main(words.split()) == 0
    session = Session(Setup(trace=str(path)))
    session.belady_missed(session.slots(Budget(cache="50%")))
    benchmark.group = "slots"
    benchmark.pedantic(session.run, ("lru", Budget(cache="50%")), rounds=3)
    _report(benchmark, session, slots=session.slots(Budget(cache="50%")))


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_replay_without_clock(benchmark: BenchmarkFixture, session: Session, policy: str) -> None:
    """Planner and ledger alone."""
    model = session.model

    def replay() -> int:
        planner = Planner(
            POLICIES.build(policy), Context(model.layers, model.experts, model.top_k, 384)
        )
        with no_garbage_collection():
            return run_counts(planner, session.future.steps())

    benchmark.group = "replay at 384 slots"
    benchmark.pedantic(replay, rounds=3)
    _report(benchmark, session)


@pytest.mark.parametrize("cache", ["25%", "50%"])
def test_whole_process(benchmark: BenchmarkFixture, trace: Path, cache: str) -> None:
    """The command as a user runs it: start, reading, run, Belady's bound, summary."""
    command = [sys.executable, "-m", "simctl", "run", "--policy", "lru"]
    command += ["--trace", str(trace), "--cache", cache]
    root = Path(__file__).resolve().parents[1]
    benchmark.group = "whole process"
    benchmark.pedantic(
        subprocess.run,
        (command,),
        {"check": True, "capture_output": True, "cwd": root},
        rounds=1,
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    _report(benchmark, Session(Setup(trace=str(trace))), peak_mib=round(peak / 1024))
