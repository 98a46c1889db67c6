"""Whole runs of the runtime over made-up traces: step times, and what each step did.

Small experts, whose copies take hardly longer than issuing them, make the host what a step
waits for; larger ones the link. Both are of no published model's dimensions.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from policies.budget import Budget
from policies.registry import POLICIES
from policies.routing import Routing
from policies.session import Prepared, Setup, no_garbage_collection
from runtime.calibration.bench import Bench
from runtime.calibration.copies import Copies
from runtime.calibration.fits import Thinking, line
from runtime.calibration.hosts import (
    HostCosts,
    Quiet,
    StepCounts,
    TimedRun,
    Waits,
    fit_host,
    miss_s,
    rest_of_step,
)
from runtime.calibration.kernels import Graphs
from runtime.calibration.models import (
    layer_graphs_s,
    woken_s,
)
from runtime.dimensions import fit_dimensions
from runtime.load import fitting
from runtime.session import ReplaySession
from runtime.store import PinnedBlock
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise

#: Steps of a run before its times count.
WARM_STEPS = 3
BUDGETS = ("100%", "50%", "25%")
BATCHES = (1, 4)

#: Policies without prefetches, on whose runs the wait for larger copies is measured.
DEMAND_ONLY = ("lru", "fifo")


class Shape(NamedTuple):
    """A made-up model and its trace: as many sequences as the largest batch."""

    layers: int
    hidden: int
    intermediate: int
    tokens: int
    experts: int = 16
    top_k: int = 4

    @property
    def spec(self) -> ModelSpec:
        """The model: one key-value head of 64, no more dense weights than it needs."""
        expert = 3 * self.hidden * self.intermediate
        attention = self.layers * 4 * self.hidden * self.hidden
        return ModelSpec(
            "made up",
            self.layers,
            self.experts,
            self.top_k,
            self.hidden,
            self.intermediate,
            expert,
            attention,
            self.layers * 2 * 128 * 2,
        )

    def write(self, path: Path, sequences: int) -> None:
        """Write a synthetic trace of this shape to *path*."""
        settings = SynthSettings(
            layers=self.layers,
            experts=self.experts,
            top_k=self.top_k,
            sequences=sequences,
            prompt=(0, 0),
            decode=(self.tokens, self.tokens),
            ahead=(0.8,),
            seed=11,
        )
        write_trace(path, self.spec, synthesise(settings), source="made up", license="none")


#: Copies of 0.4 MB at two depths, and of 7 MB.
SHALLOW = Shape(layers=3, hidden=512, intermediate=128, tokens=64)
DEEP = SHALLOW._replace(layers=10)
HEAVY = Shape(layers=5, hidden=1536, intermediate=768, tokens=64)


class _Session(ReplaySession):
    """Runs of a trace that are timed by step and not marked."""

    def step_s(self, policy: str, cache: str) -> list[float]:
        """Seconds of each decode step under *policy*."""
        with fitting(self.device):
            world, _ = self._run(self.prepare(policy, Budget(cache=cache)), iter, mark_every=0)
        return list(world.decode_step_s)

    def counts(self, policy: str, cache: str) -> list[StepCounts]:
        """What each of these steps did: its planner decides the same without a device."""
        with no_garbage_collection():
            return list(counts_of(self.prepare(policy, Budget(cache=cache))))


def counts_of(prepared: Prepared) -> Iterator[StepCounts]:
    """What each step of a run does, from a replay of its planner."""
    planner, event, stale = prepared.planner, 0, False
    for step in prepared.steps():
        begun = len(planner.begin(step))
        stale = stale or begun > 0
        demand, prefetch, waiting, updated, accesses = 0, begun, 0, 0, 0
        for layer, experts in enumerate(step.demand):
            plan = planner.plan(Routing(step, layer, experts, event))
            event += 1
            accesses += len(experts)
            loads = sum(map(len, plan.waves))
            demand, prefetch = demand + loads, prefetch + len(plan.prefetch)
            waiting += loads > 0
            updated += loads > 0 or stale
            stale = bool(plan.prefetch)
        yield StepCounts(len(step.demand), accesses, demand, prefetch, waiting, updated)


class Runs(NamedTuple):
    """What whole runs tell of the host: per-event costs, a step's rest, the start of a miss.

    *wake_s* passes from a copy's end until the layer that waited for it runs as ever.
    *missed* and *misses_off* are what the two fits are off by, as shares of a step's time.
    """

    host: HostCosts
    step_s: float
    miss_s: float
    misses_off: float
    wake_s: float


@contextmanager
def sessions(shape: Shape, batches: Sequence[int], device: str) -> Iterator[dict[int, _Session]]:
    """Sessions of one model over its made-up trace, by batch; freed behind."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace.parquet")
        shape.write(Path(path), max(batches))
        found: dict[int, _Session] = {}
        first: _Session | None = None
        try:
            for batch in batches:
                setup = Setup(trace=path, train=path, batch=batch)
                session = found[batch] = _Session(setup, device, like=first)
                session.open()
                first = first or session
            yield found
        finally:
            for session in reversed(found.values()):
                session.close()


def timed_runs(
    found: Mapping[int, _Session],
    policies: Sequence[str],
    caches: Sequence[str],
    advance: Callable[[], None] = lambda: None,
) -> list[TimedRun]:
    """Runs of *policies* with all budgets and batches; one that cannot run is left out."""
    runs = []
    for policy in policies:
        try:
            for batch, session in found.items():
                for cache in caches:
                    seconds = session.step_s(policy, cache)[WARM_STEPS:]
                    counts = session.counts(policy, cache)[WARM_STEPS:]
                    runs.append(TimedRun(policy, batch, counts, seconds))
        except InputError:
            continue
        finally:
            advance()
    return runs


def layers_s(shape: Shape, batches: Sequence[int], bench: Bench) -> dict[int, float]:
    """Device seconds of one layer of *shape* by batch; empty where nothing is captured."""
    family, dims = fit_dimensions(shape.spec, None)
    dims = dataclasses.replace(dims, layers=min(dims.layers, 4))
    wanted = [(shape.tokens, batch) for batch in batches]
    return dict(zip(batches, layer_graphs_s(family, bench, dims, wanted), strict=False))


def quiet_step_s(session: _Session) -> float:
    """Median seconds of a step in which every expert is held and nothing is moved."""
    pairs = zip(session.step_s("lru", "100%"), session.counts("lru", "100%"), strict=True)
    return statistics.median([s for s, c in list(pairs)[WARM_STEPS:] if not c.updated])


def measure_runs(
    bench: Bench,
    graphs: Graphs,
    copies: Copies,
    thinking: Mapping[str, Thinking],
    advance: Callable[[], None],
) -> Runs:
    """Every policy on small experts, a few on larger ones, on a device with graphs."""
    device = bench.device.type
    around = graphs.sync_s + graphs.launch_s
    names = [name for name in POLICIES.classes() if name in thinking]
    with sessions(SHALLOW, (1,), device) as found:
        shallow_s = quiet_step_s(found[1])
    advance()
    with sessions(DEEP, BATCHES, device) as found:
        deep_s = quiet_step_s(found[1])
        rest_s = rest_of_step((SHALLOW.layers, DEEP.layers), (shallow_s, deep_s))
        runs = timed_runs(found, names, BUDGETS[:2] if bench.quick else BUDGETS, advance)
    bench.free()
    small = Quiet(rest_s, _with_answer(layers_s(DEEP, BATCHES, bench), around))
    with sessions(HEAVY, (1,), device) as found:
        waited = timed_runs(found, DEMAND_ONLY, BUDGETS[1:])
    bench.free()
    heavy = Quiet(rest_s, _with_answer(layers_s(HEAVY, (1,), bench), around))
    advance()
    size = HEAVY.spec.expert_bytes
    first_s, next_s = (_copy_s(copies, size, queued) for queued in (False, True))
    wake_s = _woken_s(bench)
    waits = Waits(first_s, next_s, wake_s, graphs.launch_s)
    before_s = off = 0.0
    # Each fit needs what the other finds; the second round hardly changes anything.
    for _ in range(3):
        host = fit_host(runs, small, thinking, before_s)
        before_s, off = miss_s(waited, heavy, thinking, host, waits)
    return Runs(host, max(rest_s - graphs.launch_s, 1e-6), before_s, off, wake_s)


def _woken_s(bench: Bench) -> float:
    """What a layer with experts as :data:`HEAVY` waits after the end of one's copy."""
    family, dims = fit_dimensions(HEAVY.spec, None)
    block = PinnedBlock(HEAVY.spec.expert_bytes, pin=bench.cuda, what="calibration")
    try:
        return woken_s(family, bench, dataclasses.replace(dims, layers=4), block.bytes)
    finally:
        bench.wait()
        block.close()


def _with_answer(layer_s: Mapping[int, float], around_s: float) -> dict[int, float]:
    return {batch: seconds + around_s for batch, seconds in layer_s.items()}


def _copy_s(copies: Copies, size: int, queued: bool) -> float:
    """Seconds of a copy of *size* bytes between two that were measured."""
    table = copies.h2d
    seconds = table.queued_s if queued else table.isolated_s
    above = next(i for i, known in enumerate(table.sizes_bytes) if known >= size)
    ends = slice(max(above - 1, 0), above + 1)
    found = line(table.sizes_bytes[ends], seconds[ends])
    return found.alpha + found.beta * size
