"""What policies and the planner take on this host: a small made-up trace, timed event by event."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from policies.budget import Budget
from policies.planner import Planner
from policies.registry import POLICIES
from policies.routing import Routing, Step
from policies.session import Setup, TraceSession, no_garbage_collection
from runtime.calibration.fits import Thinking, thinking
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise

#: Events before timing starts: the slots fill and caches warm up.
WARM_EVENTS = 200

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


def measure_policies(quick: bool, advance: Callable[[], None]) -> dict[str, Thinking]:
    """Seconds per event and per move of every policy that is registered, by name.

    One that cannot run on the made-up trace is left out.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        made_up_trace(path, sequences=2 if quick else 6, tokens=60 if quick else 250)
        session = TraceSession(Setup(trace=str(path), train=str(path)))
        for name in POLICIES.classes():
            try:
                planner, _, steps = session.prepare(name, Budget(cache=CACHE))
            except InputError:
                continue
            finally:
                advance()
            moves, seconds = timed_events(planner, list(steps()))
            found[name] = thinking(moves, seconds)
    return found


def timed_events(
    planner: Planner, steps: list[Step], now: Callable[[], float] = time.perf_counter
) -> tuple[list[int], list[float]]:
    """Moves and seconds of each event of *steps* under *planner*, the first ones left out."""
    moves: list[int] = []
    seconds: list[float] = []
    event = 0
    with no_garbage_collection():
        for step in steps:
            planner.begin(step)
            for layer, experts in enumerate(step.demand):
                start = now()
                plan = planner.plan(Routing(step, layer, experts, event))
                seconds.append(now() - start)
                moves.append(sum(map(len, plan.waves)) + len(plan.prefetch))
                event += 1
    warm = min(WARM_EVENTS, event // 2)
    return moves[warm:], seconds[warm:]
