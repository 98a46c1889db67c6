# ruff: noqa: F811
"""Cells, verdicts, decision logs and cut traces: what a validation is made of."""

from __future__ import annotations

import json
from array import array

import numpy as np
import pytest

from policies.base import Context
from policies.recording import Recording, StepRow
from reports.validation.cells import (
    FIRST,
    Cell,
    cell_labels,
    cells_json,
    merge,
    merge_into,
    read_cells,
)
from reports.validation.compare import decode_seconds, naive_token_s, quantiles
from reports.validation.cut import Cut, count_sequences, cut_trace
from reports.validation.decisions import Record, first_difference, read_records
from reports.validation.text import cells_table
from reports.validation.verdicts import FAIL, NOT_APPLICABLE, NOT_JUDGED, PASS, Limits, judge
from tests.helpers import random_trace, records, replay
from tests.unit.validate_fakes import fake_cell, small  # noqa: F401
from traces.errors import InputError
from traces.store import open_trace

CONTEXT = Context(layers=4, experts=8, top_k=2, slots=8)


def states(cells, **limits):
    verdicts = judge(cells, Limits(**limits))
    return {verdict.name: verdict.state for verdict in verdicts}


# cells -------------------------------------------------------------------------------------


def test_the_agreed_keys_come_first_and_a_cell_survives_its_file(tmp_path):
    cells = [fake_cell(), fake_cell("lfu", failed="out of memory", tpot_gpu_s=None)]
    found = json.loads(cells_json(cells))
    assert tuple(found[0])[: len(FIRST)] == FIRST
    path = tmp_path / "cells.json"
    path.write_text(cells_json(cells))
    assert read_cells(path) == cells
    assert cells_json(cells).count("\n") == len(cells) + 2


def test_merging_replaces_the_same_run_and_keeps_the_rest(tmp_path):
    path = tmp_path / "cells.json"
    old = [fake_cell(), fake_cell("lfu"), fake_cell(batch=8), fake_cell(mode="live")]
    merge_into(path, old)
    new = [fake_cell(error=0.07), fake_cell(cache=0.5)]
    merge_into(path, new)
    assert read_cells(path) == [new[0], *old[1:], new[1]]
    assert merge([], new) == new


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "guess"}, "cell 0: mode is 'guess', expected replay or live"),
        ({"batch": "8"}, "cell 0: batch is '8', expected int"),
        ({"held_sim": True}, "cell 0: held_sim is True"),
        ({"parts_sim_s": {"attention": "much"}}, "cell 0: parts_sim_s is"),
        ({"cache": None}, "cell 0: cache is None, expected float"),
    ],
)
def test_a_cell_that_is_none_is_named(tmp_path, change, words):
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([fake_cell().to_dict() | change]))
    with pytest.raises(InputError) as error:
        read_cells(path)
    assert words in str(error.value)


def test_files_that_hold_no_cells(tmp_path):
    path = tmp_path / "cells.json"
    for text, words in (("{", "is no JSON"), ('"x"', "is str"), ("[1]", "cell 0: is int")):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_cells(path)
    values = fake_cell().to_dict()
    del values["held_gpu"]
    path.write_text(json.dumps({"cells": [values]}))
    with pytest.raises(InputError, match="cell 0: field 'held_gpu' is missing"):
        read_cells(path)
    with pytest.raises(InputError, match="No such file"):
        read_cells(tmp_path / "absent.json")


def test_labels_say_what_differs_only():
    cells = [fake_cell(), fake_cell("lfu", batch=8)]
    assert cell_labels(cells) == ["lru, 25 %, batch 1", "lfu, 25 %, batch 8"]
    assert cell_labels(cells[:1]) == ["lru, 25 %"]


# numbers -----------------------------------------------------------------------------------


def test_naive_counts_a_step_once_for_each_of_its_tokens():
    rows = [StepRow(0, "decode", 1, 0.0), StepRow(1, "decode", 3, 0.0)]
    rows[0].demand_bytes, rows[1].demand_bytes, rows[1].prefetch_bytes = 100, 150, 50
    assert naive_token_s(rows, 10.0) == pytest.approx((100 + 3 * 200) / 4 / 10)
    assert naive_token_s([], 10.0) is None


def test_decode_steps_are_told_from_prompts():
    recording = Recording(CONTEXT)
    recording.steps += [
        StepRow(i, p, 1, 0.0) for i, p in enumerate(("prefill", "decode", "decode"))
    ]
    assert decode_seconds([9.0, 1.0, 2.0], recording) == [1.0, 2.0]
    assert decode_seconds([1.0, 2.0], recording) == [1.0, 2.0]
    assert quantiles([]) == []
    assert quantiles([1.0, 3.0])[::20] == [1.0, 2.0, 3.0]


# verdicts ----------------------------------------------------------------------------------


def test_all_is_well():
    verdicts = judge([fake_cell(), fake_cell("lfu", error=-0.04)], Limits())
    assert not any(verdict.failed for verdict in verdicts)
    found = {verdict.name: verdict.found for verdict in verdicts}
    assert found["signed bias of mean TPOT"] == "-1.0 %"
    assert found["mean error of mean TPOT"] == "3.0 % over 2 cells"
    assert found["worst error of mean TPOT"] == "-4.0 % (lfu, 25 %)"
    assert found["mean error of the naive estimate"] == "40.0 %"
    assert found["mean error of TPOT p99"] == "25.0 %"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"failed": "out of memory"}, "every cell ran"),
        ({"decisions_equal": False}, "same decisions"),
        ({"held_gpu": 399}, "same accesses, held and missed"),
        ({"missed_sim": 601}, "same accesses, held and missed"),
        ({"demand_bytes_equal": False}, "same demand bytes"),
        ({"prefetch_bytes_sim": 103, "prefetch_bytes_gpu": 100}, "prefetch bytes"),
        ({"prefetch_bytes_sim": 1, "prefetch_bytes_gpu": 0}, "prefetch bytes"),
        ({"error": -0.101}, "worst error of mean TPOT"),
        ({"gpu_peak_bytes": 960}, "peak GPU memory"),
        ({"link_busy_of_stall": 0.94}, "link busy while waited for"),
        ({"link_bytes_per_s": 0.94}, "link's rate while busy"),
    ],
)
def test_one_bad_cell_fails_its_verdict_and_no_other(change, name):
    good = [fake_cell("lfu", error=0.0), fake_cell("lfru", error=0.0)]
    found = states([fake_cell(**change), *good])
    assert [verdict for verdict, state in found.items() if state == FAIL] == [name]


def test_the_mean_error_takes_no_signs():
    assert (
        states([fake_cell(error=0.06), fake_cell("lfu", error=-0.06)])["mean error of mean TPOT"]
        == FAIL
    )
    assert states([fake_cell(error=0.06)], mean_error=0.06)["mean error of mean TPOT"] == PASS


def test_limits_are_inclusive():
    edge = fake_cell(error=0.10, gpu_peak_bytes=1030, link_busy_of_stall=0.95)
    found = states([edge, fake_cell("lfu", error=0.0)])
    assert FAIL not in found.values()


def test_a_link_that_is_not_waited_for_is_not_judged():
    found = states([fake_cell(stall_share=0.2, link_busy_of_stall=0.1)])
    assert found["link busy while waited for"] == NOT_APPLICABLE
    assert found["link's rate while busy"] == NOT_APPLICABLE
    assert found["prefetch bytes"] == NOT_APPLICABLE


def test_times_of_a_cpu_are_not_judged_unless_asked_for():
    cell = fake_cell(error=3.0, world="cpu", prefetch_bytes_sim=9, prefetch_bytes_gpu=1)
    found = states([cell])
    assert FAIL not in found.values()
    timed = [name for name, state in found.items() if state == NOT_JUDGED]
    assert timed == [
        "prefetch bytes",
        "mean error of mean TPOT",
        "worst error of mean TPOT",
        "peak GPU memory",
    ]
    asked = {v.name: v.state for v in judge([cell], Limits(), judge_time=True)}
    assert [name for name, state in asked.items() if state == FAIL] == timed[:3]
    assert asked["peak GPU memory"] == NOT_JUDGED


def test_no_cell_that_ran():
    found = states([fake_cell(failed="no room")])
    assert found["every cell ran"] == FAIL
    assert found["same decisions"] == NOT_APPLICABLE
    assert found["mean error of mean TPOT"] == NOT_APPLICABLE


def test_the_table_tells_failures_and_differences():
    cells = [
        fake_cell(),
        fake_cell("lfu", failed="CUDA out of memory"),
        fake_cell("lfru", decisions_equal=False, first_difference="after 3 equal records: x"),
        fake_cell("mixed", demand_bytes_equal=False, demand_bytes_gpu=601),
    ]
    text = cells_table(cells, judge(cells, Limits()))
    assert "FAILED" in text
    assert "lfu 25 % failed: CUDA out of memory" in text
    assert "lfru 25 %: decisions differ after 3 equal records: x" in text
    assert "demand bytes differ: simulated 600, measured 601" in text
    assert "DIFFER" in text
    assert all(len(line) <= 140 for line in text.splitlines())


# decision logs -----------------------------------------------------------------------------


def test_a_log_is_read_as_the_planner_wrote_it():
    """Against the tests' own reader, on a policy with waves, prefetches and services."""
    planner = replay("mixed", random_trace(3), 6)
    theirs = records(planner)
    ours = list(read_records(planner.log.numbers or ()))
    assert len(ours) == len(theirs) > 10
    for record, other in zip(ours, theirs, strict=True):
        assert record == Record(
            other.number, other.step, other.missed, other.waves, other.prefetch, other.served
        )


def log(*numbers: int) -> array[int]:
    return array("q", numbers)


EVENT_5 = (-1, 5, 2, 8, 0, -1, 11, 1, 3)


@pytest.mark.parametrize(
    ("simulated", "measured", "words"),
    [
        (EVENT_5, EVENT_5, ""),
        (
            EVENT_5,
            (*EVENT_5[:-1], 4),
            "after 0 equal records: event 5 (step 1, layer 1): 2 alike, then "
            "simulated loads layer 1 expert 3 into slot 1 over layer 0 expert 3; "
            "measured loads layer 1 expert 3 into slot 1 over layer 0 expert 4",
        ),
        (
            (*EVENT_5, -5, 2, 1, 6, -1),
            EVENT_5,
            "after 1 equal records: simulated before step 2: prefetches layer 0 expert 1 into "
            "slot 6; measured did nothing more",
        ),
        (
            (-1, 5, 1, 8, 0, -1),
            (-1, 6, 1, 8, 0, -1),
            "simulated event 5 (step 1, layer 1): 1 missed, loads layer 1 expert 0 into slot 0; "
            "measured event 6 (step 1, layer 2): 1 missed, loads layer 1 expert 0 into slot 0",
        ),
        (
            (-1, 5, 1, -4, 9, 2),
            (-1, 5, 1, -4, 9, 26),
            "1 alike, then simulated serves layer 1 expert 1 left out; "
            "measured serves layer 1 expert 1 by layer 1 expert 2",
        ),
        (
            (-1, 5, 2, 8, 0, -1, -2, 9, 0, 8),
            (-1, 5, 2, 8, 0, -1, 9, 1, -1),
            "2 alike, then simulated begins wave 2, loads layer 1 expert 1 into slot 0 over "
            "layer 1 expert 0; measured loads layer 1 expert 1 into slot 1",
        ),
        (
            (-1, 5, 0, -3, 16, 0, -1, 17, 1, -1, 18, 2, -1, 19, 3, -1, 20, 4, -1),
            (-1, 5, 1),
            "and 3 more; measured 1 missed",
        ),
    ],
)
def test_where_two_logs_part(simulated, measured, words):
    found = first_difference(log(*simulated), log(*measured), CONTEXT)
    assert found.endswith(words) if words else found == ""


def test_a_log_that_begins_in_the_middle():
    with pytest.raises(ValueError, match="begins with 7"):
        list(read_records([7, 1, 2]))


# cut traces --------------------------------------------------------------------------------


def test_a_cut_trace_has_whole_prompts_and_fewer_tokens(small):
    whole = list(open_trace(small).sequences())
    with cut_trace(str(small), Cut(sequences=3, max_tokens=4)) as path:
        trace = open_trace(path)
        kept = list(trace.sequences())
        assert count_sequences(path) == len(kept) == 3
        assert len(trace.extra["domains"]) == 3
    for before, after in zip(whole, kept, strict=False):
        assert len(after) == after.prefill + 4 == 9
        for name in ("experts", "positions", "tokens", "weights"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[:9])
        assert len(after.ahead) == 2
    assert not open_trace(small).path.with_name("cut").exists()


def test_nothing_to_cut_copies_nothing(small):
    with cut_trace(str(small), Cut()) as path:
        assert path == str(small)
    with cut_trace(str(small), Cut(sequences=99, max_tokens=99)) as path:
        assert open_trace(path).tokens == open_trace(small).tokens


@pytest.mark.parametrize("cut", [{"sequences": 0}, {"max_tokens": -1}])
def test_a_cut_that_leaves_nothing(cut):
    with pytest.raises(InputError, match="expected at least 1"):
        Cut(**cut)


def test_an_absent_cell_field_takes_its_default():
    values = {name: fake_cell().to_dict()[name] for name in FIRST}
    assert Cell.from_dict(values, "here").slots == 0
