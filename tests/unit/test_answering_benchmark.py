"""The benchmark of the host's half of a step in one graph: what it times, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from benchmarks import answering
from policies.budget import Budget
from policies.session import Setup, TraceSession

SAMPLE = str(Path(__file__).resolve().parents[2] / "traces/samples/granular-64x8.parquet")


def test_events_are_those_of_the_trace_and_the_first_copy_leaves_before_the_end() -> None:
    session = TraceSession(Setup(SAMPLE, sizes="qwen3-30b"))
    steps = answering.WARM_STEPS + 6
    found = list(
        answering.Answering(session, "lru", Budget(cache="50%")).events(steps, lambda: None)
    )
    assert len(found) == 6 * session.model.layers
    assert {missed > 0 for missed, _, _ in found} == {True, False}
    for missed, first_s, all_s in found:
        assert math.isnan(first_s) == (missed == 0)
        assert not first_s > all_s


def test_the_table_tells_warm_and_cold(monkeypatch, capsys) -> None:
    monkeypatch.setattr(answering, "OTHER_WORK_BYTES", 8)
    words = ["answering", "--trace", SAMPLE, "--policy", "lru", "--steps", "200"]
    monkeypatch.setattr("sys.argv", words)
    assert answering.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| policy | caches | missed |")
    assert {line.split(" | ")[1] for line in lines[2:]} == {"warm", "cold"}


def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("sys.argv", ["answering", "--trace", str(tmp_path / "none.parquet")])
    assert answering.main() == 2
    assert capsys.readouterr().err.startswith("answering: ")


def test_a_policy_that_serves_otherwise_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["answering", "--trace", SAMPLE, "--policy", "mixed"])
    assert answering.main() == 2
    said = "answering: --policy mixed: changes the output, expected an exact policy\n"
    assert capsys.readouterr().err == said
