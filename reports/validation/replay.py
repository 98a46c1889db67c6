"""Cells of a trace: its routing forced on both worlds, real sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from policies.budget import Budget
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.recording import Recording
from policies.registry import POLICIES
from policies.result import Result
from policies.routing import Step
from reports.validation.cells import Cell
from reports.validation.compare import Measured, Pair, compare
from reports.validation.cut import count_sequences, cut_trace
from reports.validation.request import (
    FAILURES,
    Bars,
    Done,
    Request,
    Run,
    Watch,
    about_run,
    budget_words,
    failure_words,
    timeline_name,
)
from reports.validation.surroundings import surroundings
from runtime.cli import progress_bar
from sim.session import Session
from traces.errors import InputError

#: Steps of the runs that a timeline shows.
TIMELINE_STEPS = 16


class RealSession(Protocol):
    """What a session of the real world must do: :class:`runtime.session.ReplaySession` does."""

    def open(self, advance: Callable[[int], None]) -> None: ...

    def run(
        self,
        policy_text: str,
        budget: Budget,
        *,
        spans: bool = False,
        watch: Watch = iter,
        log: DecisionLog | None = None,
    ) -> tuple[Result, Recording | None, Measured]: ...

    def expect_belady(self, slots: int, missed: Callable[[], int]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Worlds:
    """What the cells of one batch share: the simulated session, and facts about the trace."""

    request: Request
    sim: Session
    bars: Bars
    facts: dict[str, Any]


def replay(
    request: Request, bars: Bars, opened: Callable[..., RealSession] | None = None
) -> Iterator[Done]:
    """Run every cell of a trace; *opened* starts the real world, by default the runtime's.

    Raises :class:`InputError` for what is wrong before the first cell has run.
    """
    start = opened or _runtime(request)
    with cut_trace(request.setup.trace, request.cut) as path:
        setup = replace(request.setup, trace=path, compute=request.simulated)
        sessions = {batch: Session(replace(setup, batch=batch)) for batch in request.batches}
        for batch, policy, budget in request.runs:
            with _called(path, request.setup.trace):
                sessions[batch].check(policy, budget)
        facts = {"sequences": count_sequences(path), "trace": Path(request.setup.trace).name}
        with ExitStack() as stack:
            first: RealSession | None = None
            for batch, sim in sessions.items():
                worlds = _Worlds(request, sim, bars, facts)
                runs = [(i, run) for i, run in enumerate(request.runs, 1) if run[0] == batch]
                try:
                    real = _opened(start(sim.setup, like=first), sim.model.total_experts, stack)
                except FAILURES as error:
                    if first is None:
                        raise
                    yield from [_failure(worlds, run, error) for _, run in runs]
                    continue
                first = first or real
                for number, run in runs:
                    yield _cell(worlds, real, run, number == request.timeline_cell)


@contextmanager
def _called(path: str, name: str) -> Iterator[None]:
    """What is wrong with the part of a trace at *path* is said of the trace *name*."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(path, name)) from None


def _runtime(request: Request) -> Callable[..., RealSession]:
    """How the runtime's own session is started; all share the experts of the first."""
    from runtime.session import ReplaySession

    return partial(ReplaySession, device=request.device, compute=request.compute)


def _opened(real: RealSession, experts: int, stack: ExitStack) -> RealSession:
    """*real* with its *experts* in host memory; closed with *stack*."""
    stack.callback(real.close)
    with progress_bar("experts into host memory", experts) as advance:
        real.open(advance)
    return real


def _cell(worlds: _Worlds, real: RealSession, run: Run, spans: bool) -> Done:
    """One cell; what goes wrong in it becomes a failed cell."""
    try:
        done = _both(worlds, real, run)
    except FAILURES as error:
        return _failure(worlds, run, error)
    if not spans:
        return done
    try:
        return replace(done, recordings=_timelines(worlds.sim, real, run))
    except FAILURES as error:
        return replace(done, note=f"no timeline: {failure_words(error)}")


def _both(worlds: _Worlds, real: RealSession, run: Run) -> Done:
    """Simulate, run for real, compare."""
    request, sim, facts = worlds.request, worlds.sim, worlds.facts
    batch, policy, budget = run
    name = f"{policy} {budget_words(budget)} batch {batch}"
    log = DecisionLog(keep=True)
    watch = worlds.bars(sim, f"{name}, simulated")
    expected, recording = sim.run(policy, budget, record=True, watch=watch, log=log)
    assert recording is not None
    real.expect_belady(expected.slots, partial(sim.belady_missed, expected.slots))
    costs = Costs(sim.profile, sim.model, POLICIES.build(policy).low_bits)
    tried: list[tuple[Cell, Result]] = []
    while not tried or (tried[-1][0].disturbed and len(tried) < request.attempts):
        watch = worlds.bars(sim, f"{name}, for real{' again' * bool(tried)}")
        log_gpu = DecisionLog(keep=True)
        found, _, measured = real.run(policy, budget, watch=watch, log=log_gpu)
        pair = Pair(expected, found, recording, costs, measured, log, log_gpu)
        about = about_run(request, sim, run, found.slots) | facts | surroundings(found.world)
        tried.append((compare(pair, about), found))
    cell, found = max(tried, key=lambda one: one[0].calm)
    results = [replace(result, trace=facts["trace"]) for result in (expected, found)]
    return Done(replace(cell, attempts=len(tried)), results)


def _timelines(sim: Session, real: RealSession, run: Run) -> dict[str, Recording]:
    """The first steps once more in both worlds, with every span written down.

    A run of their own, so that writing spans slows nothing that is measured.
    """
    _, policy, budget = run
    expected, simulated = sim.run(policy, budget, spans=True, watch=_first_steps)
    found, played, _ = real.run(policy, budget, spans=True, watch=_first_steps)
    pairs = ((expected, simulated), (found, played))
    return {timeline_name(r): recording for r, recording in pairs if recording is not None}


def _first_steps(steps: Iterable[Step]) -> Iterable[Step]:
    return islice(steps, TIMELINE_STEPS)


def _failure(worlds: _Worlds, run: Run, error: BaseException) -> Done:
    """The cell of a run that raised *error*; only the error's words are kept."""
    slots = worlds.sim.slots(run[2])
    about = about_run(worlds.request, worlds.sim, run, slots) | worlds.facts
    cell = Cell(**about, slots=slots, failed=failure_words(error))
    return Done(cell, bad_input=isinstance(error, InputError))
