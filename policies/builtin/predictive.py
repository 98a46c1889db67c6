"""Predictive: ExpertFlow's predictive locality-aware expert caching with correction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from policies.base import Context, Forecast, Policy
from policies.future import NEVER
from policies.orders import recency
from policies.registry import parameter, register
from policies.routing import Routing, Step


@register("predictive")
@dataclass
class Predictive(Policy):
    """Slots follow predicted demand across layers, earliest layers first.

    ExpertFlow (arXiv 2410.17954, section 3.3): what a forecast names for a coming layer is
    protected if it is held and fetched if it is not, nearest layer first, most likely first.
    Once the gate has chosen, a prefetched expert that was wrong becomes the first victim, a
    missed one is loaded ahead of every prefetch (the world's queue lets demand overtake).
    Everything else is evicted least recently used.

    A prefetch must be worth it. With chance p it hides up to a transfer behind the layers
    until its event; in any case it may hold up demand if it is still on the link at the next
    gate. Gain and cost are weighed in seconds, from calibrated constants, the policy's own
    count of what it put on the link, how often events miss, and how many of its earlier
    prefetches came true.
    """

    forecasts: ClassVar[bool] = True

    horizon: int = parameter(8, "events ahead that are fetched for", low=1, high=4096)
    caution: float = parameter(1.0, "weight of a prefetch's cost against its gain", low=0, high=100)
    margin: float = parameter(0.1, "least gain worth a slot, in transfers", low=0, high=1)
    confidence: float = parameter(0.35, "least chance worth protecting or fetching", low=0, high=1)
    protect: bool = parameter(True, "keep held experts that are forecast")

    def reset(self, context: Context) -> None:
        self._recency = recency(context)
        self._transfer_s, self._layer_s = context.transfer_s, context.layer_s
        self._lag_s = 0.0
        self._missing = 0.5
        self._promised = self._kept = 8.0
        self._now = -1
        self._held: set[int] = set()
        self._due: dict[int, int] = {}
        self._named: dict[int, list[int]] = {}
        self._fetched: dict[int, int] = {}

    def on_route(self, routing: Routing) -> None:
        """Correct: what was foreseen for this event and is wrong goes first."""
        self._now = event = routing.event
        self._lag_s = max(0.0, self._lag_s - self._layer_s)
        experts, due, fetched = routing.experts, self._due, self._fetched
        if fetched:
            for expert in experts:
                if expert in fetched:
                    del fetched[expert]
                    self._kept += 1.0
        missing = not self._held.issuperset(experts)
        self._missing += 0.02 * (missing - self._missing)
        for expert in self._named.pop(event, ()):
            if due.get(expert) == event:
                del due[expert]
                if fetched.get(expert) == event:
                    del fetched[expert]
                    self._recency.first(expert)
        self._recency.touch(experts)

    def on_load(self, copy: int) -> None:
        self._held.add(copy)
        self._recency.add(copy)
        if copy in self._fetched:
            self._lag_s += self._transfer_s

    def on_evict(self, copy: int) -> None:
        self._held.discard(copy)
        self._recency.remove(copy)
        self._fetched.pop(copy, None)

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        return self._wanted(forecast)

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        return self._wanted(forecast)

    def _wanted(self, forecast: Forecast) -> Iterator[int]:
        """Note what is foreseen; yield what is worth fetching, nearest layer first."""
        held, due, confidence = self._held, self._due, self.confidence
        for ahead, experts, scores in forecast:
            event = self._now + ahead
            named = self._named.setdefault(event, [])
            for expert, score in zip(experts, scores, strict=True):
                if score < confidence:
                    break
                if expert in held:
                    if self.protect and due.get(expert, NEVER) > event:
                        due[expert] = event
                        named.append(expert)
                elif ahead <= self.horizon:
                    if score < self._least_chance(ahead):
                        break
                    due[expert] = self._fetched[expert] = event
                    self._promised += score
                    named.append(expert)
                    yield expert

    def _least_chance(self, ahead: int) -> float:
        """The chance at which a prefetch for *ahead* events from now starts to pay.

        Gain p * hidden against cost caution * missing * spill, both in seconds: *hidden* is
        what the layers until then cover of a transfer that starts when the link is free,
        *spill* how long it still occupies the link at the next gate.
        """
        transfer, layer = self._transfer_s, self._layer_s
        hidden = min(transfer, ahead * layer - self._lag_s)
        if hidden <= 0.0:
            return 2.0
        spill = min(max(0.0, self._lag_s + transfer - layer), 2.0 * transfer)
        cost = self.caution * self._missing * spill + self.margin * transfer
        honest = min(1.0, self._kept / self._promised)
        return cost / (hidden * honest)

    def victims(self, incoming: int) -> Iterator[int]:
        """Least recent first; what is foreseen only for demand, and the farthest first."""
        due = self._due
        foreseen = []
        for copy in self._recency.order(incoming):
            if copy in due:
                foreseen.append(copy)
            else:
                yield copy
        if incoming not in self._fetched:
            foreseen.sort(key=due.__getitem__, reverse=True)
            yield from foreseen
