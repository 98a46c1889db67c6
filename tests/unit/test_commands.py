"""The commands on small inputs: what they print, write and promise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import simctl

ROOT = Path(__file__).resolve().parents[2]
COARSE = str(ROOT / "traces/samples/coarse-8x2.parquet")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace with prompts, weights, token ids and next gates."""
    path = tmp_path_factory.mktemp("trace") / "small.parquet"
    options = "--layers 4 --experts 8 --top-k 2 --sequences 6 --prompt 5 --decode 12"
    words = f"trace synth {path} {options} --ahead 0.9,0.8 --token-information 0.5".split()
    assert simctl.main(words) == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert simctl.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def result(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    return json.loads(run(capsys, *words, "--json", "-"))


def test_json_on_standard_output_is_json_alone(capsys, small, tmp_path):
    words = ("--policy", "lru", "--trace", small, "--slots", 8)
    found = result(capsys, "run", *words, "--report", tmp_path / "r", "--timeline", tmp_path / "t")
    assert found["schema"] == "simctl.result/1"
    assert found["held"] + found["missed"] == found["accesses"]
    assert found["hit"] + found["late"] == found["held"]
    assert sum(found["breakdown_s"].values()) == pytest.approx(found["time"]["total_s"])
    assert sum(found["time"]["tpot_parts_s"].values()) == pytest.approx(
        found["time"]["tpot_s"]["mean"]
    )


def test_every_option_of_a_run(capsys, small, tmp_path):
    options = {
        "--policy": "predictive:horizon=2",
        "--trace": small,
        "--slots": 12,
        "--batch": 3,
        "--hardware": "rtx4090-pcie4",
        "--sizes": "olmoe",
        "--forecaster": "markov:horizon=1",
        "--scheduler": "prompt-length",
        "--pool": "layer",
        "--depth": 1,
        "--seed": 3,
    }
    words = [word for pair in options.items() for word in pair]
    found = result(capsys, "run", *words)
    assert found["policy"]["parameters"]["horizon"] == 2
    assert found["policy"]["forecaster"]["parameters"]["horizon"] == 1
    assert (found["pool"], found["batch"], found["scheduler"]) == ("layer", 3, "prompt-length")
    assert "olmoe" in found["model"]["name"]
    assert "olmoe" in run(capsys, "run", *words)


@pytest.mark.parametrize("budget", ["--cache=37.5%", "--slots=12"])
def test_budgets_that_are_the_same(capsys, small, budget):
    assert result(capsys, "run", "--policy", "lru", "--trace", small, budget)["slots"] == 12


def test_a_budget_in_memory_leaves_room_for_the_dense_part(capsys, small):
    words = ("--policy", "lru", "--trace", small, "--sizes", "mixtral-8x7b")
    found = result(capsys, "run", *words, "--gpu-memory", "8GiB")
    memory = found["memory"]
    used = memory["slots_bytes"] + memory["dense_bytes"] + memory["kv_bytes"]
    assert used <= 8 * 2**30 < used + found["model"]["expert_params"] * 2


def test_the_same_seed_gives_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        words = ["run", "--policy", "predictive", "--trace", str(small), "--seed", "1"]
        words += ["--forecaster", "oracle:accuracy=0.7", "--json", str(tmp_path / f"{name}.json")]
        words += ["--timeline", str(tmp_path / f"{name}.gz")]
        assert simctl.main(words) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    events = json.loads(gzip.decompress((tmp_path / "a.gz").read_bytes()))["traceEvents"]
    names = {e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert {"host", "GPU", "H2D", "D2H", "CPU"} <= names


def test_a_token_table_is_learned_on_another_part(capsys, small, tmp_path):
    train, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    words = ["trace", "split", small, train, test, "--share", "0.5"]
    run(capsys, *words)
    policy = ("--policy", "predictive", "--forecaster", "token", "--slots", 8)
    found = result(capsys, "run", *policy, "--trace", test, "--train", train)
    assert found["policy"]["forecaster"]["name"] == "token"
    assert found["train"] == str(train)


def test_compare_in_workers_equals_compare_here(capsys, small):
    words = ("compare", "--trace", small, "--policy", "lfu", "--slots", 8, "--slots", 12)
    here, there = (result(capsys, *words, "--jobs", jobs)["results"] for jobs in (1, 2))
    assert here == there
    assert [r["policy"]["name"] for r in here] == ["lfu", "lru", "belady"] * 2


def test_reports_of_results(capsys, small, tmp_path):
    out = tmp_path / "r.json"
    run(capsys, "compare", "--trace", small, "--policy", "lru", "--slots", 8, "--json", out)
    text = run(capsys, "report", out, "--out", tmp_path / "page", "--title", "a title")
    assert "belady" in text
    assert "a title" in (tmp_path / "page/index.html").read_text()
    assert list((tmp_path / "page/figures").glob("*.png"))


def test_lists(capsys):
    assert {"lru", "belady", "predictive", "mixed"} <= {
        p["name"] for p in json.loads(run(capsys, "policies", "--json"))["policies"]
    }
    assert "h200-pcie5" in run(capsys, "hardware")
    assert "python" in run(capsys, "doctor")
    assert "popularity" in run(capsys, "trace", "info", COARSE)


def test_a_policy_in_a_file(capsys, small):
    example = ROOT / "examples/fading.py"
    words = ("run", "--policy", f"{example}:Fading:reach=0", "--trace", small, "--slots", 8)
    found = result(capsys, *words)
    assert found["policy"]["name"] == "fading.py:Fading"
    assert found["policy"]["parameters"]["reach"] == 0
