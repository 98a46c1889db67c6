"""benchmarks/prefill: what it writes, as a dry run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from click.testing import CliRunner  # noqa: E402

from benchmarks import prefill  # noqa: E402


def run(out: Path, *words: str) -> tuple[int, str]:
    always = ["--model", "tiny", "--device", "cpu", "--prompts", "3", "--json", str(out)]
    found = CliRunner().invoke(prefill.main, [*always, *words])
    return found.exit_code, found.output


def test_rows_and_their_ratios(tmp_path: Path) -> None:
    out = tmp_path / "new" / "prefill.json"
    code, printed = run(out, "--tokens", "20", "--tokens", "8", "--policy", "lru", "--cache", "50%")
    assert code == 0, printed
    rows = json.loads(out.read_text())["rows"]
    assert [(row["tokens"], row["policy"], row["cache"]) for row in rows] == [
        (20, "lru", "50%"), (8, "lru", "50%"),
    ]  # fmt: skip
    assert printed.count("| tiny | 2 | ") == len(rows)
    for row in rows:
        experts = prefill.TINY.layers * prefill.TINY.experts
        assert 0 < row["missed_per_layer"] <= prefill.TINY.experts
        assert 0 < row["moved_bytes"] <= experts * prefill.TINY.expert_bytes
        assert row["copy_s"] > 0
        assert row["ratio"] > 0
        assert 0 <= row["stalled"] <= 1


def test_a_policy_that_is_none(tmp_path: Path) -> None:
    code, printed = run(tmp_path / "x.json", "--tokens", "20", "--policy", "lur")
    assert code == 2
    assert "lur" in printed.splitlines()[-1]
    assert not list(tmp_path.iterdir())
