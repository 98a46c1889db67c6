"""A real world to validate against where there is none: the simulator with known faults."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

import simctl
from policies.session import Setup
from reports.validation.cells import Cell
from sim.session import Session


class FakeReal:
    """A session whose runs are simulated, *slower* by a share, in a world of another name."""

    slower = 0.0
    world = "gpu"
    change: ClassVar[dict[str, Any]] = {}
    measured: ClassVar[dict[str, Any]] = {}
    #: The link's rate in one run after the other, if given.
    rates: ClassVar[list[float]] = []
    #: The host's speed likewise.
    speeds: ClassVar[list[float]] = []
    #: policy, or batch size -> what its run or the session's start raises
    raises: ClassVar[dict[str | int, BaseException]] = {}
    opened: ClassVar[list[FakeReal]] = []

    def __init__(
        self, setup: Setup, device: str = "auto", compute: str = "fused", like: Any = None
    ) -> None:
        self.session = Session(replace(setup, **self.change))
        self.arguments = (setup, device, compute)
        self.closed = False
        self.runs: list[str] = []
        self.opened.append(self)

    def open(self, advance):
        if self.arguments[0].batch in self.raises:
            raise self.raises[self.arguments[0].batch]
        advance(self.session.model.total_experts)

    def run(self, policy_text, budget, *, spans=False, watch=iter, log=None):
        self.runs.append(policy_text)
        if policy_text in self.raises:
            raise self.raises[policy_text]
        result, recording = self.session.run(
            policy_text, budget, record=True, spans=spans, watch=watch, log=log
        )
        longer = 1 + self.slower
        time = dict(result.time)
        for key in ("tpot_s", "tpot_parts_s"):
            time[key] = {name: seconds * longer for name, seconds in time[key].items()}
        measured = {
            "gpu_peak_bytes": 1010,
            "gpu_predicted_bytes": 1000,
            "host_peak_bytes": 5000,
            "link_busy_of_stall": 0.97,
            "link_bytes_per_s": 1e9,
            "host_speed": 0.99,
            "step_s": [longer * (row.end_s - row.start_s) for row in recording.steps],
        }
        measured |= self.measured
        if self.rates:
            measured["link_bytes_per_s"] = self.rates.pop(0)
        if self.speeds:
            measured["host_speed"] = self.speeds.pop(0)
        result = replace(result, world=self.world, time=time)
        return result, recording if spans else None, SimpleNamespace(**measured)

    def expect_belady(self, slots, missed):
        self.session.expect_belady(slots, missed)

    def close(self):
        self.closed = True


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> type[FakeReal]:
    """The runtime's session replaced by a fake of its own for each test, and the command known."""

    class Fake(FakeReal):
        change: ClassVar[dict[str, Any]] = {}
        measured: ClassVar[dict[str, Any]] = {}
        rates: ClassVar[list[float]] = []
        speeds: ClassVar[list[float]] = []
        raises: ClassVar[dict[str | int, BaseException]] = {}
        opened: ClassVar[list[FakeReal]] = []

    module = ModuleType("runtime.session")
    module.ReplaySession = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runtime.session", module)
    monkeypatch.setitem(simctl.COMMANDS, "validate", "reports.cli_validate:validate")
    return Fake


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace with prompts, weights, token ids and next gates."""
    path = tmp_path_factory.mktemp("validate") / "small.parquet"
    options = "--layers 4 --experts 8 --top-k 2 --sequences 6 --prompt 5 --decode 12 --domains 2"
    words = f"trace synth {path} {options} --ahead 0.9,0.8 --token-information 0.5".split()
    assert simctl.main(words) == 0
    return path


def fake_cell(policy: str = "lru", error: float = 0.02, **changes: Any) -> Cell:
    """A cell of 10 ms per token on the GPU at which all is well but for *error*."""
    values: dict[str, Any] = dict(
        model="tiny", policy=policy, cache=0.25, batch=1, mode="replay",
        tpot_sim_s=0.01 * (1 + error), tpot_gpu_s=0.01, decisions_equal=True, held_sim=400,
        held_gpu=400, demand_bytes_equal=True, link_busy_of_stall=0.99, gpu_peak_bytes=1020,
        slots=8, error=error, naive_s=0.006, naive_error=-0.4, accesses_sim=1000,
        accesses_gpu=1000, missed_sim=600, missed_gpu=600, demand_bytes_sim=600,
        demand_bytes_gpu=600, prefetch_bytes_sim=0, prefetch_bytes_gpu=0, stall_share=0.5,
        link_bytes_per_s=0.98, link_profile_bytes_per_s=1.0, gpu_predicted_bytes=1000,
        tpot_sim_p50_s=0.0101, tpot_gpu_p50_s=0.01, tpot_sim_p90_s=0.02, tpot_gpu_p90_s=0.02,
        tpot_sim_p99_s=0.03, tpot_gpu_p99_s=0.04,
        parts_sim_s={"attention": 0.002, "experts": 0.003, "stall_demand": 0.005},
        parts_gpu_s={"attention": 0.002, "experts": 0.003, "stall_demand": 0.005},
        step_quantiles_sim_s=[0.008, 0.01, 0.012], step_quantiles_gpu_s=[0.008, 0.01, 0.013],
        hardware="bench", machine="one GPU", versions={"Python": "3.12"}, date="2026-01-02",
    )  # fmt: skip
    return Cell(**(values | changes))
