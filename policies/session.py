"""A run from what a user asks for to a planner and its steps: the same for both worlds."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from policies.base import Context, Forecaster, Policy, Training
from policies.batching import Batches
from policies.budget import Budget
from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.future import Future
from policies.hardware import HardwareProfile, load_profile
from policies.memory import Shape, shape_of
from policies.planner import Planner, run_counts
from policies.registry import FORECASTERS, POLICIES, SCHEDULERS
from policies.routing import Step
from policies.schedule import Schedule, make_schedule, no_clock
from policies.scheduling import BatchScheduler, TokenScheduler
from policies.token_paths import (
    ForecastPaths,
    HistoryPaths,
    PathSource,
    PreviousPaths,
    path_forecaster,
)
from policies.training import check_taught, learn
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import model_sizes, resize
from traces.store import StoredTrace, open_trace
from traces.trace import MemoryTrace, Trace

#: Routing of a trace up to this size is kept in memory, so that it is read once.
KEEP_BYTES = 256 * 2**20

POOLS = ("global", "layer")

#: How decode steps run: one graph each where they can, a chain of graphs, or neither.
COMPUTE = ("graph", "fused", "reference")

#: Slots and the share of accesses missed with them.
CurvePoint = tuple[int, float]


def check_pool(pool: str, slots: int, model: ModelSpec, *, option: str) -> None:
    """Raise :class:`InputError` where *slots* are too few for *pool*, which *option* chose.

    A pool for each layer must hold what one token takes there.
    """
    least = model.layers * model.top_k
    if pool == "layer" and slots < least:
        raise InputError(
            f"{option} layer: {slots} slots are fewer than top_k = {model.top_k} for each of "
            f"{model.layers} layers, expected at least {least}"
        )


def check_compute(compute: str | None, profile: HardwareProfile) -> None:
    """Raise :class:`InputError` where *profile* does not know *compute* of a :class:`Setup`."""
    if compute not in (None, *COMPUTE):
        raise InputError(f"--compute {compute}: expected one of {', '.join(COMPUTE)}")
    if compute == "graph" and profile.whole is None:
        raise InputError(
            f"--compute graph: hardware profile {profile.name} has no section [whole], expected "
            "one that `simctl calibrate` of this version has written anew"
        )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Spare a run the search for reference cycles: it makes none, and millions of objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Setup:
    """Everything but policy and budget: what the runs of a comparison have in common.

    *compute* is how decode steps are simulated: ``graph`` as one graph each where they can,
    which only a profile with ``[whole]`` knows, ``fused`` as chains. None: ``graph`` where the
    profile knows it. What the profile calls eager is eager anyway.
    """

    trace: str
    batch: int = 1
    hardware: str = "h200-pcie5"
    sizes: str | None = None
    forecaster: str | None = None
    scheduler: str = "none"
    pool: str = "global"
    train: str | None = None
    seed: int = 0
    depth: int = 2
    compute: str | None = None


class Prepared(NamedTuple):
    """One run before it starts: *steps* gives its steps, once, in order."""

    planner: Planner
    costs: Costs
    steps: Callable[[], Iterable[Step]]


@dataclass
class TraceSession:
    """A trace on a machine, ready to be run under any policy and budget.

    What does not depend on the policy (the trace, the future, Belady's misses) is worked out
    once. Every mistake in the setup raises :class:`InputError`.
    """

    setup: Setup
    _belady: dict[int, int] = field(default_factory=dict)
    _expected: dict[int, Callable[[], int]] = field(default_factory=dict)
    _division_s: list[float] | None = None

    def __post_init__(self) -> None:
        for option, least in (("batch", 1), ("depth", 1), ("seed", 0)):
            value = getattr(self.setup, option)
            if value < least:
                raise InputError(f"--{option} {value}: expected at least {least}")
        if self.setup.pool not in POOLS:
            raise InputError(f"--pool {self.setup.pool}: expected {' or '.join(POOLS)}")
        self.stored: StoredTrace = open_trace(self.setup.trace)
        self.profile: HardwareProfile = load_profile(self.setup.hardware)
        check_compute(self.setup.compute, self.profile)
        self.model: ModelSpec = self.stored.model
        if self.setup.sizes:
            self.model = resize(self.model, model_sizes(self.setup.sizes))
        self.scheduler: BatchScheduler = SCHEDULERS.build(self.setup.scheduler)
        if self.setup.forecaster is not None:
            FORECASTERS.build(self.setup.forecaster)  # a wrong name must not pass unused

    @cached_property
    def training(self) -> Training | None:
        """What the trace given by ``--train`` teaches."""
        return learn(open_trace(self.setup.train), self.model) if self.setup.train else None

    @cached_property
    def _small(self) -> bool:
        model = self.stored.model
        per_token = model.layers * model.top_k * (2 + 4 * self.stored.has_weights)
        return self.stored.tokens * per_token <= KEEP_BYTES

    @cached_property
    def _routing(self) -> Trace:
        """The trace without what only few policies need, kept in memory if it is small.

        Every column is read once all the same: reading is what refuses a bad one.
        """
        if not self._small:
            for _ in self.stored.sequences():
                pass
            return self.stored
        sequences = [
            dataclasses.replace(s, tokens=None, weights=None, ahead=())
            for s in self.stored.sequences()
        ]
        return MemoryTrace(self.stored.model, sequences, name=self.stored.name)

    def batches(self, columns: frozenset[str] = frozenset()) -> Batches:
        """The batches of a run that needs *columns* of the trace."""
        trace = self.stored if columns else self._routing
        return Batches(trace, self.setup.batch, self.scheduler, columns, self.schedule)

    @cached_property
    def schedule(self) -> Schedule | None:
        """The decode steps of a token scheduler, decided once for all runs; else None."""
        if not isinstance(self.scheduler, TokenScheduler):
            return None
        return self._make_schedule(self.scheduler)

    def division_s(self, clock: Callable[[], float]) -> Sequence[float]:
        """What dividing tokens takes before each decode step, by *clock*; worked out once."""
        if not isinstance(self.scheduler, TokenScheduler):
            return ()
        if self._division_s is None:
            made = self._make_schedule(self.scheduler, clock)
            self._division_s = [step.seating.measured_s for unit in made.units for step in unit]
        return self._division_s

    def _make_schedule(
        self, scheduler: TokenScheduler, clock: Callable[[], float] = no_clock
    ) -> Schedule:
        """Let *scheduler* begin anew and decide every step."""
        model, setup = self.model, self.setup
        context = Context(
            model.layers,
            model.experts,
            model.top_k,
            model.total_experts,
            batch=setup.batch,
            seed=setup.seed,
            training=self.training,
        )
        forecaster = self._path_forecaster(scheduler)
        columns = self._columns(("forecaster", forecaster))
        paths: PathSource = PreviousPaths(model.experts)
        if forecaster is not None:
            paths = ForecastPaths(forecaster, context)
        elif scheduler.paths == "history":
            paths = HistoryPaths(model.experts)
        scheduler.reset(context)
        batches = Batches(
            self.stored if columns else self._routing, setup.batch, scheduler, columns
        )
        return make_schedule(batches.units(), scheduler, paths, model, setup.batch, clock)

    def _path_forecaster(self, scheduler: TokenScheduler) -> Forecaster | None:
        """A forecaster of *scheduler*'s own, where it is shown a forecaster's paths."""
        option = self.setup.forecaster
        named = FORECASTERS.build(option) if option else None
        return path_forecaster(scheduler, named, option)

    @cached_property
    def future(self) -> Future:
        """All that the trace will demand, for offline policies and bounds."""
        return Future(self.batches())

    @cached_property
    def kv_tokens(self) -> int:
        """Most tokens whose keys and values are held at once."""
        return self.batches().peak_kv_tokens()

    @cached_property
    def shape(self) -> Shape:
        """How large the passes of a run become; a unit has rows in the cache for each batch."""
        shape = shape_of(self.batches().members())
        if self.schedule is not None:
            shape = dataclasses.replace(shape, sequences=self.schedule.rows)
        return shape

    def slots(self, budget: Budget) -> int:
        """The slots that *budget* buys for this model on this machine."""
        slots = budget.resolve(self.model, self.profile, self.kv_tokens)
        check_pool(self.setup.pool, slots, self.model, option="--pool")
        return slots

    def costs(self, policy: Policy) -> Costs:
        """What things cost under *policy*; captured decode steps read a whole static cache."""
        captured = self.profile.host.graph_launch_s > 0
        return Costs(
            self.profile,
            self.model,
            policy.low_bits,
            cache_tokens=self.longest if captured else 0,
            whole=self.setup.compute in (None, "graph"),
        )

    @property
    def longest(self) -> int:
        """Positions of the longest sequence."""
        return self.shape.cache_tokens

    def context(self, slots: int, costs: Costs, policy: str = "") -> Context:
        """What a policy may know of a run with *slots* slots."""
        return dataclasses.replace(
            costs.context(policy, slots),
            pool=self.setup.pool,
            batch=self.setup.batch,
            seed=self.setup.seed,
            has_weights=self.stored.has_weights,
            training=self.training,
        )

    def expect_belady(self, slots: int, missed: Callable[[], int]) -> None:
        """Let *missed* answer :meth:`belady_missed` when it is asked for *slots* slots."""
        self._expected[slots] = missed

    def belady_missed(self, slots: int) -> int:
        """Moves of the best demand-only replay with *slots* slots in one global pool."""
        if slots in self._expected:
            self._belady[slots] = self._expected.pop(slots)()
        if slots not in self._belady:
            model = self.model
            context = Context(model.layers, model.experts, model.top_k, slots)
            planner = Planner(POLICIES.build("belady"), context)
            with no_garbage_collection():
                self._belady[slots] = run_counts(planner, self.future.steps())
        return self._belady[slots]

    def fewest_moves(self, slots: int) -> int:
        """Moves that no exact policy which computes on the GPU alone can go below.

        Belady's, where every event's demand fits. An event that runs in waves need not hold
        its demand all at once and may keep up to *slots* other copies that Belady gives up.
        """
        share = slots // self.model.layers if self.setup.pool == "layer" else slots
        return max(0, self.belady_missed(slots) - slots * self.future.events_over(share))

    def check(self, policy_text: str, budget: Budget) -> None:
        """Raise what a run would raise before it starts."""
        policy = POLICIES.build(policy_text)
        self._columns(("policy", policy), ("forecaster", self._forecaster(policy)))
        if isinstance(self.scheduler, TokenScheduler):
            self._columns(("forecaster", self._path_forecaster(self.scheduler)))
        self.slots(budget)

    def prepare(
        self, policy_text: str, budget: Budget, *, log: DecisionLog | None = None
    ) -> Prepared:
        """Build policy, forecaster and planner for one run, and the steps it will take."""
        policy = POLICIES.build(policy_text)
        forecaster = self._forecaster(policy)
        columns = self._columns(("policy", policy), ("forecaster", forecaster))
        costs = self.costs(policy)
        context = self._informed(policy, self.context(self.slots(budget), costs, policy.name))
        share = costs.low_bytes / costs.full_bytes
        planner = Planner(policy, context, forecaster, low_bytes_share=share, log=log)
        batches = self.batches(columns)
        source: Batches | Future = batches
        if policy.offline:
            source = Future(batches) if columns else self.future
        if forecaster is not None and forecaster.offline:
            forecaster.reveal(self.future.demand())
        return Prepared(planner, costs, source.steps)

    def _informed(self, policy: Policy, context: Context) -> Context:
        """*context* with how often the trace uses each expert, for policies that may know."""
        if policy.offline or "popularity" in policy.needs:
            return dataclasses.replace(context, popularity=self.future.popularity)
        return context

    def curve(self, policy_text: str, slots: Sequence[int], max_steps: int) -> list[CurvePoint]:
        """Missed ratio at several budgets, from replays of the first *max_steps* steps.

        Without a clock, for policies that need neither forecast nor gate weights.
        """
        points = []
        for size in slots:
            policy = POLICIES.build(policy_text)
            context = self.context(size, self.costs(policy), policy.name)
            planner = Planner(policy, self._informed(policy, context))
            source = self.future if policy.offline else self.batches()
            missed = run_counts(planner, islice(source.steps(), max_steps))
            points.append((size, missed / max(planner.counts["accesses"], 1)))
        return points

    def _forecaster(self, policy: Policy) -> Forecaster | None:
        """The forecaster that was asked for, or the best that the trace allows."""
        if not policy.forecasts:
            return None
        name = self.setup.forecaster
        if name is None:
            name = "ahead" if self.stored.ahead_depth else "markov"
        return FORECASTERS.build(name)

    def _columns(self, *plugins: tuple[str, Policy | Forecaster | None]) -> frozenset[str]:
        """Columns of the trace that the plug-ins need; what it lacks is an input error."""
        have = {
            "weights": self.stored.has_weights,
            "tokens": self.stored.has_tokens,
            "ahead": self.stored.ahead_depth > 0,
            "training": self.training is not None,
            "popularity": True,
        }
        names = {"weights": ["weights"], "tokens": ["token"]}
        names["ahead"] = [f"ahead_{d + 1}" for d in range(self.stored.ahead_depth)]
        columns: set[str] = set()
        for kind, plugin in plugins:
            for need in plugin.needs if plugin is not None else ():
                if need not in have:
                    raise InputError(
                        f"{kind} {plugin.name!r} needs {need!r}, expected any of "  # type: ignore[union-attr]
                        + ", ".join(have)
                    )
                if not have[need]:
                    where = "--train FILE" if need == "training" else self.setup.trace
                    raise InputError(
                        f"{where}: {kind} {plugin.name!r} needs {need}, expected "  # type: ignore[union-attr]
                        + ("a training trace" if need == "training" else f"a trace with {need}")
                    )
                columns.update(names.get(need, ()))
            if plugin is not None:
                check_taught(plugin, self.training, self.setup.train or "--train")
        return frozenset(columns)
