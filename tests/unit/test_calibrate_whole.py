"""Calibration of decode steps in one graph: made-up stamps and moments against known answers."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.costs import Costs  # noqa: E402
from policies.hardware import FIGURES  # noqa: E402
from policies.session import Setup  # noqa: E402
from policies.tables import leaves  # noqa: E402
from runtime import cli_calibrate  # noqa: E402
from runtime.calibration import handshakes, run, whole_layers  # noqa: E402
from runtime.calibration.bench import Bench  # noqa: E402
from runtime.calibration.handshakes import (  # noqa: E402
    Ping,
    fit_follow,
    measure_launch,
    measure_ping,
    measure_publish,
)
from runtime.calibration.hosts import HostCosts, Planning  # noqa: E402
from runtime.calibration.models import Reads, measure_layers  # noqa: E402
from runtime.calibration.runs import Shape  # noqa: E402
from runtime.calibration.shapes import Decoding, offloaded  # noqa: E402
from runtime.calibration.stamps import GateTimes, answers_apart_s, gate_times  # noqa: E402
from runtime.calibration.timed import EventCounts, TimedRun  # noqa: E402
from runtime.calibration.whole_layers import (  # noqa: E402
    WholeLayer,
    WholeLayers,
    whole_graphs,
    whole_layer,
)
from runtime.calibration.wholes import Wholes, measure_wholes  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.handshake import PLANNED, POSTED, RELEASED  # noqa: E402
from runtime.lanes import HostLanes  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.unit.test_calibrate import FOUND  # noqa: E402
from traces.sizes import dimensions, model_sizes  # noqa: E402

#: Nanoseconds, and since when a GPU's clock counts them.
US, EPOCH = 1000, 1_790_000_000_123_456_789

LAYERS = WholeLayers({"qwen3_moe": 2.8e-5}, {"qwen3_moe": 5.1e-5}, [2.5e-6, 3e-6, 3.5e-6])
WHOLES = Wholes(LAYERS, Ping(2e-6, 5e-6), 3e-5, 1.4e-6, 2.5e-6)
KNOWN = FOUND._replace(wholes=WHOLES)


@pytest.fixture
def bench():
    return Bench(torch.device("cpu"), quick=True)


def made_up_stamps(draw, steps=80, layers=6, tick=1, late=0.0, missing=0.0):
    """Gates of 2.6 us, of which 1.1 until the host is heard, layers of 41 us between them.

    A host is *late*, by up to 90 us, for such a share of all gates but a step's first; as many
    events are *missing* something that lands up to 300 us later. The clock ticks by *tick* ns.
    """
    found, now = [], EPOCH
    for _ in range(steps):
        now += round(draw.uniform(5e5, 2e6))
        rows = []
        for layer in range(layers):
            waited = draw.random() < late and layer > 0
            settled = now + 1100 + (draw.randrange(3 * US, 90 * US) if waited else 0)
            known = settled + 900
            landed = known + 600 + (draw.randrange(300 * US) if draw.random() < missing else 0)
            rows.append((now, settled, known, landed))
            now = landed + 41 * US + draw.randrange(-200, 201)
        found.append(rows)
    return np.array(found, dtype=np.int64) // tick * tick


@pytest.mark.parametrize(("late", "missing"), [(0.0, 0.0), (0.4, 0.0), (0.0, 0.1), (0.3, 0.1)])
def test_gates_and_layers_come_back_from_stamps(late, missing):
    """However often the host is late, and though some experts are missed."""
    found = gate_times(made_up_stamps(random.Random(3), late=late, missing=missing))
    assert found.handshake_s == pytest.approx(2.6e-6, rel=0.02)
    assert found.work_s == pytest.approx(41e-6, rel=0.003)
    assert found.layer_s == pytest.approx(43.6e-6, rel=0.004)


def test_a_coarse_clock_does_not_round_what_is_found():
    found = gate_times(made_up_stamps(random.Random(4), steps=300, tick=1024))
    assert found.layer_s == pytest.approx(43.6e-6, rel=0.01)
    assert found.handshake_s == pytest.approx(2.6e-6, abs=0.4e-6)


def test_layers_are_needed_to_tell_them_apart():
    for shape in ((3, 1, 4), (0, 5, 4), (5, 4)):
        with pytest.raises(ValueError, match="expected steps of two or more layers"):
            gate_times(np.zeros(shape, dtype=np.int64))


def test_a_ping_is_what_an_answer_adds_to_a_gate():
    stamps = made_up_stamps(random.Random(5))
    apart_s = answers_apart_s(stamps)
    assert apart_s == pytest.approx(43.6e-6, rel=0.003)
    later = stamps + np.arange(6)[None, :, None] * 3400
    assert Ping(apart_s, answers_apart_s(later)).way_s == pytest.approx(1.7e-6, rel=1e-3)
    assert Ping(2e-6, 1e-6).way_s == 0.0


def test_floor_handshake_and_reads_add_up_to_what_was_measured():
    """The handshake is every family's, their floors are what is left of each layer."""
    layers, known_s = WholeLayers.empty(), 9e-6
    times = {"mixtral": GateTimes(2.4e-6, 38e-6), "olmoe": GateTimes(2.8e-6, 51e-6)}
    for name, one in times.items():
        layers.note(name, WholeLayer(one, 4.0), known_s, several=False)
        slower = one._replace(work_s=2 * one.work_s)
        layers.note(name, WholeLayer(slower, 9.0), known_s, several=True)
    assert layers.handshake_s == pytest.approx(2.6e-6)
    one, several = layers.floors()
    for name, gate in times.items():
        assert one[name] + layers.handshake_s + known_s == pytest.approx(gate.layer_s)
        more = several[name] - one[name]
        assert more == pytest.approx(gate.work_s)
    assert one["any"] == pytest.approx((one["mixtral"] + one["olmoe"]) / 2)
    # What is subtracted is a model: a floor stays. Most handshakes take 2.8 us now.
    layers.note("olmoe", WholeLayer(times["olmoe"], 4.0), 1.0, several=False)
    assert layers.floors()[0]["olmoe"] == pytest.approx(5.1e-6)


def test_a_simulated_layer_takes_what_was_measured(bench, tmp_path):
    profile = run.write_profile(tmp_path / "mine.toml", run.profile_values(bench, KNOWN))
    dims, whole = dimensions("qwen3-30b"), Costs(profile, model_sizes("qwen3-30b")).whole
    assert whole is not None
    charged = whole.attention_s(1, 0) + whole.handshake_s + dims.top_k * whole.expert_s(1)
    reads = Reads(profile.gpu.memory_bytes_per_s, 0.7, 0.85, 0.2)
    assert charged == pytest.approx(
        LAYERS.one_s["qwen3_moe"] + reads.weights_s(dims, 8, 1), rel=0.01
    )
    more = whole.attention_s(4, 0) - whole.attention_s(1, 0)
    assert more == pytest.approx(2.3e-5, rel=0.01)


def test_it_stands_in_the_profile(bench, tmp_path):
    values = run.profile_values(bench, KNOWN)
    profile = run.write_profile(tmp_path / "mine.toml", values)
    whole = profile.whole
    assert whole is not None
    assert (whole.handshake_s, whole.launch_s, whole.follow_s) == (3e-6, 3e-5, 2.5e-6)
    assert (whole.answer_s, whole.notice_s, whole.publish_s) == (1.5e-6, 1.5e-6, 1.4e-6)
    assert whole.layer_floor_s == {"qwen3_moe": 2.5e-5, "any": 2.5e-5}
    assert whole.several_floor_s == {"qwen3_moe": 4.8e-5, "any": 4.8e-5}
    figures = [path for path in leaves(profile, FIGURES) if path.startswith("whole.")]
    assert len(figures) == 8
    assert all(path in profile.sources for path in figures)
    assert all(profile.source_of(path).startswith("measured: ") for path in figures)
    assert "whole.layer_floor_s.qwen3_moe" in cli_calibrate.summary(values)
    nothing = WHOLES._replace(follow_s=0.0)
    profile = run.write_profile(
        tmp_path / "less.toml", run.profile_values(bench, FOUND._replace(wholes=nothing))
    )
    assert profile.whole == dataclasses.replace(whole, follow_s=0.0)


def test_without_such_steps_nothing_is_said_of_them(bench):
    for found in (FOUND, KNOWN._replace(runs=None)):
        values = run.profile_values(bench, found)
        assert "whole" not in values
        assert not any(name.startswith("whole") for name in values["sources"])


def test_the_simulator_runs_on_it(bench, tmp_path):
    path = tmp_path / "mine.toml"
    run.write_profile(path, run.profile_values(bench, KNOWN))
    Shape(layers=3, hidden=64, intermediate=32, tokens=6, experts=8, top_k=2).write(
        tmp_path / "t.parquet", 2
    )
    found = {}
    for compute in ("graph", "fused"):
        setup = Setup(str(tmp_path / "t.parquet"), hardware=str(path), compute=compute)
        found[compute] = Session(setup).run("lru", Budget(cache="50%"))[0]
    one, chain = found["graph"], found["fused"]
    assert one.decisions_sha256 == chain.decisions_sha256
    assert one.time["total_s"] < chain.time["total_s"]


HOST = HostCosts(
    {
        "lru": Planning(9e-6, 5e-7, 6e-6, 2e-6, 0.0, 1e-6, 0.0),
        "predictive": Planning(4e-5, 3e-6, 1.1e-5, 3e-6, 7e-6, 2e-5, 1e-6),
    },
    launching_s=7e-6, first_s=9e-6, issue_s=1.7e-5, tell_s=5e-6, change_s=5e-7, late_s=1.3e-5,
    missed=0.0,
)  # fmt: skip


def made_up_moments(policy, draw, layer_s, more_s, turn_s, prefetch_s, steps=60):
    """A run whose every event takes *more_s* beyond its planning; *turn_s* lie between two."""
    counts, times = [], []
    planning = HOST.planning[policy]
    for _ in range(steps):
        row, moments = [], []
        now = gate = draw.random()
        for _ in range(8):
            moves = draw.choice((1, 2, 4)) if policy == "predictive" else 0
            one = EventCounts(draw.choice((6, 6, 5)), 0, moves, 0)
            answered = max(now, gate)
            planned = answered + planning.seconds(one)
            followed = planned + more_s
            fetched = followed + planning.foreseeing_s(one)
            moments.append((answered, planned, followed, fetched))
            row.append(one)
            now, gate = fetched + turn_s + moves * prefetch_s, answered + layer_s
        counts.append(row)
        times.append(moments)
    return TimedRun(policy, counts, np.array(times), [1e-3] * steps)


def test_what_follows_an_event_is_what_chains_do_not_know():
    draw = random.Random(6)
    quiet = made_up_moments("lru", draw, 6e-5, 1.9e-6, 3e-6, 0.0)
    late = made_up_moments("predictive", draw, 6e-5, 1.9e-6, 5e-6, 9e-6)
    assert fit_follow(quiet, [late], HOST, 1.5e-6) == pytest.approx(1.9e-6 + 3.5e-6, rel=1e-3)
    # A host that is never late tells nothing of what lies between two events.
    assert fit_follow(quiet, [], HOST, 1.5e-6) == pytest.approx(1.9e-6, rel=1e-3)
    quicker = made_up_moments("lru", draw, 6e-5, -4e-6, 3e-6, 0.0)
    assert fit_follow(quicker, [], HOST, 1.5e-6) == 0.0
    busy = [[one._replace(demand=1) for one in row] for row in quiet.counts]
    assert fit_follow(quiet._replace(counts=busy), [late], HOST, 1.5e-6) == 0.0


def test_a_cpu_has_no_such_steps(bench):
    assert measure_ping(bench) is None
    called = []
    assert measure_wholes(bench, LAYERS, HOST, lambda: called.append(1)) is None
    assert called
    layers, wholes = measure_layers(bench, Reads(1e12, 0.7, 0.8), 5e-6, lambda: None)
    assert not layers.floor_s
    assert wholes == WholeLayers.empty()
    # The host's part is the same anywhere.
    assert 0 < measure_publish(bench) < 1e-3


def test_a_model_that_has_run_is_too_late_for_a_table_of_its_moves(bench):
    with offloaded("qwen3_moe", 2, bench) as model:
        assert whole_graphs(model) is None
        Decoding(model, bench, 40, prompt=4)
        with pytest.raises(ValueError, match="has run before"):
            whole_graphs(model)


class CountingLanes(HostLanes):
    """Lanes that could count the copies that they have none of."""

    def count_landings(self):
        return torch.zeros(1, dtype=torch.int32)


class FakeKernel:
    """Gates that answer when they are launched: 2 us apart, 5 if they wait for the host."""

    def __init__(self, shake, *, served, early):
        assert served
        assert not early
        self.shake, self.now = shake, EPOCH

    def run(self, layer, rows, weights, index, host):
        words = self.shake.words
        self.now += 2 * US if words[PLANNED] == RELEASED else 5 * US
        self.shake.stamps[layer, 0] = self.now
        words[POSTED] += 1


def test_a_ping_goes_through_gates_that_wait_and_gates_that_do_not(bench, monkeypatch):
    monkeypatch.setattr(handshakes, "lanes_for", lambda device: CountingLanes())
    monkeypatch.setattr(handshakes, "can_shake", lambda lanes: True)
    monkeypatch.setattr(handshakes, "GateKernel", FakeKernel)
    assert measure_ping(bench) == pytest.approx((2e-6, 5e-6))


def test_a_layer_is_timed_in_the_graphs_that_are_asked(bench, monkeypatch):
    """By their own stamps, in place of the model's graphs and only for as long."""
    stamps = made_up_stamps(random.Random(7), steps=1, layers=2)[0]

    class FakeGraphs:
        captured = 0
        handshake = SimpleNamespace(stamps=torch.tensor(stamps))
        chains = ("a chain", "one graph")

        def suits(self, kwargs):
            self.captured += 1
            return False

    graphs = FakeGraphs()
    with offloaded("qwen3_moe", 2, bench) as model:
        runner = model.expert_cache.runner
        runner.graphs = before = SimpleNamespace(suits=lambda kwargs: False)
        assert whole_layer(model, graphs, bench, 64, 2) == []
        monkeypatch.setattr(whole_layers, "WholeStep", str)
        [found] = whole_layer(model, graphs, bench, 64, 2)
        assert runner.graphs is before
    assert found.times == gate_times(stamps[None])
    assert 4 <= found.experts <= 8


def test_a_launch_is_one_of_a_step_that_is_one_graph(bench, monkeypatch):
    monkeypatch.setattr(handshakes, "LAUNCH_LAYERS", 2)
    with pytest.raises(OffloadError, match="expected them to be, as those of smaller models"):
        measure_launch(bench)
