"""Orderings that policies share: recency and frequency, constant time per use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from policies.base import Context
from traces.trace import FloatArray, IntArray


class Pools:
    """Which ordering a copy belongs to: one for all, or one per layer and precision."""

    def __init__(self, context: Context) -> None:
        self._total = context.total
        self._experts = context.experts
        self.by_layer = context.pool == "layer"
        self.count = 2 * (context.layers if self.by_layer else 1)
        self._half = self.count // 2

    def of(self, copy: int) -> int:
        """The pool of *copy*: full-precision pools first, then the low ones."""
        if not self.by_layer:
            return copy >= self._total
        low, expert = (self._half, copy - self._total) if copy >= self._total else (0, copy)
        return low + expert // self._experts


class Recency:
    """Copies from least to most recent, within each pool; see :func:`recency`."""

    def __init__(self, context: Context) -> None:
        self._total = context.total
        self._orders: list[OrderedDict[int, None]] = [OrderedDict(), OrderedDict()]

    def order(self, copy: int) -> OrderedDict[int, None]:
        """The ordering that *copy* belongs to, least recent first."""
        return self._orders[copy >= self._total]

    def touch(self, experts: Sequence[int]) -> None:
        """Make one layer's *experts* most recent, in the order given."""
        order = self.order(experts[0])
        for expert in experts:
            order[expert] = None
            order.move_to_end(expert)

    def add(self, copy: int) -> None:
        """Make *copy* most recent unless it has its place already."""
        self._orders[copy >= self._total].setdefault(copy)

    def remove(self, copy: int) -> None:
        """Forget *copy*."""
        self._orders[copy >= self._total].pop(copy, None)

    def first(self, copy: int) -> None:
        """Make *copy* the least recent of its pool, if it is there."""
        order = self.order(copy)
        if copy in order:
            order.move_to_end(copy, last=False)


class _RecencyByLayer(Recency):
    """The same with a pool for every layer and precision."""

    def __init__(self, context: Context) -> None:
        self._of = Pools(context).of
        self._orders = [OrderedDict() for _ in range(2 * context.layers)]

    def order(self, copy: int) -> OrderedDict[int, None]:
        return self._orders[self._of(copy)]

    def add(self, copy: int) -> None:
        self.order(copy).setdefault(copy)

    def remove(self, copy: int) -> None:
        self.order(copy).pop(copy, None)


def recency(context: Context) -> Recency:
    """An ordering by recency for the pools of *context*."""
    return _RecencyByLayer(context) if context.pool == "layer" else Recency(context)


class _Bucket:
    """All copies with the same number of uses, least recent first; a node of a list."""

    __slots__ = ("copies", "next", "previous", "uses")

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self.copies: OrderedDict[int, None] = OrderedDict()
        self.previous: _Bucket = self
        self.next: _Bucket = self


class Frequency:
    """Copies from least to most used since they were added; ties by least recent use."""

    def __init__(self) -> None:
        self._head = _Bucket(-1)
        self._bucket_of: dict[int, _Bucket] = {}

    def __contains__(self, copy: int) -> bool:
        return copy in self._bucket_of

    def add(self, copy: int, uses: int) -> None:
        """Start counting *copy* at *uses* (0 or 1)."""
        bucket = self._head
        while bucket.next is not self._head and bucket.next.uses < uses:
            bucket = bucket.next
        self._put(copy, bucket, uses)

    def use(self, copy: int) -> None:
        """Count one more use of *copy*."""
        bucket = self._bucket_of[copy]
        self._put(copy, bucket, bucket.uses + 1)
        self._take(copy, bucket)

    def remove(self, copy: int) -> None:
        """Forget *copy* and its count."""
        self._take(copy, self._bucket_of.pop(copy))

    def least(self) -> Iterator[int]:
        """Every copy, least used first."""
        bucket = self._head.next
        while bucket is not self._head:
            yield from bucket.copies
            bucket = bucket.next

    def _put(self, copy: int, after: _Bucket, uses: int) -> None:
        """Enter *copy* in the bucket of *uses*, which is or comes right behind *after*."""
        bucket = after.next
        if bucket.uses != uses:
            new = _Bucket(uses)
            new.previous, new.next = after, bucket
            after.next = bucket.previous = new
            bucket = new
        bucket.copies[copy] = None
        self._bucket_of[copy] = bucket

    def _take(self, copy: int, bucket: _Bucket) -> None:
        del bucket.copies[copy]
        if not bucket.copies:
            bucket.previous.next, bucket.next.previous = bucket.next, bucket.previous


class Faded:
    """Copies from the least to the most used, a use counting half after *half_life* steps.

    Uses are counted whether an expert is held or not. Instead of letting all counts fade, which
    no order sees, each new use counts for more: a count only grows when its expert is used. So a
    heap may hold counts as they once were, which are put right when they come to its top, and a
    use costs no more than an addition.
    """

    #: Where what a use counts would grow beyond floats, all counts shrink.
    MOST = 1e200

    def __init__(self, context: Context, half_life: float) -> None:
        pools = Pools(context)
        self._of = pools.of
        self._growth = 2.0 ** (1.0 / half_life)
        self._weight = 1.0
        self._counts = [0.0] * context.total
        self._held: set[int] = set()
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(pools.count)]
        #: Copies that have an entry in a heap, held or not, and entries that were named last.
        self._listed: set[int] = set()
        self._named: list[tuple[float, int]] = []

    def begin(self) -> None:
        """A step begins."""
        self._weight *= self._growth
        if self._weight > self.MOST:
            self._shrink()

    def _shrink(self) -> None:
        self._restore()
        scale, self._weight = 1.0 / self._weight, 1.0
        self._counts = [count * scale for count in self._counts]
        for heap in self._heaps:
            heap[:] = [(count * scale, copy) for count, copy in heap]
            heapify(heap)

    def use(self, experts: Sequence[int]) -> None:
        """An event uses *experts*."""
        counts, weight = self._counts, self._weight
        for expert in experts:
            counts[expert] += weight

    def add(self, copy: int) -> None:
        """*copy* is held now."""
        self._held.add(copy)
        if copy not in self._listed:
            self._listed.add(copy)
            heappush(self._heaps[self._of(copy)], (self._counts[copy], copy))

    def remove(self, copy: int) -> None:
        """*copy* is held no longer; its entry goes when it comes up."""
        self._held.discard(copy)

    def least(self, incoming: int) -> Iterator[int]:
        """The pool of *incoming*, least used first; one of these may run at a time."""
        self._restore()
        heap, counts, held = self._heaps[self._of(incoming)], self._counts, self._held
        while heap:
            count, copy = heap[0]
            if copy not in held:
                heappop(heap)
                self._listed.discard(copy)
            elif count < counts[copy]:
                heapreplace(heap, (counts[copy], copy))
            else:
                yield copy
                # It has to stay.
                self._named.append(heappop(heap))

    def _restore(self) -> None:
        """Enter again what was named, of which no more than one has gone."""
        for entry in self._named:
            heappush(self._heaps[self._of(entry[1])], entry)
        self._named.clear()


class Ranked:
    """Copies from least to most worth keeping, by a score of all of them at once.

    For scores that change for every copy at every event, so that no ordering can be kept up
    to date: the held copies of a pool are scored once per event in which one must go, in one
    vector operation over its slots, and only the lowest are sorted. *score* gives one number
    per copy; ties go to the smallest copy.
    """

    #: How many of the lowest are sorted at first.
    FEW = 24

    def __init__(self, context: Context, score: Callable[[IntArray], FloatArray]) -> None:
        pools = Pools(context)
        self._of = pools.of
        self._score = score
        self._held = [np.zeros(2 * context.total, dtype=bool) for _ in range(pools.count)]
        self._ranking: dict[int, list[int]] = {}
        #: Of each ranking, those at its head that have gone since: they need not be named.
        self._gone: dict[int, list[int]] = {}

    def stale(self) -> None:
        """A new event: scores have changed."""
        self._ranking.clear()
        self._gone.clear()

    def add(self, copy: int) -> None:
        """*copy* is held now."""
        pool = self._of(copy)
        self._held[pool][copy] = True
        gone = self._gone.get(pool)
        if gone and copy in gone:
            # It has its place again.
            self._ranking[pool] += reversed(gone)
            gone.clear()

    def remove(self, copy: int) -> None:
        """*copy* is no longer held."""
        pool = self._of(copy)
        self._held[pool][copy] = False
        ranking = self._ranking.get(pool)
        if ranking and ranking[-1] == copy:
            self._gone[pool].append(ranking.pop())

    def least(self, incoming: int) -> Iterator[int]:
        """The pool of *incoming*, least worth keeping first."""
        pool = self._of(incoming)
        ranking = self._ranking.get(pool)
        if ranking is None:
            ranking = self._rank(pool, self.FEW)
        yield from reversed(ranking)
        yield from reversed(self._rank(pool, None))

    def _rank(self, pool: int, few: int | None) -> list[int]:
        """The *few* lowest of *pool* (and their equals), or all of them; the lowest comes last."""
        copies = self._held[pool].nonzero()[0]
        scores = self._score(copies)
        if few is not None and len(copies) > few:
            low = (scores <= np.partition(scores, few)[few]).nonzero()[0]
            copies, scores = copies.take(low), scores.take(low)
        # Copies ascend: of equals the smallest comes first.
        ranked: list[int] = copies.take(scores.argsort(kind="stable")[::-1]).tolist()
        self._ranking[pool], self._gone[pool] = ranked, []
        return ranked
