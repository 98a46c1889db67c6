"""``predictive``: whom it evicts by forecasts of reuse, and when it holds back."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import Context, Forecast, Forecaster, Reuse, StepForecast
from policies.batching import Batches
from policies.builtin._counted import (
    Avoided,
    Displaced,
    Duel,
    LinkUse,
    LruBeside,
    Rival,
)
from policies.builtin._habit import Frequent, Habit, Recent
from policies.builtin._next_use import NextUse, expected_wait
from policies.builtin.predictive import Predictive
from policies.examples import example_trace
from policies.future import Future
from policies.planner import Planner
from policies.registry import FORECASTERS, POLICIES
from policies.routing import Routing, Step
from tests.helpers import context_of, replay, sample
from traces.errors import InputError
from traces.trace import MemoryTrace


def again(chances: list[list[float]], windows: tuple[int, ...] = (1, 2)) -> Reuse:
    return Reuse(windows, np.array(chances, np.float32))


def ordered(reuse: Reuse, context: Context, held: list[int], **changes: float) -> NextUse:
    """The order after one step has begun, nothing used."""
    order = NextUse(context, changes.get("age", 0.0), held)
    order.begin(0, lambda: reuse)
    assert order.known
    return order


class Backwards(Forecaster):
    """An oracle whose chances of reuse are turned round: as wrong as can be."""

    name, offline = "backwards", True

    def __init__(self) -> None:
        self._inner = FORECASTERS.build("oracle")
        self.reset, self.reveal = self._inner.reset, self._inner.reveal  # type: ignore[method-assign]

    def on_step(self, step: Step) -> Forecast:
        self._inner.on_step(step)
        return StepForecast((), self.reuse)

    def on_route(self, routing: Routing) -> Forecast:
        self._inner.on_route(routing)
        return ()

    def reuse(self) -> Reuse | None:
        found = self._inner.reuse()
        assert found is not None
        return Reuse(found.windows, 1.0 - found.chances)


def test_expected_wait_sums_what_is_left_after_each_token() -> None:
    """Windows 1, 2, 4: one token at 3 lies half-way; certain, impossible, and in between."""
    found = expected_wait(again([[1, 0, 0.5, 0], [1, 0, 0.5, 1], [1, 0, 0.9, 1]], (1, 2, 4)))
    assert found.tolist() == pytest.approx([0.0, 4.0, 0.5 + 0.5 + 0.3 + 0.1, 1.0])


def test_the_last_to_be_used_goes_first() -> None:
    context = Context(2, 3, 1, 4)
    reuse = again([[0, 1, 0.2, 0, 1, 0.2], [0, 1, 0.2, 1, 1, 0.2]])
    order = ordered(reuse, context, [0, 1, 2, 3, 5])
    # They wait 2, 0, 1.6; 1, 0, 1.6 tokens, the second layer's half a token more.
    assert list(order.order(4)) == [5, 0, 2, 3, 1]
    order.foresee(0, 1, 0.9)
    assert list(order.order(4))[-1] == 0
    order.forget(0)
    order.remove(5)
    order.use(1, [4])
    assert list(order.order(4)) == [0, 2, 3, 1]


def test_a_prefetch_displaces_later_ones_only() -> None:
    context = Context(1, 4, 1, 3)
    order = ordered(again([[0.1, 0.9, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]]), context, [0, 1, 2])
    assert list(order.after(3)) == [0]
    order.foresee(3, 0, 0.3)
    assert list(order.after(3)) == [0, 2]
    order.foresee(3, 0, 1.0)
    assert list(order.after(3)) == [0, 2, 1]


def test_recency_decides_between_equals() -> None:
    context = Context(1, 4, 1, 3)
    order = NextUse(context, 0.0, [0, 1, 2])
    for event, expert in enumerate((2, 0, 1)):
        order.begin(event, lambda: again([[0.5] * 4], (1,)))
        order.use(event, [expert])
    order.begin(3, lambda: again([[0.5] * 4], (1,)))
    assert order.known
    assert list(order.order(3)) == [2, 0, 1]


def test_a_pool_for_every_layer_keeps_to_its_own() -> None:
    context = Context(2, 3, 1, 4, pool="layer")
    order = ordered(again([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], (1,)), context, [0, 1, 3, 4])
    assert list(order.order(2)) == [0, 1]
    assert list(order.order(5)) == [3, 4]


def test_many_held_are_ranked_as_few_are() -> None:
    """Only some are sorted at first: the order is that of all."""
    total = 200
    chances = np.random.default_rng(0).random((1, total)).astype(np.float32)
    order = ordered(Reuse((1,), chances), Context(1, total, 1, total), list(range(total - 1)))
    expected = np.argsort(chances[0, : total - 1], kind="stable").tolist()
    found = list(dict.fromkeys(order.order(total - 1)))
    assert found == expected
    assert list(dict.fromkeys(order.after(total - 1))) == [
        e for e in expected if chances[0, e] < chances[0, total - 1]
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_an_oracle_tells_reuse_as_it_comes(batch: int) -> None:
    trace = example_trace(3, lengths=(30, 20, 25))
    model, steps = trace.model, list(Batches(trace, batch).steps())
    oracle = FORECASTERS.build("oracle")
    oracle.reset(context_of(trace, 8, batch=batch))
    oracle.reveal(Future(Batches(trace, batch)).demand())
    for number, step in enumerate(steps):
        oracle.on_step(step)
        for layer in range(model.layers):
            oracle.on_route(Routing(step, layer, step.demand[layer], number * 3 + layer))
        found = oracle.reuse()
        assert found is not None
        assert list(found.windows) == [1, 2, 4, 8]
        for window, chances in zip(found.windows, found.chances, strict=True):
            used = {e for s in steps[number + 1 : number + 1 + window] for d in s.demand for e in d}
            assert set(np.flatnonzero(chances == 1.0).tolist()) == used
            assert set(np.flatnonzero(chances)) == used


def test_a_noisy_oracle_says_how_sure_it_is() -> None:
    """What it gives a chance of p comes true in a share p of all cases."""
    trace = example_trace(3, shape=(2, 8, 2), lengths=(400,), skew=0.0)
    steps = list(Batches(trace, 1).steps())
    oracle = FORECASTERS.build("oracle:accuracy=0.7,tokens=1")
    oracle.reset(context_of(trace, 8))
    oracle.reveal(Future(Batches(trace, 1)).demand())
    said, true = [], []
    for number, step in enumerate(steps[:-1]):
        oracle.on_step(step)
        found = oracle.reuse()
        assert found is not None
        said.append(found.chances)
        for layer in range(2):
            oracle.on_route(Routing(step, layer, step.demand[layer], number * 2 + layer))
        true.append(np.isin(np.arange(16), np.concatenate(steps[number + 1].demand)))
    chances, came = np.array(said)[:, 0], np.array(true)
    assert chances.mean() == pytest.approx(came.mean(), abs=0.01)
    sure = chances > 0.5
    assert chances[sure].mean() == pytest.approx(came[sure].mean(), abs=0.03)
    assert 0.4 < sure.sum() / came.sum() < 1.1


@pytest.fixture(scope="module")
def granular() -> MemoryTrace:
    return sample("granular-64x8", 6)


def moves(planner: Planner) -> int:
    return planner.counts["demand"] + planner.counts["prefetch"]


@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("batch", [1, 4])
def test_reuse_saves_moves(granular: MemoryTrace, pool: str, batch: int) -> None:
    slots = granular.model.total_experts // 2

    def run(policy: str) -> Planner:
        oracle = FORECASTERS.build("oracle:accuracy=0.9") if policy != "lru" else None
        return replay(policy, granular, slots, batch=batch, pool=pool, forecaster=oracle)

    lru, recency, reuse = map(run, ("lru", "predictive:evict=recency", "predictive"))
    assert moves(reuse) < 0.9 * moves(recency)
    assert moves(reuse) < 0.95 * moves(lru)
    assert reuse.counts["missed"] < recency.counts["missed"]


@pytest.mark.parametrize("forecaster", ["markov", "ahead", "oracle:accuracy=0.8,tokens=0"])
def test_where_nothing_is_known_of_reuse_habit_decides(
    granular: MemoryTrace, forecaster: str
) -> None:
    slots = granular.model.total_experts // 4
    found = [
        replay(policy, granular, slots, forecaster=FORECASTERS.build(forecaster)).log.sha256()
        for policy in ("predictive", "predictive:evict=frequency", "predictive:evict=recency")
    ]
    assert found[0] == found[2]
    assert found[0] != found[1]


@pytest.mark.parametrize("batch", [1, 4])
def test_frequency_saves_moves(granular: MemoryTrace, batch: int) -> None:
    slots = granular.model.total_experts // 4

    def run(policy: str) -> Planner:
        guess = FORECASTERS.build("markov:floor=0.1")
        return replay(policy, granular, slots, batch=batch, forecaster=guess)

    often = moves(run("predictive:evict=frequency"))
    assert often < 0.95 * moves(run("predictive:evict=recency"))
    assert often < 0.95 * moves(run("lru"))


def habit_of(steps: list[list[int]], half_life: float | None) -> Habit:
    """The order after *steps* of one layer with three slots, whose victims it named."""
    context, held = Context(1, 16, 1, 3), set[int]()
    habit = Recent(context) if half_life is None else Frequent(context, half_life)
    for experts in steps:
        habit.begin()
        habit.use(experts)
        for expert in experts:
            if expert not in held:
                if len(held) == 3:
                    gone = next(c for c in habit.order(expert) if c in held and c not in experts)
                    habit.remove(gone, ())
                    held.remove(gone)
                habit.add(expert)
                held.add(expert)
    return habit


def test_what_is_used_often_stays_though_others_are_more_recent() -> None:
    passing = [[1], [1], [1], [2], [3], [4], [5]]
    assert list(habit_of(passing, 96.0).order(6))[-1] == 1
    assert 1 not in list(habit_of(passing, None).order(6))


def test_the_short_range_decides_while_what_was_frequent_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First 1 and 2 a thousand times, then three others, for which one slot would be left."""
    steps = [[1], [2]] * 500 + [[3 + number % 3] for number in range(600)]
    assert not {1, 2} & set(habit_of(steps, 1200.0).order(0))
    monkeypatch.setattr(Duel, "LEAST", -1.0)
    assert {1, 2} <= set(habit_of(steps, 1200.0).order(0))


def test_a_wrong_copy_takes_from_others_what_of_the_link_is_in_use() -> None:
    link = LinkUse(Context(1, 4, 1, 2, transfer_s=1e-3, layer_s=4e-3))
    assert link.busy == 0.0
    for _ in range(400):
        link.load()
        link.use()
    assert link.busy == pytest.approx(0.25, rel=1e-3)
    for _ in range(400):
        for _ in range(8):
            link.load()
        link.use()
    assert link.busy == 1.0
    assert LinkUse(Context(1, 4, 1, 2)).busy == 0.0


def test_a_busy_link_is_spared_guesses_that_are_not_likely(
    granular: MemoryTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Planner:
        guess = FORECASTERS.build("markov:floor=0.1")
        return replay("predictive", granular, 128, forecaster=guess)

    spared = run()
    monkeypatch.setattr(LinkUse, "busy", 0.0)
    eager = run()
    assert 0 < spared.counts["prefetch"] < eager.counts["prefetch"]


def test_wrong_forecasts_of_reuse_are_noticed(granular: MemoryTrace) -> None:
    """Followed all the way, they would cost several times the misses."""
    slots = granular.model.total_experts // 2
    lru = replay("lru", granular, slots)
    held_back = replay("predictive", granular, slots, forecaster=Backwards())
    Duel.LEAST, kept = -1.0, Duel.LEAST
    try:
        followed = replay("predictive", granular, slots, forecaster=Backwards())
    finally:
        Duel.LEAST = kept
    assert followed.counts["missed"] > 1.5 * lru.counts["missed"]
    assert held_back.counts["missed"] < 1.1 * lru.counts["missed"]


def test_a_duel_is_won_by_who_names_the_one_needed_later() -> None:
    duel = Duel()
    duel.watch(1, 2)
    duel.watch(1, 3)  # 1 is watched already
    before = duel.share
    duel.use([2])
    assert duel.share > before
    duel.use([3])
    duel.watch(4, 5)
    duel.watch(6, 6)
    before = duel.share
    duel.use([6, 7])
    assert duel.share == before
    duel.use([4])
    assert duel.share < before
    duel.watch(8, 9)
    before = duel.share
    duel.use([8, 9])
    assert duel.share == before
    for _ in range(300):
        duel.watch(1, 2)
        duel.use([1])
    assert duel.lost


def test_undecided_pairs_make_room() -> None:
    duel = Duel()
    for pair in range(Duel.MOST):
        duel.watch(2 * pair, 2 * pair + 1)
    assert not any(duel.due() for _ in range(8))
    duel.begin()
    assert any(duel.due() for _ in range(8))


@pytest.mark.parametrize("pool", ["global", "layer"])
def test_lru_beside_misses_what_lru_misses(pool: str) -> None:
    trace = example_trace(7, lengths=(40, 30))
    beside = LruBeside(context_of(trace, 8, pool=pool))
    found = [beside.use(e) for step in Batches(trace, 1).steps() for e in step.demand]
    missed = replay("lru", trace, 8, pool=pool).counts["missed"]
    assert sum(found) == missed
    avoided = Avoided()
    for by_lru in found:
        avoided.use(0, by_lru)
    assert avoided._avoided - Avoided.PRIOR == missed
    assert avoided.worth == 1.0


def test_prefetches_that_avoid_nothing_lose_their_worth_and_are_tried_again() -> None:
    avoided = Avoided()
    for _ in range(40):
        avoided.begin()
        avoided.use(0, 0)
        avoided.spend()
    assert avoided.worth < 0.3
    for _ in range(2000):
        avoided.begin()
    assert avoided.worth > 0.9


def busy() -> Displaced:
    """Where every event misses an expert that takes longer than a layer."""
    displaced = Displaced(Context(2, 4, 1, 2, transfer_s=3e-3, layer_s=1e-3))
    for event in range(100):
        displaced.use(event, [7], 1)
    return displaced


@pytest.mark.parametrize(("missed_at", "wasted"), [(103, 1 / 9), (105, 1 / 9), (106, 0.0)])
def test_a_victim_missed_before_the_event_it_went_for_was_swapped_not_won(
    missed_at: int, wasted: float
) -> None:
    displaced = busy()
    assert displaced.wasted == 0.0
    displaced.evict(3)
    displaced.load(105)
    displaced.win()
    displaced.use(missed_at, [3], 1)
    assert displaced.wasted == pytest.approx(wasted)
    for _ in range(2000):
        displaced.begin()
    assert displaced.wasted < 0.01


def test_demand_and_free_slots_displace_nothing() -> None:
    displaced = busy()
    displaced.evict(3)
    displaced.load()
    displaced.load(105)
    displaced.win()
    displaced.use(101, [3], 1)
    assert displaced.wasted == 0.0


def test_what_is_wasted_costs_nothing_on_a_link_with_room() -> None:
    displaced = busy()
    displaced.load(105)
    assert displaced.wasted > 0.1
    for event in range(200):
        displaced.use(event, [], 0)
    assert displaced.wasted == 0.0


@pytest.mark.parametrize(("batch", "slots"), [(16, 128), (16, 256), (4, 128)])
def test_a_busy_link_is_left_to_demand_where_prefetches_swap(
    batch: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools by layer hold less than a step of many tokens wants: what comes displaces its peers."""
    trace = sample("granular-64x8", 16)

    def run() -> Planner:
        guess = FORECASTERS.build("oracle:accuracy=0.8")
        context = Context(
            8, 64, 8, slots, pool="layer", batch=batch, transfer_s=0.27e-3, layer_s=1e-3
        )
        planner = Planner(POLICIES.build("predictive:evict=recency"), context, guess)
        guess.reveal(Future(Batches(trace, batch)).demand())
        for step in Batches(trace, batch).steps():
            planner.begin(step)
            for layer, experts in enumerate(step.demand):
                planner.plan(Routing(step, layer, experts, step.number * 8 + layer))
                planner.prefetch()
        return planner

    back = run()
    monkeypatch.setattr(Displaced, "wasted", 0.0)
    eager = run()
    assert back.counts["prefetch"] < 0.7 * eager.counts["prefetch"]
    assert moves(back) < moves(eager)


@pytest.fixture
def coarse() -> MemoryTrace:
    return sample("coarse-8x2", 12)


def test_it_holds_back_where_the_link_is_slow_and_prefetches_avoid_little(
    coarse: MemoryTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run with every prefetch taken for worth its while makes more moves."""

    def run() -> Planner:
        return slow_link(coarse, "predictive:evict=recency", "oracle:accuracy=0.9")

    back = run()
    monkeypatch.setattr(Avoided, "worth", 1.0)
    eager = run()
    assert 0 < back.counts["prefetch"] < 0.5 * eager.counts["prefetch"]
    assert moves(back) < moves(eager)


def slow_link(trace: MemoryTrace, policy: str, forecaster: str) -> Planner:
    """Run where one transfer takes as long as five layers, a quarter of the experts fit."""
    guess = FORECASTERS.build(forecaster)
    context = Context(8, 8, 2, 16, transfer_s=6e-3, layer_s=1.2e-3)
    planner = Planner(POLICIES.build(policy), context, guess)
    guess.reveal(Future(Batches(trace)).demand())
    for step in Batches(trace).steps():
        planner.begin(step)
        for layer, experts in enumerate(step.demand):
            planner.plan(Routing(step, layer, experts, step.number * 8 + layer))
            planner.prefetch()
            planner.prefetch()
    return planner


def test_evict_is_one_of_three() -> None:
    with pytest.raises(InputError, match="evict is 'never', expected reuse, frequency, recency"):
        POLICIES.build("predictive:evict=never")


def test_lru_is_followed_while_it_misses_less() -> None:
    """It loses what it had won slowly, so that the other order is tried again."""
    rival = Rival()
    for _ in range(30):
        rival.use(5, 3)
    assert not rival.better
    for _ in range(4):
        rival.use(5, 3)
    assert rival.better
    for _ in range(100):
        rival.use(3, 3)
    assert rival.better
    events = 0
    while rival.better:
        rival.use(3, 3)
        events += 1
    assert 2_000 < events < 4_000


def test_frequency_that_evicts_the_wrong_ones_gives_way_to_recency() -> None:
    """What was frequent is never used again, and what comes goes round four for a while."""
    policy = Predictive(evict="frequency", half_life=1e6)
    planner = Planner(policy, Context(1, 400, 1, 8))
    events = [[n % 7] for n in range(700)] + [
        [10 + (n // 40 * 4 + n % 4) % 380] for n in range(600)
    ]
    for number, experts in enumerate(events):
        step = Step(number, "decode", 1)
        step._experts = np.array([[experts]])
        planner.begin(step)
        planner.plan(Routing(step, 0, experts, number))
        planner.prefetch()
    assert list(policy._habit.order(399)) == list(policy._habit._recent.order(399))  # type: ignore[attr-defined]
