"""Oracle: knows what comes, with a settable error rate: how good must a predictor be?"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Forecaster, Prediction, Reuse, StepForecast
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from traces.trace import FloatArray


@register_forecaster("oracle")
@dataclass
class Oracle(Forecaster):
    """Names the experts of the next *horizon* events, each right with chance *accuracy*.

    A wrong one is replaced by an expert of the same layer that the event does not demand.
    What is forecast for an event stays the same until it has come. Horizon 0 reaches to the
    end of the step (ExpertFlow's horizon); longer ones go on into the next steps. Of the
    coming *tokens* it tells which experts are used again within 1, 2, 4, ... of them, from
    the same names with the same errors: a named expert is used with chance *accuracy*, any
    other with the chance that makes the sum right.
    """

    offline: ClassVar[bool] = True

    accuracy: float = parameter(1.0, "share of predicted experts that are right", low=0, high=1)
    horizon: int = parameter(0, "events ahead; 0: to the end of the step", low=0, high=4096)
    tokens: int = parameter(8, "coming tokens whose reuse it tells; 0: none", low=0, high=64)

    def reset(self, context: Context) -> None:
        self._context = context
        self._random = np.random.default_rng(context.seed)
        self._coming: deque[Prediction] = deque()
        self._future: Iterator[Sequence[int]] = iter(())
        self._passed = 0

    def reveal(self, demand: Iterable[Sequence[int]]) -> None:
        self._future = iter(demand)

    def on_step(self, step: Step) -> Forecast:
        self._passed = 0
        path = self._forecast(self.horizon or self._context.layers)
        return StepForecast(path, self.reuse) if self.tokens else path

    def on_route(self, routing: Routing) -> Forecast:
        self._look(1)
        self._coming.popleft()
        self._passed = routing.layer + 1
        return self._forecast(self.horizon or self._context.layers - 1 - routing.layer)

    def reuse(self) -> Reuse | None:
        """From the names of the coming steps; asked in the middle of a step, it knows the same.

        Where the trace ends, nothing more is used.
        """
        layers = self._context.layers
        left = layers - self._passed
        self._look(left + layers * self.tokens)
        coming = list(self._coming)[left:]
        none, chances = np.ones(self._context.total), []
        windows = [1 << i for i in range(self.tokens.bit_length())]
        for token in range(windows[-1]):
            none *= 1.0 - self._used(coming[token * layers : (token + 1) * layers])
            if token + 1 in windows:
                chances.append(1.0 - none)
        return Reuse(windows, np.array(chances, np.float32))

    def _used(self, step: Sequence[Prediction]) -> FloatArray:
        """The chance that one step, of which the names are known, uses each expert, [L * E]."""
        experts = self._context.experts
        used = np.zeros(self._context.total)
        for layer, guess in enumerate(step):
            named, first = len(guess.experts), layer * experts
            others = max(experts - named, 1)
            used[first : first + experts] = min((1.0 - self.accuracy) * named / others, 1.0)
            used[list(guess.experts)] = self.accuracy
        return used

    def _forecast(self, reach: int) -> Forecast:
        self._look(reach)
        return [
            Prediction(ahead + 1, coming.experts, coming.scores)
            for ahead, coming in zip(range(reach), self._coming, strict=False)
        ]

    def _look(self, reach: int) -> None:
        while len(self._coming) < reach:
            demand = next(self._future, None)
            if demand is None:
                return
            guess = self._blur(demand)
            self._coming.append(Prediction(0, guess, [self.accuracy] * len(guess)))

    def _blur(self, demand: Sequence[int]) -> list[int]:
        """*demand* with errors: each expert stays with chance *accuracy*."""
        if self.accuracy >= 1.0:
            return list(demand)
        experts = self._context.experts
        base = demand[0] // experts * experts
        wrong = self._random.random(len(demand)) >= self.accuracy
        others = sorted(set(range(base, base + experts)).difference(demand))
        count = min(int(wrong.sum()), len(others))
        chosen = self._random.choice(others, size=count, replace=False).tolist() if count else []
        return sorted([e for e, bad in zip(demand, wrong, strict=True) if not bad] + chosen)
