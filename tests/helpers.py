"""Traces, machines and runs that several tests share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from policies import landing
from policies.base import Context, Forecaster, Policy
from policies.batching import Batches
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.examples import EXPERT_BYTES, example_model, example_trace
from policies.future import Future
from policies.hardware import Cpu, ExpertModel, Gpu, HardwareProfile, Host, Software
from policies.link_times import CopyTable, Direction, Link
from policies.planner import Plan, Planner, run_counts
from policies.registry import FORECASTERS, POLICIES
from policies.routing import Routing
from policies.training import learn
from sim.world import World
from traces.model import ModelSpec
from traces.store import open_trace
from traces.trace import MemoryTrace, TokenSequence, Trace

#: Forecasters that build without a file; routing-path has its contract test beside its file's.
BUILT_ALONE = [
    name for name, cls in FORECASTERS.classes().items() if not getattr(cls, "leading", "")
]

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = {
    name: ROOT / f"traces/samples/{name}.parquet" for name in ("coarse-8x2", "granular-64x8")
}
GPT_OSS = ROOT.parent / "shared/traces/gpt-oss-20b-decode.npz"


def trace_of(
    model: ModelSpec, routes: Iterable[np.ndarray | Sequence[object]], prefill: Sequence[int] = ()
) -> MemoryTrace:
    """One sequence per item of *routes* [n, layers, k], the first *prefill* tokens its prompt."""
    items = []
    for number, route in enumerate(routes):
        experts = np.asarray(route, dtype=np.int16).reshape(-1, model.layers, model.top_k)
        positions = np.arange(len(experts), dtype=np.int32)
        prompt = prefill[number] if number < len(prefill) else 0
        items.append(TokenSequence(number, experts, positions, prompt))
    return MemoryTrace(model, items)


def random_trace(
    seed: int,
    *,
    layers: int = 3,
    experts: int = 6,
    top_k: int = 2,
    lengths: Sequence[int] = (9, 5, 12),
    prefill: int = 3,
) -> MemoryTrace:
    """Skewed random routing, as the public contract tests have it."""
    return example_trace(seed, shape=(layers, experts, top_k), lengths=lengths, prefill=prefill)


def sample(name: str, sequences: int | None = None) -> MemoryTrace:
    """The first *sequences* of a sample trace, in memory."""
    stored = open_trace(SAMPLES[name])
    return MemoryTrace(stored.model, list(stored.sequences(()))[:sequences], name=name)


def gpt_oss(sequences: int | None = None) -> MemoryTrace:
    """The first *sequences* of the recorded gpt-oss-20b routing; skips where it is absent."""
    if not GPT_OSS.is_file():
        pytest.skip(f"{GPT_OSS.name} is not there")
    with np.load(GPT_OSS) as data:
        offsets, experts, first = data["seq_offsets"], data["experts"], data["first_pos"]
    model = example_model(24, 32, 4)
    items = []
    for number in range(len(offsets) - 1 if sequences is None else sequences):
        part = experts[offsets[number] : offsets[number + 1]].astype(np.int16)
        positions = np.arange(len(part), dtype=np.int32) + int(first[number])
        items.append(TokenSequence(number, part, positions))
    return MemoryTrace(model, items, name="gpt-oss-20b")


def context_of(trace: Trace, slots: int, *, pool: str = "global", batch: int = 1) -> Context:
    """What a policy may know of a run over *trace*."""
    model = trace.model
    return Context(model.layers, model.experts, model.top_k, slots, pool=pool, batch=batch)


def replay(
    policy: str | Policy,
    trace: Trace,
    slots: int,
    *,
    batch: int = 1,
    pool: str = "global",
    forecaster: Forecaster | None = None,
    low_bytes_share: float = 0.25,
) -> Planner:
    """Run *policy* over *trace* without a clock; the planner has counts and the whole log."""
    if isinstance(policy, str):
        policy = POLICIES.build(policy)
    batches = Batches(trace, batch)
    future = Future(batches)
    context = Context(
        **{
            **vars(context_of(trace, slots, pool=pool, batch=batch)),
            "popularity": future.popularity,
            "training": learn(trace, trace.model) if forecaster is not None else None,
            "transfer_s": 1e-3,
            "layer_s": 1e-3,
        }
    )
    planner = Planner(
        policy, context, forecaster, low_bytes_share=low_bytes_share, log=DecisionLog(keep=True)
    )
    if forecaster is not None and forecaster.offline:
        forecaster.reveal(future.demand())
    run_counts(planner, future.steps() if policy.offline else batches.steps())
    planner.log.sha256()
    return planner


def machine(
    *,
    copy_s: float = 1e-3,
    idle_extra_s: float = 0.0,
    expert_s: float = 1e-4,
    attention_kernels: int = 0,
    group_kernels: int = 0,
    kernel_min_s: float = 0.0,
    launch_s: float = 0.0,
    sync_s: float = 0.0,
    event_s: float = 0.0,
    copy_issue_s: float = 0.0,
    step_s: float = 0.0,
) -> HardwareProfile:
    """A machine on which an expert of :func:`example_model` takes *copy_s* and *expert_s*.

    What is not given is free: a world of only copies and experts. Attention then takes
    a third of ``expert_s`` for each 1000 dense bytes of a layer.
    """

    def table(alpha: float) -> CopyTable:
        rate = copy_s / EXPERT_BYTES
        sizes = (EXPERT_BYTES // 3, EXPERT_BYTES, EXPERT_BYTES * 3)
        return CopyTable(sizes, tuple(alpha + size * rate for size in sizes))

    way = Direction(table(idle_extra_s), table(0.0))
    return HardwareProfile(
        name="tiny",
        kind="datasheet",
        title="a machine of round numbers",
        gpu=Gpu("tiny", 1 << 40, EXPERT_BYTES / expert_s, 1e30, kernel_min_s),
        link=Link(way, way),
        host=Host(copy_issue_s, launch_s, sync_s, event_s, step_s, 1e9),
        software=Software("tiny", attention_kernels, group_kernels, 0),
        expert=ExpertModel(1, 1.0, 0.0),
        cpu=Cpu(EXPERT_BYTES / (10 * expert_s), 1e30),
        sources={},
    )


#: A machine on which every kind of work costs something.
BUSY = machine(
    idle_extra_s=1.3e-4,
    attention_kernels=3,
    group_kernels=2,
    kernel_min_s=7e-6,
    launch_s=1.1e-5,
    sync_s=1.7e-5,
    event_s=2.3e-5,
    copy_issue_s=5e-6,
    step_s=9e-5,
)


def simulate(
    policy: str | Policy,
    trace: Trace,
    slots: int,
    profile: HardwareProfile = BUSY,
    *,
    batch: int = 1,
    pool: str = "global",
    forecaster: Forecaster | None = None,
    depth: int = 2,
    planner: type[Planner] = Planner,
) -> World:
    """Run *policy* over *trace* in the simulated world."""
    if isinstance(policy, str):
        policy = POLICIES.build(policy)
    costs = Costs(profile, trace.model, policy.low_bits)
    batches = Batches(trace, batch)
    future = Future(batches)
    context = Context(
        **{
            **vars(context_of(trace, slots, pool=pool, batch=batch)),
            "popularity": future.popularity,
            "transfer_s": costs.queued_copy_s(costs.full_bytes),
            "layer_s": costs.layer_s(),
        }
    )
    share = costs.low_bytes / costs.full_bytes
    plans = planner(policy, context, forecaster, low_bytes_share=share, log=DecisionLog(keep=True))
    if forecaster is not None and forecaster.offline:
        forecaster.reveal(future.demand())
    world = World(plans, costs, depth=depth)
    world.run(future.steps())
    return world


class Watched(Planner):
    """A planner that checks, after everything it does, that the ledger holds."""

    def plan(self, routing: Routing) -> Plan:
        before = set(self.cache.slot_of)
        plan = super().plan(routing)
        assert len(self.cache.slot_of) <= self.context.slots
        if len(plan.waves) <= 1:
            missed = set(plan.missed) - set(plan.served or ())
            assert set(routing.experts) & before <= set(self.cache.slot_of)
            assert missed <= set(self.cache.slot_of)
        return plan


@dataclass
class Record:
    """One record of a decision log: an event, or the prefetches before a step."""

    number: int
    step: bool = False
    missed: int = 0
    #: Waves of (copy, slot, victim).
    waves: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])
    prefetch: list[tuple[int, int, int]] = field(default_factory=list)
    served: list[tuple[int, int]] = field(default_factory=list)

    @property
    def moves(self) -> list[tuple[int, int, int]]:
        """Demand first, then prefetches, in the order they were placed."""
        return [move for wave in self.waves for move in wave] + self.prefetch


def records(planner: Planner) -> list[Record]:
    """The decision log of *planner*, read back by its documented form."""
    planner.log.sha256()
    numbers = iter(planner.log.numbers or ())
    found: list[Record] = []
    moves: list[tuple[int, int, int]] = []
    for number in numbers:
        if number == -1:
            found.append(Record(next(numbers), missed=next(numbers)))
            moves = found[-1].waves[0]
        elif number == -5:
            found.append(Record(next(numbers), step=True))
            moves = found[-1].prefetch
        elif number == -2:
            moves = []
            found[-1].waves.append(moves)
        elif number == -3:
            moves = found[-1].prefetch
        elif number == -4:
            found[-1].served.append((next(numbers), next(numbers)))
        else:
            moves.append((number, next(numbers), next(numbers)))
    return found


@contextmanager
def landing_in_groups(least_bytes: int, most_bytes: int) -> Iterator[None]:
    """Within, groups of landing copies are as large as this."""
    before = landing.LEAST_BYTES, landing.MOST_BYTES
    landing.LEAST_BYTES, landing.MOST_BYTES = least_bytes, most_bytes
    try:
        yield
    finally:
        landing.LEAST_BYTES, landing.MOST_BYTES = before
