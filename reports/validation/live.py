"""Cells of a checkpoint: it generates text, and the routing it took is simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from policies.budget import Budget
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.registry import POLICIES
from reports.validation.cells import Cell
from reports.validation.compare import Pair, compare
from reports.validation.request import (
    FAILURES,
    Bars,
    Done,
    Request,
    Run,
    about_run,
    budget_words,
    cache_share,
    failure_words,
    timeline_name,
)
from reports.validation.surroundings import surroundings
from runtime.cli import progress_bar
from runtime.predictor.names import replayed
from sim.session import Session
from traces.errors import InputError

#: Tokens generated for each prompt of a live run.
LIVE_TOKENS = 64


def live(
    request: Request, bars: Bars, generate: Callable[..., Any] | None = None
) -> Iterator[Done]:
    """Generate with a checkpoint in every cell, then simulate the routing that it recorded.

    *generate* is :func:`runtime.live.run_live` or what stands in for it. The experts of the
    checkpoint are read in the first cell and stay in host memory; the rest is read in each.
    """
    with _trace_folder(request.keep) as folder, _runs(generate) as started:
        for number, run in enumerate(request.runs, start=1):
            out = folder / f"cell-{number}.parquet"
            try:
                spans = number == request.timeline_cell
                yield _lived(_Live(request, bars, started, out, spans), run)
            except FAILURES as error:
                yield _live_failure(request, run, error)


@contextmanager
def _runs(generate: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """*generate*, or the runtime's own with one set of experts for all cells."""
    if generate is not None:
        yield generate
        return
    from runtime.live import live_runs

    with live_runs() as started:
        yield started


@contextmanager
def _trace_folder(keep: Path | None) -> Iterator[Path]:
    """Where recorded traces lie: *keep*, or a folder that goes away."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with TemporaryDirectory(prefix="simctl-") as name:
        yield Path(name)


@dataclass(frozen=True)
class _Live:
    """What one live cell is run with: *spans* if its timeline is wanted, *out* its trace."""

    request: Request
    bars: Bars
    generate: Callable[..., Any]
    out: Path
    spans: bool


def _lived(live: _Live, run: Run) -> Done:
    """One live cell: its real run comes first, because it writes the trace."""
    request, (batch, policy, budget) = live.request, run
    shared = ("hardware", "forecaster", "pool", "train", "depth", "seed")
    logs = DecisionLog(keep=True), DecisionLog(keep=True)
    path, found, played, measured = live.generate(
        request.model,
        prompts=list(request.prompts),
        policy=policy,
        budget=budget,
        out=live.out,
        spans=live.spans,
        log=logs[1],
        progress=progress_bar,
        batch=batch,
        max_new_tokens=request.cut.max_tokens or LIVE_TOKENS,
        device=request.device,
        compute=request.compute,
        **{name: getattr(request.setup, name) for name in shared},
    )
    # A predictor that ran beside the model has left its forecasts for the simulation.
    forecaster = replayed(request.setup.forecaster, path)
    setup = replace(request.setup, trace=str(path), batch=batch, forecaster=forecaster)
    sim = Session(replace(setup, compute=request.simulated))
    budget_slots = Budget(slots=found.slots)
    expected, recording = sim.run(
        policy, budget_slots, record=True, log=logs[0],
        watch=live.bars(sim, f"{policy} {budget_words(budget)} batch {batch}, simulated"),
    )  # fmt: skip
    assert recording is not None
    costs = Costs(sim.profile, sim.model, POLICIES.build(policy).low_bits)
    about = about_run(request, sim, run, found.slots) | surroundings(found.world)
    about |= {
        "trace": live.out.name if request.keep else "",
        "sequences": len(request.prompts),
    }
    recordings = {}
    if played is not None and played.spans:
        shown = sim.run(policy, budget_slots, spans=True)[1]
        recordings = {timeline_name(expected): shown, timeline_name(found): played}
    cell = compare(Pair(expected, found, recording, costs, measured, *logs), about)
    results = [replace(result, trace=about["trace"] or "live") for result in (expected, found)]
    return Done(cell, results, {k: v for k, v in recordings.items() if v is not None})


def _live_failure(request: Request, run: Run, error: BaseException) -> Done:
    """A live cell that failed: the model is known by its folder alone."""
    batch, policy, budget = run
    cell = Cell(
        model=request.model.name if request.model else "",
        policy=policy,
        cache=cache_share(budget, budget.slots or 0, 1) if budget.cache else 0.0,
        batch=batch,
        mode="live",
        slots=budget.slots or 0,
        failed=failure_words(error),
        hardware=request.setup.hardware,
    )
    return Done(cell, bad_input=isinstance(error, InputError))
