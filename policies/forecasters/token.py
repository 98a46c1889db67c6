"""Token tables: which experts a token id took in a training trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Forecaster
from policies.forecasting import MAX_TOKENS, any_of, from_layer, predictions
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from traces.trace import FloatArray


@register_forecaster("token")
@dataclass
class Token(Forecaster):
    """The path of a token id is known before layer 0: all layers of the current step.

    A token id that training has not seen falls back on popularity. Counts are smoothed by
    *prior* uses at the popularity of each expert.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokens", "training")

    floor: float = parameter(0.35, "least chance at which an expert is named", low=0, high=1)
    prior: float = parameter(1.0, "weight of popularity, in tokens", low=0.0)

    def reset(self, context: Context) -> None:
        self._context = context
        training = context.training
        assert training is not None
        popularity = training.popularity.astype(np.float64)
        self._popular = popularity * context.top_k / max(popularity[: context.experts].sum(), 1.0)
        self._tables = training.token_experts
        self._path: Forecast = ()

    def on_step(self, step: Step) -> Forecast:
        self._path = ()
        if step.token_ids is None or step.size > MAX_TOKENS:
            return ()
        chances = any_of(np.stack([self._chances(int(token)) for token in step.token_ids]))
        self._path = predictions(chances, 0, self._context.experts, self.floor)
        return self._path

    def _chances(self, token: int) -> FloatArray:
        """Chance of each expert given *token*."""
        table = self._tables.get(token)
        if table is None:
            popular: FloatArray = self._popular
            return popular
        seen = table[: self._context.experts].sum() / self._context.top_k
        chance: FloatArray = (table + self.prior * self._popular) / (seen + self.prior)
        return chance

    def on_route(self, routing: Routing) -> Forecast:
        return from_layer(self._path, routing)
