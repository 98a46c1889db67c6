"""Paths: predictions as columns, which say and decide what a list of predictions would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from policies.base import Forecast, Forecaster, Path, Prediction, Reuse, StepForecast, triples
from policies.forecasting import from_layer, predictions
from policies.registry import FORECASTERS
from policies.routing import Routing, Step
from tests.helpers import replay, sample
from traces.trace import FloatArray, MemoryTrace

FOUND = [
    Prediction(1, [1, 0], [0.9, 0.5]),
    Prediction(3, [9], [0.8]),
    Prediction(4, [12, 13], [0.7, 0.7]),
]


def named(scores: FloatArray, experts: int, floor: float, base: int) -> list[Prediction]:
    """What :func:`predictions` says, layer by layer and expert by expert."""
    found = []
    for layer, row in enumerate(scores.reshape(-1, experts).tolist()):
        best = sorted((-score, id) for id, score in enumerate(row) if score >= floor)
        ids = [base + layer * experts + id for _, id in best]
        if ids:
            found.append(Prediction(layer + 1, ids, [-score for score, _ in best]))
    return found


def test_a_path_is_the_sequence_of_its_predictions() -> None:
    path = Path.of(FOUND)
    assert Path.of(path) is path
    assert (len(path), list(path), path[1], path[-1]) == (3, FOUND, FOUND[1], FOUND[2])
    assert list(path[:2]) == FOUND[:2]
    assert list(path + path[2:]) == [*FOUND, FOUND[2]]
    assert not Path.of(())
    assert list(triples(path)) == list(triples(FOUND)) == FOUND


@pytest.mark.parametrize("layer", range(4))
def test_what_is_left_of_a_path(layer: int) -> None:
    path, routing = Path.of(FOUND), Routing(Step(0, "decode", 1), layer, [0], layer)
    left = from_layer(path, routing)
    assert isinstance(left, Path)
    assert list(left) == from_layer(FOUND, routing)
    assert left.origin is path.origin
    assert left.origin is not Path.of(FOUND).origin


def test_the_forecast_of_a_step_is_its_path() -> None:
    def ask() -> Reuse | None:
        return None

    path = Path.of(FOUND)
    for given in (path, FOUND):
        forecast = StepForecast(given, ask)
        assert list(forecast) == FOUND
        assert forecast.reuse is ask
    assert StepForecast(path, ask).origin is path.origin


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.5, 2.0])
def test_experts_are_named_layer_by_layer(floor: float) -> None:
    """With many equal scores, of which the lower id comes first."""
    rng = np.random.default_rng(0)
    for layers in (1, 5):
        scores = rng.integers(0, 8, layers * 7) / 8
        assert list(predictions(scores, 2, 7, floor)) == named(scores, 7, floor, 14)


class Listed(Forecaster):
    """The truth of the next two steps or of this one; as a path, or as lists made anew."""

    offline = True

    def __init__(self, *, columns: bool, steps: int, wrong: float) -> None:
        # The sample's model has eight layers.
        self._inner = FORECASTERS.build(f"oracle:horizon={8 * steps},accuracy={1 - wrong}")
        self.reset, self.reveal = self._inner.reset, self._inner.reveal  # type: ignore[method-assign]
        self._columns = columns
        self._drop = np.random.default_rng(0)

    def on_step(self, step: Step) -> Forecast:
        self._path = Path.of([self._noisy(p) for p in self._inner.on_step(step)])
        return StepForecast(self._path if self._columns else list(self._path), self.reuse)

    def _noisy(self, prediction: Prediction) -> Prediction:
        chances = np.sort(self._drop.random(len(prediction.experts)))[::-1].tolist()
        return prediction._replace(scores=chances)

    def on_route(self, routing: Routing) -> Forecast:
        self._inner.on_route(routing)
        left = from_layer(self._path, routing)
        return left if self._columns else list(left)

    def reuse(self) -> Reuse | None:
        return self._inner.reuse()


@pytest.fixture(scope="module")
def granular() -> MemoryTrace:
    return sample("granular-64x8", 2)


@pytest.mark.parametrize("policy", ["predictive", "predictive:horizon=2,confidence=0.1,margin=0"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_path_decides_as_its_predictions_do(
    granular: MemoryTrace, policy: str, steps: int
) -> None:
    """Only near events are looked at again where the rest is known: one choice is not another."""
    logs: list[Sequence[str]] = []
    for columns in (True, False):
        forecaster = Listed(columns=columns, steps=steps, wrong=0.2)
        planner = replay(policy, granular, 200, forecaster=forecaster)
        assert planner.counts["prefetch"] > 0
        logs.append(planner.log.sha256())
    assert logs[0] == logs[1]
