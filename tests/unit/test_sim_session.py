"""Sessions: one trace on one machine, run through the same planner as without a clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from policies.budget import Budget
from policies.costs import Costs
from policies.examples import example_trace
from policies.future import Future
from policies.planner import Planner, run_counts
from policies.registry import FORECASTERS, POLICIES
from policies.session import Setup
from sim.session import Session
from tests.helpers import SAMPLES
from traces.errors import InputError
from traces.store import write_trace
from traces.trace import MemoryTrace, TokenSequence

RUNS = [
    *((name, None) for name in ("lru", "lfu", "lfru", "fifo", "belady", "static")),
    *((name, forecaster) for name in ("predictive", "mixed") for forecaster in
      ("ahead", "markov", "token", "oracle:accuracy=0.7,horizon=5")),
]  # fmt: skip


def written(trace: MemoryTrace, path: Path) -> str:
    write_trace(path, trace.model, trace.items, source="made up", license="none")
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    trace = example_trace(1, lengths=(14, 9, 1, 11, 6))
    return written(trace, tmp_path_factory.mktemp("session") / "trace.parquet")


def setup_of(file: str, forecaster: str | None, **others: object) -> Setup:
    return Setup(file, forecaster=forecaster, train=file, seed=3, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "forecaster"), RUNS)
@pytest.mark.parametrize(("batch", "pool"), [(1, "global"), (2, "layer")])
def test_the_simulated_world_decides_as_the_planner_alone(
    file: str, name: str, forecaster: str | None, batch: int, pool: str
) -> None:
    session = Session(setup_of(file, forecaster, batch=batch, pool=pool))
    result, _ = session.run(name, Budget(slots=8))

    policy = POLICIES.build(name)
    costs = Costs(session.profile, session.model, policy.low_bits)
    guess = FORECASTERS.build(forecaster) if forecaster else None
    future = Future(
        session.batches(frozenset({"weights", "token", "ahead_1", "ahead_2", "ahead_3"}))
    )
    context = session.context(8, costs)
    if name == "static":
        context = Session(setup_of(file, None, batch=batch, pool=pool)).context(8, costs)
    planner = Planner(policy, context, guess, low_bytes_share=costs.low_bytes / costs.full_bytes)
    if guess is not None and guess.offline:
        guess.reveal(future.demand())
    missed = run_counts(planner, future.steps())

    assert result.decisions_sha256 == planner.log.sha256()
    assert result.missed == missed
    assert result.moves["demand"] == planner.counts["demand"]
    assert result.moves["prefetch"] == planner.counts["prefetch"]


@pytest.mark.parametrize(("name", "forecaster"), RUNS)
def test_the_same_run_gives_the_same_bytes(file: str, name: str, forecaster: str | None) -> None:
    texts = [
        Session(setup_of(file, forecaster)).run(name, Budget(slots=7), record=record)[0].to_json()
        for record in (False, True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("name", "forecaster"), RUNS)
def test_a_result_adds_up(file: str, name: str, forecaster: str | None) -> None:
    result, recording = Session(setup_of(file, forecaster)).run(name, Budget(slots=7), record=True)
    assert result.accesses == result.held + result.missed
    assert result.held == result.hit + result.late
    assert sum(result.breakdown_s.values()) == pytest.approx(result.time["total_s"], rel=1e-9)
    assert result.time["prefill_s"] + result.time["decode_s"] == pytest.approx(
        result.time["total_s"], rel=1e-9
    )
    moves, size = result.moves, result.bytes
    used = moves["prefetch"] - moves["cancelled"] - moves["wasted"]
    assert min(used, *moves.values(), *size.values()) >= 0
    assert size["wasted"] <= size["prefetch"]
    assert result.tokens == 41
    if POLICIES.classes()[name].exact:
        assert result.time["total_s"] >= result.limit_s * (1 - 1e-12)
        assert size["demand"] == moves["demand"] * 3000
        assert size["prefetch"] == (moves["prefetch"] - moves["cancelled"]) * 3000
    assert recording is not None
    assert recording.uses.sum() == result.accesses
    assert recording.missed.sum() == result.missed
    assert sum(row.missed for row in recording.steps) == result.missed
    assert recording.late.sum() == sum(row.late for row in recording.steps) == result.late
    assert sum(row.accesses for row in recording.steps) == result.accesses


def test_a_real_trace_at_a_quarter_and_a_half() -> None:
    """Belady misses least, and no exact policy beats the limits."""
    session = Session(Setup(str(SAMPLES["coarse-8x2"]), sizes="mixtral-8x7b"))
    for cache in ("25%", "50%"):
        results = {
            name: session.run(name, Budget(cache=cache))[0]
            for name in ("lru", "belady", "predictive")
        }
        fewest = results["belady"].missed
        assert fewest == results["belady"].bounds["belady_missed"]
        for result in results.values():
            assert result.moves["demand"] + result.moves["prefetch"] >= fewest
            assert result.time["total_s"] >= result.limit_s
            assert result.bounds == results["lru"].bounds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "--batch 0: expected at least 1"),
        ({"depth": 0}, "--depth 0: expected at least 1"),
        ({"pool": "both"}, "--pool both: expected global or layer"),
        ({"hardware": "h20-pcie5"}, "h20-pcie5"),
        ({"sizes": "mixtral"}, "mixtral"),
        ({"scheduler": "nine"}, "unknown scheduler 'nine'"),
        ({"trace": "nowhere.parquet"}, "nowhere.parquet"),
    ],
)
def test_bad_setups(file: str, change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Session(Setup(**{"trace": file, **change}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "change", "said"),
    [
        ("lrru", {}, "unknown policy 'lrru'.*lru"),
        ("lru:width=3", {}, "width"),
        ("predictive:horizon=0", {}, "horizon"),
        ("predictive", {"forecaster": "marko"}, "unknown forecaster 'marko'.*markov"),
        ("predictive", {"forecaster": "token"}, "--train FILE: forecaster 'token' needs training"),
        ("lru", {"train": "nowhere.parquet"}, "nowhere.parquet"),
        ("lru", {"pool": "layer", "sizes": None}, "--pool layer: 5 slots are fewer than top_k"),
    ],
)
def test_bad_runs(file: str, policy: str, change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Session(Setup(file, **change)).run(policy, Budget(slots=5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "forecaster", "said"),
    [
        ("mixed", "markov", "policy 'mixed' needs weights, expected a trace with weights"),
        ("predictive", "ahead", "forecaster 'ahead' needs ahead, expected a trace with ahead"),
        ("predictive", "token", "forecaster 'token' needs tokens, expected a trace with tokens"),
    ],
)
def test_a_trace_must_carry_what_a_plugin_needs(
    tmp_path: Path, policy: str, forecaster: str, said: str
) -> None:
    plain = TokenSequence(0, np.array([[[0]], [[1]]], dtype=np.int16), np.arange(2, dtype=np.int32))
    trace = MemoryTrace(example_trace(shape=(1, 4, 1)).model, [plain])
    bare = written(trace, tmp_path / "bare.parquet")
    session = Session(Setup(bare, forecaster=forecaster, train=bare))
    with pytest.raises(InputError, match=said):
        session.run(policy, Budget(slots=2))


OFFLINE = """
from policies.builtin.belady import Belady


class Peek(Belady):
    needs = ("weights",)

    def on_route(self, routing):
        assert routing.next_use and routing.token_weights.shape[1] == 2
        super().on_route(routing)
"""


def test_an_offline_policy_gets_the_columns_it_needs(file: str, tmp_path: Path) -> None:
    (tmp_path / "peek.py").write_text(OFFLINE)
    result, _ = Session(Setup(file)).run(f"{tmp_path}/peek.py:Peek", Budget(slots=6))
    assert result.missed == result.bounds["belady_missed"]


def test_a_training_trace_of_another_shape_is_refused(file: str, tmp_path: Path) -> None:
    other = written(example_trace(shape=(3, 7, 2)), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="experts is 7, expected 6"):
        Session(Setup(file, train=other)).run("static", Budget(slots=6))
