"""Timelines load, lie in order, and are the same every time."""

import gzip
import json
from itertools import pairwise

import pytest

from reports.timeline import LANES, timeline_of, write_timeline, write_timelines
from tests.unit.reports_fakes import borrowed, fake_recording, fake_result
from traces.errors import InputError


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "run.json.gz"
    write_timeline(path, fake_recording(prefetch=True), fake_result())
    return json.loads(gzip.decompress(path.read_bytes()))


def of_kind(timeline, kind):
    return [event for event in timeline["traceEvents"] if event["ph"] == kind]


def test_lanes_are_named_and_sorted(written):
    names = {
        e["tid"]: e["args"]["name"] for e in of_kind(written, "M") if e["name"] == "thread_name"
    }
    assert [names[tid] for tid in sorted(names)] == list(LANES)
    places = {
        e["tid"]: e["args"]["sort_index"]
        for e in of_kind(written, "M")
        if e["name"] == "thread_sort_index"
    }
    assert places == {tid: tid for tid in names}
    process = [e for e in of_kind(written, "M") if e["name"] == "process_name"]
    assert [e["args"]["name"] for e in process] == ["lru, 50 % of experts (simulated)"]


def test_bars_are_in_order_and_do_not_overlap(written):
    bars = of_kind(written, "X")
    assert len(bars) == 160
    lanes: dict[int, list[dict]] = {}
    for bar in bars:
        lanes.setdefault(bar["tid"], []).append(bar)
    assert len(lanes) == 3
    for lane in lanes.values():
        for before, after in pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6


def test_microseconds(written):
    bars = [e for e in of_kind(written, "X") if e["name"] == "experts 0"]
    assert bars[1]["ts"] == 12000
    assert bars[1]["dur"] == 6000
    assert bars[1]["cat"] == "experts"


def test_touching_bars_still_touch_after_rounding():
    recording = fake_recording(steps=0)
    moments = [i / 3e6 for i in range(10)]
    for start, end in pairwise(moments):
        recording.span("GPU", "x", start, end)
    bars = of_kind(timeline_of({"run": recording}), "X")
    for before, after in pairwise(bars):
        assert round(1000 * (before["ts"] + before["dur"])) == round(1000 * after["ts"])


def test_counters_hold_changes_only(written):
    slots = [e for e in of_kind(written, "C") if e["name"] == "slots"]
    assert [e["args"]["used"] for e in slots] == list(range(17))
    queue = [e for e in of_kind(written, "C") if e["name"] == "queue"]
    assert [(e["ts"], e["args"]["moves"]) for e in queue] == [(0, 2)]


def test_what_was_left_out_is_said(tmp_path):
    recording = fake_recording(steps=10)
    recording.dropped_spans = 7
    del recording.spans[20:]
    last = max(span.end_s for span in recording.spans)
    timeline = timeline_of({"run": recording})
    run = timeline["otherData"]["runs"][0]
    assert run["dropped_spans"] == 7
    assert "7 spans" in run["note"]
    assert all(event["ts"] <= 1e6 * last for event in of_kind(timeline, "C"))


def test_settings_travel_along(tmp_path):
    result = fake_result(model=borrowed(fake_result(), "mixtral-8x7b"))
    run = timeline_of({"run": fake_recording()}, {"run": result})["otherData"]["runs"][0]
    assert run["hardware"] == "bench (measured)"
    assert "mixtral-8x7b" in run["sizes"]


def test_two_worlds_lie_under_each_other(tmp_path):
    runs = {"simulated": fake_recording(), "measured": fake_recording(prefetch=True)}
    timeline = timeline_of(runs)
    names = [e for e in of_kind(timeline, "M") if e["name"] == "process_name"]
    assert [(e["pid"], e["args"]["name"]) for e in names] == [(1, "simulated"), (2, "measured")]
    path = tmp_path / "both.json.gz"
    write_timelines(path, runs)
    assert json.loads(gzip.decompress(path.read_bytes())) == timeline


def test_unknown_lanes_come_last():
    recording = fake_recording(steps=1)
    recording.span("disk", "read", 0.0, 0.001)
    timeline = timeline_of({"run": recording})
    names = [e["args"]["name"] for e in of_kind(timeline, "M") if e["name"] == "thread_name"]
    assert names == [*LANES, "disk"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a.json.gz", "b.json.gz"):
        write_timeline(tmp_path / name, fake_recording(), fake_result())
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_a_measured_run_is_called_so(tmp_path):
    write_timeline(tmp_path / "t.gz", fake_recording(), fake_result(world="runtime"))
    text = gzip.decompress((tmp_path / "t.gz").read_bytes()).decode()
    assert "(measured)" in text


def test_a_run_without_spans_has_lanes_all_the_same():
    recording = fake_recording(steps=0)
    recording.dropped_spans = 3
    assert of_kind(timeline_of({"run": recording}), "X") == []


@pytest.mark.parametrize("name", ["absent/t.gz", "folder"])
def test_places_that_take_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError):
        write_timeline(tmp_path / name, fake_recording(steps=1), fake_result())
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
