"""benchmarks/expertflow_gaps: its cells, its table and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.expertflow_gaps import Row, main, source_of
from policies.examples import example_trace
from traces.store import write_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "x.parquet"
    made = example_trace(3, shape=(3, 8, 2), lengths=(30, 25))
    write_trace(path, made.model, made.items, source="drawn", license="CC0-1.0")
    return path


def test_every_cell_and_forecaster_is_there(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gaps.json"
    assert (
        main(["--trace", str(trace), "--batch", "1,2", "--cache", "50%", "--json", str(out)]) == 0
    )
    rows = [Row(**row) for row in json.loads(out.read_text())]
    assert {(row.batch, row.cache) for row in rows} == {(1, "50%"), (2, "50%")}
    names = [(row.forecaster, row.evict) for row in rows if row.batch == 1]
    assert names[:2] == [("ahead", "recency"), ("markov", "recency")]
    assert names[2:4] == [("oracle:accuracy=1.0", "recency"), ("oracle:accuracy=1.0", "reuse")]
    assert len(names) == 10
    by_name = {(row.forecaster, row.evict): row for row in rows if row.batch == 1}
    recency, reuse = (by_name["oracle:accuracy=1.0", evict] for evict in ("recency", "reuse"))
    assert recency.lru_hit == reuse.lru_hit < reuse.belady_hit
    assert recency.gap_moves < reuse.gap_moves <= 1.0
    printed = capsys.readouterr().out
    assert "| forecaster | evict | B 1, 50% | B 2, 50% |" in printed
    assert "| oracle:accuracy=0.7 | reuse |" in printed
    assert f"{min(row.speed for row in rows):.3f}x" in printed


def test_a_trace_is_given_with_sizes_and_forecasts() -> None:
    assert source_of("a.parquet").sizes is None
    assert source_of("a.parquet::f.npz").forecasts == "f.npz"
    assert source_of("a.parquet:mixtral-8x7b").sizes == "mixtral-8x7b"


def test_bad_input_is_one_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", f"{trace}:no-such-model"]) == 2
    assert main(["--trace", str(trace), "--batch", "one"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "no-such-model" in errors[0]
