"""One cell of a comparison: a trace, a machine and a batch, under any policy and forecaster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.expertflow_gaps import Source
from policies.budget import Budget
from policies.result import Result
from policies.session import Setup
from sim.session import Session

#: The oracles that stand in for a trained predictor, by the accuracy that the paper reports.
ORACLES = ("oracle:accuracy=1.0", "oracle:accuracy=0.9", "oracle:accuracy=0.8")

#: The one that is as often right as the paper's predictor on Switch-64, at the lower end.
PAPERS_ORACLE = ("oracle:accuracy=0.8",)


@dataclass
class Cell:
    """Runs of one trace on one machine in one batch size; Belady runs once for each budget."""

    source: Source
    batch: int
    hardware: str
    _belady: dict[int, int] = field(default_factory=dict)

    def session(self, forecaster: str | None = None, **said: str) -> Session:
        """A session of this cell; *said* are further fields of its setup."""
        setup = Setup(
            self.source.trace,
            batch=self.batch,
            hardware=self.hardware,
            sizes=self.source.sizes,
            forecaster=forecaster,
        )
        return Session(replace(setup, **said))  # type: ignore[arg-type]

    def run(
        self, policy: str, budget: Budget, forecaster: str | None = None, **said: str
    ) -> Result:
        """Simulate *policy*."""
        session = self.session(forecaster, **said)
        slots = session.slots(budget)
        plain = said.get("scheduler", "none") == "none"
        if plain and slots in self._belady:
            session.expect_belady(slots, lambda: self._belady[slots])
        found, _ = session.run(policy, budget)
        if plain:
            self._belady[slots] = session.belady_missed(slots)
        return found


def name_of(source: Source) -> str:
    """The trace's name without folders and suffix."""
    return Path(source.trace).stem


def told(forecaster: str) -> str:
    """*forecaster* without the file that it reads, which says nothing elsewhere."""
    return forecaster.partition(":")[0] if forecaster.startswith("routing-path") else forecaster


def forecasters_of(source: Source, oracles: Sequence[str] = ORACLES) -> Iterable[str]:
    """The trained predictor where there is one, else *oracles*."""
    return [f"routing-path:{source.forecasts}"] if source.forecasts else oracles


def floor_slots(session: Session) -> int:
    """Slots for load on demand: one for each expert that a layer can demand in a decode step."""
    model = session.stored.model
    return min(model.experts, model.top_k * session.setup.batch)


def slots_for_saving(session: Session, saving: float) -> int:
    """The most slots with which ``memory.saving`` is at least *saving*; 0 where none are."""
    model = session.model
    kv_bytes = session.kv_tokens * model.kv_bytes_per_token
    beside = model.dense_params * model.param_bytes + kv_bytes
    whole = model.total_experts * model.expert_bytes + beside
    return max(0, int(((1 - saving) * whole - beside) // model.expert_bytes))
