"""What ``predictive`` counts of its own success, so that it holds back where there is none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from policies.base import Context
from policies.orders import Pools


class LruBeside:
    """LRU replayed beside a policy, with the same slots."""

    def __init__(self, context: Context) -> None:
        self._of = Pools(context).of
        pools = context.layers if context.pool == "layer" else 1
        share, rest = divmod(context.slots, pools)
        self._slots = [share + (pool < rest) for pool in range(pools)]
        self._orders: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(pools)]

    def use(self, experts: Sequence[int]) -> int:
        """One event uses *experts*; how many of them LRU misses."""
        pool = self._of(experts[0])
        order = self._orders[pool]
        missed = 0
        for expert in experts:
            if expert in order:
                order.move_to_end(expert)
            else:
                order[expert] = None
                missed += 1
        while len(order) > self._slots[pool]:
            order.popitem(last=False)
        return missed


class Avoided:
    """What a prefetch avoids: misses fewer than LRU's, for each copy that was spent on them.

    Both counts fade, step by step, towards *PRIOR* of each, so that what was held back is tried
    again.
    """

    PRIOR = 8.0
    FADE = 0.005

    def __init__(self) -> None:
        self._avoided = self._spent = self.PRIOR

    @property
    def worth(self) -> float:
        """Misses that a prefetch avoids, at most 1; not above 0 where LRU misses less."""
        return min(1.0, self._avoided / self._spent)

    def begin(self) -> None:
        """A step begins."""
        self._avoided += self.FADE * (self.PRIOR - self._avoided)
        self._spent += self.FADE * (self.PRIOR - self._spent)

    def use(self, missed: int, by_lru: int) -> None:
        """One event *missed* so many experts, of which LRU would have missed *by_lru*."""
        self._avoided += by_lru - missed

    def spend(self) -> None:
        """A copy is made ahead of time."""
        self._spent += 1.0


class Rival:
    """Whether LRU would miss less than the order that is followed, prefetches aside.

    What LRU missed less is summed up, fading by *FADE* an event. Beyond *LOST* misses it is the
    better one, until a quarter of that is left: then the other is tried again.
    """

    FADE = 0.0005
    LOST = 64.0

    def __init__(self) -> None:
        self.better = False
        self._less = 0.0

    def use(self, missed: int, by_lru: int) -> None:
        """One event would have *missed* so many experts, had none been prefetched."""
        self._less += missed - by_lru - self.FADE * self._less
        self.better = self._less > (self.LOST / 4 if self.better else self.LOST)


class Duel:
    """Which of two orders of eviction is right: of the victims they name, who is needed last.

    At an eviction both name one. Where they differ, the two are watched until an event uses
    one of them: the order that named the other was right. *share* is how often the first order
    was, over about the last two hundred pairs; it begins with the weight of *PRIOR* pairs.
    """

    #: Every so many evictions one is judged, which costs as much as the eviction itself.
    EVERY = 2
    MOST = 64
    RATE = 0.005
    PRIOR = 20.0
    #: Below this share of the verdicts the first order is not to be followed.
    LEAST = 0.5

    def __init__(self) -> None:
        self.share = 0.6
        self._verdicts = 0
        self._evictions = 0
        self._rival: dict[int, int] = {}
        self._first: set[int] = set()

    @property
    def lost(self) -> bool:
        """Whether the first order is the worse one."""
        return self.share < self.LEAST

    def due(self) -> bool:
        """Whether this eviction is one of those that are judged."""
        self._evictions += 1
        return self._evictions % self.EVERY == 0 and len(self._first) < self.MOST

    def watch(self, first: int, second: int) -> None:
        """The first order would evict *first*, the second one *second*."""
        rival = self._rival
        if first != second and first not in rival and second not in rival:
            rival[first], rival[second] = second, first
            self._first.add(first)

    def use(self, experts: Sequence[int]) -> None:
        """An event uses *experts*: pairs of which it uses one have a winner."""
        for expert in experts:
            other = self._rival.pop(expert, None)
            if other is None:
                continue
            del self._rival[other]
            wrong = expert in self._first
            self._first.discard(expert if wrong else other)
            if other not in experts:
                self._verdicts += 1
                rate = max(self.RATE, 1.0 / (self.PRIOR + self._verdicts))
                self.share += rate * ((not wrong) - self.share)

    def begin(self) -> None:
        """A step begins: pairs that stay undecided make room for others."""
        if len(self._first) == self.MOST:
            self._rival.clear()
            self._first.clear()


class LinkUse:
    """How much of the time between two events the link is busy, by the copies that are made."""

    #: How fast the mean of copies follows, a share for each event.
    RATE = 0.02

    def __init__(self, context: Context) -> None:
        self._transfers = context.transfer_s / context.layer_s if context.layer_s else 0.0
        self._made = 0
        self._mean = 0.0

    @property
    def busy(self) -> float:
        """The share, at most 1: what a copy that turns out wrong takes from others."""
        return min(1.0, self._mean * self._transfers)

    def use(self) -> None:
        """An event has come."""
        self._mean += self.RATE * (self._made - self._mean)
        self._made = 0

    def load(self) -> None:
        """A copy is made."""
        self._made += 1


class Displaced:
    """What prefetches won: those that came true, less misses of what they had displaced.

    A victim counts if it is missed no later than the event that what displaced it was fetched for;
    after that it would have gone for that event's demand anyway. Both counts fade, step by step,
    towards *PRIOR* of each, so that what was held back is tried again.
    """

    PRIOR = 8.0
    FADE = 0.005
    #: How fast the mean of misses follows, a share for each event.
    RATE = 0.02

    def __init__(self, context: Context) -> None:
        self._transfer_s, self._layer_s = context.transfer_s, context.layer_s
        self._made = self._won = self.PRIOR
        self._missed = 0.0
        self._until: dict[int, int] = {}
        self._victim = -1

    @property
    def wasted(self) -> float:
        """Share of prefetches that won nothing, where demand alone keeps the link busy; else 0."""
        if self._missed * self._transfer_s <= self._layer_s:
            return 0.0
        return 1.0 - min(1.0, max(0.0, self._won / self._made))

    def begin(self) -> None:
        """A step begins."""
        self._made += self.FADE * (self.PRIOR - self._made)
        self._won += self.FADE * (self.PRIOR - self._won)

    def use(self, event: int, missed: Iterable[int], count: int) -> None:
        """*event* missed *count* experts, *missed*."""
        self._missed += self.RATE * (count - self._missed)
        until = self._until
        if until:
            for expert in missed:
                if until.pop(expert, -1) >= event:
                    self._won -= 1.0

    def win(self) -> None:
        """An event uses what was fetched for it."""
        self._won += 1.0

    def evict(self, copy: int) -> None:
        """*copy* goes for what is placed next."""
        self._victim = copy

    def load(self, event: int = -1) -> None:
        """A copy is placed; one that is fetched ahead, for *event*."""
        if event >= 0:
            self._made += 1.0
            if self._victim >= 0:
                self._until[self._victim] = event
        self._victim = -1
