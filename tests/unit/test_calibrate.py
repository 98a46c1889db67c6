"""Calibration: the fits against known answers, the file, and a whole quick run on the CPU."""

from __future__ import annotations

import itertools
import json
import math
import random
import tomllib
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.costs import Costs  # noqa: E402
from policies.graph_costs import Cold  # noqa: E402
from policies.hardware import FIGURES, load_profile  # noqa: E402
from policies.registry import POLICIES  # noqa: E402
from policies.session import Setup, TraceSession  # noqa: E402
from policies.tables import leaves  # noqa: E402
from runtime import cli_calibrate  # noqa: E402
from runtime.calibration import fits, run  # noqa: E402
from runtime.calibration.bench import Bench, median_s  # noqa: E402
from runtime.calibration.copies import Copies, Table  # noqa: E402
from runtime.calibration.experts import (  # noqa: E402
    CpuRates,
    ExpertRow,
    Experts,
    Low,
    measure_dense,
    measure_fused,
    measure_low,
    measure_token_share,
)
from runtime.calibration.fits import ExpertTime, Line, Thinking  # noqa: E402
from runtime.calibration.hosts import (  # noqa: E402
    HostCosts,
    Misses,
    Planning,
    fit_host,
    fit_misses,
    fit_return,
    more_layer_s,
    rest_of_step,
)
from runtime.calibration.kernels import (  # noqa: E402
    LEAST_PART_S,
    Graphs,
    Rates,
    measure_graphs,
    round_trip_parts,
)
from runtime.calibration.launches import Launches  # noqa: E402
from runtime.calibration.models import (  # noqa: E402
    Layers,
    Reads,
    kv_time,
    layer_times,
    noted,
)
from runtime.calibration.policies import (  # noqa: E402
    Stages,
    Timed,
    made_up_trace,
    time_events,
)
from runtime.calibration.runs import Runs, Shape, sessions, timed_runs  # noqa: E402
from runtime.calibration.shapes import (  # noqa: E402
    FAMILIES,
    LONG_CACHE,
    PUBLISHED,
    SHORT_CACHE,
    Decoding,
    middle_dimensions,
    offloaded,
    tiny_dimensions,
    with_published_heads,
)
from runtime.calibration.timed import (  # noqa: E402
    EventCounts,
    TimedRun,
    layer_s,
    quiet_layer_s,
)
from runtime.calibration.toml import dumps  # noqa: E402
from runtime.lanes import HostLanes  # noqa: E402
from runtime.steps import ReplayedSteps  # noqa: E402
from tests.helpers import random_trace, simulate  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.sizes import dimensions, model_sizes  # noqa: E402

POSITIVE = st.floats(1e-7, 1e-2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Cores that others use make threads wait for each other, up to a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakeClock:
    """Ticks by what the work under it says it took."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def takes(self, seconds):
        self.now_s += seconds


@given(alpha=POSITIVE, beta=st.floats(1e-12, 1e-9))
def test_copies_timed_by_a_clock_give_back_their_latency_and_rate(alpha, beta):
    clock = FakeClock()
    sizes = [4096 * 4**i for i in range(9)]
    seconds = [median_s(lambda s=s: clock.takes(alpha + beta * s), 3, clock) for s in sizes]
    found = fits.line(sizes, seconds)
    assert found.beta == pytest.approx(beta, rel=1e-6)
    assert found.alpha == pytest.approx(alpha, rel=1e-3, abs=1e-9)
    assert found.residual < 1e-9


def test_a_line_has_no_negative_part():
    assert fits.line([1, 2, 3], [0.0, 1.0, 2.0]).alpha == 0
    falling = fits.line([1, 2, 3], [3.0, 2.0, 1.0])
    assert (falling.alpha, falling.beta) == (pytest.approx(2.0), 0.0)
    assert fits.line([5, 5], [1.0, 3.0])[:2] == (2.0, 0.0)


@given(st.lists(POSITIVE, min_size=1, max_size=12))
def test_rising_rises_and_leaves_alone_what_did(seconds):
    found = fits.rising(seconds)
    assert all(b >= a * (1 + fits.LEAST_RISE) * (1 - 1e-12) for a, b in pairwise(found))
    assert fits.rising(found) == pytest.approx(found)
    assert max(found) <= max(seconds) * (1 + fits.LEAST_RISE) ** len(seconds) * (1 + 1e-12)


def test_pauses_of_the_host_do_not_count():
    """A plane under two in a hundred events that take a thousand times as long."""
    draw = random.Random(1)
    accesses = [draw.choice([4, 4, 9, 12]) for _ in range(4000)]
    moves = [draw.choice([0, 0, 0, 1, 2, 4]) for _ in accesses]
    seconds = [
        2e-6 + 3e-7 * n + 5e-7 * m + (5e-3 if draw.random() < 0.02 else 0.0)
        for n, m in zip(accesses, moves, strict=True)
    ]
    found = fits.thinking(accesses, moves, seconds)
    assert found.event_s == pytest.approx(2e-6, rel=1e-6)
    assert found.access_s == pytest.approx(3e-7, rel=1e-6)
    assert found.move_s == pytest.approx(5e-7, rel=1e-6)
    assert found.residual_s < 1e-12 < found.constant_residual_s


def test_no_part_of_thinking_is_negative():
    """Fewer seconds with more moves: the moves are free, the mean remains."""
    found = fits.thinking([4, 4, 4], [0, 1, 2], [3e-6, 2e-6, 1e-6])
    assert found.move_s == 0
    assert found.event_s + 4 * found.access_s == pytest.approx(2e-6)
    assert fits.thinking([2, 8], [0, 0], [1e-6, 4e-6])[:3] == pytest.approx((0, 5e-7, 0))


@pytest.mark.parametrize("passes", [0.0, 3.0, 11.0])
def test_experts_give_back_their_activation_passes(passes):
    read_rate, flops_rate, memory_rate = 3.7e12, 6.6e14, 4.2e12
    rows = []
    for size in (9e6, 3.5e8):
        for tokens in (256, 1024, 4096):
            flops, one_pass = size * tokens, tokens * 4096.0
            computing = flops / flops_rate + passes * one_pass / memory_rate
            rows.append(ExpertTime(size, flops, one_pass, math.hypot(size / read_rate, computing)))
    found = fits.activation_passes(rows, read_rate, flops_rate, memory_rate)
    assert found == pytest.approx(passes, abs=1e-6)


def test_an_efficiency_is_the_slope_and_not_the_latency():
    sizes = [1e6, 1e7, 1e8]
    found = fits.read_efficiency(sizes, [3e-6 + s / (0.8 * 4e12) for s in sizes], 4e12)
    assert found.beta == pytest.approx(0.8)
    assert found.alpha == pytest.approx(3e-6)
    assert fits.read_efficiency(sizes, [s / 8e12 for s in sizes], 4e12).beta == pytest.approx(2.0)


def test_a_cache_costs_what_its_length_and_its_sequences_tell():
    """20 ns a position however many sequences, 10 ns more for each."""
    more = LONG_CACHE - SHORT_CACHE
    short = [5e-5, 6e-5]
    long = [s + more * (2e-8 + n * 1e-8) for s, n in zip(short, (1, 4), strict=True)]
    found = kv_time((1, 4), short, long)
    assert found == pytest.approx((2e-8, 1e-8))
    assert found.efficiency(2e-9) == pytest.approx(0.2)
    assert found.efficiency(2e-8) == 1.0
    free = kv_time((1, 4), short, short)
    assert free == (0.0, 0.0)
    assert free.efficiency(1e-9) == 1.0
    serial = kv_time((1, 4), short, [s + more * 3e-8 for s in short])
    assert (serial.token_s, serial.efficiency(1e-9)) == (pytest.approx(3e-8), 1.0)


def test_reads_are_those_that_a_simulated_layer_is_charged(bench, tmp_path):
    """A layer's floor, reads and experts add up to what costs say of the same model."""
    profile = run.write_profile(tmp_path / "mine.toml", run.profile_values(bench, FOUND))
    dims = dimensions("qwen3-30b")
    reads = Reads(profile.gpu.memory_bytes_per_s, 0.7, 0.85)
    graph = Costs(profile, model_sizes("qwen3-30b")).graph
    assert graph is not None
    charged = graph.attention_s(1, 0) + dims.top_k * graph.expert_s(1)
    assert charged == pytest.approx(graph.floor_s + reads.weights_s(dims, 8, 1), rel=0.01)
    # Four tokens that choose 24 experts between them.
    further = 4 * dims.top_k - 24
    several = graph.attention_s(4, 0) + 24 * graph.expert_s(1)
    several += further * (graph.expert_s(2) - graph.expert_s(1))
    read_s = reads._replace(token_share=0.2).weights_s(dims, 24, 4)
    assert several == pytest.approx(6e-5 + read_s, rel=0.01)


def test_the_parts_of_a_round_trip_add_up_and_are_never_nothing():
    sync_s, launch_s = round_trip_parts(52.6e-6, 48.7e-6, 44.5e-6)
    assert (sync_s, launch_s) == (pytest.approx(3.9e-6), pytest.approx(4.2e-6))
    assert round_trip_parts(1e-6, 2e-6, 3e-6) == (LEAST_PART_S, LEAST_PART_S)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=6), st.integers(0, 10**6))
def test_least_squares_recover_what_is_not_negative(wanted, seed):
    draw = np.random.default_rng(seed)
    columns = draw.random((40, len(wanted)))
    found = fits.nonnegative(columns, columns @ np.array(wanted))
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found.min() >= 0


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_no_other_allowed_answer_is_nearer(columns, seed):
    """The conditions of Karush, Kuhn and Tucker: no allowed direction leads down."""
    draw = np.random.default_rng(seed)
    matrix, values = draw.normal(size=(12, columns)), draw.normal(size=12)
    found = fits.nonnegative(matrix, values)
    slope = matrix.T @ (matrix @ found - values)
    assert found.min() >= 0
    assert slope.min() >= -1e-8
    assert np.abs(slope * found).max() < 1e-8


TRUE = HostCosts(
    {
        "lru": Planning(9e-6, 5e-7, 6e-6, 2e-6, 0.0),
        "predictive": Planning(4e-5, 3e-6, 1.1e-5, 3e-6, 7e-6, 2e-5, 1e-6),
    },
    launching_s=7e-6,
    first_s=9e-6,
    issue_s=1.7e-5,
    tell_s=5e-6,
    change_s=5e-7,
    late_s=1.3e-5,
    missed=0.0,
)
LAYER_S, REST_S = 1.9e-4, 3e-4


#: How often a host and a device pause in a run that is made up.
PAUSES = 0.001


def planning_s(counts, planning):
    """From an event's answer to its plan."""
    seconds = planning.event_s + counts.accesses * planning.access_s
    return seconds + bool(counts.demand) * planning.miss_s + counts.demand * planning.move_s


def launching_s(counts, costs=TRUE):
    """From an event's plan to its launch."""
    seconds = costs.launching_s + bool(counts.demand) * costs.first_s
    seconds += counts.demand * costs.issue_s + counts.issued * costs.late_s
    return seconds + bool(counts.changes) * costs.tell_s + counts.changes * costs.change_s


def colder(seconds, waited, cold):
    """What takes a warm host *seconds*, after a wait."""
    return cold.longer(seconds, cold.weight(waited))


def made_up_run(policy, batch, draw, wait=lambda counts: 0.0, layers=8, quiet=False, costs=TRUE):
    """A run whose every event takes what *costs* say; hosts and devices pause at times."""
    counts, times, step_s = [], [], []
    for step in range(40):
        now = begun = float(step)
        now += costs.launching_s + LAYER_S * 0.6
        fetched = begun
        counts.append([])
        times.append([])
        for layer in range(layers):
            demand = draw.randint(0, 5) * (not quiet)
            prefetch = draw.randint(0, 3) * (policy == "predictive") * (not quiet)
            # Now and then the table has to be told only of what was fetched before.
            changes = demand + draw.randint(0, demand + prefetch + 1) * (not quiet)
            # Prefetches of the event before are on their way, some not yet issued.
            late = counts[-1][-1].prefetch if counts[-1] else 0
            one = EventCounts(batch * draw.randint(3, 4), demand, prefetch, changes)
            one = one._replace(late=late, issued=draw.randint(0, late) if late else 0)
            counts[-1].append(one)
            answered, waited = now, now - fetched
            planning = costs.planning[policy]
            planned = answered + colder(planning_s(one, planning), waited, planning.cold)
            now = planned + colder(launching_s(one, costs), waited, costs.cold)
            now += 4e-3 if draw.random() < PAUSES else 0.0
            fetched = now + planning.foreseeing_s(one)
            times[-1].append((answered, planned, now, fetched))
            now += LAYER_S * (1.0 if layer < layers - 1 else 0.4) + wait(one)
            now += 3e-3 if draw.random() < PAUSES else 0.0
        step_s.append(now + REST_S - begun)
    return TimedRun(policy, counts, np.array(times), step_s)


def made_up_runs(**options):
    draw = random.Random(5)
    return [made_up_run(p, b, draw, **options) for p in TRUE.planning for b in (1, 4)]


def test_host_costs_come_back_from_runs_with_pauses():
    runs = made_up_runs()
    runs[0].counts[0][0] = runs[0].counts[0][0]._replace(apart=True)
    runs[0].times[0, 0, 0] -= 1.0
    found = fit_host(runs)
    assert found.missed < 0.01
    assert found.cold.share == pytest.approx(0.0, abs=0.051)
    assert found.planning["lru"].residual_s < 1e-6
    for n, d, p, changes in ((4, 0, 0, 0), (13, 0, 0, 1), (3, 1, 0, 1), (4, 4, 0, 6), (9, 2, 3, 9)):
        for policy, planning in TRUE.planning.items():
            one = EventCounts(n, d, p * (policy != "lru"), changes, issued=p)
            assert found.planning[policy].seconds(one) == pytest.approx(
                planning_s(one, planning), rel=0.05
            )
            assert found.planning[policy].foreseeing_s(one) == pytest.approx(
                planning.foreseeing_s(one), rel=0.05, abs=1e-9
            )
        assert found.launching(one) == pytest.approx(launching_s(one), rel=0.05)


def test_each_part_of_the_hosts_costs_comes_back(monkeypatch):
    """What an event takes that misses anything, or tells the table anything, beside the counts."""
    monkeypatch.setattr(f"{__name__}.PAUSES", 0.0)
    found = fit_host(made_up_runs())
    for name in ("launching_s", "first_s", "issue_s", "tell_s", "change_s", "late_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    for policy, planning in TRUE.planning.items():
        for name in ("event_s", "access_s", "miss_s", "move_s", "prefetch_s"):
            expected = pytest.approx(getattr(planning, name), rel=1e-3, abs=1e-10)
            assert getattr(found.planning[policy], name) == expected, (policy, name)


def test_what_passes_until_a_late_host_reads_the_answer_comes_back():
    """And what handing over each prefetch adds; where one was late, it issued others besides."""
    run = made_up_run("predictive", 1, random.Random(3))
    for step, (counts, times) in enumerate(zip(run.counts, run.times, strict=True)):
        for layer in range(len(counts)):
            late = int(step % 4 == 0)
            one = EventCounts(4, 0, layer % 3, 0, late=late, issued=late)
            counts[layer] = one
            if layer and counts[layer - 1].prefetch:
                # The event before fetched for longer than a layer takes.
                before = times[layer - 1]
                before[3] = before[2] + 2 * LAYER_S
                more = 1.7e-5 * counts[layer - 1].prefetch + 3e-5 + 4e-4 * late
                times[layer:] += before[3] + more - times[layer, 0]
            times[layer, 3] = times[layer, 2]
    assert fit_return([run]) == pytest.approx((3e-5, 1.7e-5), rel=1e-6)
    host = fit_host([run])
    assert (host.return_s, host.prefetch_s) == fit_return([run])
    assert fit_return([made_up_run("lru", 1, random.Random(3))]) == (0.0, 0.0)


def long_waits(one):
    return 8e-4 * one.demand


@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.0), (0.4, 0.2, 0.7), (0.0, 0.5, 0.3)])
def test_a_host_that_waited_is_slower_by_the_shares_that_come_back(shares):
    """Of launching, for all policies together, and of each policy's planning."""
    launching, *planning = (Cold(share, most_s=4e-5) for share in shares)
    true = {
        name: TRUE.planning[name]._replace(cold=cold)
        for name, cold in zip(TRUE.planning, planning, strict=True)
    }
    costs = TRUE._replace(cold=launching, planning=true)
    found = fit_host(made_up_runs(wait=long_waits, costs=costs))
    assert found.cold.share == pytest.approx(launching.share, abs=0.051)
    for name, cold in zip(TRUE.planning, planning, strict=True):
        assert found.planning[name].cold.share == pytest.approx(cold.share, abs=0.051)
    one = EventCounts(4, 2, 0, 3)
    for waited in (-1.0, 1e-4, 2e-3):
        seconds = colder(found.launching(one), waited, found.cold)
        expected = colder(launching_s(one, costs), waited, costs.cold)
        assert seconds == pytest.approx(expected, rel=0.05)
        for name, policy in costs.planning.items():
            seconds = colder(found.planning[name].seconds(one), waited, found.planning[name].cold)
            expected = colder(planning_s(one, policy), waited, policy.cold)
            assert seconds == pytest.approx(expected, rel=0.05)


def test_a_policy_that_never_waited_for_long_is_as_cold_as_lru(monkeypatch):
    monkeypatch.setattr(f"{__name__}.PAUSES", 0.0)
    planning = {n: p._replace(cold=Cold(0.4, most_s=4e-5)) for n, p in TRUE.planning.items()}
    costs, draw = TRUE._replace(planning=planning), random.Random(6)
    waited = made_up_run("lru", 1, draw, wait=long_waits, costs=costs)
    brief = made_up_run("predictive", 1, draw, costs=costs)
    found = fit_host([waited, brief]).planning
    assert found["lru"].cold.share == pytest.approx(0.4, abs=0.051)
    assert found["predictive"].cold == found["lru"].cold
    assert fit_host([brief]).planning["predictive"].cold == Cold()


def test_many_changes_of_the_table_cost_as_much_each_as_few():
    """The table is told without a copy at times, and of hundreds of changes at others."""
    found = made_up_run("lru", 1, random.Random(1))
    for step, times in zip(found.counts, found.times, strict=True):
        for i, one in enumerate(step):
            step[i] = EventCounts(4, 0, 0, 100 * one.demand)
            times[i, 1] = times[i, 0] + planning_s(step[i], TRUE.planning["lru"])
            times[i, 2:] = times[i, 1] + launching_s(step[i])
    host = fit_host([found])
    assert host.launching_s == pytest.approx(TRUE.launching_s, rel=1e-3)
    assert host.tell_s == pytest.approx(TRUE.tell_s, rel=1e-3)
    assert host.change_s == pytest.approx(TRUE.change_s, rel=1e-3)
    assert host.first_s == host.issue_s == 0.0


def test_what_a_miss_takes_comes_back_with_its_copies():
    copy_s, more_s, miss_s = 1.6e-4, 2.6e-5, 2.3e-5

    def wait(one):
        """Beyond a layer: the host is through before the first of the copies has landed."""
        if not one.demand:
            return 0.0
        behind = launching_s(one) - TRUE.first_s - TRUE.issue_s
        return miss_s + more_s + one.demand * copy_s - behind

    runs = [r for r in made_up_runs(wait=wait) if r.policy == "lru"]
    found = fit_misses(runs, LAYER_S, TRUE, more_s)
    assert found.start_s == pytest.approx(miss_s, rel=0.02)
    assert found.copy_s == pytest.approx(copy_s, rel=0.01)
    assert found.missed < 0.01
    assert fit_misses(runs, LAYER_S, TRUE, 1e-3).start_s == 0.0
    assert fit_misses([], LAYER_S, TRUE, more_s) == (0.0, 0.0, 0.0)


def test_a_layer_and_the_rest_of_a_step_come_from_quiet_events():
    quiet = made_up_run("lru", 1, random.Random(2), quiet=True)
    assert layer_s(quiet) == pytest.approx(LAYER_S)
    assert rest_of_step([quiet], TRUE) == pytest.approx(REST_S, rel=1e-3)
    busy = made_up_run("lru", 1, random.Random(2), wait=lambda one: 1e-3 * one.demand)
    assert layer_s(busy) == pytest.approx(LAYER_S)
    # A graph that waits for a prefetch takes longer than its layer.
    late = [busy.counts[0][0]._replace(demand=0, changes=0, late=1)] * 8
    assert math.isnan(layer_s(busy._replace(counts=[late] * 40)))
    # Where the last event moved nothing; others may have.
    assert rest_of_step([busy, quiet], TRUE) == pytest.approx(REST_S, rel=0.05)
    assert rest_of_step([quiet.from_step(30)], TRUE) == pytest.approx(REST_S, rel=1e-3)
    assert rest_of_step([], TRUE) == 1e-6
    assert len(quiet.from_step(30).counts) == 10


def test_what_a_layer_takes_more_is_the_shortest_of_a_policys_runs():
    draw = random.Random(4)
    quiet = made_up_run("lru", 1, draw, quiet=True)

    def longer(policy, more_s):
        return made_up_run(policy, 1, draw, wait=lambda one: more_s, quiet=True)._replace(
            policy=policy
        )

    runs = [longer("lru", 5e-5), longer("lru", 2e-5), longer("predictive", 1e-5)]
    moving = [one._replace(demand=1) for one in quiet.counts[0]]
    busy = quiet._replace(policy="busy", counts=[moving] * len(quiet.counts))
    found = more_layer_s([*runs, busy], layer_s(quiet))
    assert found == {"lru": pytest.approx(2e-5), "predictive": pytest.approx(1e-5)}
    # What is shorter than a plain layer is measured no better than that.
    assert more_layer_s([quiet, *runs], layer_s(runs[0])) == {"lru": 0.0, "predictive": 0.0}
    assert more_layer_s([], LAYER_S) == {}


def test_every_policy_runs_for_its_events(bench):
    """The runtime itself on a small model: four moments of every event, and its counts."""
    shape = Shape(layers=2, hidden=64, intermediate=32, tokens=6, experts=8, top_k=2)
    with sessions(shape, (1, 2), "cpu") as found:
        runs = timed_runs(found, list(POLICIES.classes()), ("50%",))
    assert {r.policy for r in runs} == set(POLICIES.classes())
    for timed, batch in zip(runs, itertools.cycle((1, 2))):
        steps = 15 if batch == 1 else 9
        assert len(timed.counts) == len(timed.step_s) == steps
        assert timed.times.shape == (steps, 2, 4)
        moments = timed.times.reshape(-1)
        assert (np.diff(moments) > 0).all()
        assert (timed.times[:, -1, -1] - timed.times[:, 0, 0] < timed.step_s).all()
        for one in (one for step in timed.counts for one in step):
            assert one.accesses >= 2
            assert one.changes >= one.demand or timed.policy == "mixed"
    moves = {r.policy: sum(c.prefetch for step in r.counts for c in step) for r in runs[::2]}
    assert moves["lru"] == 0 < moves["predictive"]


def test_each_event_of_a_run_has_the_prefetches_that_it_found_on_their_way(monkeypatch):
    """Copies land only when somebody waits for them."""
    monkeypatch.setattr(
        "runtime.session.lanes_for", lambda device, **how: HostLanes(lag=lambda: 10**9)
    )
    shape = Shape(layers=3, hidden=64, intermediate=32, tokens=6, experts=8, top_k=2)
    with sessions(shape, (2,), "cpu") as found:
        events = {
            name: [one for step in found[2].timed(name, "80%").counts for one in step]
            for name in ("lru", "predictive")
        }
    assert not any(one.late or one.issued for one in events["lru"])
    found = events["predictive"]
    assert any(one.late for one in found)
    assert any(one.issued for one in found)
    # Each was fetched before, and is issued but once.
    assert sum(one.issued for one in found) <= sum(one.prefetch for one in found)


def test_every_event_of_a_decoding_model_is_noted(bench):
    with offloaded("qwen3_moe", 2, bench, middle_dimensions("qwen3_moe", 2, wide=False)) as model:
        times = noted(model, Decoding(model, bench, 64, prompt=8), 5)
        assert times.shape == (9, 2, 4)
        assert (np.diff(times.reshape(-1)) > 0).all()
        assert 0 < quiet_layer_s(times) < 1
        assert model.expert_cache.runner.engine.clock is None


def test_no_layer_is_timed_where_none_is_captured(bench):
    dims = middle_dimensions("qwen3_moe", 2, wide=False)
    assert layer_times("qwen3_moe", bench, dims, [(64, 1), (64, 2)]) == []
    graphs = measure_graphs(bench)
    assert graphs.launch_s == 0.0
    assert LEAST_PART_S <= graphs.sync_s < 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_middle_dimensions(family, bench):
    dims = middle_dimensions(family, 1, wide=False)
    for name in PUBLISHED.values():
        wide = middle_dimensions(family, 1)
        known = dimensions(name)
        assert (wide.hidden, wide.intermediate) != (known.hidden, known.intermediate)
    with offloaded(family, 1, bench, dims) as model:
        assert Decoding(model, bench, 40, sequences=2, prompt=4).step_s(2) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_small_with_the_heads_of_a_published_model(family, bench):
    headed = with_published_heads(family, tiny_dimensions(family, 2, wide=False))
    published = dimensions(PUBLISHED[family])
    per_layer = published.kv_bytes_per_token(2) / published.all_layers
    assert headed.kv_bytes_per_token(2) / headed.all_layers == per_layer
    with offloaded(family, 2, bench, headed) as model:
        decoding = Decoding(model, bench, 80)
        assert decoding.step_s(2) > 0
        assert len(decoding.kept) == 2


@pytest.mark.parametrize("policy", ["lru", "belady", "predictive"])
def test_events_are_timed_with_their_experts_and_moves(tmp_path, policy):
    """Each stage takes one tick of a clock that does nothing else; the rest is the planner's."""
    made_up_trace(tmp_path / "t.parquet", sequences=2, tokens=30)
    session = TraceSession(Setup(trace=str(tmp_path / "t.parquet"), batch=2))
    planner, _, steps = session.prepare(policy, Budget(cache="50%"))
    ticks, timed = iter(range(10**6)), (Timed(), Timed())
    steps = list(steps())
    source = ReplayedSteps(session.model)
    time_events(planner, steps, source, timed, lambda: float(next(ticks)))
    for stage in timed:
        assert set(stage.seconds) == {1.0}
        assert stage.accesses == [len(d) for step in steps for d in step.demand][180:]
    demanded, fetched = (sum(stage.moves) for stage in timed)
    assert 0 < demanded <= planner.counts["demand"]
    assert (fetched > 0) == (policy == "predictive")


VALUES = st.recursive(
    st.one_of(
        st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(codec="utf-8"), max_size=8), st.booleans(),
        st.lists(st.integers(-9, 9), max_size=3),
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), inner),
        st.lists(st.dictionaries(st.sampled_from("abc"), inner), min_size=1, max_size=2),
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), VALUES))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(values):
    assert tomllib.loads(dumps(values, "a comment\nof two lines")) == values


def a_table(alpha, rate):
    sizes = [4096, 2**20, 2**28]
    return Table(sizes, [alpha + s / rate for s in sizes], [s / rate for s in sizes])


IDLE = Thinking(1e-7, 2e-8, 3e-7, 1e-8, 1e-8)
FOUND = run.Measured(
    copies=Copies(a_table(9e-6, 5.5e10), a_table(8e-6, 5.4e10), 2.8e9, 7.9e-6, 6e-6),
    rates=Rates(4.2e12, 6.6e14, 1.8e-6),
    graphs=Graphs(6e-6, 5e-6),
    experts=Experts(0.9, 11.0, [ExpertRow("qwen3-30b", 9_437_184, [1], [5e-5], 1.5e-5)]),
    cpu=CpuRates(1e11, 2e12),
    policies={
        "lru": Stages(Thinking(2e-6, 2e-7, 1e-6, 1e-7, 1e-6), IDLE),
        "predictive": Stages(
            Thinking(2e-5, 1e-6, 3e-6, 1e-7, 4e-6), Thinking(1e-5, 2e-6, 4e-6, 1e-7, 4e-6)
        ),
        "fifo": Stages(Thinking(1e-6, 0.0, 1e-6, 1e-7, 1e-6), IDLE),
    },
    launches=Launches(9e-6, 3e-4, 60, 20, 30),
    dense=Line(3e-6, 0.7, 1e-6),
    fused=Line(4e-6, 0.85, 2e-6),
    token_share=0.2,
    low=Low({"4": 0.6, "8": 0.8}, 0.05),
    layers=Layers(
        {"qwen3_moe": 4e-5, "any": 4.5e-5}, {"qwen3_moe": 6e-5, "any": 7e-5},
        {"qwen3_moe": 0.2, "any": 0.3}, {"qwen3_moe": 2e-8, "any": 1e-8},
    ),
    runs=Runs(
        HostCosts(
            {
                "lru": Planning(8e-6, 3e-7, 0.0, 1.5e-6, 0.0, residual_s=1e-7),
                "predictive": Planning(
                    5.5e-5, 2.5e-6, 4e-6, 7.5e-6, 9e-6, 2e-5, 4e-7, 1e-7, Cold(0.3, most_s=8e-5)
                ),
            },
            launching_s=7e-6, first_s=3e-6, issue_s=1.1e-5, tell_s=5e-6, change_s=4e-7,
            late_s=1.2e-5, missed=0.01, cold=Cold(0.1), return_s=3e-5, prefetch_s=9e-6,
        ),
        3e-4, Misses(2e-5, 1.6e-4, 0.02), {"mixed": 1.3e-5}, 4e-6,
    ),
    workspace_bytes=9_000_000,
)  # fmt: skip


@pytest.fixture
def bench():
    return Bench(torch.device("cpu"), quick=True)


def test_what_runs_tell_stands_in_the_profile(bench, tmp_path):
    """Policies that were not run keep what they take when they are replayed alone."""
    profile = run.write_profile(tmp_path / "mine.toml", run.profile_values(bench, FOUND))
    host, software = profile.host, profile.software
    assert host.policy_event_s == {"lru": 8e-6, "predictive": 5.5e-5, "fifo": 1e-6}
    assert host.policy_access_s == {"lru": 3e-7, "predictive": 2.5e-6, "fifo": 0}
    assert host.policy_move_s == {"lru": 1.5e-6, "predictive": 7.5e-6, "fifo": 1e-6}
    assert host.policy_prefetch_s == {"lru": 0.0, "predictive": 9e-6, "fifo": 3e-7}
    assert host.policy_foresee_event_s == {"lru": 0.0, "predictive": 2e-5, "fifo": 1e-7}
    assert host.policy_foresee_access_s == {"lru": 0.0, "predictive": 4e-7, "fifo": 2e-8}
    # What the machine takes before a first copy is every policy's.
    assert host.policy_miss_s == {"lru": 2.3e-5, "predictive": 2.7e-5, "fifo": 2.3e-5}
    assert (host.copy_issue_s, host.miss_s) == (1.1e-5, 2.3e-5)
    assert (host.table_tell_s, host.table_update_s) == (5e-6, 4e-7)
    assert (host.step_s, host.graph_launch_s, host.gate_sync_s) == (3e-4, 7e-6, 5e-6)
    assert (host.return_s, host.prefetch_issue_s, host.late_issue_s) == (3e-5, 9e-6, 1.2e-5)
    assert (host.cold_share, host.cold_most_s) == (0.1, 1.0)
    # Of a policy that was not run nothing is said: it is as launching is.
    assert host.policy_cold_share == {"lru": 0.0, "predictive": 0.3}
    assert host.policy_cold_most_s == {"lru": 1.0, "predictive": 8e-5}
    assert software.policy_layer_s == {"mixed": 1.3e-5}
    assert profile.link.wake_s == 6e-6
    assert profile.gpu.workspace_bytes == 9_000_000
    assert profile.expert.fused_efficiency == 0.85
    assert profile.expert.fused_token_share == 0.2
    assert profile.expert.low_efficiency == {"4": 0.6, "8": 0.8}
    assert profile.expert.low_token_share == 0.05
    assert software.several_floor_s == {"qwen3_moe": 6e-5, "any": 7e-5}
    assert software.dense_efficiency == 0.7
    assert software.kv_efficiency == {"qwen3_moe": 0.2, "any": 0.3}
    assert software.kv_token_s == {"qwen3_moe": 2e-8, "any": 1e-8}
    graph = Costs(profile, model_sizes("qwen3-30b")).graph
    assert graph is not None
    assert graph.floor_s == 4e-5
    colds = [graph.planning_cold(name) for name in ("lru", "predictive", "fifo")]
    assert colds == [Cold(0.0), Cold(0.3, most_s=8e-5), Cold(0.1)]


def test_copies_as_large_as_experts_take_what_they_take_in_runs(bench):
    link = run.profile_values(bench, FOUND)["link"]
    for name, alone in (
        ("isolated", FOUND.copies.h2d.isolated_s),
        ("queued", FOUND.copies.h2d.queued_s),
    ):
        found = link["h2d"][name]
        assert found["sizes_bytes"] == FOUND.copies.h2d.sizes_bytes
        more = [a - b for a, b in zip(found["seconds"], alone, strict=True)]
        assert more == pytest.approx([0.0, 4e-6, 4e-6], abs=1e-8)
    for values in (link, run.profile_values(bench, FOUND._replace(runs=None))["link"]):
        assert values["d2h"]["queued"]["seconds"] == FOUND.copies.d2h.queued_s
    assert values["h2d"]["queued"]["seconds"] == FOUND.copies.h2d.queued_s


def test_without_runs_what_was_measured_alone_stands(bench):
    host = run.profile_values(bench, FOUND._replace(runs=None))["host"]
    assert (host["copy_issue_s"], host["step_s"]) == (7.9e-6, 3e-4)
    assert host["policy_event_s"]["lru"] == 2e-6
    told = {"graph_launch_s", "table_tell_s", "table_update_s", "miss_s", "policy_miss_s"}
    told |= {"return_s", "prefetch_issue_s", "late_issue_s", "cold_share", "policy_cold_share"}
    assert not told & host.keys()
    assert "policy_layer_s" not in run.profile_values(bench, FOUND._replace(runs=None))["software"]
    assert FOUND.runs is not None
    unfitted = FOUND.runs.host._replace(issue_s=0.0, launching_s=0.0, prefetch_s=0.0)
    runs = FOUND.runs._replace(host=unfitted)
    host = run.profile_values(bench, FOUND._replace(runs=runs))["host"]
    # 0 would be refused, or say that another figure counts.
    assert (host["copy_issue_s"], host["graph_launch_s"]) == (1e-9, 6e-6)
    assert (host["return_s"], host["prefetch_issue_s"]) == (3e-5, 1e-9)
    runs = FOUND.runs._replace(host=unfitted._replace(return_s=0.0))
    assert run.profile_values(bench, FOUND._replace(runs=runs))["host"]["prefetch_issue_s"] == 0.0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A quick run of the command on the CPU: its profile's path and what it printed."""
    path = tmp_path_factory.mktemp("calibrate") / "mine.toml"
    words = ["--out", str(path), "--device", "cpu", "--quick"]
    result = CliRunner().invoke(cli_calibrate.calibrate, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path, result.output


def test_a_cpu_can_be_calibrated(written):
    path, output = written
    profile = load_profile(path)
    assert profile.kind == "measured"
    assert profile.measurement is not None
    assert profile.measurement.date
    for figure in leaves(profile, FIGURES):
        assert profile.source_of(figure).startswith("measured: "), figure
    for figure in ("gpu.memory_bytes_per_s", "link.h2d", "expert", "gpu.kernel_min_s"):
        assert "no GPU" in profile.source_of(figure)
    assert profile.host.graph_launch_s == 0
    assert set(profile.host.policy_event_s) == set(POLICIES.classes())
    assert 10 < profile.software.attention_kernels < 200
    assert f"{path}: written after" in output
    assert "host.policy_event_s.lru" in output
    assert [p.name for p in path.parent.iterdir()] == ["mine.toml"]


def test_its_tables_rise(written):
    link = load_profile(written[0]).link
    for direction in (link.h2d, link.d2h):
        for table in (direction.isolated, direction.queued):
            assert list(table.seconds) == sorted(set(table.seconds))
        for size in direction.isolated.sizes_bytes:
            assert direction.copy_s(size, True) <= direction.copy_s(size, False)


@pytest.mark.parametrize("policy", ["lru", "predictive"])
def test_the_simulator_runs_on_it(written, bench, tmp_path, policy):
    from policies.forecasters.oracle import Oracle

    graphs = run.write_profile(tmp_path / "graphs.toml", run.profile_values(bench, FOUND))
    for profile in (load_profile(written[0]), graphs):
        forecaster = Oracle(accuracy=0.8, horizon=3) if policy == "predictive" else None
        world = simulate(policy, random_trace(3), 6, profile, batch=2, forecaster=forecaster)
        assert 0 < world.total_s < 60
        assert sum(world.parts_s) == pytest.approx(world.total_s)


def test_the_kernels_that_graphs_need_can_be_timed_anywhere(bench):
    """On a CPU the figures mean nothing, but the measurements run."""
    for measure in (measure_fused, measure_dense):
        found = measure(bench, 1e10)
        assert found.beta > 0
        assert math.isfinite(found.residual)
    assert 0 <= measure_token_share(bench, 1e10, found) < 100
    low = measure_low(bench, 1e10)
    assert low.efficiency.keys() == {"4"}
    assert low.efficiency["4"] > 0
    assert low.token_share >= 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.json", "expected a name that ends in .toml"),
        ("nowhere/mine.toml", "no folder"),
        ("there.toml", "exists already, expected a new file; --force replaces it"),
    ],
)
def test_a_bad_target_is_refused_before_anything_is_measured(tmp_path, name, said, monkeypatch):
    (tmp_path / "there.toml").write_text("mine")
    monkeypatch.setattr(cli_calibrate, "require_torch", lambda: pytest.fail("went on"))
    with pytest.raises(InputError, match=said):
        CliRunner().invoke(
            cli_calibrate.calibrate, ["--out", str(tmp_path / name)], catch_exceptions=False
        )
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "there.toml"
    path.write_text("mine")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    for where in ("measure", "load_profile"):
        monkeypatch.setattr(run, where, interrupted)
        if where == "load_profile":
            monkeypatch.setattr(run, "measure", lambda bench, advance: FOUND)
        words = ["--out", str(path), "--device", "cpu", "--quick", "--force"]
        assert CliRunner().invoke(cli_calibrate.calibrate, words).exit_code != 0
        assert [p.name for p in tmp_path.iterdir()] == ["there.toml"]
        assert path.read_text() == "mine"


def test_the_summary_has_every_figure(bench):
    values = run.profile_values(bench, FOUND)
    text = cli_calibrate.summary(values)
    figures = ("host.graph_launch_s", "host.policy_miss_s.fifo", "software.layer_floor_s.qwen3_moe")
    for word in (*figures, "7.00 us", "0.85"):
        assert word in text
    assert json.loads(json.dumps(values)) == values
