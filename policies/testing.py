"""Contract tests for policies and forecasters, to subclass in a test file of one's own.

Needs pytest only to be run: the classes hold plain assertions. Nothing here keeps time but one
check that a policy's work does not grow with the slots.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from policies.base import Context, Forecast, Forecaster, Policy, StepForecast
from policies.batching import Batches
from policies.decisions import DecisionLog
from policies.examples import example_trace
from policies.future import Future
from policies.planner import Planner, run_counts
from policies.registry import FORECASTERS, POLICIES, parameters
from policies.routing import Routing, Step
from policies.training import learn
from traces.errors import InputError
from traces.trace import MemoryTrace

#: How much more an event may cost with 16 times the slots.
GROWTH = 8.0


class PolicyContract:
    """What every policy must do; subclass it in a test file, and pytest runs it all.

    ::

        from policies.testing import PolicyContract

        class TestMine(PolicyContract):
            policy = "my.py:Mine"

    *policy* is text as for ``--policy``; override :meth:`make_policy` for a policy that needs
    more. A policy that wants forecasts is given *forecaster*. Where its work per event does
    grow with the slots, and is meant to, set *scales* to False.
    """

    policy: str = ""
    forecaster: str = "oracle:accuracy=0.7"
    scales: bool = True

    def make_policy(self) -> Policy:
        """A new policy, as it is before its first run."""
        return POLICIES.build(self.policy)

    def make_forecaster(self) -> Forecaster:
        """A new forecaster, for policies that want one."""
        return FORECASTERS.build(self.forecaster)

    def run(
        self,
        trace: MemoryTrace,
        slots: int,
        *,
        batch: int = 1,
        pool: str = "global",
        policy: Policy | None = None,
    ) -> Planner:
        """Replay *trace*, without a clock but under every rule; the planner knows the rest."""
        policy = policy or self.make_policy()
        batches = Batches(trace, batch)
        future = Future(batches)
        context = dataclasses.replace(
            _context(trace, slots, pool, batch), popularity=future.popularity
        )
        forecaster = self.make_forecaster() if policy.forecasts else None
        planner = Planner(policy, context, forecaster, low_bytes_share=0.3, log=DecisionLog(True))
        if forecaster is not None and forecaster.offline:
            forecaster.reveal(future.demand())
        run_counts(planner, future.steps() if policy.offline else batches.steps())
        return planner

    def test_has_a_name(self) -> None:
        assert self.make_policy().name, "a policy needs a name"

    def test_the_same_run_takes_the_same_decisions(self) -> None:
        trace = example_trace(1)
        first, second = self.run(trace, 7), self.run(trace, 7)
        assert first.log.sha256() == second.log.sha256(), "two equal runs decided differently"

    def test_reset_forgets_the_run_before(self) -> None:
        fresh = self.run(example_trace(1), 7)
        policy = self.make_policy()
        self.run(example_trace(2, shape=(2, 9, 3)), 11, pool="layer", policy=policy)
        again = self.run(example_trace(1), 7, policy=policy)
        assert fresh.log.sha256() == again.log.sha256(), "reset() leaves something behind"

    def test_every_budget_from_top_k_up(self) -> None:
        trace = example_trace(3)
        for slots in range(trace.model.top_k, trace.model.total_experts + 1):
            assert len(self.run(trace, slots).cache) <= 4 * slots, f"over budget at {slots} slots"

    def test_a_pool_for_every_layer(self) -> None:
        trace = example_trace(4)
        for slots in range(trace.model.layers * trace.model.top_k, trace.model.total_experts + 1):
            self.run(trace, slots, pool="layer")

    def test_several_sequences_at_once(self) -> None:
        trace = example_trace(5, lengths=(4, 9, 1, 6, 3), prefill=2)
        for batch in (1, 2, 4, 9):
            for pool in ("global", "layer"):
                self.run(trace, 9, batch=batch, pool=pool)

    def test_prompts_that_demand_more_than_the_budget(self) -> None:
        trace = example_trace(6, shape=(2, 16, 2), lengths=(40, 30), prefill=25)
        for slots in (2, 3, 5):
            self.run(trace, slots, batch=2)

    def test_a_trace_of_one_token(self) -> None:
        for prefill in (0, 1):
            trace = example_trace(7, lengths=(1,), prefill=prefill)
            assert self.run(trace, 2).counts["missed"] <= trace.model.layers * trace.model.top_k

    def test_one_layer_of_experts_and_all_of_them_chosen(self) -> None:
        self.run(example_trace(8, shape=(1, 4, 4)), 4)
        self.run(example_trace(8, shape=(1, 4, 1)), 1)

    def test_victims_end_and_asking_changes_nothing(self) -> None:
        trace = example_trace(9, lengths=(20, 20))
        asked = _Asking(self.make_policy())
        plain, curious = self.run(trace, 8), self.run(trace, 8, policy=asked)
        assert plain.log.sha256() == curious.log.sha256(), "asking for victims changed something"
        assert not asked.endless, f"victims() goes on after {asked.endless} candidates"

    def test_refuses_victims_only_if_it_says_so(self) -> None:
        policy = self.make_policy()
        trace = example_trace(12, prefill=0)
        # Enough for all that an event demands at either precision, and no more than that.
        planner = self.run(trace, 4 * trace.model.top_k, policy=policy)
        numbers = planner.log.numbers
        assert numbers is not None
        waves = -2 in numbers
        assert policy.refuses_victims or not waves, "refuses victims, but does not say so"

    def test_an_exact_policy_computes_every_expert(self) -> None:
        policy = self.make_policy()
        if not policy.exact:
            return
        planner = self.run(example_trace(10), 6, policy=policy)
        changed = {"low", "skip", "substitute"} & set(planner.quality)
        assert not changed, f"declares exact = True, but served experts by {changed}"

    def test_parameters_work_over_their_whole_range(self) -> None:
        if not self.policy:
            return
        joint = "," if "=" in self.policy else ":"
        trace = example_trace(11)
        for name, field in parameters(type(self.make_policy())).items():
            for value in (field.metadata.get("low"), field.metadata.get("high")):
                if value is None:
                    continue
                try:
                    policy = POLICIES.build(f"{self.policy}{joint}{name}={value}")
                except InputError:  # two parameters that do not go together
                    continue
                self.run(trace, 8, policy=policy)

    def test_work_does_not_grow_with_the_slots(self) -> None:
        if not self.scales:
            return
        small, large = (self._event_s(slots) for slots in (64, 1024))
        assert large < GROWTH * small, (
            f"{large * 1e6:.0f} us per event with 1024 slots, {small * 1e6:.0f} us with 64"
        )

    def _event_s(self, slots: int) -> float:
        """Processor seconds per event where most accesses miss, the best of three."""
        trace = example_trace(12, shape=(16, 512, 2), lengths=(150,), prefill=0, skew=0.0)
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            self.run(trace, slots)
            best = min(best, time.process_time() - began)
        return best / (150 * 16)


class _Asking(Policy):
    """Passes everything on to *inner*, but lists all victims before it asks for them again."""

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self.name, self.exact, self.offline = inner.name, inner.exact, inner.offline  # type: ignore[misc]
        self.forecasts, self.needs = inner.forecasts, inner.needs  # type: ignore[misc]
        self.low_bits, self.low_share = inner.low_bits, inner.low_share
        self.endless = 0
        for hook in ("on_route", "serve", "on_load", "on_evict", "plan_step", "prefetch"):
            setattr(self, hook, getattr(inner, hook))

    def reset(self, context: Context) -> None:
        self._most = 8 * context.total + 64
        self._inner.reset(context)

    def serve(self, routing: Routing, missed: Sequence[int]) -> None:
        """Stands in for the inner one's, so that the planner asks."""

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        """Stands in for the inner one's, so that the planner asks."""
        return ()

    def victims(self, incoming: int) -> Iterable[int]:
        named = sum(1 for _ in islice(self._inner.victims(incoming), self._most))
        self.endless = max(self.endless, named if named == self._most else 0)
        return self._inner.victims(incoming)


class ForecasterContract:
    """What every forecaster must do; subclass it in a test file like :class:`PolicyContract`.

    ::

        from policies.testing import ForecasterContract

        class TestMine(ForecasterContract):
            forecaster = "my.py:Mine"
    """

    forecaster: str = ""

    def make_forecaster(self) -> Forecaster:
        """A new forecaster, as it is before its first run."""
        return FORECASTERS.build(self.forecaster)

    def run(
        self, trace: MemoryTrace, *, batch: int = 1, forecaster: Forecaster | None = None
    ) -> list[tuple[int, Forecast]]:
        """All forecasts over *trace*, each with the event before it."""
        forecaster = forecaster or self.make_forecaster()
        forecaster.reset(_context(trace, trace.model.total_experts // 2, "global", batch))
        batches = Batches(trace, batch)
        if forecaster.offline:
            forecaster.reveal(Future(batches).demand())
        return list(_forecasts(forecaster, batches.steps()))

    def test_has_a_name(self) -> None:
        assert self.make_forecaster().name, "a forecaster needs a name"

    def test_the_same_run_gives_the_same_forecasts(self) -> None:
        trace = example_trace(1)
        assert self.run(trace) == self.run(trace), "two equal runs forecast differently"

    def test_reset_forgets_the_run_before(self) -> None:
        trace, forecaster = example_trace(1), self.make_forecaster()
        self.run(example_trace(2, shape=(2, 9, 3)), forecaster=forecaster)
        assert self.run(trace) == self.run(trace, forecaster=forecaster), "reset() leaves something"

    def test_forecasts_are_well_formed(self) -> None:
        """Nearest event first; experts of that event's layer, once each, most likely first."""
        for trace in (example_trace(3), example_trace(4, shape=(5, 8, 3), lengths=(30, 4, 4))):
            layers, experts = trace.model.layers, trace.model.experts
            for batch in (1, 3):
                for event, forecast in self.run(trace, batch=batch):
                    distances = [prediction.ahead for prediction in forecast]
                    assert distances == sorted(set(distances)), "not nearest first, or one twice"
                    for ahead, named, scores in forecast:
                        assert ahead >= 1, "names an event that is over"
                        assert len(named) == len(set(named)) == len(scores), "an expert twice"
                        layer = (event + ahead) % layers
                        wrong = [e for e in named if e // experts != layer]
                        assert not wrong, f"names experts {wrong} for layer {layer}"
                        assert list(scores) == sorted(scores, reverse=True), "not by likelihood"
                        assert all(0.0 <= score <= 1.0 for score in scores), "no probability"

    def test_reuse_is_well_formed_and_asking_changes_nothing(self) -> None:
        """Chances of all experts over windows that rise; they may be asked for at any event."""
        trace = example_trace(8, lengths=(70, 9, 12), prefill=3)
        for batch in (1, 3):
            for asked_at in range(trace.model.layers + 1):
                forecaster = _Asked(self.make_forecaster(), asked_at)
                plain, asked = (self.run(trace, batch=batch, forecaster=f) for f in
                                (self.make_forecaster(), forecaster))  # fmt: skip
                assert plain == asked, "reuse() changes what is forecast"

    def test_a_trace_of_one_token(self) -> None:
        for prefill in (0, 1):
            self.run(example_trace(5, lengths=(1,), prefill=prefill))

    def test_one_layer(self) -> None:
        self.run(example_trace(6, shape=(1, 4, 2)))

    def test_long_prompts_and_wide_batches(self) -> None:
        trace = example_trace(7, lengths=(90, 80, 3, 70), prefill=60)
        for batch in (1, 2, 4):
            self.run(trace, batch=batch)


class _Asked(Forecaster):
    """Passes everything on to *inner*, and asks for reuse before event *at* of every step.

    Events of a step count from 0; *at* the number of layers asks after the last.
    """

    def __init__(self, inner: Forecaster, at: int) -> None:
        self._inner, self._at = inner, at
        self.offline = inner.offline  # type: ignore[misc]
        self.reveal = inner.reveal  # type: ignore[method-assign]

    def reset(self, context: Context) -> None:
        self._context = context
        self._inner.reset(context)

    def on_step(self, step: Step) -> Forecast:
        self._path = self._inner.on_step(step)
        return self._checked(0, self._path)

    def on_route(self, routing: Routing) -> Forecast:
        return self._checked(routing.layer + 1, self._inner.on_route(routing))

    def _checked(self, at: int, forecast: Forecast) -> Forecast:
        if at == self._at and isinstance(self._path, StepForecast):
            reuse = self._path.reuse()
            if reuse is not None:
                windows = list(reuse.windows)
                assert windows, "no windows, expected None"
                assert windows == sorted(set(windows)), "windows do not rise"
                assert all(int(w) == w >= 1 for w in windows), "a window is no number of tokens"
                shape = (len(windows), self._context.total)
                assert reuse.chances.shape == shape, f"{reuse.chances.shape}, expected {shape}"
                inside = (reuse.chances >= 0.0) & (reuse.chances <= 1.0)
                assert inside.all(), "no probability"
        return forecast


def _forecasts(forecaster: Forecaster, steps: Iterable[Step]) -> Iterator[tuple[int, Forecast]]:
    event = 0
    for step in steps:
        yield event - 1, list(forecaster.on_step(step))
        for layer, experts in enumerate(step.demand):
            yield event, list(forecaster.on_route(Routing(step, layer, experts, event)))
            event += 1


def _context(trace: MemoryTrace, slots: int, pool: str, batch: int) -> Context:
    model = trace.model
    return Context(
        model.layers,
        model.experts,
        model.top_k,
        slots,
        pool=pool,
        batch=batch,
        transfer_s=2e-4,
        transfer_low_s=6e-5,
        layer_s=3e-4,
        expert_s=1e-5,
        has_weights=True,
        training=learn(trace, model),
    )
