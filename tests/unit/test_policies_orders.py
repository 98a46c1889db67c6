"""Orders that are kept up to date beside the same worked out anew each time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest

from policies.base import Context
from policies.orders import Faded, Pools, Ranked
from policies.routing import DECODE, Routing, Step
from traces.trace import FloatArray


@pytest.mark.parametrize("most", [Faded.MOST, 1e3])
@pytest.mark.parametrize("pool", ["global", "layer"])
def test_faded_names_the_least_used_of_late(
    pool: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through evictions, returns and counts that shrink, as if each use were added up anew."""
    monkeypatch.setattr(Faded, "MOST", most)
    draw = random.Random(5)
    context = Context(2, 20, 2, 30, pool=pool)
    faded, pool_of = Faded(context, half_life=1.7), Pools(context).of
    held: set[int] = set()
    uses: list[tuple[int, list[int]]] = []
    for step in range(60):
        faded.begin()
        for layer in range(2):
            experts = draw.sample(range(20 * layer, 20 * layer + 20), 3)
            faded.use(experts)
            uses.append((step, experts))
            # Each step's number of its own: no two that were used are equal.
            worth = {c: sum(2 ** ((s - step) / 1.7) for s, e in uses if c in e) for c in range(40)}
            for expert in experts:
                mine = [c for c in held if pool_of(c) == pool_of(expert)]
                expected = sorted(mine, key=lambda c: (round(worth[c], 9), c))
                named = list(faded.least(expert))
                assert [round(worth[c], 9) for c in named] == [round(worth[c], 9) for c in expected]
                assert sorted(named) == sorted(mine)
                if expert not in held:
                    if len(mine) > 8:
                        held.remove(named[0])
                        faded.remove(named[0])
                    held.add(expert)
                    faded.add(expert)


class Plain:
    """Names what :class:`Ranked` does, and those that have gone since: they are passed over."""

    def __init__(self, scores: FloatArray, pool_of: Callable[[int], int]) -> None:
        self._scores, self._pool_of = scores, pool_of
        self.held: set[int] = set()
        self.rankings: dict[int, list[int]] = {}

    def least(self, incoming: int) -> Iterator[int]:
        pool = self._pool_of(incoming)
        if pool not in self.rankings:
            self._rank(pool, Ranked.FEW)
        yield from self.rankings[pool]
        self._rank(pool, None)
        yield from self.rankings[pool]

    def _rank(self, pool: int, few: int | None) -> None:
        mine = [copy for copy in self.held if self._pool_of(copy) == pool]
        order = sorted(mine, key=lambda copy: (self._scores[copy], copy))
        if few is not None and few < len(order):
            last = self._scores[order[few]]
            order = [copy for copy in order if self._scores[copy] <= last]
        self.rankings[pool] = order


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pool", ["global", "layer"])
def test_ranked_names_who_may_go_as_if_nothing_were_left_out(seed: int, pool: str) -> None:
    """Through evictions and returns within an event, of low copies as well."""
    draw = random.Random(seed)
    context = Context(2, 40, 2, 60, pool=pool)
    scores = np.zeros(2 * context.total)
    ranked, plain = Ranked(context, lambda copies: scores[copies]), Plain(scores, Pools(context).of)
    held = plain.held
    for copy in draw.sample(range(2 * context.total), 90):
        held.add(copy)
        ranked.add(copy)
    for _ in range(30):
        ranked.stale()
        plain.rankings.clear()
        scores[:] = [draw.randint(0, 9) for _ in scores]
        gone: list[int] = []
        for _ in range(12):
            fresh = [copy for copy in range(2 * context.total) if copy not in held]
            incoming = draw.choice([draw.choice(fresh), *gone])
            most = draw.choice((1, 2, 3, 60))
            named, expected = (
                list(islice((copy for copy in order.least(incoming) if copy in held), most))
                for order in (ranked, plain)
            )
            assert named == expected
            victim = draw.choice(named[:2])
            held.remove(victim)
            ranked.remove(victim)
            held.add(incoming)
            ranked.add(incoming)
            gone = [copy for copy in (*gone, victim) if copy not in held]


@pytest.mark.parametrize("tokens", [1, 3, 8, 70])
def test_weights_of_several_experts_are_those_of_each(tokens: int) -> None:
    draw = np.random.default_rng(tokens)
    step = Step(0, DECODE, tokens)
    chosen = np.argsort(draw.random((tokens, 1, 16)), axis=2)[:, :, :4]
    step._experts = chosen.astype(np.int16)
    step._weights = draw.random(chosen.shape).astype(np.float16).astype(np.float32)
    ids = np.unique(chosen).tolist()
    routing = Routing(step, 0, ids, 0)
    assert routing.weights_of(ids) == [routing.weight_of(id) for id in ids]
    step._weights = None
    assert routing.weights_of(ids) == [routing.weight_of(id) for id in ids]
