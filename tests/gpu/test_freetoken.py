"""FreeToken beside our runtime on small dimensions: both sides of the benchmark run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.freetoken import rows
from benchmarks.freetoken.__main__ import main
from benchmarks.freetoken.plan import ROUTINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("freetoken") is None,
        reason="FreeToken is not installed: docs/performance.md says how",
    ),
]


def test_both_sides_of_the_benchmark_run(tmp_path: Path) -> None:
    out = tmp_path / "graph.json"
    words = ["--tiny", "--out", str(out), "--share", "100%", "--share", "50%", "--tokens", "64"]
    words += ["--batch", "1", "--batch", "2", "--policy", "lru", "--logs", str(tmp_path / "logs")]
    assert main(words) == 0
    found = rows.read(out)
    assert [(row["routing"], row["batch"], row["slots_share"]) for row in found] == [
        (routing, batch, share) for routing in ROUTINGS for batch in (1, 2) for share in (1.0, 0.5)
    ]
    for row in found:
        assert row["freetoken_ms"] > 0
        assert row["lru_ms"] > 0
        # The same routing, but for choices that rounding turns.
        missed = row["lru_missed_per_token"], row["freetoken_missed_per_token"]
        assert abs(missed[0] - missed[1]) <= 0.2 * max(missed) + 0.5
