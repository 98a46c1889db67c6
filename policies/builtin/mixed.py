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
    uses_cpu: ClassVar[bool] = False
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
        #: Uses and full-precision uses of each expert in the sequence, and its three first terms
        #: (times T), at full and at low precision.
        self._uses, self._high_uses = [0] * context.total, [0] * context.total
        self._terms = np.zeros(2 * context.total)
        experts = np.arange(2 * context.total) % context.total
        self._layer_of = experts // context.experts
        #: The last term by the present layer and an expert's.
        layers = np.arange(context.layers)
        distance = (layers - layers[:, None]) % context.layers
        self._nearness = self.w_fld * (1 - distance / context.layers)
        self._token = 1
        self._layer = 0
        self._sequences: frozenset[int] = frozenset()
        self._locked: dict[int, int] = {}
        self._now = -1
        self._weights: FloatArray | None = None
        self._usual = np.full(context.top_k, 1.0 / context.top_k)
        self._expected = [HIGH] * context.top_k

    def _priority(self, copies: IntArray) -> FloatArray:
        terms = self._terms.take(copies) / self._token
        nearness = self._nearness[self._layer].take(self._layer_of.take(copies))
        priority: FloatArray = terms + nearness
        return priority

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        """Forget the counts of a sequence when another begins."""
        ids = step.sequence_ids
        sequences = frozenset(ids.tolist()) if ids is not None else frozenset()
        if not sequences <= self._sequences:
            for counts in (self._uses, self._high_uses):
                counts[:] = [0] * len(counts)
            self._terms.fill(0.0)
            self._token = 0
        self._sequences = sequences
        self._token += 1
        return self._wanted(forecast)

    def on_route(self, routing: Routing) -> None:
        self._now, self._layer = routing.event, routing.layer
        self._ranked.stale()
        self._asked = self._precisions(routing)
        self._count(self._asked)
        for copy in [c for c, event in self._locked.items() if event <= routing.event]:
            del self._locked[copy]

    def _count(self, asked: Mapping[int, int]) -> None:
        """Note a use of each expert, at the precision *asked* of it."""
        terms, uses, high_uses, total = (
            self._terms,
            self._uses,
            self._high_uses,
            self._context.total,
        )
        recent = self.w_lru * self._token
        for expert, precision in asked.items():
            uses[expert] += 1
            high_uses[expert] += precision == HIGH
            term = recent + self.w_lfu * uses[expert] + self.w_lhu * high_uses[expert]
            terms[expert] = terms[expert + total] = term

    def _precisions(self, routing: Routing) -> dict[int, int]:
        """The precision each expert of the demand is asked for, by the most demanding token."""
        weights = routing.token_weights
        if weights is None:
            return dict.fromkeys(routing.experts, HIGH)
        self._weights = weights = np.asarray(weights, dtype=np.float64)
        base = routing.layer * self._context.experts
        asked: dict[int, int] = dict.fromkeys(routing.experts, SKIP)
        for ids, levels in zip(routing.token_experts.tolist(), self._levels(weights), strict=True):
            for id, level in zip(ids, levels, strict=True):
                if level > asked[base + id]:
                    asked[base + id] = level
        return asked

    def _expect(self, weights: FloatArray) -> None:
        """What a gate's ranks usually weigh says at which precision to fetch the predicted."""
        mean = np.add.reduce(weights, axis=0) / len(weights)
        self._usual += 0.05 * (mean / max(np.add.reduce(mean), 1e-30) - self._usual)
        self._expected = self._levels(self._usual[None])[0]

    def _levels(self, weights: FloatArray) -> list[list[int]]:
        """SKIP, LOW or HIGH for *weights* [T, k], each row falling."""
        t1, t2 = self.t1, self.t2
        low = LOW if self._context.low_slots else HIGH
        found = []
        totals = np.add.reduce(weights, axis=1).tolist()
        for row, total in zip(weights.tolist(), totals, strict=True):
            levels, passed = [], 0.0
            total = max(total, 1e-30)
            for weight in row:
                passed += weight
                before = (passed - weight) / total
                levels.append(HIGH if before <= t1 else low if before <= t2 else SKIP)
            levels[0] = HIGH
            found.append(levels)
        return found

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
        if self._weights is not None:
            self._expect(self._weights)
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
