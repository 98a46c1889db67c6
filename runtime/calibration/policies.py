"""What policies and the planner take on this host: a small made-up trace, timed event by event."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from policies.budget import Budget
from policies.planner import Planner
from policies.routing import Step
from policies.session import Setup, TraceSession, no_garbage_collection
from runtime.calibration.fits import Thinking, thinking
from runtime.steps import Answer, ReplayedSteps
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise

#: Events before timing starts: the slots fill and caches warm up.
WARM_EVENTS = 200

#: Sequences at a time: a policy's time grows with the experts of an event.
BATCHES = (1, 4, 8)

#: The budget: most events of a run wait for something, many do not.
CACHE = "50%"


def made_up_trace(path: Path, sequences: int, tokens: int, seed: int = 7) -> None:
    """A synthetic trace of 12 layers with 32 experts, 4 to a token, written to *path*."""
    settings = SynthSettings(
        layers=12,
        experts=32,
        top_k=4,
        sequences=sequences,
        prompt=(0, 0),
        decode=(tokens, tokens),
        ahead=(0.8,),
        seed=seed,
    )
    model = ModelSpec("made up", 12, 32, 4, 64, 32, 3 * 64 * 32, 100_000, 1024)
    write_trace(path, model, synthesise(settings), source="made up", license="none")


class Timed:
    """One stage of timed events: distinct experts, moves and seconds of each."""

    def __init__(self) -> None:
        self.accesses: list[int] = []
        self.moves: list[int] = []
        self.seconds: list[float] = []

    def add(self, accesses: int, moves: int, seconds: float) -> None:
        """One event's stage."""
        self.accesses.append(accesses)
        self.moves.append(moves)
        self.seconds.append(seconds)

    def fit(self) -> Thinking:
        """What an event takes, each of its experts and each of its moves."""
        return thinking(self.accesses, self.moves, self.seconds)


class Stages(NamedTuple):
    """What a policy takes before an event is launched, and to decide on prefetches after."""

    demand: Thinking
    prefetch: Thinking


def measure_policies(
    quick: bool, names: Iterable[str], advance: Callable[[], None]
) -> dict[str, Stages]:
    """Seconds per event, expert and move of both stages of the policies called *names*.

    From runs of one and of several sequences at a time. A policy that cannot run on the
    made-up trace is left out.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        made_up_trace(path, sequences=max(BATCHES), tokens=30 if quick else 120)
        sessions = [
            TraceSession(Setup(trace=str(path), train=str(path), batch=batch)) for batch in BATCHES
        ]
        for name in names:
            timed = Timed(), Timed()
            try:
                for session in sessions:
                    planner, _, steps = session.prepare(name, Budget(cache=CACHE))
                    time_events(planner, list(steps()), ReplayedSteps(session.model), timed)
            except InputError:
                continue
            finally:
                advance()
            found[name] = Stages(timed[0].fit(), timed[1].fit())
    return found


def time_events(
    planner: Planner,
    steps: list[Step],
    source: ReplayedSteps,
    into: tuple[Timed, Timed],
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Time each event of *steps* but the first: from its answer to its plan, and its prefetches."""
    event, warm = 0, min(WARM_EVENTS, sum(len(step.demand) for step in steps) // 2)
    with no_garbage_collection():
        for step in steps:
            planner.begin(step)
            for layer, answer in enumerate(_answers(step, planner.context.experts)):
                start = now()
                routing = source.route(step, layer, answer, event)
                plan = planner.plan(routing)
                planned = now()
                moves = planner.prefetch()
                fetched = now()
                event += 1
                if event > warm:
                    experts = len(routing.experts)
                    into[0].add(experts, sum(map(len, plan.waves)), planned - start)
                    into[1].add(experts, len(moves), fetched - planned)


def _answers(step: Step, experts: int) -> list[Answer]:
    """What the gates of *step* answered; where a run carries only demands, as one token."""
    if step._experts is not None:
        return [Answer(step._experts[:, layer]) for layer in range(len(step.demand))]
    return [
        Answer(np.array([demand]) - layer * experts) for layer, demand in enumerate(step.demand)
    ]
