# ruff: noqa: F811
"""The command: what it runs, compares, writes and refuses, with a stand-in for the real world."""

from __future__ import annotations

import gzip
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import simctl
from reports.validation.cells import FIRST, cells_json, read_cells
from reports.validation.page import write_validation
from reports.validation.verdicts import Limits, judge
from tests.helpers import random_trace
from tests.unit.validate_fakes import FakeReal, fake_cell, real, small  # noqa: F401
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import write_trace

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> int:
    return simctl.main(["validate", *map(str, words)])


def base(small: Path, *more: object) -> list[object]:
    return ["--trace", small, "--policy", "lru", "--slots", 8, *more]


def content(capsys, *words: object) -> dict:
    run(*words, "--json", "-")
    return json.loads(capsys.readouterr().out)


def test_two_worlds_that_agree(capsys, real, small, tmp_path):
    words = ["--trace", small, "--policy", "lru", "--policy", "predictive", "--policy", "mixed"]
    words += ["--cache", "25%", "--slots", 12, "--batch", 1, "--batch", 2]
    words += ["--cells", tmp_path / "cells.json", "--report", tmp_path / "report"]
    words += ["--timeline", tmp_path / "both.json.gz", "--timeline-cell", 2]
    real.measured["link_bytes_per_s"] = 1e12
    assert run(*words, "--json", tmp_path / "all.json") == 0
    out = capsys.readouterr().out
    assert "pass           same decisions" in out
    assert "pass           mean error of mean TPOT           0.0 % over 12 cells" in out
    cells = read_cells(tmp_path / "cells.json")
    assert len(cells) == 12
    assert [(c.batch, c.cache, c.policy) for c in cells[:4]] == [
        (1, 0.25, "lru"), (1, 0.25, "predictive"), (1, 0.25, "mixed"), (1, 0.375, "lru"),
    ]  # fmt: skip
    first = cells[0]
    assert (first.slots, first.mode, first.world, first.sequences) == (8, "replay", "gpu", 6)
    assert first.trace == small.name
    assert first.held_sim == first.held_gpu
    assert first.demand_bytes_equal
    assert sum(first.parts_gpu_s.values()) == pytest.approx(first.tpot_gpu_s)
    assert 0 < first.naive_s < first.tpot_gpu_s
    assert len(first.step_quantiles_gpu_s) == 41
    assert cells[1].forecaster == "ahead"
    # one session per batch, closed; the chosen cell ran once more for the timeline
    assert [fake.closed for fake in real.opened] == [True, True]
    names = ("lru", "predictive", "mixed")
    assert real.opened[0].runs == ["lru", "predictive", *names[1:], *names]
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["passed"]
    assert len(found["results"]) == 24
    assert tuple(found["cells"][0])[: len(FIRST)] == FIRST
    events = json.loads(gzip.decompress((tmp_path / "both.json.gz").read_bytes()))
    names = [run["name"] for run in events["otherData"]["runs"]]
    assert len(names) == 2
    assert all(name.startswith("predictive (ahead), 25 %") for name in names)
    assert {"simulated", "measured on the GPU"} == {name.split("(")[-1][:-1] for name in names}
    page = (tmp_path / "report/index.html").read_text()
    for image in ("scatter", "errors-1", "breakdown-1", "breakdown-2", "steps"):
        assert (tmp_path / f"report/figures/{image}.png").exists()
        assert f'id="{image}"' in page
    assert read_cells(tmp_path / "report/cells.json") == cells


def test_the_timeline_is_short_in_both_worlds(real, small, tmp_path):
    assert run(*base(small, "--timeline", tmp_path / "t.gz")) in (0, 1)
    events = json.loads(gzip.decompress((tmp_path / "t.gz").read_bytes()))["traceEvents"]
    for process in (1, 2):
        gates = [e for e in events if e["pid"] == process and e["name"].startswith("attention")]
        assert 0 < len(gates) <= 16 * 4


def test_an_error_of_time_is_signed_and_fails(capsys, real, small):
    real.slower = 0.25
    found = content(capsys, *base(small))
    assert found["cells"][0]["error"] == pytest.approx(1 / 1.25 - 1)
    failed = [v["name"] for v in found["verdicts"] if v["state"] == "fail"]
    assert failed[:2] == ["mean error of mean TPOT", "worst error of mean TPOT"]
    assert not found["passed"]
    assert run(*base(small)) == 1
    real.measured["link_bytes_per_s"] = 1e12
    loose = ("--max-mean-error", "20%", "--max-error", "20.5%")
    assert run(*base(small, *loose)) == 0


def test_a_link_that_others_slow_is_tried_again(capsys, real, small):
    """Until it is as fast as the profile says, or often enough; the fastest attempt counts."""
    real.rates[:] = [4e10, 5e10, 4.5e10, 1e12]
    first = content(capsys, *base(small))["cells"][0]
    assert (first["attempts"], first["link_bytes_per_s"]) == (3, 5e10)
    second = content(capsys, *base(small))["cells"][0]
    assert (second["attempts"], second["link_bytes_per_s"]) == (1, 1e12)
    assert [len(fake.runs) for fake in real.opened] == [3, 1]
    real.rates[:] = [4e10, 4e10]
    assert content(capsys, *base(small, "--attempts", 2))["cells"][0]["attempts"] == 2
    real.rates[:] = [4e10, 4e10]
    real.world = "cpu"
    assert content(capsys, *base(small))["cells"][0]["attempts"] == 1


def test_a_host_that_others_slow_is_tried_again(capsys, real, small):
    """Link and host weigh alike: each as a share of what it must reach."""
    real.measured["link_bytes_per_s"] = 1e12
    real.speeds[:] = [0.6, 0.79, 0.7]
    first = content(capsys, *base(small))["cells"][0]
    assert (first["attempts"], first["host_speed"]) == (3, 0.79)
    real.speeds[:] = [0.6, 0.9]
    second = content(capsys, *base(small))["cells"][0]
    assert (second["attempts"], second["host_speed"]) == (2, 0.9)
    del real.measured["link_bytes_per_s"]
    real.rates[:], real.speeds[:] = [4e10, 5e10], [0.75, 0.5]
    third = content(capsys, *base(small, "--attempts", 2))["cells"][0]
    assert (third["link_bytes_per_s"], third["host_speed"]) == (4e10, 0.75)


def test_decisions_that_differ_are_told_in_words(capsys, real, small):
    real.change["pool"] = "layer"
    assert run(*base(small)) == 1
    out = capsys.readouterr().out
    assert "fail           same decisions" in out
    line = next(line for line in out.splitlines() if "decisions differ" in line)
    assert "simulated loads layer" in line
    assert "; measured " in line
    assert "event 0 (step 0, layer 0)" in line


def test_a_cpu_proves_decisions_and_not_times(capsys, real, small):
    real.world, real.slower = "cpu", 3.0
    assert run(*base(small)) == 0
    assert "not judged     worst error of mean TPOT" in capsys.readouterr().out
    assert run(*base(small, "--judge-time")) == 1


def test_both_worlds_see_the_same_cut(capsys, real, small):
    found = content(capsys, *base(small, "--sequences", 2, "--max-tokens", 3))
    cell = found["cells"][0]
    assert (cell["sequences"], cell["tokens"], cell["steps"]) == (2, 2 * (5 + 3), 2 * (1 + 3))
    assert {result["trace"] for result in found["results"]} == {small.name}
    setup = real.opened[0].arguments[0]
    assert setup.trace != str(small)
    assert not Path(setup.trace).exists()


def test_a_cell_that_fails_leaves_the_others(capsys, real, small, tmp_path):
    real.raises["lfu"] = RuntimeError("CUDA out of memory. Tried\nto allocate")
    real.measured["link_bytes_per_s"] = 1e12
    words = ["--policy", "lfu", "--policy", "lfru", "--cells", tmp_path / "c.json"]
    assert run(*base(small, *words)) == 1
    out = capsys.readouterr().out
    assert "lfu 25 % failed: RuntimeError: CUDA out of memory. Tried" in out
    assert "fail           every cell ran                    2 of 3 cells" in out
    assert "pass           same decisions" in out
    cells = read_cells(tmp_path / "c.json")
    assert [bool(cell.failed) for cell in cells] == [False, True, False]
    assert run("--from-cells", tmp_path / "c.json") == 1


def test_an_interrupt_keeps_what_is_finished(capsys, real, small, tmp_path):
    real.raises["lfu"] = KeyboardInterrupt()
    path = tmp_path / "c.json"
    words = ["--policy", "lfu", "--cells", path, "--report", tmp_path / "r"]
    assert run(*base(small, *words)) == 130
    assert [cell.policy for cell in read_cells(path)] == ["lru"]
    assert (tmp_path / "r/index.html").exists()
    assert real.opened[0].closed
    assert "interrupted" in capsys.readouterr().err


def test_an_interrupt_in_the_first_cell_writes_nothing(real, small, tmp_path):
    real.raises["lru"] = KeyboardInterrupt()
    assert run(*base(small, "--cells", tmp_path / "c.json")) == 130
    assert not (tmp_path / "c.json").exists()


def test_cells_of_before_are_judged_again(real, tmp_path):
    path = tmp_path / "cells.json"
    path.write_text(cells_json([fake_cell(), fake_cell("lfu", error=0.09)]))
    assert run("--from-cells", path) == 1
    assert run("--from-cells", path, "--max-mean-error", "6%") == 0
    assert run("--from-cells", path, "--max-mean-error", "6%", "--report", tmp_path / "r") == 0
    assert "lfu" in (tmp_path / "r/index.html").read_text()
    assert run("--from-cells", path, "--max-error", "8%") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--trace, --model, --from-cells: none given, expected exactly one"),
        (("--trace", "TRACE", "--model", "m"), "--trace and --model given"),
        (("--model", "m"), "--model and --prompts: expected both or neither"),
        (("--trace", "TRACE"), "--policy: none given"),
        (("--trace", "TRACE", "--policy", "lur"), "lur"),
        (("--trace", "TRACE", "--policy", "lru", "--slots", "1"), "--slots 1: is 1 slots"),
        (("--trace", "TRACE", "--policy", "lru", "--sizes", "no"), "no model 'no'"),
        (("--trace", "TRACE", "--policy", "lru", "--sequences", "0"), "--sequences 0"),
        (("--trace", "TRACE", "--policy", "lru", "--batch", "0"), "--batch 0"),
        (("--trace", "TRACE", "--policy", "lru", "--max-error", "5"), "--max-error 5: expected"),
        (("--trace", "TRACE", "--policy", "lru", "--traces", "x"), "--traces: keeps what live"),
        (
            ("--trace", "TRACE", "--policy", "lru", "--timeline", "t", "--timeline-cell", "3"),
            "--timeline-cell 3: expected 1 to 2",
        ),
        (("--trace", "TRACE", "--policy", "lru", "--cells", "no/c.json"), "no does not exist"),
        (("--trace", "absent.parquet", "--policy", "lru"), "no such file"),
        (("--from-cells", "absent.json"), "No such file"),
        (("--from-cells", "EMPTY"), "holds no cell"),
        (("--model", "m", "--prompts", "p", "--policy", "lru", "--sizes", "t5"), "--sizes: only"),
        (("--model", "m", "--prompts", "p", "--policy", "lru"), "--model m: has no config.json"),
    ],
)
def test_bad_input_is_one_line(capsys, real, small, tmp_path, words, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    names = {"TRACE": str(small), "EMPTY": "empty.json"}
    assert run(*(names.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not real.opened


def test_a_broken_file_of_cells_is_noticed_before_the_runs(capsys, real, small, tmp_path):
    path = tmp_path / "cells.json"
    path.write_text("[{}]")
    assert run(*base(small, "--cells", path)) == 2
    assert "field 'model' is missing" in capsys.readouterr().err
    assert path.read_text() == "[{}]"
    assert not real.opened


def test_no_cuda_device_and_no_torch(capsys, real, small, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(*base(small, "--device", "cuda")) == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from reports.cli_validate import _device

    with pytest.raises(InputError, match="not installed"):
        _device("auto")


def test_a_real_world_that_does_not_start(capsys, real, small):
    real.raises[1] = InputError("sizes t5: not supported, expected another")
    assert run(*base(small, "--batch", 1, "--batch", 2)) == 2
    assert "sizes t5: not supported" in capsys.readouterr().err
    assert run(*base(small, "--batch", 2, "--batch", 1)) == 1
    out = capsys.readouterr().out
    assert "batch 1, lru 25 % failed: sizes t5: not supported" in out
    assert "1 of 2 cells" in out
    assert all(fake.closed for fake in real.opened)


def test_what_every_cell_says_is_bad_input(capsys, real, small, tmp_path):
    real.raises["lru"] = InputError("sizes: no such family, expected another")
    assert run(*base(small, "--cells", tmp_path / "c.json")) == 2
    assert "no such family" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


def test_live_simulates_what_was_generated(capsys, real, small, tmp_path, monkeypatch):
    asked = []

    def run_live(model, **options):
        asked.append((model, options))
        Path(options["out"]).write_bytes(small.read_bytes())
        setup = SimpleNamespace(**options)
        from policies.session import Setup

        fake = FakeReal(Setup(str(options["out"]), batch=setup.batch))
        result, _, measured = fake.run(options["policy"], options["budget"])
        return options["out"], result, None, measured

    module = ModuleType("runtime.live")
    module.live_runs = lambda: nullcontext(run_live)
    monkeypatch.setitem(sys.modules, "runtime.live", module)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": f"prompt {i}"}) for i in range(3)))
    words = ["--model", tmp_path / "model", "--prompts", prompts, "--policy", "lru"]
    words += ["--slots", 8, "--sequences", 2, "--max-tokens", 5, "--traces", tmp_path / "kept"]
    found = content(capsys, *words)
    cell = found["cells"][0]
    assert (cell["mode"], cell["decisions_equal"], cell["slots"]) == ("live", True, 8)
    assert cell["error"] == pytest.approx(0)
    assert asked[0][1]["prompts"] == ["prompt 0", "prompt 1"]
    assert asked[0][1]["max_new_tokens"] == 5
    assert (tmp_path / "kept/cell-1.parquet").exists()


def test_the_runtime_itself_decides_as_the_simulator_does(capsys, tmp_path, monkeypatch):
    """No stand-in: a tiny random model on the CPU, prompts in waves and prefetches included."""
    pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
    monkeypatch.setitem(simctl.COMMANDS, "validate", "reports.cli_validate:validate")
    model = ModelSpec("tiny", 3, 6, 2, 64, 32, 3 * 64 * 32, 60_000, 2 * 3 * 64 * 2)
    trace = random_trace(5, layers=3, experts=6, top_k=2)
    path = tmp_path / "tiny.parquet"
    write_trace(path, model, trace.items, source="random", license="")
    words = ["--trace", path, "--policy", "lru", "--policy", "predictive", "--slots", 5]
    words += ["--batch", 2, "--sequences", 2, "--max-tokens", 4, "--device", "cpu"]
    words += ["--timeline", tmp_path / "both.gz", "--json", "-"]
    assert run(*words) == 0
    found = json.loads(capsys.readouterr().out)
    cells = found["cells"]
    assert len(cells) == 2
    for cell in cells:
        assert not cell["failed"]
        assert cell["decisions_equal"]
        assert (cell["held_sim"], cell["missed_sim"]) == (cell["held_gpu"], cell["missed_gpu"])
        assert cell["demand_bytes_equal"]
        assert (cell["world"], cell["compute"]) == ("cpu", "reference")
        assert cell["tpot_gpu_s"] > 0
        assert sum(cell["parts_gpu_s"].values()) == pytest.approx(cell["tpot_gpu_s"], rel=0.02)
    assert any(cell["missed_gpu"] for cell in cells)
    assert {verdict["state"] for verdict in found["verdicts"]} == {
        "pass", "not judged", "not applicable",
    }  # fmt: skip
    events = json.loads(gzip.decompress((tmp_path / "both.gz").read_bytes()))["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {1, 2}


def test_the_same_cells_give_the_same_page(tmp_path):
    cells = [fake_cell(), fake_cell("lfu", failed="<no room>"), fake_cell(batch=8, model="b")]
    verdicts = judge(cells, Limits())
    pages = [write_validation(tmp_path / n, cells, verdicts, command="simctl") for n in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    text = pages[0].read_text()
    assert "&lt;no room&gt;" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    names = [path.name for path in (tmp_path / "a/figures").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "b/figures").iterdir())


def test_a_page_of_failures_alone(tmp_path):
    cells = [replace(fake_cell(failed="no room"), tpot_gpu_s=None)]
    page = write_validation(tmp_path / "r", cells, judge(cells, Limits()))
    assert "no room" in page.read_text()
