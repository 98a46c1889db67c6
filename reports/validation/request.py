"""What is validated, and what comes out of each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policies.budget import Budget
from policies.recording import Recording
from policies.registry import POLICIES
from policies.result import Result
from policies.routing import Step
from policies.session import Setup, TraceSession
from reports.labels import budget_text, policy_label
from reports.validation.cells import Cell
from reports.validation.cut import Cut
from traces.errors import InputError, first_line, kind_and_line

#: What may go wrong in one cell and leave the others standing: torch's errors are RuntimeErrors.
FAILURES = (InputError, RuntimeError, MemoryError)

Watch = Callable[[Iterable[Step]], Iterable[Step]]

#: Batch, policy and budget of one cell.
Run = tuple[int, str, Budget]

#: Gives the progress bar of a run: from its session and label.
Bars = Callable[[TraceSession, str], Watch]


@dataclass(frozen=True)
class Request:
    """What is validated: every policy at every budget and batch, on one trace or one checkpoint.

    *setup* holds what all cells share (its batch is not looked at). In live mode *model* is
    the checkpoint's folder, *prompts* its texts, and *keep* where recorded traces stay.
    """

    setup: Setup
    policies: Sequence[str]
    budgets: Sequence[Budget]
    batches: Sequence[int] = (1,)
    device: str = "auto"
    compute: str = "fused"
    cut: Cut = field(default_factory=Cut)
    timeline_cell: int | None = None
    model: Path | None = None
    prompts: Sequence[str] = ()
    keep: Path | None = None
    attempts: int = 3

    @property
    def runs(self) -> list[Run]:
        """Every cell, in the order in which they run."""
        return [
            (batch, policy, budget)
            for batch in self.batches
            for budget in self.budgets
            for policy in self.policies
        ]

    @property
    def simulated(self) -> str:
        """How decode steps are simulated: as they run, which on a CPU is never in graphs."""
        return "reference" if self.device == "cpu" else self.compute

    @property
    def mode(self) -> str:
        """``replay`` or ``live``."""
        return "replay" if self.model is None else "live"


@dataclass(frozen=True)
class Done:
    """A cell that has run or failed, with its results and, if asked for, both timelines.

    *bad_input* says that it failed on something that the user gave, *note* what else is worth
    a word.
    """

    cell: Cell
    results: Sequence[Result] = ()
    recordings: Mapping[str, Recording] = field(default_factory=dict)
    bad_input: bool = False
    note: str = ""


def budget_words(budget: Budget) -> str:
    """The budget as it was asked for: ``25%``, ``96 slots`` or ``8GiB``."""
    if budget.slots is not None:
        return f"{budget.slots} slots"
    return budget.gpu_memory or budget.cache or "50%"


def cache_share(budget: Budget, slots: int, experts: int) -> float:
    """The budget as a share of all *experts*: as it was asked for, else *slots* of them."""
    if budget.slots is None and budget.gpu_memory is None:
        return float((budget.cache or "50%").strip().rstrip("% ")) / 100
    return round(slots / experts, 4)


def about_run(request: Request, session: TraceSession, run: Run, slots: int) -> dict[str, Any]:
    """What names a cell of *slots* slots and says how it was run."""
    batch, policy, budget = run
    setup = session.setup
    chosen = request.setup.forecaster if POLICIES.build(policy).forecasts else None
    return {
        "model": session.model.name,
        "policy": f"{policy} ({chosen})" if chosen else policy,
        "cache": cache_share(budget, slots, session.model.total_experts),
        "batch": batch,
        "mode": request.mode,
        "seed": setup.seed,
        "pool": setup.pool,
        "depth": setup.depth,
        "scheduler": setup.scheduler,
        "compute": request.compute,
        "hardware": session.profile.name,
        "forecaster": chosen or "",
    }


def failure_words(error: BaseException) -> str:
    """What a failed cell says: one line, the kind of error before it unless it is the user's."""
    return first_line(error) if isinstance(error, InputError) else kind_and_line(error)


def timeline_name(result: Result) -> str:
    """How a run is called in a timeline."""
    where = "simulated" if result.world == "sim" else f"measured on the {result.world.upper()}"
    return f"{policy_label(result)}, {budget_text(result)} of experts ({where})"
