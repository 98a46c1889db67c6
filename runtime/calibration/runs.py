"""Whole runs of the runtime over made-up traces: what each event did, and when.

Small experts, whose copies take hardly longer than issuing them, make the host what a step
waits for; larger ones the link. Both are of no published model's dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from policies.budget import Budget
from policies.graph_costs import UntoldChanges
from policies.registry import POLICIES
from policies.routing import Routing
from policies.session import Prepared, Setup, no_garbage_collection
from runtime.calibration.bench import Bench
from runtime.calibration.copies import Copies
from runtime.calibration.fits import line
from runtime.calibration.hosts import (
    HostCosts,
    Misses,
    fit_host,
    fit_misses,
    more_layer_s,
    rest_of_step,
)
from runtime.calibration.timed import EventCounts, TimedRun, layer_s
from runtime.eventclock import EventClock
from runtime.load import fitting
from runtime.session import ReplaySession
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise

#: Steps of a run before its times count.
WARM_STEPS = 3
BUDGETS = ("50%", "25%")
BATCHES = (1, 8)
FEW_SEQUENCES = 3

#: Policies without prefetches, on whose runs the wait for larger copies is measured.
DEMAND_ONLY = ("lru", "fifo")

#: Policies that show how much slower a host is that has waited for large copies.
COLD = ("lru", "predictive", "mixed")


class Shape(NamedTuple):
    """A made-up model and its trace: as many sequences as the largest batch."""

    layers: int
    hidden: int
    intermediate: int
    tokens: int
    experts: int = 48
    top_k: int = 6

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
            ahead=(0.8, 0.7, 0.6),
            # As wide as a capture makes it.
            ahead_width=2 * self.top_k,
            seed=11,
        )
        write_trace(path, self.spec, synthesise(settings), source="made up", license="none")


#: Copies of 0.4 MB, of 7 MB, and of 100 MB; the second from 2 GB of host memory, as models have
#: them: addresses must be translated anew.
SMALL = Shape(layers=8, hidden=512, intermediate=128, tokens=64)
HEAVY = Shape(layers=5, hidden=1536, intermediate=768, tokens=64, experts=64, top_k=4)
LARGE = Shape(layers=4, hidden=4096, intermediate=4096, tokens=48, experts=8, top_k=2)


#: How runs compute that tell what a chain of graphs costs: see :class:`runtime.offloading.Options`.
CHAINS = "fused"


class _Session(ReplaySession):
    """Runs of a trace that are timed by event and not marked."""

    def timed(self, policy: str, cache: str) -> TimedRun:
        """What each decode step under *policy* did, and when; its planner decides it twice."""
        clock = EventClock()
        with fitting(self.device):
            prepared = self.prepare(policy, Budget(cache=cache))
            world, _ = self._run(prepared, iter, mark_every=0, clock=clock)
        layers = self.model.layers
        late, issued = iter(clock.late.tolist()), iter(clock.issued.tolist())
        with no_garbage_collection():
            counts = [
                [one._replace(late=next(late), issued=next(issued)) for one in step]
                for step in counts_of(self.prepare(policy, Budget(cache=cache)))
            ]
        return TimedRun(policy, counts, clock.take(layers), list(world.decode_step_s))


def counts_of(prepared: Prepared) -> Iterator[list[EventCounts]]:
    """What each event of each step does, from a replay of its planner."""
    planner, event = prepared.planner, 0
    untold = UntoldChanges(planner.context.total)
    for step in prepared.steps():
        untold.fetched(planner.begin(step))
        found = []
        for layer, experts in enumerate(step.demand):
            plan = planner.plan(Routing(step, layer, experts, event))
            event += 1
            changes = untold.told(plan, len(experts))
            moves = planner.prefetch()
            untold.fetched(moves)
            demand = sum(map(len, plan.waves))
            found.append(EventCounts(len(experts), demand, len(moves), changes, not plan.whole))
        yield found


class Runs(NamedTuple):
    """What whole runs tell: the host's costs, a step's rest, what misses take.

    *more_layer_s* is what the device's layer takes more under a policy that is not exact,
    *copy_longer_s* what a copy takes longer than it did when copies were measured alone.
    """

    host: HostCosts
    step_s: float
    misses: Misses
    more_layer_s: dict[str, float]
    copy_longer_s: float


@contextmanager
def sessions(
    shape: Shape, batches: Sequence[int], device: str, compute: str = CHAINS
) -> Iterator[dict[int, _Session]]:
    """Sessions of one model over its made-up traces, by batch; freed behind.

    Each has as many sequences as its batch, but at least :data:`FEW_SEQUENCES`; *compute* is
    how they run.
    """
    with tempfile.TemporaryDirectory() as folder:
        found: dict[int, _Session] = {}
        first: _Session | None = None
        try:
            for batch in batches:
                path = str(Path(folder) / f"trace-{batch}.parquet")
                shape.write(Path(path), max(batch, FEW_SEQUENCES))
                setup = Setup(trace=path, train=path, batch=batch)
                session = found[batch] = _Session(setup, device, compute=compute, like=first)
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
            for session in found.values():
                for cache in caches:
                    runs.append(session.timed(policy, cache).from_step(WARM_STEPS))
        except InputError:
            continue
        finally:
            advance()
    return runs


def measure_runs(
    bench: Bench,
    copies: Copies,
    advance: Callable[[], None],
) -> Runs:
    """Every policy on small experts, a few on larger ones, on a device with graphs."""
    device = bench.device.type
    classes = POLICIES.classes()
    budgets = BUDGETS[:1] if bench.quick else BUDGETS
    with sessions(SMALL, BATCHES, device) as found:
        quiet = timed_runs(found, ["lru"], ["100%"])
        runs = timed_runs(found, list(classes), budgets, advance)
    inexact = [run for run in runs if not classes[run.policy].exact]
    # Of one token at a time, as the first of *quiet*; the others hardly have quiet events.
    more_s = more_layer_s(inexact, layer_s(quiet[0]))
    bench.free()
    with sessions(HEAVY, (1,), device) as found:
        alone_s = layer_s(found[1].timed("lru", "100%").from_step(WARM_STEPS))
        waited = timed_runs(found, DEMAND_ONLY, BUDGETS)
        more = [name for name in COLD if name not in DEMAND_ONLY]
        cold = timed_runs(found, more, BUDGETS[:1])
    bench.free()
    if not bench.quick:
        with sessions(LARGE, (1,), device) as found:
            cold += timed_runs(found, COLD, BUDGETS[:1])
        bench.free()
    advance()
    host = fit_host(quiet + runs + waited + cold)
    size = HEAVY.spec.expert_bytes
    first_s = _copy_s(copies, size, False) - _copy_s(copies, size, True) + copies.wake_s
    misses = fit_misses(waited, alone_s, host, first_s)
    longer_s = max(misses.copy_s - _copy_s(copies, size, True), 0.0)
    return Runs(host, rest_of_step(waited, host), misses, more_s, longer_s)


def _copy_s(copies: Copies, size: int, queued: bool) -> float:
    """Seconds of a copy of *size* bytes between two that were measured."""
    table = copies.h2d
    seconds = table.queued_s if queued else table.isolated_s
    above = next(i for i, known in enumerate(table.sizes_bytes) if known >= size)
    ends = slice(max(above - 1, 0), above + 1)
    found = line(table.sizes_bytes[ends], seconds[ends])
    return found.alpha + found.beta * size
