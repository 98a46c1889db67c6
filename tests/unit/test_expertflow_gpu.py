"""benchmarks/expertflow_gpu: its cells, failures and limits, as a dry run on a CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from benchmarks import expertflow_gpu, expertflow_live, expertflow_replays  # noqa: E402
from benchmarks.expertflow_replays import Machine, Replays  # noqa: E402
from benchmarks.expertflow_rows import Clock, attempt, ratio  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from runtime.predictor.spec import PredictorSpec  # noqa: E402
from tests.helpers import ROOT  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402
from tests.helpers_predictor import small_spec  # noqa: E402


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expertflow_replays, "SOURCES", (("mixtral-8x7b", "coarse-8x2"),))
    monkeypatch.setattr(expertflow_live, "BATCHES", (1, 2))


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "gpu.json"
    code = expertflow_gpu.main(["--tiny", "--device", "cpu", "--json", str(out), *words])
    return code, json.loads(out.read_text())["parts"]


def slow_link(tmp_path: Path) -> str:
    """A profile whose copies take as long as those of real experts, for experts that are small."""
    text = (ROOT / "policies/profiles/h200-pcie5.toml").read_text()
    before, host, after = text.partition("[host]")
    slow = [re.sub(r"e-6\b", "e-4", line) if line.startswith("seconds") else line
            for line in before.splitlines()]  # fmt: skip
    path = tmp_path / "slow.toml"
    path.write_text("\n".join(slow) + "\n" + host + after)
    return str(path)


def test_replays_in_both_worlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, parts = run(tmp_path, "--only", "a,b,d", "--hardware", slow_link(tmp_path))
    assert code == 0
    speed, memory, scheduler = (parts[name] for name in ("speed", "memory", "scheduler"))
    assert [(r["policy"], r["cache"], r["batch"]) for r in speed[:3]] == [
        ("load-on-demand", "2 slots", 1), ("lru", "25%", 1), ("predictive", "25%", 1),
    ]  # fmt: skip
    assert len(speed) == 9
    assert all(row["decisions_equal"] for row in (*speed, *memory, *scheduler))
    # With as many slots as one token takes in a layer nothing is ever found again.
    assert speed[0]["held_ratio"] == 0
    assert speed[0]["tokens_per_s_sim"] < speed[1]["tokens_per_s_sim"]
    assert speed[2]["over_lru_sim"] == pytest.approx(
        speed[2]["tokens_per_s_sim"] / speed[1]["tokens_per_s_sim"]
    )
    assert [row["cache"] for row in memory] == ["100%", "25%", "25%", "2 slots", "2 slots"]
    # A CPU tells no peak; the simulated saving grows as the budget shrinks.
    assert [row["saved_gpu"] for row in memory] == [None] * 5
    saved = [row["saved_sim"] for row in memory]
    assert saved[0] == 0 < saved[1] < saved[3] < 1
    assert {row["scheduler"] for row in scheduler} >= {"none", "expertflow:kv=reindex"}
    assert "divisions" not in scheduler[0]
    assert scheduler[1]["divisions"] > 0
    assert scheduler[1]["division_ms_gpu"] > 0
    assert "over_demand_sim" in capsys.readouterr().out


def test_a_predictor_beside_models(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", "qwen3_moe", layers=4)
    predictor = tmp_path / "p.safetensors"
    spec = open_spec(folder)
    save_predictor(predictor, Predictor(spec), {}, "float16")
    code, parts = run(tmp_path, "--only", "c", "--model", f"{folder}={predictor}")
    assert code == 0
    rows = parts["predictor"]
    assert [row["told"] for row in rows[:3]] == ["", "ahead", "routing-path"]
    assert {row["model"] for row in rows} == {"tiny", "qwen3-30b layers, random"}
    for row in rows:
        assert row["decisions_equal"]
        assert ("predictor_share" in row) == (row["told"] == "routing-path")
    assert all(0 < row["predictor_share"] < 1 for row in rows if row["told"] == "routing-path")


def open_spec(folder: Path) -> PredictorSpec:
    """A small predictor for the checkpoint in *folder*."""
    from runtime.families import model_spec
    from runtime.streaming import open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        model = checkpoint.model
        return small_spec(
            model_spec(model, "tiny"), vocabulary=model.config.vocab_size, windows=(1, 2)
        )


def test_what_fails_leaves_the_others_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expertflow_live, "BATCHES", (1,))
    code, parts = run(tmp_path, "--only", "c", "--model", str(tmp_path / "none"))
    assert code == 1
    failed = [row for row in parts["predictor"] if row["model"] == "none"]
    assert all("none.safetensors: no such file" in row["failed"] for row in failed)
    assert len(failed) == 3
    others = [row for row in parts["predictor"] if row["model"] != "none"]
    assert len(others) == 3
    assert not any("failed" in row for row in others)


def test_nothing_is_begun_after_the_limit(tmp_path: Path) -> None:
    code, parts = run(tmp_path, "--limit", "0", "--only", "a")
    assert code == 1
    assert all(row["skipped"] == "no time left" for row in parts["speed"])


def test_a_family_that_cannot_be_replayed_has_a_stand_in(tmp_path: Path) -> None:
    """T5's experts have two matrices of 768 x 3072: three of 768 x 2048 have as many weights."""
    runs = Replays("switch-base-128", "granular-64x8", Machine("cpu"), tmp_path)
    assert "its family cannot be replayed" in runs.stand_in
    assert (runs._spec.hidden, runs._spec.intermediate) == (768, 2048)
    assert runs._spec.expert_params == 2 * 768 * 3072
    assert Replays("qwen1.5-moe", "granular-64x8", Machine("cpu"), tmp_path).stand_in == ""


def test_rows() -> None:
    times = iter([0.0, 1.0, 1.0, 3.0, 6.0])
    clock = Clock(5.0, lambda: next(times))

    def broken() -> Any:
        raise ValueError("no\nsuch thing")

    assert attempt({"a": 1}, broken, clock) == {
        "a": 1, "failed": "ValueError: no", "took_s": 2.0,
    }  # fmt: skip
    assert attempt({"a": 1}, dict, clock) == {"a": 1, "skipped": "no time left"}
    row, base = {"tokens_per_s_gpu": 3.0, "tokens_per_s_sim": None}, {"tokens_per_s_gpu": 2.0}
    assert ratio(row, base, "x") == {"x_gpu": 1.5}


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert expertflow_gpu.main(["--only", "a,e"]) == 2
    assert expertflow_gpu.main(["--hardware", "no-such"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "no part 'e'" in errors[0]


def test_other_parts_stay_if_they_were_measured_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, before = run(tmp_path, "--limit", "0", "--only", "a")
    _, parts = run(tmp_path, "--limit", "0", "--only", "b")
    assert parts["speed"] == before["speed"]
    assert set(parts) == {"speed", "memory"}
    file = tmp_path / "gpu.json"
    words = ["--tiny", "--device", "cpu", "--limit", "0", "--json", str(file)]
    for other, said in (
        (json.loads(file.read_text()) | {"machine": "another"}, "measured with machine another"),
        ([], "not written by this program"),
    ):
        file.write_text(json.dumps(other))
        assert expertflow_gpu.main([*words, "--only", "b"]) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert said in error
        assert json.loads(file.read_text()) == other
