"""The link's arithmetic against queueing theory and its own rules."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.moves import Move
from sim.link import Link

COPY_S = 1.0


def link_of(depth: int = 2, idle_s: float = COPY_S) -> Link:
    """Copies of handles below 100 take one second, of others a quarter."""

    def size(copy: int) -> int:
        return 400 if copy < 100 else 100

    return Link(
        size,
        lambda n: COPY_S * n / 400,
        lambda n: (COPY_S * n + 400 * (idle_s - COPY_S)) / 400,
        depth,
    )


def moves(count: int, *, demand: bool, first: int = 0) -> list[Move]:
    return [Move(first + i, first + i, -1, demand) for i in range(count)]


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_mean_wait_is_that_of_the_m_d_1_queue(load: float) -> None:
    """Pollaczek-Khinchine: rho / (2 mu (1 - rho)).

    The gaps are every quantile of the exponential distribution once, shuffled: the load is
    then exact, which most of the noise of a mean wait comes from.
    """
    jobs = 500_000
    quantiles = -np.log1p(-(np.arange(jobs) + 0.5) / jobs) * COPY_S / load
    gaps = np.random.default_rng(0).permutation(quantiles).tolist()
    env, link = simpy.Environment(), link_of()
    waits: list[float] = []

    def arrivals() -> Iterator[simpy.Event]:
        for gap in gaps:
            yield env.timeout(gap)
            move = Move(0, 0, -1, True)
            link.demand([move], env.now, 0.0)
            waits.append(move.land_s - COPY_S - env.now)

    env.run(env.process(arrivals()))
    expected = load / (2 * (1 - load))
    assert np.mean(waits) == pytest.approx(expected, rel=0.02)
    assert link.busy_s == pytest.approx(jobs * COPY_S)


def waiting_over_time(arrive: np.ndarray, start: np.ndarray) -> float:
    """The integral of the queue's length, stepping through arrivals and starts in order."""
    times = np.concatenate([arrive, start])
    change = np.concatenate([np.ones(len(arrive)), -np.ones(len(start))])
    order = np.argsort(times, kind="stable")
    queue = np.cumsum(change[order])
    return float((queue[:-1] * np.diff(times[order])).sum())


def test_lindley_and_little_hold_exactly() -> None:
    """The wait of each job follows from the last one's; time-averaged queue = rate * wait."""
    gaps = np.random.default_rng(1).integers(0, 9, 5000) / 4  # exact in binary
    arrive = np.cumsum(gaps)
    link = link_of()
    found = []
    for now in arrive.tolist():
        move = Move(0, 0, -1, True)
        link.demand([move], now, 0.0)
        found.append(move.land_s - COPY_S - now)
    wait, expected = 0.0, []
    for gap in [*gaps.tolist()[1:], 0.0]:
        expected.append(wait)
        wait = max(0.0, wait + COPY_S - gap)
    assert found == expected
    start = arrive + np.array(found)
    assert waiting_over_time(arrive, start) == pytest.approx(sum(found), rel=1e-12)


def test_a_copy_into_an_idle_engine_pays_the_start_up_once() -> None:
    link = link_of(idle_s=1.5)
    first = moves(3, demand=True)
    link.demand(first, 10.0, 0.0)
    assert [move.land_s for move in first] == [11.5, 12.5, 13.5]
    late = moves(1, demand=True)
    link.demand(late, 13.5, 0.0)
    assert late[0].land_s == 15.0
    assert link.busy_s == 5.0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_demand_overtakes_what_is_not_issued(depth: int) -> None:
    link = link_of(depth)
    ahead = moves(6, demand=False)
    link.prefetch(ahead, 0.0, 0.0)
    link.advance(0.0)
    assert len(link) == 6 - depth
    urgent = Move(50, 50, -1, True)
    link.demand([urgent], 0.0, 0.0)
    assert urgent.land_s == depth + 1
    link.advance(100.0)
    landed = [move.land_s for move in ahead]
    assert landed == [*range(1, depth + 1), *range(depth + 2, 8)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_at_most_depth_copies_are_issued_ahead(depth: int) -> None:
    link = link_of(depth)
    ahead = moves(6, demand=False)
    link.prefetch(ahead, 0.0, 0.0)
    for now in range(6):
        link.advance(now)
        flying = [move for move in ahead if not move.queued and move.land_s > now]
        assert len(flying) == min(depth, 6 - now)


def test_a_wanted_prefetch_overtakes_the_others() -> None:
    link = link_of()
    ahead = moves(5, demand=False)
    link.prefetch(ahead, 0.0, 0.0)
    link.advance(0.0)
    link.want(ahead[4], 0.0)
    link.advance(100.0)
    assert [move.land_s for move in ahead] == [1, 2, 4, 5, 3]


def test_a_cancelled_move_never_crosses_and_an_issued_one_always_does() -> None:
    link = link_of()
    crossed: list[int] = []
    link.on_copy = lambda move, start, end: crossed.append(move.copy)
    link.prefetch(moves(5, demand=False), 0.0, 0.0)
    link.advance(0.0)  # 0 and 1 are issued
    link.demand([Move(60, 0, 0, True), Move(61, 3, 3, True)], 0.5, 0.0)
    link.advance(100.0)
    assert crossed == [0, 1, 60, 61, 2, 4]
    assert link.cancelled == 1
    assert not link.pending
    assert link.prefetch_bytes == 4 * 400


@pytest.mark.parametrize("demand", [True, False])
def test_the_queue_moves_on_while_the_host_issues(demand: bool) -> None:
    """At 1.5 the third copy has left the queue: it cannot be cancelled, nor overtaken."""
    link = link_of()
    ahead = moves(4, demand=False)
    link.prefetch(ahead, 0.0, 0.0)
    link.advance(0.0)
    later = [Move(50, 2, 2, demand), Move(51, 3, 3, demand)]
    (link.demand if demand else link.prefetch)(later, 1.5, 0.75)
    link.advance(100.0)
    assert [move.land_s for move in ahead[:3]] == [1, 2, 3]
    # The fourth was issued at 2, before the host came to it at 2.25, unless demand was there.
    assert [move.land_s for move in (later[0], later[1])] == ([4, 5] if demand else [5, 6])
    assert link.cancelled == demand


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["demand", "prefetch", "want"]),
            st.integers(0, 3),
            st.integers(0, 12),
            st.integers(0, 7),
        ),
        max_size=30,
    ),
    depth=st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_bytes_and_time_are_conserved(steps: list[tuple[str, int, int, int]], depth: int) -> None:
    """Whatever is asked for: one copy at a time, in time, once; and nothing gets lost."""
    link = link_of(depth, idle_s=1.25)
    spans: list[tuple[Move, float, float]] = []
    link.on_copy = lambda move, start, end: spans.append((move, start, end))
    now, number, asked, prefetched = 0.0, 0, [], []
    for kind, wait, victim, many in steps:
        now += wait / 4
        link.advance(now)
        fresh = [Move(90 + number + i, 0, -1, kind == "demand") for i in range(many % 3 + 1)]
        fresh[0].victim = 90 + number - victim
        if kind == "demand":
            link.demand(fresh, now, 0.0)
        elif kind == "prefetch":
            link.prefetch(fresh, now, 0.0)
            prefetched += fresh
        else:
            for move in list(link.pending.values())[:1]:
                link.want(move, now)
            continue
        asked += fresh
        number += len(fresh)
    link.advance(1e6)
    assert not len(link)
    assert not link.pending
    crossed = [move for move, _, _ in spans]
    assert len(set(crossed)) == len(crossed)
    assert len(crossed) + link.cancelled == len(asked)
    assert set(asked) - set(crossed) <= set(prefetched)
    sizes = [400 if move.copy < 100 else 100 for move in crossed]
    assert link.demand_bytes + link.prefetch_bytes == sum(sizes)
    assert link.busy_s == pytest.approx(sum(end - start for _, start, end in spans))
    for (_, _, end), (_, start, _) in pairwise(spans):
        assert start >= end
    for move, start, end in spans:
        assert move.land_s == end
        assert start >= move.submit_s
