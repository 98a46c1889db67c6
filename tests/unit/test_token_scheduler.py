"""Token schedulers: who decodes with whom, what follows, what it costs, what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import simctl
from policies.base import Context, Forecast, Forecaster, Prediction
from policies.batching import Batches
from policies.budget import Budget
from policies.costs import Costs
from policies.examples import example_model
from policies.kv_moves import KvCosts, seating_of, waited_s
from policies.medoids import (
    Search,
    best_division,
    distances,
    distinct,
    exchanged,
    file_order,
    k_medoids,
    packed,
)
from policies.registry import FORECASTERS, SCHEDULERS, parameters
from policies.result import Result
from policies.routing import DECODE, PREFILL, Routing, Step
from policies.schedule import RowMove, Schedule, Seating, make_schedule
from policies.scheduling import Coming, TokenScheduler
from policies.session import Setup
from policies.token_paths import ForecastPaths, HistoryPaths, PreviousPaths
from sim.session import Session
from tests.helpers import BUSY, ROOT, SAMPLES, random_trace
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise
from traces.trace import MemoryTrace, TokenSequence

LENGTHS = (9, 5, 12, 7, 7, 10, 4)


@dataclass
class Turning(TokenScheduler):
    """Deals the sequences out one by one in even rounds, in file order in odd ones."""

    name = "turning"
    unit: int = 2
    every: int = 1
    kv: str = "merge"
    in_a_row: bool = False
    overlap: bool = False

    def divide(self, coming: Coming) -> list[int]:
        n = len(coming.present)
        if coming.round % 2:
            return file_order(n, coming.groups).tolist()
        return [i % coming.groups for i in range(n)]


def schedule_of(trace: MemoryTrace, batch: int, scheduler: TokenScheduler) -> Schedule:
    """The schedule of *trace*, by the paths of previous tokens."""
    units = Batches(trace, batch, scheduler).units()
    scheduler.reset(Context(1, 1, 1, 1))
    return make_schedule(units, scheduler, PreviousPaths(trace.model.experts), trace.model, batch)


def steps_of(trace: MemoryTrace, batch: int, scheduler: TokenScheduler) -> list[Step]:
    schedule = schedule_of(trace, batch, scheduler)
    return list(Batches(trace, batch, scheduler, schedule=schedule).steps())


VARIANTS = [
    Turning(),
    Turning(unit=3),
    Turning(every=3),
    Turning(every=3, in_a_row=True),
    Turning(kv="reindex"),
    *map(
        SCHEDULERS.build,
        (
            "expertflow",
            "expertflow:rounds=0",
            "expertflow:overlap=true,unit=4,every=2",
            "prompt-routes",
        ),
    ),
]


@pytest.mark.parametrize("scheduler", VARIANTS, ids=repr)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_sequence_runs_its_tokens_in_order_and_unchanged(
    scheduler: TokenScheduler, batch: int
) -> None:
    trace = random_trace(3, lengths=LENGTHS, prefill=3)
    ran: dict[int, list[tuple[int, str, list[list[int]]]]] = {}
    for number, step in enumerate(steps_of(trace, batch, scheduler)):
        assert step.number == number
        assert step.phase == PREFILL or step.size <= batch
        for row in range(step.size):
            experts = step._experts[row].tolist()
            ran.setdefault(int(step.sequence_ids[row]), []).append(
                (int(step.positions[row]), step.phase, experts)
            )
        taken = step._experts + np.arange(trace.model.layers)[:, None] * trace.model.experts
        for layer, demand in enumerate(step.demand):
            assert demand == np.unique(taken[:, layer]).tolist()
    for sequence in trace.items:
        expected = [
            (int(p), PREFILL if i < sequence.prefill else DECODE, e.tolist())
            for i, (p, e) in enumerate(zip(sequence.positions, sequence.experts, strict=True))
        ]
        assert ran.pop(sequence.id) == expected
    assert not ran


@pytest.mark.parametrize("scheduler", VARIANTS, ids=repr)
def test_a_round_decodes_every_live_sequence_of_the_unit_once(scheduler: TokenScheduler) -> None:
    trace = random_trace(3, lengths=LENGTHS, prefill=3)
    schedule = schedule_of(trace, 2, scheduler)
    units = list(Batches(trace, 2, scheduler).units())
    assert len(units) == len(schedule.units) == -(-len(LENGTHS) // (2 * scheduler.unit))
    for unit, steps in zip(units, schedule.units, strict=True):
        members = [m for batch in unit for m in batch]
        for number in range(max(len(m) - m.prefill for m in members)):
            groups = [step for step in steps if step.round == number]
            live = [i for i, m in enumerate(members) if len(m) - m.prefill > number]
            assert sorted(i for step in groups for i in step.members.tolist()) == live
            if scheduler.every == 1:
                assert len(groups) <= max(1, -(-len(live) // 2))
        turns = [step.round // scheduler.every for step in steps]
        assert turns == sorted(turns)
        if not scheduler.in_a_row:
            assert [step.round for step in steps] == sorted(step.round for step in steps)
        assert [step.seating.first for step in steps] == [True] + [False] * (len(steps) - 1)


def test_groups_stay_between_divisions_less_those_that_ended() -> None:
    trace = random_trace(1, lengths=(30, 9, 30, 30), prefill=2)
    (steps,) = schedule_of(trace, 2, Turning(every=5)).units
    rounds = [
        {frozenset(s.members.tolist()) for s in steps if s.round == number} for number in range(12)
    ]
    assert rounds[0] != rounds[5]
    gone: frozenset[int] = frozenset({1})
    for number, (before, after) in enumerate(pairwise(rounds)):
        if number + 1 not in (5, 7, 10):
            assert after == before
        elif number + 1 == 7:
            assert after == {group - gone for group in before}


def test_a_group_may_take_its_steps_in_a_row() -> None:
    trace = random_trace(1, lengths=(10, 9, 10, 10), prefill=2)
    (steps,) = schedule_of(trace, 2, Turning(every=3, in_a_row=True)).units
    order = [(step.round, step.seating.group) for step in steps]
    assert order[:6] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert order[6:9] == [(3, 0), (4, 0), (5, 0)]
    assert [step.seating.divided for step in steps] == [4, 0, 0, 0, 0, 0] * 2 + [4, 0, 0, 0]


@pytest.mark.parametrize("scheduler", VARIANTS, ids=repr)
def test_keys_and_values_are_where_a_step_looks_for_them(scheduler: TokenScheduler) -> None:
    """Every row is told what it holds; what a step reads is its own sequences', all of it."""
    batch, trace = 2, random_trace(5, lengths=LENGTHS, prefill=3)
    schedule = schedule_of(trace, batch, scheduler)
    units = Batches(trace, batch, scheduler).units()
    for unit, steps in zip(units, schedule.units, strict=True):
        rows: list[tuple[int, int] | None] = [None] * schedule.rows
        for group, members in enumerate(unit):
            for row, m in enumerate(members):
                rows[group * batch + row] = (m.id, m.prefill)
        members = [m for b in unit for m in b]
        for step in steps:
            before = list(rows)
            for move in step.seating.moves:
                rows[move.target] = before[move.source]
                assert before[move.source][1] == move.kv_tokens
            found = [rows[row] for row in step.seating.rows.tolist()]
            inside = [members[i] for i in step.members.tolist()]
            assert found == [(m.id, m.prefill + step.round) for m in inside]
            first, size = step.seating.key
            if scheduler.kv == "merge":
                assert step.seating.rows.tolist() == list(range(first, first + size))
                assert first == step.seating.group * batch
            else:
                assert not step.seating.moves
            for row, m in zip(step.seating.rows.tolist(), inside, strict=True):
                rows[row] = (m.id, m.prefill + step.round + 1)


def test_groups_are_named_so_that_little_moves() -> None:
    """The same two groups, numbered the other way round, are no reason to move anything."""

    class Swapped(Turning):
        def divide(self, coming: Coming) -> list[int]:
            return [int(1 - group) for group in coming.present]

    trace = random_trace(2, lengths=(12, 12, 12, 12), prefill=2)
    schedule = schedule_of(trace, 2, Swapped())
    assert schedule.tally.divisions == 10
    assert schedule.tally.moved == 0


def test_the_tally_counts_what_the_steps_demand() -> None:
    trace = random_trace(4, lengths=LENGTHS, prefill=3)
    scheduler = SCHEDULERS.build("expertflow")
    schedule = schedule_of(trace, 2, scheduler)
    steps = [s for s in steps_of(trace, 2, scheduler) if s.phase == DECODE]
    tally = schedule.tally
    assert tally.steps == len(steps)
    assert tally.distinct == sum(len(demand) for step in steps for demand in step.demand)
    moves = [move for step in steps for move in seating_of(step).moves]
    assert tally.moved == len(moves) > 0
    assert tally.moved_kv_tokens == sum(move.kv_tokens for move in moves)
    plain = schedule_of(trace, 2, SCHEDULERS.build("expertflow:rounds=0")).tally
    assert plain.distinct == plain.distinct_file_order


# k-medoids


def _domains(seed: int, n: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Paths of *n* tokens of *groups* domains in random order, and whose each is."""
    random = np.random.default_rng(seed)
    domain = random.permutation(np.arange(n) % groups)
    chance = np.where(np.arange(96) // (96 // groups) == domain[:, None], 0.5, 0.02)
    return random.random((n, 96)) < chance, domain


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("search", [Search(swaps=0), Search(starts=1), Search()], ids=repr)
def test_tokens_of_one_domain_come_together(groups: int, search: Search) -> None:
    paths, domain = _domains(7, 16, groups)
    labels = best_division(
        packed(paths), groups, np.zeros(16, int), np.random.default_rng(0), search
    )
    assert np.bincount(labels).tolist() == [16 // groups] * groups
    if search.swaps:
        assert all(len(set(domain[labels == g].tolist())) == 1 for g in range(groups))
    assert distinct(packed(paths), labels, groups) < distinct(
        packed(paths), file_order(16, groups), groups
    )


@pytest.mark.parametrize("n", [3, 7, 15, 16])
def test_groups_are_of_equal_size_as_far_as_they_can(n: int) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        paths = packed(random.random((n, 70)) < 0.2)
        medoids = random.choice(n, 2, replace=False)
        labels = k_medoids(distances(paths), medoids, -(-n // 2), 30)
        assert sorted(np.bincount(labels, minlength=2)) == [n // 2, n - n // 2]


def test_exchanges_never_take_more_experts_and_end_where_none_helps() -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        words = packed(random.random((9, 130)) < 0.15)
        begin = file_order(9, 3)
        labels = exchanged(words, begin, 3, 1000)
        assert np.bincount(labels).tolist() == [3, 3, 3]
        least = distinct(words, labels, 3)
        assert least <= distinct(words, begin, 3)
        for i in range(9):
            for j in range(i):
                other = labels.copy()
                other[[i, j]] = other[[j, i]]
                assert distinct(words, other, 3) >= least


def test_distances_are_counts_of_differing_bits() -> None:
    paths = np.random.default_rng(1).random((5, 67)) < 0.5
    expected = (paths[:, None] != paths[None, :]).sum(axis=2)
    assert (distances(packed(paths)) == expected).all()


def test_the_same_seed_divides_alike() -> None:
    trace = random_trace(4, lengths=LENGTHS * 2, prefill=3)
    made = [schedule_of(trace, 3, SCHEDULERS.build("expertflow")) for _ in range(2)]
    first, second = (
        [[s.members.tolist() for s in steps] for steps in schedule.units] for schedule in made
    )
    assert first == second


# Whose paths


@dataclass
class Telling(Forecaster):
    """Names the expert that a token's id gives, in every layer; notes what it was asked."""

    name = "telling"
    needs = ("tokens",)

    def reset(self, context: Context) -> None:
        self.context = context
        self.asked: list[tuple[int, int]] = []

    def on_step(self, step: Step) -> Forecast:
        assert step.size == 1
        self.asked.append((int(step.sequence_ids[0]), int(step.positions[0])))
        layers, experts = self.context.layers, self.context.experts
        named = int(step.token_ids[0]) % experts
        return [Prediction(i + 1, [i * experts + named], [1.0]) for i in range(layers)]

    def on_route(self, routing: Routing) -> Forecast:
        raise AssertionError("no routing is told to a forecaster of single tokens")


def _with_ids(trace: MemoryTrace) -> MemoryTrace:
    items = [replace(m, tokens=np.arange(len(m), dtype=np.int32)) for m in trace.items]
    return MemoryTrace(trace.model, items)


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_known_of_tokens_that_have_not_come(overlap: bool) -> None:
    """Beside a running step, its sequences are seen by the token that runs, not the next."""
    trace = _with_ids(random_trace(6, lengths=(8, 8, 8, 8), prefill=3))
    scheduler = Turning(overlap=overlap)
    forecaster = Telling()
    model = trace.model
    paths = ForecastPaths(forecaster, Context(model.layers, model.experts, model.top_k, 4))
    schedule = make_schedule(Batches(trace, 2, scheduler).units(), scheduler, paths, model, 2)
    asked = [forecaster.asked[i : i + 4] for i in range(0, len(forecaster.asked), 4)]
    (steps,) = schedule.units
    assert len(asked) == 5
    for number, tokens in enumerate(asked):
        last = [s for s in steps if s.round == number - 1][-1:]
        running = last[0].members.tolist() if last and overlap else []
        assert tokens == [(i, 3 + number - (i in running)) for i in range(4)]


def test_an_oracle_of_single_tokens_names_their_paths() -> None:
    trace = random_trace(6, lengths=(9, 9))
    model = trace.model
    context = Context(model.layers, model.experts, model.top_k, 4)
    paths = ForecastPaths(FORECASTERS.build("oracle"), context)
    previous = PreviousPaths(model.experts)
    for sequence, index in ((0, 5), (1, 3), (0, 2)):
        found = paths.path(trace.items[sequence], index)
        taken = np.sort(trace.items[sequence].experts[index], axis=1)
        assert [np.flatnonzero(row).tolist() for row in found] == taken.tolist()
        after = previous.path(trace.items[sequence], index + 1)
        assert (after == found).all()
    assert not previous.path(trace.items[0], 0).any()
    blurred = ForecastPaths(FORECASTERS.build("oracle:accuracy=0.5"), context)
    right = [(blurred.path(trace.items[0], i) & previous.path(trace.items[0], i + 1)).sum()
             for i in range(8)]  # fmt: skip
    assert 0.2 < sum(right) / (8 * model.layers * model.top_k) < 0.8


def test_the_history_of_a_sequence_names_what_it_took_most() -> None:
    experts = np.array([[[0], [3]], [[0], [3]], [[1], [2]], [[2], [2]], [[1], [1]], [[3], [0]]])
    sequence = TokenSequence(0, experts.astype(np.int16), np.arange(6, dtype=np.int32), 4)
    paths = HistoryPaths(4)
    assert np.flatnonzero(paths.path(sequence, 1)[0]).tolist() == [0]
    found = paths.path(sequence, 5)
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1], [2, 3]]
    assert not paths.path(sequence, 0).any()


def test_prompts_of_one_domain_decode_together(tiny: str) -> None:
    """What a prompt took tells its domain, and the domain what is taken later."""
    best = _run(tiny, "prompt-routes")
    assert best.schedule is not None
    assert best.schedule["divisions"] == 1
    assert best.schedule["distinct_experts"] < 0.93 * best.schedule["distinct_in_file_order"]
    assert best.missed < _run(tiny, "none").missed


# What it costs


def _seating(**said: object) -> Seating:
    return replace(Seating(0, np.arange(2), "merge"), **said)


def test_the_cost_of_keys_and_values() -> None:
    model = example_model(4, 8, 2)
    costs = Costs(BUSY, model)
    rate, kernel_s = BUSY.gpu.memory_bytes_per_s, BUSY.gpu.kernel_min_s
    assert model.kv_bytes_per_token
    kv = KvCosts(costs)
    many = 10_000_000
    moves = [RowMove(0, 1, many), RowMove(1, 0, 0)]
    expected = 4 * many * model.kv_bytes_per_token / rate + 2 * kernel_s
    assert kv.move_s(moves) == pytest.approx(expected)
    assert kv.issue_s(moves) == 4 * BUSY.host.kernel_launch_s
    step = Step(0, DECODE, 2)
    step.kv_tokens = many
    assert kv.gather_s(step, _seating()) == 0
    gathered = 2 * many * model.kv_bytes_per_token / 4 / rate
    assert kv.gather_s(step, _seating(kv="reindex")) == pytest.approx(gathered)
    assert KvCosts(costs, many).gather_s(step, _seating(kv="reindex")) == pytest.approx(
        2 * gathered
    )


def test_what_a_division_makes_a_step_wait() -> None:
    assert waited_s(_seating(), 3e-3, 2e-3) == 3e-3
    assert waited_s(_seating(beside=True), 3e-3, 2e-3) == pytest.approx(1e-3)
    assert waited_s(_seating(beside=True), 1e-3, 2e-3) == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve sequences of three domains with token ids, of a model with keys and values."""
    path = tmp_path_factory.mktemp("scheduler") / "tiny.parquet"
    spec = ModelSpec("tiny", 4, 16, 2, 32, 32, 3 * 32 * 32, 0, 4096)
    settings = SynthSettings(
        layers=4, experts=16, top_k=2, sequences=12, prompt=(3, 6), decode=(8, 12),
        skew=0.3, repetition=0.6, domains=3, token_information=0.5, seed=2,
    )  # fmt: skip
    write_trace(path, spec, synthesise(settings), source="drawn", license="none")
    return str(path)


def _run(
    tiny: str, scheduler: str, policy: str = "lru", cache: str = "50%", **said: object
) -> Result:
    session = Session(Setup(tiny, batch=3, scheduler=scheduler, **said))
    return session.run(policy, Budget(cache=cache))[0]


@pytest.mark.parametrize("hardware", ["h200-pcie5", "rtx4090-pcie4"])
@pytest.mark.parametrize("kv", ["merge", "reindex"])
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_the_time_is_split_without_rest(tiny: str, hardware: str, kv: str, overlap: str) -> None:
    scheduler = f"expertflow:kv={kv},overlap={overlap}"
    for policy, cache in (("lru", "30%"), ("predictive", "60%"), ("lru", "100%")):
        found = _run(tiny, scheduler, policy, cache, hardware=hardware)
        assert sum(found.breakdown_s.values()) == pytest.approx(found.time["total_s"], rel=1e-12)
        assert min(found.breakdown_s.values()) >= 0
        assert found.limit_s <= found.time["total_s"] * (1 + 1e-12)
        schedule = found.schedule
        assert schedule is not None
        assert schedule["follow_s"] > 0
        assert 0 <= schedule["waited_s"] <= schedule["divide_s"]
        assert (schedule["moved_bytes"] > 0) == (kv == "merge")
        assert schedule["moved_bytes"] % 4096 == 0


@pytest.mark.parametrize("hardware", ["h200-pcie5", "rtx4090-pcie4"])
def test_what_following_costs_is_in_the_time(
    tiny: str, hardware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dearer moves of keys and values, and slower division, lengthen a run by just that."""
    plain = _run(tiny, "expertflow", hardware=hardware)
    move_s, host_s = KvCosts.move_s, type(SCHEDULERS.build("expertflow")).host_s
    monkeypatch.setattr(KvCosts, "move_s", lambda self, moves: move_s(self, moves) + bool(moves))
    monkeypatch.setattr(
        type(SCHEDULERS.build("expertflow")), "host_s", lambda self, n, v: host_s(self, n, v) + 2
    )
    dear = _run(tiny, "expertflow", hardware=hardware)
    assert dear.decisions_sha256 == plain.decisions_sha256
    assert dear.schedule is not None
    assert plain.schedule is not None
    more = {k: dear.schedule[k] - plain.schedule[k] for k in ("follow_s", "waited_s")}
    assert more["waited_s"] == pytest.approx(2 * plain.schedule["divisions"])
    assert more["follow_s"] > 1
    longer = dear.time["total_s"] - plain.time["total_s"]
    # Launching the moves, and what stalls a little less, are hidden by them.
    assert longer == pytest.approx(sum(more.values()), rel=1e-3)


def test_the_oracle_gains_and_both_worlds_of_the_result_agree(tiny: str) -> None:
    plain = _run(tiny, "expertflow:rounds=0")
    assert plain.schedule is not None
    assert plain.schedule["distinct_experts"] == plain.schedule["distinct_in_file_order"]
    assert _run(tiny, "none").schedule is None
    best = _run(tiny, "expertflow", forecaster="oracle").schedule
    weak = _run(tiny, "expertflow:paths=previous", forecaster="oracle").schedule
    assert best is not None
    assert weak is not None
    assert best["distinct_experts"] < 0.97 * best["distinct_in_file_order"]
    assert best["distinct_experts"] < weak["distinct_experts"] < plain.schedule["distinct_experts"]


def test_a_result_keeps_its_schedule(tiny: str) -> None:
    found = _run(tiny, "expertflow")
    again = Result.from_dict(json.loads(found.to_json()))
    assert again == found
    assert "schedule" not in _run(tiny, "none").to_dict()


def test_every_key_of_a_schedule_is_defined(tiny: str) -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert [
        key for key in _run(tiny, "expertflow").schedule if f"`schedule.{key}`" not in page
    ] == []


def test_every_parameter_of_a_scheduler_is_explained() -> None:
    page = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    section = page[page.index("## Schedulers") :]
    for name in ("expertflow", "prompt-routes"):
        assert f"`{name}`" in section
        for key in parameters(SCHEDULERS.classes()[name]):
            assert f"`{key}`" in section


def test_units_hold_more_keys_and_values(tiny: str) -> None:
    alone, unit = (_run(tiny, name).memory for name in ("none", "expertflow"))
    assert alone["kv_bytes"] < unit["kv_bytes"] < 2.5 * alone["kv_bytes"]


def test_offline_policies_run_under_a_scheduler(tiny: str) -> None:
    found = _run(tiny, "expertflow", "belady")
    assert found.missed == found.bounds["belady_missed"]
    assert found.missed <= _run(tiny, "expertflow").missed


# Mistakes


@pytest.mark.parametrize(
    ("scheduler", "more", "words"),
    [
        ("expertflow:kv=copy", (), ("kv is 'copy'", "merge or reindex")),
        ("expertflow:unit=0", (), ("unit is 0", "expected 1 to 8")),
        ("expertflow:paths=mine", (), ("paths is 'mine'",)),
        ("expertflow:paths=forecaster", (), ("no --forecaster", "routing-path:FILE")),
        ("expertflow:paths=forecaster", ("--forecaster", "markov"), ("--forecaster markov",)),
        ("expertflow", ("--forecaster", "token"), ("'token' needs training",)),
    ],
)
def test_mistakes_are_said_in_one_line(tiny, scheduler, more, words, capsys):
    command = ["run", "--policy", "lru", "--trace", tiny, "--batch", "2", "--scheduler", scheduler]
    assert simctl.main([*command, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_trace_without_token_ids_and_a_forecaster_that_needs_them(tmp_path, tiny, capsys):
    bare = tmp_path / "bare.parquet"
    trace = random_trace(3, lengths=LENGTHS)
    items = [replace(m, tokens=None) for m in trace.items]
    write_trace(bare, trace.model, items, source="drawn", license="none")
    command = ["run", "--policy", "lru", "--trace", str(bare), "--scheduler", "expertflow"]
    assert simctl.main([*command, "--forecaster", "token", "--train", str(bare)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "needs tokens" in said
    assert simctl.main([*command, "--batch", "2"]) == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[0]", "groups are int64"),
        ("[0.5] * len(coming.present)", "groups are float64"),
        ("[5] * len(coming.present)", "group 5 found, expected 0 to 1"),
        ("[0] * len(coming.present)", "a group of 4 sequences, expected at most 2"),
        ("[1 // 0]", "ZeroDivisionError"),
    ],
)
def test_a_division_of_no_use_is_the_schedulers_mistake(
    tiny: str, tmp_path: Path, answer: str, message: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from policies.scheduling import TokenScheduler\n\n\n"
        "class Mine(TokenScheduler):\n"
        "    def divide(self, coming):\n"
        f"        return {answer}\n"
    )
    session = Session(Setup(tiny, batch=2, scheduler=f"{file}:Mine"))
    with pytest.raises(InputError, match=message) as error:
        session.run("lru", Budget(cache="50%"))
    assert "mine.py:Mine" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_sample_is_won_by_its_paths() -> None:
    """Real routing: an oracle's division takes clearly fewer experts than file order."""
    if not SAMPLES["granular-64x8"].is_file():
        pytest.skip("the sample trace is not there")
    setup = Setup(str(SAMPLES["granular-64x8"]), batch=8, forecaster="oracle")
    session = Session(replace(setup, scheduler="expertflow"))
    assert session.schedule is not None
    tally = session.schedule.tally
    assert tally.distinct < 0.93 * tally.distinct_file_order


def test_batches_of_a_token_scheduler_need_its_schedule() -> None:
    trace = random_trace(1)
    with pytest.raises(ValueError, match="no schedule"):
        list(Batches(trace, 2, Turning()).steps())


def test_a_sequence_without_decode_takes_part_in_prefill_alone() -> None:
    model = example_model(2, 4, 1)
    items = [
        TokenSequence(i, np.zeros((n, 2, 1), np.int16), np.arange(n, dtype=np.int32), 3)
        for i, n in enumerate((3, 5, 3, 4))
    ]
    steps = steps_of(MemoryTrace(model, items), 2, Turning())
    assert [s.phase for s in steps] == [PREFILL, PREFILL, DECODE, DECODE]
    assert [s.size for s in steps] == [6, 6, 2, 1]
