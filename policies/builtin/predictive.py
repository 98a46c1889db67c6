"""Predictive: ExpertFlow's predictive locality-aware expert caching with correction."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import ClassVar, NamedTuple

from policies.base import Context, Forecast, Path, Policy, StepForecast, triples
from policies.builtin._counted import Avoided, Displaced, Duel, LinkUse, LruBeside
from policies.builtin._habit import Frequent, Habit, Recent
from policies.builtin._next_use import NextUse
from policies.future import NEVER
from policies.registry import parameter, register
from policies.routing import Routing, Step
from traces.errors import InputError

#: How ``predictive`` chooses what to evict.
EVICT = ("reuse", "frequency", "recency")


class Price(NamedTuple):
    """What a prefetch costs, and costs more if it is *wrong*, in seconds.

    *honest* is the share of earlier ones' chances that came true.
    """

    cost: float
    wrong: float
    honest: float


@register("predictive")
@dataclass
class Predictive(Policy):
    """Slots follow predicted demand across layers, earliest layers first.

    ExpertFlow (arXiv 2410.17954, section 3.3): what a forecast names for a coming layer is
    protected if it is held and fetched if it is not, nearest layer first, most likely first.
    Once the gate has chosen, a missed expert is loaded ahead of every prefetch (the world's
    queue lets demand overtake), and a prefetched one that was wrong is protected no longer; by
    recency it becomes the first victim.

    Where the forecaster tells what the tokens after the step use again, the expert whose next
    use is expected last is evicted, across layers or, with a pool for each, within one, and a
    prefetch displaces only what is expected later than itself. Everything else goes by recency,
    or with ``evict=frequency`` by how often it was used of late, at short or at long range,
    whichever names the better victims; so does all of it while forecasts of reuse name worse ones.

    A prefetch must be worth it. With chance p it hides up to a transfer behind the layers
    until its event; in any case it may hold up demand if it is still on the link at the next
    gate; and if it is wrong it has taken from others what of the link is in use. Gain and cost
    are weighed in seconds, from calibrated constants, the policy's own count of what it put on
    the link, how often events miss, and how many of its earlier prefetches came true. Where a
    layer does not cover a transfer, a prefetch also counts no more than the misses that it
    avoids, against LRU replayed beside. Where it does, but demand alone keeps the link busy,
    what prefetches displaced and an event then missed is taken off.
    """

    forecasts: ClassVar[bool] = True

    horizon: int = parameter(8, "events ahead that are fetched for", low=1, high=4096)
    caution: float = parameter(1.0, "weight of a prefetch's cost against its gain", low=0, high=100)
    margin: float = parameter(0.1, "least gain worth a slot, in transfers", low=0, high=1)
    confidence: float = parameter(0.35, "least chance worth protecting or fetching", low=0, high=1)
    protect: bool = parameter(True, "keep held experts that are forecast")
    evict: str = parameter("reuse", "by forecasts of reuse, else recency; by frequency; or recency")
    half_life: float = parameter(
        96.0, "steps after which a use counts half, at most; evict=frequency", low=1, high=1e6
    )
    age: float = parameter(
        0.2, "tokens by which a token without use delays the next; evict=reuse", low=0, high=8
    )

    def __post_init__(self) -> None:
        if self.evict not in EVICT:
            raise InputError(f"evict is {self.evict!r}, expected {', '.join(EVICT)}")

    def reset(self, context: Context) -> None:
        self._context = context
        frequent = self.evict == "frequency"
        self._habit: Habit = Frequent(context, self.half_life) if frequent else Recent(context)
        self._next_use: NextUse | None = None
        self._transfer_s, self._layer_s = context.transfer_s, context.layer_s
        self._lag_s = 0.0
        self._missing = 0.5
        self._promised = self._kept = 8.0
        saturated = context.transfer_s > context.layer_s
        self._avoided = Avoided() if saturated else None
        self._lru = LruBeside(context) if saturated or frequent else None
        #: What the present event missed, and would have missed without prefetches.
        self._misses = self._alone = 0
        self._displaced = Displaced(context)
        self._link = LinkUse(context)
        self._duel = Duel()
        self._pinned: Sequence[int] = ()
        self._now = -1
        self._held: set[int] = set()
        self._due: dict[int, int] = {}
        self._named: dict[int, list[int]] = {}
        #: The origin of the step's path, if it names a layer once: held ones have been noted.
        self._noted: object = None
        self._fetched: dict[int, int] = {}

    def on_route(self, routing: Routing) -> None:
        """Correct: what was foreseen for this event and is wrong goes first."""
        self._now = event = routing.event
        self._lag_s = max(0.0, self._lag_s - self._layer_s)
        experts, due, fetched = routing.experts, self._due, self._fetched
        next_use = self._next_use
        true = self._came_true(experts) if fetched else 0
        missing = not self._held.issuperset(experts)
        self._missing += 0.02 * (missing - self._missing)
        self._link.use()
        missed = set(experts) - self._held if missing else ()
        self._misses, self._alone = len(missed), len(missed) + true
        self._displaced.use(event, missed, len(missed))
        for expert in self._named.pop(event, ()):
            if due.get(expert) == event:
                del due[expert]
                if next_use is not None:
                    next_use.forget(expert)
                if fetched.get(expert) == event:
                    del fetched[expert]
                    self._habit.wrong(expert)
        self._habit.use(experts)
        if next_use is not None:
            self._pinned = experts
            self._duel.use(experts)
            next_use.use(event, experts)

    def _came_true(self, experts: Sequence[int]) -> int:
        """Count those of *experts* that were fetched ahead of this event; how many are held."""
        fetched, true = self._fetched, 0
        for expert in experts:
            if expert in fetched:
                del fetched[expert]
                self._kept += 1.0
                if expert in self._held:
                    self._displaced.win()
                    true += 1
        return true

    def on_load(self, copy: int) -> None:
        self._held.add(copy)
        self._link.load()
        self._habit.add(copy)
        if self._next_use is not None:
            self._next_use.add(copy)
        self._displaced.load(self._fetched.get(copy, -1))
        if copy in self._fetched:
            self._lag_s += self._transfer_s
            if self._avoided is not None:
                self._avoided.spend()

    def on_evict(self, copy: int) -> None:
        self._displaced.evict(copy)
        if self._next_use is not None:
            if self._duel.due():
                self._judge(self._next_use, copy)
            self._next_use.remove(copy)
        self._held.discard(copy)
        self._habit.remove(copy, self._due)
        self._fetched.pop(copy, None)

    def _judge(self, next_use: NextUse, copy: int) -> None:
        """Watch *copy*, which goes, and what the order that is not followed would have evicted."""
        if not next_use.known:
            return
        lost = self._duel.lost
        order = next_use.order(copy) if lost else self._habitual(copy)
        other = next((c for c in order if c in self._held and c not in self._pinned), copy)
        self._duel.watch(*((other, copy) if lost else (copy, other)))

    def plan_step(self, step: Step, forecast: Forecast) -> Iterable[int]:
        """Ready the order of eviction; what is held and foreseen counts before any fetch."""
        ask = forecast.reuse if isinstance(forecast, StepForecast) else None
        if ask is not None and self._next_use is None and self.evict == "reuse":
            self._next_use = NextUse(self._context, self.age, self._held)
        self._displaced.begin()
        self._noted = None
        self._habit.begin()
        if self._avoided is not None:
            self._avoided.begin()
        if self._next_use is not None:
            self._pinned = ()
            self._duel.begin()
            self._next_use.begin(step.number * self._context.layers, ask)
            path = Path.of(forecast)
            if self.protect:
                self._protect(path, self._next_use)
            if not path or path.aheads[-1] <= self._context.layers:
                self._noted = path.origin
        return self._wanted(forecast)

    def _protect(self, path: Path, next_use: NextUse) -> None:
        """Note the held experts that *path* names, before anything is fetched."""
        now, held, due, confidence = self._now, self._held, self._due, self.confidence
        foreseen: list[int] = []
        events: list[int] = []
        chances: list[float] = []
        for ahead, experts, scores in triples(path):
            event = now + ahead
            named = self._named.setdefault(event, [])
            for expert, score in zip(experts, scores, strict=True):
                if score < confidence:
                    break
                if expert in held and due.get(expert, NEVER) > event:
                    due[expert] = event
                    named.append(expert)
                    foreseen.append(expert)
                    events.append(event)
                    chances.append(score)
        next_use.foresee_all(foreseen, events, chances)

    def prefetch(self, routing: Routing, forecast: Forecast) -> Iterable[int]:
        if self._lru is not None:
            # Here nobody waits for it.
            by_lru = self._lru.use(routing.experts)
            self._habit.judge(self._alone, by_lru)
            if self._avoided is not None:
                self._avoided.use(self._misses, by_lru)
        return self._wanted(forecast)

    def _wanted(self, forecast: Forecast) -> Iterator[int]:
        """Note what is foreseen; yield what is worth fetching, nearest layer first."""
        held, due, confidence = self._held, self._due, self.confidence
        next_use, protect = self._next_use, self.protect
        price: Price | None = None
        for ahead, experts, scores in triples(self._near(forecast)):
            event = self._now + ahead
            named = self._named.setdefault(event, [])
            for expert, score in zip(experts, scores, strict=True):
                if score < confidence:
                    break
                if expert in held:
                    if protect and due.get(expert, NEVER) > event:
                        due[expert] = event
                        named.append(expert)
                        if next_use is not None:
                            next_use.foresee(expert, event, score)
                elif ahead <= self.horizon:
                    price = price or self._price()
                    if score < self._least_chance(ahead, price):
                        break
                    due[expert] = self._fetched[expert] = event
                    self._promised += score
                    named.append(expert)
                    if next_use is not None:
                        next_use.foresee(expert, event, score)
                    yield expert
                    price = None

    def _near(self, forecast: Forecast) -> Forecast:
        """What of *forecast* there may be anything to do for.

        Of the step's own path that is what is near enough to be fetched: who is held has been
        noted, and who is named for later is placed for no other event.
        """
        if not isinstance(forecast, Path) or forecast.origin is not self._noted:
            return forecast
        return forecast[: bisect_right(forecast.aheads, self.horizon)]

    def _least_chance(self, ahead: int, price: Price) -> float:
        """The chance at which a prefetch for *ahead* events from now starts to pay.

        Gain p * hidden against what it costs, and (1 - p) * wrong more, in seconds: *hidden* is
        what the layers until then cover of a transfer that starts when the link is free.
        """
        hidden = min(self._transfer_s, ahead * self._layer_s - self._lag_s)
        if hidden <= 0.0 or price.honest <= 0.0:
            return 2.0
        return (price.cost + price.wrong) / (hidden * price.honest + price.wrong)

    def _price(self) -> Price:
        """What a prefetch costs now, and how many come true of those that should.

        The cost is caution * missing * spill, where *spill* is how long the transfer still
        occupies the link at the next gate, and what it must win in any case.
        """
        transfer, layer = self._transfer_s, self._layer_s
        spill = min(max(0.0, self._lag_s + transfer - layer), 2.0 * transfer)
        wasted = self._displaced.wasted if self._avoided is None else 0.0
        cost = self.caution * self._missing * spill + (self.margin + wasted) * transfer
        honest = min(1.0 - wasted, self._kept / self._promised)
        if self._avoided is not None:
            honest = min(honest, self._avoided.worth)
        return Price(cost, self._link.busy * transfer, honest)

    def victims(self, incoming: int) -> Iterator[int]:
        """The farthest next use first, where it is known; a prefetch displaces farther ones only.

        Where it is not: least recent first; what is foreseen only for demand, and the farthest
        first.
        """
        if self._next_use is not None and self._next_use.known and not self._duel.lost:
            if incoming in self._fetched:
                return self._next_use.after(incoming)
            return self._next_use.order(incoming)
        return self._habitual(incoming)

    def _habitual(self, incoming: int) -> Iterator[int]:
        due, habit = self._due, self._habit
        yield from filterfalse(due.__contains__, habit.order(incoming))
        if incoming not in self._fetched:
            foreseen = filter(due.__contains__, habit.order(incoming))
            yield from sorted(foreseen, key=due.__getitem__, reverse=True)
