"""Mixed: HOBBIT's mixed-precision serving, prefetching and four-term eviction priority."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Policy, Service, Substitute
from policies.orders import Ranked
from policies.registry import parameter, register
from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray

#: Precision that a use of an expert asks for, from the least to the most.
SKIP, LOW, HIGH = range(3)


@register("mixed")
@dataclass
class Mixed(Policy):
    """Serves unimportant missed experts at low precision, or not at all (arXiv 2411.01433).

    *Serving* (section 3.2): a token's experts are ordered by gate weight, normalised over its
    top-k; the score of one is the weight before it. A missed expert is loaded at full
    precision up to score *t1*, at low precision up to *t2* and skipped beyond; over several
    tokens the most demanding wins. *Prefetching* (3.3): the layers ahead are walked until one
    lacks a predicted expert; what it lacks is fetched, at the precision that its rank usually
    asks for, and what is predicted stays. *Eviction* (3.4), in a pool per precision: lowest

        w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l - l_now + L) mod L) / L)

    with R the token of the last use, F the uses and H the full-precision uses in this
    sequence, T the present token, L layers. The paper fits its weights and does not print
    them: equal ones are the default here.
    """

    exact: ClassVar[bool] = False
    forecasts: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("weights",)

    t1: float = parameter(0.6, "score up to which full precision is used", low=0, high=1)
    t2: float = parameter(0.9, "score up to which low precision is used", low=0, high=1)
    low_bits: int = parameter(4, "bits of a low-precision copy", low=2, high=8)
    low_share: float = parameter(0.25, "share of the budget for such copies", low=0.01, high=0.9)
    depth: int = parameter(2, "layers ahead that are walked", low=0, high=8)
    w_lru: float = parameter(0.25, "weight of recency", low=0, high=1)
    w_lfu: float = parameter(0.25, "weight of frequency", low=0, high=1)
    w_lhu: float = parameter(0.25, "weight of full-precision frequency", low=0, high=1)
    w_fld: float = parameter(0.25, "weight of layer distance", low=0, high=1)

    def __post_init__(self) -> None:
        if self.t1 > self.t2:
            raise ValueError(f"t1 is {self.t1}, expected at most t2 = {self.t2}")

    def reset(self, context: Context) -> None:
        self._context = context
        self._ranked = Ranked(context, self._priority)
        self._held: set[int] = set()
        self._recent, self._uses, self._high_uses = (np.zeros(context.total) for _ in range(3))
        self._token = 1
        self._layer = 0
        self._sequences: frozenset[int] = frozenset()
        self._locked: dict[int, int] = {}
        self._now = -1
        self._usual = np.full(context.top_k, 1.0 / context.top_k)
        self._expected = [HIGH] * context.top_k

    def _priority(self, copies: IntArray) -> FloatArray:
        experts = copies % self._context.total
        layers = self._context.layers
        distance = (experts // self._context.experts - self._layer + layers) % layers
        terms = (
            self.w_lru * self._recent[experts]
            + self.w_lfu * self._uses[experts]
            + self.w_lhu * self._high_uses[experts]
        )
        priority: FloatArray = terms / self._token + self.w_fld * (1 - distance / layers)
        return priority

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        """Forget the counts of a sequence when another begins."""
        ids = step.sequence_ids
        sequences = frozenset(ids.tolist()) if ids is not None else frozenset()
        if not sequences <= self._sequences:
            for counts in (self._recent, self._uses, self._high_uses):
                counts[:] = 0
            self._token = 0
        self._sequences = sequences
        self._token += 1
        return self._wanted(forecast)

    def on_route(self, routing: Routing) -> None:
        self._now, self._layer = routing.event, routing.layer
        self._ranked.stale()
        self._asked = self._precisions(routing)
        self._recent[routing.experts] = self._token
        self._uses[routing.experts] += 1
        self._high_uses[[e for e, p in self._asked.items() if p == HIGH]] += 1
        for copy in [c for c, event in self._locked.items() if event <= routing.event]:
            del self._locked[copy]

    def _precisions(self, routing: Routing) -> dict[int, int]:
        """The precision each expert of the demand is asked for, by the most demanding token."""
        weights = routing.token_weights
        if weights is None:
            return dict.fromkeys(routing.experts, HIGH)
        asked = self._levels(np.asarray(weights, dtype=np.float64))
        self._expect(np.asarray(weights, dtype=np.float64))
        best = np.zeros(self._context.experts, dtype=np.int64)
        np.maximum.at(best, routing.token_experts.reshape(-1), asked.reshape(-1))
        base = routing.layer * self._context.experts
        return {expert: int(best[expert - base]) for expert in routing.experts}

    def _expect(self, weights: FloatArray) -> None:
        """What a gate's ranks usually weigh says at which precision to fetch the predicted."""
        mean = weights.mean(axis=0)
        self._usual += 0.05 * (mean / max(mean.sum(), 1e-30) - self._usual)
        self._expected = self._levels(self._usual[None])[0].tolist()

    def _levels(self, weights: FloatArray) -> IntArray:
        """SKIP, LOW or HIGH for *weights* [T, k], each row falling."""
        total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
        before = (np.cumsum(weights, axis=1) - weights) / total
        levels: IntArray = (before <= self.t1).astype(np.int64) + (before <= self.t2)
        levels[:, 0] = HIGH
        if not self._context.low_slots:
            levels[levels == LOW] = HIGH
        return levels

    def serve(self, routing: Routing, missed: Sequence[int]) -> Mapping[int, Service | Substitute]:
        services = {LOW: Service.LOW, SKIP: Service.SKIP}
        asked = self._asked
        return {e: services[asked[e]] for e in missed if asked[e] != HIGH}

    def on_load(self, copy: int) -> None:
        self._held.add(copy)
        self._ranked.add(copy)

    def on_evict(self, copy: int) -> None:
        self._held.discard(copy)
        self._ranked.remove(copy)
        self._locked.pop(copy, None)

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return self._wanted(forecast)

    def _wanted(self, forecast: Forecast) -> Iterator[int]:
        """Walk the layers ahead to the first that lacks something, and fetch that."""
        for ahead, experts, _ in forecast[: self.depth]:
            lacking = []
            for expert, level in zip(experts, self._expected, strict=False):
                copy = expert if level == HIGH else self._context.low(expert)
                self._locked[expert] = self._locked[copy] = self._now + ahead
                if level != SKIP and copy not in self._held and expert not in self._held:
                    lacking.append(copy)
            if lacking:
                yield from lacking
                return

    def victims(self, incoming: int) -> Iterator[int]:
        """By priority, what is predicted only for demand."""
        locked = []
        for copy in self._ranked.least(incoming):
            if copy in self._locked:
                locked.append(copy)
            else:
                yield copy
        if self._locked.get(incoming, -1) <= self._now:
            yield from locked
