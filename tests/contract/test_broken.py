"""The public contract tells broken policies and forecasters from sound ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from policies.base import Context, Forecast, Forecaster, Policy, Prediction, Service
from policies.builtin.lru import LRU
from policies.routing import Routing
from policies.testing import ForecasterContract, PolicyContract
from traces.errors import InputError


class Random(LRU):
    def victims(self, incoming: int) -> Iterable[int]:
        return np.random.default_rng().permutation(list(super().victims(incoming))).tolist()


class Remembers(LRU):
    runs = 0

    def reset(self, context: Context) -> None:
        super().reset(context)
        self.runs += 1

    def victims(self, incoming: int) -> Iterable[int]:
        order = list(super().victims(incoming))
        return order if self.runs == 1 else order[::-1]


class Refuses(LRU):
    def victims(self, incoming: int) -> Iterable[int]:
        return ()


class Endless(LRU):
    def victims(self, incoming: int) -> Iterable[int]:
        return itertools.cycle(list(super().victims(incoming)))


class Changed(LRU):
    asked = 0

    def victims(self, incoming: int) -> Iterable[int]:
        self.asked += 1
        order = list(super().victims(incoming))
        return order[self.asked % 2 :] + order[: self.asked % 2]


class Skips(LRU):
    def serve(self, routing: Routing, missed: object) -> dict[int, Service]:  # type: ignore[override]
        return dict.fromkeys(routing.experts[:1], Service.SKIP)


class Slow(LRU):
    def on_route(self, routing: Routing) -> None:
        super().on_route(routing)
        until = time.process_time() + 3e-7 * len(self._recency.order(0))
        while time.process_time() < until:
            pass


class LooksAhead(LRU):
    def on_route(self, routing: Routing) -> None:
        super().on_route(routing)
        assert routing.next_use


def contract_of(kind: Callable[[], Policy]) -> PolicyContract:
    contract = PolicyContract()
    contract.make_policy = kind  # type: ignore[method-assign]
    return contract


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (Random, "test_the_same_run_takes_the_same_decisions"),
        (Remembers, "test_reset_forgets_the_run_before"),
        (Refuses, "test_every_budget_from_top_k_up"),
        (Refuses, "test_a_pool_for_every_layer"),
        (Endless, "test_victims_end_and_asking_changes_nothing"),
        (Changed, "test_victims_end_and_asking_changes_nothing"),
        (Skips, "test_an_exact_policy_computes_every_expert"),
        (Slow, "test_work_does_not_grow_with_the_slots"),
        (LooksAhead, "test_a_trace_of_one_token"),
    ],
)
def test_a_broken_policy_fails(kind: type[Policy], test: str) -> None:
    with pytest.raises((AssertionError, InputError, LookupError)):
        getattr(contract_of(kind), test)()
    getattr(contract_of(LRU), test)()


class Same(Forecaster):
    name = "same"
    prediction = Prediction(1, (0, 1), (0.9, 0.1))

    def on_route(self, routing: Routing) -> Forecast:
        context = self.context
        layer = (routing.layer + self.prediction.ahead) % context.layers
        experts = [context.expert(layer, id) for id in self.prediction.experts]
        return [self.prediction._replace(experts=experts)]

    def reset(self, context: Context) -> None:
        self.context = context


@pytest.mark.parametrize(
    ("prediction", "sound"),
    [
        (Same.prediction, True),
        (Prediction(4, (1, 0), (0.5, 0.5)), True),
        (Prediction(0, (0, 1), (0.9, 0.1)), False),
        (Prediction(1, (0, 0), (0.9, 0.1)), False),
        (Prediction(1, (0, 1), (0.1, 0.9)), False),
        (Prediction(1, (0, 1), (1.9, 0.1)), False),
        (Prediction(1, (0, 1), (0.9,)), False),
        (Prediction(1, (0, 99), (0.9, 0.1)), False),
    ],
)
def test_a_malformed_forecast_fails(prediction: Prediction, sound: bool) -> None:
    contract = ForecasterContract()
    forecaster = Same()
    forecaster.prediction = prediction
    contract.make_forecaster = lambda: forecaster  # type: ignore[method-assign]
    if sound:
        contract.test_forecasts_are_well_formed()
        return
    with pytest.raises(AssertionError):
        contract.test_forecasts_are_well_formed()
