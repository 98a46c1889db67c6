"""A policy in one file: keeps what was used often of late, and fetches what is forecast.

Run it with ``simctl run --policy examples/fading.py:Fading --trace FILE``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Policy
from policies.registry import parameter
from policies.routing import Routing


@dataclass
class Fading(Policy):
    """Every use of an expert counts 1 and fades; the coldest expert goes first."""

    forecasts: ClassVar[bool] = True

    half_life: float = parameter(16.0, "steps after which a use counts half", low=0.1, high=1e6)
    reach: int = parameter(1, "layers ahead that are fetched for; 0: none", low=0, high=8)
    chance: float = parameter(0.7, "least chance worth a move", low=0, high=1)

    def reset(self, context: Context) -> None:
        self.fade = 0.5 ** (1 / (self.half_life * context.layers))
        self.heat = np.zeros(context.total)
        self.held: set[int] = set()
        self.coming: set[int] = set()

    def on_route(self, routing: Routing) -> None:
        self.heat *= self.fade
        self.heat[routing.experts] += 1
        self.coming.difference_update(routing.experts)

    def on_load(self, copy: int) -> None:
        self.held.add(copy)

    def on_evict(self, copy: int) -> None:
        self.held.remove(copy)

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterator[int]:
        """What the next layers are likely to want; it must not push itself out again."""
        near = forecast[: self.reach]
        pairs = [pair for p in near for pair in zip(p.experts, p.scores, strict=True)]
        likely = [expert for expert, score in pairs if score >= self.chance]
        self.coming = set(likely)
        yield from (expert for expert in likely if expert not in self.held)

    def victims(self, incoming: int) -> Iterable[int]:
        cold = sorted(self.held - self.coming, key=self.heat.__getitem__)
        return cold if incoming in self.coming else [*cold, *self.coming]
