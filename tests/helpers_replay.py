"""The event contract a second time, on other principles than the code under test.

Nothing is kept in order here: every expert has a number, and a victim is found by looking at
all of them. Steps are cut from the sequences token by token, with sets. An event is a pair
(layer, sorted experts), an expert ``layer * experts + id``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from traces.trace import TokenSequence, Trace

Event = tuple[int, list[int]]


def events_of(trace: Trace, batch: int = 1) -> list[Event]:
    """Every event of a run, by the rule for batches: prompts together, then token by token."""
    waiting = list(trace.sequences())
    events: list[Event] = []
    while waiting:
        members, waiting = waiting[:batch], waiting[batch:]
        prompts = [row for m in members for row in m.experts[: m.prefill]]
        if prompts:
            events += _events(prompts, trace.model.experts)
        for j in range(max(len(m) - m.prefill for m in members)):
            live = [m for m in members if m.prefill + j < len(m)]
            events += _events([_decoded(m, j) for m in live], trace.model.experts)
    return events


def _decoded(sequence: TokenSequence, j: int) -> np.ndarray:
    return sequence.experts[sequence.prefill + j]


def _events(rows: list[np.ndarray], experts: int) -> Iterator[Event]:
    for layer in range(len(rows[0])):
        chosen = {int(id) for row in rows for id in row[layer]}
        yield layer, sorted(layer * experts + id for id in chosen)


class Rule:
    """How much each expert is worth keeping: the victim has the least, then the smallest id.

    What is worth infinitely much is never a victim.
    """

    def __init__(self, total: int, events: list[Event]) -> None:
        self.total = total
        self.worth = np.zeros(total)

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        """*demand* is asked for; *held* says for all experts who was held."""

    def placed(self, event: int, expert: int) -> None:
        """*expert* has a slot."""


class LRU(Rule):
    """Worth is the stamp (event, id) of the last use."""

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        for expert in demand:
            self.worth[expert] = event * self.total + expert


class FIFO(Rule):
    """Worth is the number of the placing."""

    count = 0

    def placed(self, event: int, expert: int) -> None:
        self.count += 1
        self.worth[expert] = self.count


class LFU(Rule):
    """Worth is the uses since placing, then the stamp of the last use."""

    def __init__(self, total: int, events: list[Event]) -> None:
        super().__init__(total, events)
        self.uses = np.zeros(total)
        self.step = float((len(events) + 1) * total)

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        for expert in demand:
            self.uses[expert] = self.uses[expert] + 1 if held[expert] else 1
            self.worth[expert] = self.uses[expert] * self.step + event * self.total + expert


class LFRU(Rule):
    """Worth is uses (never forgotten) per age."""

    def __init__(self, total: int, events: list[Event]) -> None:
        super().__init__(total, events)
        self.uses, self.last = np.zeros(total), np.zeros(total)

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        self.uses[demand] += 1
        self.last[demand] = event
        self.worth = self.uses / (event - self.last + 1)


class Fading(Rule):
    """Worth is the sum over past uses of 2^(steps since the first / 32)."""

    def __init__(self, total: int, events: list[Event]) -> None:
        super().__init__(total, events)
        self.events, self.weight = events, 1.0

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        if self.events[event][0] == 0:
            self.weight *= 2.0 ** (1.0 / 32.0)
        self.worth[demand] += self.weight


class Belady(Rule):
    """Worth is how soon the next event comes, found in the list of each expert's events."""

    def __init__(self, total: int, events: list[Event]) -> None:
        super().__init__(total, events)
        self.when: dict[int, list[int]] = defaultdict(list)
        for number, (_, demand) in enumerate(events):
            for expert in demand:
                self.when[expert].append(number)

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        for expert in demand:
            later = self.when[expert]
            i = bisect_right(later, event)
            self.worth[expert] = -later[i] if i < len(later) else -np.inf


RULES = {
    "lru": LRU, "fifo": FIFO, "lfu": LFU, "lfru": LFRU, "fading": Fading, "belady": Belady,
}  # fmt: skip


class Static(LRU):
    """The most popular experts are worth everything; the rest pass through *staging* slots."""

    def __init__(self, total: int, events: list[Event], slots: int, staging: int) -> None:
        super().__init__(total, events)
        uses = np.zeros(total, dtype=int)
        for _, demand in events:
            uses[demand] += 1
        ranked = sorted(range(total), key=lambda expert: (-uses[expert], expert))
        self.pinned = ranked[: max(slots - staging, 0)]

    def used(self, event: int, demand: list[int], held: np.ndarray) -> None:
        super().used(event, demand, held)
        self.worth[self.pinned] = np.inf


class Cache:
    """Slots of one pool per layer, or of one pool, and who holds them."""

    def __init__(self, layers: int, experts: int, slots: int, by_layer: bool) -> None:
        total = layers * experts
        self.held = np.zeros(total, dtype=bool)
        self.pool = np.arange(total) // experts if by_layer else np.zeros(total, dtype=int)
        pools = layers if by_layer else 1
        self.free = [slots // pools + (i < slots % pools) for i in range(pools)]


def missed_by(
    rule: Rule, events: list[Event], cache: Cache, preloaded: list[int] | None = None
) -> list[int]:
    """Missed experts of every event, by section 4 of the contract taken literally."""
    for expert in preloaded or ():
        cache.held[expert] = True
        cache.free[cache.pool[expert]] -= 1
    missed_each = []
    for number, (_, demand) in enumerate(events):
        missed = [expert for expert in demand if not cache.held[expert]]
        missed_each.append(len(missed))
        rule.used(number, demand, cache.held)
        pinned = np.zeros(rule.total, dtype=bool)
        pinned[demand] = True
        for expert in missed:
            if not _place(rule, cache, number, expert, pinned):
                pinned[:] = False  # what was there has computed: the next wave begins
                assert _place(rule, cache, number, expert, pinned)
            pinned[expert] = True
    return missed_each


def _place(rule: Rule, cache: Cache, event: int, expert: int, pinned: np.ndarray) -> bool:
    pool = cache.pool[expert]
    if cache.free[pool]:
        cache.free[pool] -= 1
    else:
        candidates = np.flatnonzero(
            cache.held & ~pinned & (cache.pool == pool) & (rule.worth < np.inf)
        )
        if not len(candidates):
            return False
        cache.held[candidates[np.argmin(rule.worth[candidates])]] = False
    cache.held[expert] = True
    rule.placed(event, expert)
    return True


def missed(
    name: str, trace: Trace, slots: int, *, batch: int = 1, pool: str = "global"
) -> list[int]:
    """Missed experts per event of policy *name*."""
    model = trace.model
    events = events_of(trace, batch)
    cache = Cache(model.layers, model.experts, slots, pool == "layer")
    return missed_by(RULES[name](model.total_experts, events), events, cache)
