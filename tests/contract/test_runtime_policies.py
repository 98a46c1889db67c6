"""Every policy decides in the real world just what it decides in the simulated one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies import landing  # noqa: E402
from policies.budget import Budget  # noqa: E402
from policies.decisions import DecisionLog  # noqa: E402
from policies.moves import Move  # noqa: E402
from policies.registry import POLICIES  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime.session import ReplaySession  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers import BUILT_ALONE, landing_in_groups  # noqa: E402
from traces.model import ModelSpec  # noqa: E402
from traces.store import write_trace  # noqa: E402
from traces.synth import SynthSettings, synthesise  # noqa: E402

LAYERS, EXPERTS, TOP_K, SIZE = 3, 6, 2, 32
ALL = LAYERS * EXPERTS
WAVE = -2

#: Batch size and pool of a setup -> budgets in slots, from the least that is allowed.
BUDGETS = {
    (1, "global"): (TOP_K, 7),
    (1, "layer"): (LAYERS * TOP_K,),
    (3, "global"): (TOP_K, ALL),
    (3, "layer"): (LAYERS * TOP_K, 11),
}


def tiny_trace(path: Path) -> str:
    """A trace with every column of a model whose layers are 32 by 32."""
    spec = ModelSpec(
        "tiny", LAYERS, EXPERTS, TOP_K, SIZE, SIZE, 3 * SIZE * SIZE, 0, 2 * LAYERS * 64 * 2
    )
    settings = SynthSettings(
        layers=LAYERS, experts=EXPERTS, top_k=TOP_K, sequences=4, prompt=(3, 5), decode=(4, 7),
        token_information=0.5, ahead=(0.9, 0.8), ahead_width=2 * TOP_K, seed=3,
    )  # fmt: skip
    write_trace(path, spec, synthesise(settings), source="drawn", license="none")
    return str(path)


class Worlds:
    """Both worlds of one setup."""

    def __init__(self, setup: Setup, device: str = "cpu") -> None:
        self.sim = Session(setup)
        self.real = ReplaySession(setup, device=device, compute="fused")

    def compare(self, policy: str, slots: int) -> tuple[Any, list[int]]:
        """Run *policy* in both and check that they agree; the real result and the decisions."""
        logs = [DecisionLog(keep=True), DecisionLog(keep=True)]
        budget = Budget(slots=slots)
        expected, _ = self.sim.run(policy, budget, log=logs[0])
        found, _, measured = self.real.run(policy, budget, log=logs[1])
        assert logs[1].numbers == logs[0].numbers
        for name in ("decisions_sha256", "accesses", "held", "missed", "steps", "tokens"):
            assert getattr(found, name) == getattr(expected, name), name
        assert found.bytes["demand"] == expected.bytes["demand"]
        for name in ("demand", "prefetch"):
            assert found.moves[name] == expected.moves[name]
        assert found.quality == expected.quality
        assert found.policy == expected.policy
        assert found.bounds["belady_missed"] == expected.bounds["belady_missed"]
        assert found.hit + found.late == found.held
        assert 0 <= found.late <= found.held
        assert sum(found.breakdown_s.values()) == pytest.approx(found.time["total_s"])
        assert min(measured.step_s) > 0
        return found, list(logs[1].numbers or ())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_trace(tmp_path_factory.mktemp("runtime") / "tiny.parquet")


@pytest.fixture(scope="module")
def worlds(trace: str) -> Iterator[dict[tuple[int, str], Worlds]]:
    """The worlds of every setup, with models and stores that all policies share."""
    # A run ends by collecting garbage, which is slow among all that a test run has imported.
    gc.freeze()
    made = {
        (batch, pool): Worlds(Setup(trace, batch=batch, pool=pool, train=trace))
        for batch, pool in BUDGETS
    }
    yield made
    for both in made.values():
        both.real.close()
    gc.unfreeze()


@pytest.mark.parametrize(("batch", "pool"), BUDGETS)
@pytest.mark.parametrize("policy", sorted(POLICIES.classes()))
def test_the_same_decisions(
    worlds: dict[tuple[int, str], Worlds], policy: str, batch: int, pool: str
) -> None:
    for slots in BUDGETS[batch, pool]:
        found, decisions = worlds[batch, pool].compare(policy, slots)
        if slots == TOP_K and policy == "lru":
            assert WAVE in decisions, "the budget was meant to force waves"
        if slots == ALL and policy == "lru":
            assert found.missed <= ALL


def test_what_the_cases_cover(worlds: dict[tuple[int, str], Worlds]) -> None:
    """Prefetches, low precision and waves of inexact policies do occur in these runs."""
    found, _ = worlds[1, "global"].compare("predictive", 7)
    assert found.moves["prefetch"] > 0
    found, decisions = worlds[3, "layer"].compare("mixed", 11)
    assert found.quality["low_accesses"] > 0
    assert WAVE in decisions


@pytest.mark.parametrize("forecaster", BUILT_ALONE)
def test_every_forecaster(trace: str, forecaster: str) -> None:
    setup = Setup(trace, batch=2, forecaster=forecaster, train=trace)
    both = Worlds(setup)
    try:
        found, _ = both.compare("predictive", 7)
        assert found.policy["forecaster"]["name"] == forecaster
    finally:
        both.real.close()


def test_a_depth_of_one_and_of_many(trace: str) -> None:
    """How many copies are issued ahead changes when they land, never what is decided."""
    shas = set()
    for depth in (1, 8):
        both = Worlds(Setup(trace, batch=2, depth=depth))
        try:
            found, _ = both.compare("predictive", 7)
            shas.add(found.decisions_sha256)
        finally:
            both.real.close()
    assert len(shas) == 1


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("slots", [TOP_K, 7, ALL])
@pytest.mark.parametrize("policy", ["lru", "belady", "mixed"])
def test_the_same_groups_land(
    worlds: dict[tuple[int, str], Worlds],
    policy: str,
    slots: int,
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is missed is issued, and computed, in as many groups of the same sizes."""
    both = worlds[3, "global"]
    found: dict[str, list[list[int]]] = {"sim": [], "runtime": []}

    def counting(world: str) -> Any:
        def counted(arriving: Any, bytes_of: Any) -> Any:
            groups = landing.cut(arriving, bytes_of)
            if arriving and isinstance(arriving[0], Move):
                found[world].append([len(group) for group in groups])
            return groups

        return counted

    monkeypatch.setattr("sim.arrivals.cut", counting("sim"))
    monkeypatch.setattr("runtime.engine.cut", counting("runtime"))
    monkeypatch.setattr("runtime.arrivals.cut", counting("runtime"))
    size = 3 * SIZE * SIZE * 2 * together
    with landing_in_groups(size, size):
        both.compare(policy, slots)
    assert found["sim"] == found["runtime"]
    assert max(map(len, found["sim"])) > 1 or together > 1


#: Scheduler -> batch size, and whether keys and values move.
SCHEDULED = {
    "prompt-length": (2, False),
    "expertflow": (2, True),
    "expertflow:kv=reindex": (2, False),
    "expertflow:unit=3,every=2,overlap=true": (1, False),
    "prompt-routes:unit=2": (2, True),
}


@pytest.mark.parametrize("scheduler", SCHEDULED)
@pytest.mark.parametrize("policy", ["lru", "belady", "predictive", "mixed"])
def test_every_scheduler(trace: str, scheduler: str, policy: str) -> None:
    """Both worlds run the same groups; the real one moves or gathers keys and values for them."""
    batch, moves = SCHEDULED[scheduler]
    both = Worlds(Setup(trace, batch=batch, scheduler=scheduler))
    try:
        found, _ = both.compare(policy, 7)
        expected, _ = both.sim.run(policy, Budget(slots=7))
    finally:
        both.real.close()
    if scheduler == "prompt-length":
        assert found.schedule is expected.schedule is None
        return
    counts = ("divisions", "moved", "moved_bytes", "distinct_experts", "distinct_in_file_order")
    for name in counts:
        assert found.schedule[name] == expected.schedule[name], name
    assert (found.schedule["moved"] > 0) == moves
    assert (found.schedule["follow_s"] > 0) == (moves or "reindex" in scheduler)
    assert 0 <= found.schedule["waited_s"] <= found.schedule["divide_s"]
    if batch > 1:
        assert 0 < found.schedule["waited_s"] < found.breakdown_s["host"]


def test_reference_kernels_decide_alike(trace: str) -> None:
    setup = Setup(trace)
    real = ReplaySession(setup, device="cpu", compute="reference", kernel="grouped_mm")
    try:
        found, recording, _ = real.run("predictive", Budget(slots=7), record=True, spans=True)
    finally:
        real.close()
    expected, _ = Session(setup).run("predictive", Budget(slots=7))
    assert found.decisions_sha256 == expected.decisions_sha256
    assert recording is not None
    assert int(recording.uses.sum()) == found.accesses
    assert int(recording.missed.sum()) == found.missed
    assert int(recording.late.sum()) == found.late
    assert sum(row.accesses for row in recording.steps) == found.accesses
