"""``simctl predictor``: from traces to a run that replays forecasts, and every way to err."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import simctl
from tests.helpers import ROOT, SAMPLES
from tests.helpers_predictor import MODEL, drawn_sequences, rule_trace
from traces.store import open_trace, write_trace

SMALL = ["--d-model", "16", "--d-ff", "32", "--heads", "2", "--d-kv", "8", "--blocks", "1"]


def run(capsys, *words: object, code: int = 0) -> str:
    """What ``simctl`` prints; its standard error where *code* is not 0."""
    assert simctl.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    return err if code else out


def refused(capsys, *words: object) -> str:
    """The one line with which ``simctl`` leaves."""
    text = run(capsys, *words, code=2)
    assert text.count("\n") == 1
    return text


def written(path: Path, sequences, **model) -> Path:
    spec = dataclasses.replace(MODEL, **model)
    write_trace(path, spec, sequences, source="", license="")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two traces of one rule, and a predictor trained on the first."""
    folder = tmp_path_factory.mktemp("predictor")
    found = {}
    for name, seed in (("train", 1), ("test", 2)):
        trace = rule_trace(seed, 30)
        found[name] = folder / f"{name}.parquet"
        write_trace(found[name], MODEL, trace.items, source="", license="", extra=trace.extra)
    found["predictor"] = folder / "p.safetensors"
    words = ["predictor", "train", "--trace", found["train"], "--out", found["predictor"]]
    words += ["--steps", 30, "--lr", 0.01, "--vocabulary", 20, "--device", "cpu", *SMALL]
    assert simctl.main([str(word) for word in words]) == 0
    return found


def train_words(files, out: Path, *more: object) -> list[object]:
    words = ["predictor", "train", "--trace", files["train"], "--out", out, "--device", "cpu"]
    return [*words, *SMALL, *more]


def judge_words(files, *more: object) -> list[object]:
    return ["predictor", "evaluate", "--predictor", files["predictor"], "--device", "cpu", *more]


def forecast_words(files, trace: Path, out: Path, *more: object) -> list[object]:
    words = ["predictor", "forecast", "--predictor", files["predictor"], "--trace", trace]
    return [*words, "--out", out, "--device", "cpu", *more]


def test_the_whole_way(capsys, files, tmp_path):
    """Evaluate, forecast, and replay in a run and in a comparison."""
    found = tmp_path / "e.json"
    words = ["--trace", files["test"], "--train", files["train"], "--batch", 2, "--by-layer"]
    text = run(capsys, *judge_words(files, *words, "--json", found))
    assert "routing-path" in text
    assert "topic 1" in text
    figures = json.loads(found.read_text())
    assert figures["methods"]["routing-path"]["decode"]["batch_recall"]["2"]["recall"] > 0.5
    assert set(figures["methods"]) == {
        "routing-path", "previous", "token-table", "markov", "markov-1",
    }  # fmt: skip
    assert figures["predictor"]["training"]["traces"] == ["train.parquet"]

    out = tmp_path / "x.forecast.npz"
    assert "4 experts a layer" in run(capsys, *forecast_words(files, files["test"], out))
    words = ["--policy", "predictive", "--trace", files["test"], "--cache", "50%", "--json", "-"]
    result = json.loads(run(capsys, "run", *words, "--forecaster", f"routing-path:{out}"))
    assert result["policy"]["forecaster"]["name"] == "routing-path"
    assert result["prefetch"]["accuracy"] is None or result["prefetch"]["accuracy"] >= 0
    words = ["--trace", files["test"], "--policy", "predictive", "--cache", "50%", "--batch", 3]
    run(capsys, "compare", *words, "--forecaster", f"routing-path:{out},beyond=true", "--jobs", 1)


def test_forecasts_are_what_the_predictor_says(capsys, files, tmp_path):
    from policies.sidecar import read_sidecar
    from runtime.predictor.data import read_corpus
    from runtime.predictor.files import load_predictor
    from runtime.predictor.inference import score

    out = tmp_path / "x.npz"
    run(capsys, *forecast_words(files, files["test"], out, "--top", 3, "--windows", "1,8"))
    sidecar, corpus = read_sidecar(out), read_corpus(files["test"])
    row = 0
    for found in score(load_predictor(files["predictor"]).model, corpus.sequences):
        rows = slice(row, row + len(found.sequence))
        experts = sidecar.arrays["experts"][rows].astype(np.intp)
        best = -np.sort(-found.now, axis=-1)[..., :3]
        chances = np.take_along_axis(found.now, experts, axis=-1)
        np.testing.assert_allclose(chances, best, atol=1e-6)
        np.testing.assert_allclose(sidecar.arrays["scores"][rows] / 255, best, atol=0.002)
        reuse = found.again[:, [0, 3]]
        np.testing.assert_allclose(sidecar.arrays["reuse"][rows] / 255, reuse, atol=0.002)
        row = rows.stop
    assert sidecar.windows == (1, 8)
    assert run(capsys, *forecast_words(files, files["test"], tmp_path / "y.npz"))
    again = tmp_path / "z.npz"
    run(capsys, *forecast_words(files, files["test"], again, "--windows", "none"))
    assert read_sidecar(again).arrays["reuse"].shape[1] == 0


def test_the_same_command_gives_the_same_bytes(capsys, files, tmp_path):
    for name in ("a", "b"):
        run(capsys, *train_words(files, tmp_path / f"{name}.safetensors", "--steps", 5))
    first, second = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.checkpoint"))


def test_the_vocabulary_that_a_capture_wrote_down(capsys, files, tmp_path):
    """It needs no --vocabulary, one that is given goes first, and two models do not mix."""
    from runtime.predictor.files import load_predictor

    trace, out = rule_trace(1, 4), tmp_path / "p.safetensors"
    paths = {}
    for vocabulary in (23, 24, 19, True):
        paths[vocabulary] = tmp_path / f"{vocabulary}.parquet"
        extra = {"capture": {"vocabulary": vocabulary}}
        write_trace(paths[vocabulary], MODEL, trace.items, source="", license="", extra=extra)
    words = ["predictor", "train", "--out", out, "--device", "cpu", *SMALL, "--steps", 1]
    for traces, options, expected in (
        ([paths[23]], [], 23),
        ([paths[23]], ["--vocabulary", 30], 30),
        ([files["train"], paths[23]], [], 23),
        ([paths[True]], [], 256),
    ):
        chosen = [word for path in traces for word in ("--trace", path)]
        run(capsys, *words, *chosen, *options, "--restart")
        assert load_predictor(out).spec.vocabulary == expected
    found = refused(capsys, *words, "--trace", paths[23], "--trace", paths[24], "--restart")
    assert "24.parquet: model has a vocabulary of 24, expected 23 as in" in found
    found = refused(capsys, *words, "--trace", paths[19], "--restart")
    assert "19.parquet: sequence" in found
    assert "expected below 19, the predictor's vocabulary" in found


def test_several_traces_and_epochs(capsys, files, tmp_path):
    out = tmp_path / "p.safetensors"
    words = train_words(files, out, "--trace", files["test"], "--epochs", 2, "--batch", 32)
    text = run(capsys, *words)
    assert "4 steps on 960 tokens of 60 sequences" in text


def test_an_interrupt_keeps_what_was_learned(capsys, files, tmp_path):
    """Ctrl-C leaves a checkpoint and no predictor; resumed, the training comes to its end."""
    out = tmp_path / "p.safetensors"
    words = [str(w) for w in train_words(files, out, "--steps", 100, "--dropout", 0.2)]
    code = "import sys, simctl; sys.exit(simctl.main())"
    command = [sys.executable, "-u", "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    seen = f"/proc/{process.pid}/status"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _catches_interrupts(seen):
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the training ended before the interrupt came")
    assert process.returncode == 130, err
    assert "go on with --resume" in err
    unfinished = tmp_path / "p.safetensors.checkpoint"
    assert unfinished.exists()
    assert sorted(tmp_path.iterdir()) == [unfinished]
    assert simctl.main([*words, "--resume", str(unfinished)]) == 0
    assert sorted(tmp_path.iterdir()) == [out]
    assert "100 steps on" in capsys.readouterr().out


def _catches_interrupts(status: str) -> bool:
    """Whether a process has put its own handler on SIGTERM, which Python alone does not."""
    for line in Path(status).read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def test_what_training_refuses(capsys, files, tmp_path):
    out = tmp_path / "p.safetensors"
    (plain,) = drawn_sequences([(3, 4)])
    none = written(tmp_path / "none.parquet", [dataclasses.replace(plain, tokens=None)])
    holes = plain.tokens.copy()
    holes[2] = -1
    some = written(tmp_path / "some.parquet", [dataclasses.replace(plain, tokens=holes)])
    other = written(tmp_path / "other.parquet", [plain], experts=9)
    start = ["predictor", "train", "--out", out, "--steps", 2]
    assert "none.parquet: has no token ids" in refused(capsys, *start, "--trace", none)
    message = "some.parquet: sequence 0, position 2: token id unknown"
    assert message in refused(capsys, *start, "--trace", some)
    both = ["--trace", files["train"], "--trace", other]
    message = "other.parquet: model has experts = 9, expected 8 as in"
    assert message in refused(capsys, *start, *both)
    found = refused(capsys, *train_words(files, out, "--vocabulary", 12))
    assert "expected below 12, the predictor's vocabulary" in found
    assert "train.parquet: sequence " in found
    found = refused(capsys, *train_words(files, tmp_path / "p.bin"))
    assert "expected a name that ends in .safetensors" in found
    found = refused(capsys, *train_words(files, tmp_path / "no" / "p.safetensors"))
    assert "no folder" in found
    assert "no such file" in refused(capsys, *start, "--trace", tmp_path / "absent.parquet")
    assert not out.exists()


def test_nothing_is_lost_unasked(capsys, files, tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"mine")
    assert "exists, expected a new file" in refused(capsys, *train_words(files, out))
    assert out.read_bytes() == b"mine"
    run(capsys, *train_words(files, out, "--steps", 2, "--restart"))
    out.unlink()
    unfinished = tmp_path / "p.safetensors.checkpoint"
    unfinished.write_bytes(b"half")
    assert "left by an interrupted training" in refused(capsys, *train_words(files, out))
    found = refused(capsys, *train_words(files, out, "--resume", unfinished))
    assert "not a readable safetensors file" in found
    found = refused(capsys, *train_words(files, out, "--resume", tmp_path / "absent"))
    assert "--resume" in found
    found = refused(capsys, *train_words(files, out, "--resume", files["predictor"]))
    assert "is of kind 'predictor', expected a unfinished" in found or "expected" in found
    run(capsys, *train_words(files, out, "--steps", 2, "--restart"))
    assert not unfinished.exists()


@pytest.mark.parametrize("command", ["evaluate", "forecast"])
def test_what_asking_a_predictor_refuses(capsys, files, tmp_path, command):
    (plain,) = drawn_sequences([(3, 4)])
    high = plain.tokens.copy()
    high[5] = 20
    cases = {
        "none": ([dataclasses.replace(plain, tokens=None)], {}, "has no token ids"),
        "layers": (
            [dataclasses.replace(plain, experts=plain.experts[:, :2])],
            {"layers": 2},
            "model tiny has layers = 2, expected 3: the predictor was trained for tiny",
        ),
        "experts": ([plain], {"experts": 9}, "has experts = 9, expected 8"),
        "top_k": (
            [dataclasses.replace(plain, experts=plain.experts[..., :1])],
            {"top_k": 1},
            "has top_k = 1, expected 2",
        ),
        "ids": (
            [dataclasses.replace(plain, tokens=high)],
            {},
            "sequence 0, position 5: token id 20, expected below 20, the predictor's vocabulary",
        ),
    }
    out = tmp_path / "x.npz"
    words = ["predictor", command, "--device", "cpu"]
    words += ["--out", out] if command == "forecast" else []
    for name, (sequences, model, message) in cases.items():
        trace = written(tmp_path / f"{name}.parquet", sequences, **model)
        found = refused(capsys, *words, "--predictor", files["predictor"], "--trace", trace)
        assert message in found
        assert f"{name}.parquet" in found
    for name, content in (("broken", b"no"), ("short", files["predictor"].read_bytes()[:-9])):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        found = refused(capsys, *words, "--predictor", path, "--trace", files["test"])
        assert f"{name}.safetensors: not a readable safetensors file" in found
    found = refused(capsys, *words, "--predictor", tmp_path / "absent", "--trace", files["test"])
    assert "absent: no such file, expected a predictor" in found
    assert not out.exists()


def test_a_safetensors_file_of_something_else(capsys, files, tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    words = ["predictor", "evaluate", "--predictor", path, "--trace", files["test"]]
    assert "is of kind None, expected a predictor" in refused(capsys, *words)


def test_what_forecasting_refuses(capsys, files, tmp_path):
    out = tmp_path / "x.npz"
    words = forecast_words(files, files["test"], out)
    assert "--top 9: expected 1 to 8 experts" in refused(capsys, *words, "--top", 9)
    assert "--windows 3: expected any of 1, 2, 4, 8" in refused(capsys, *words, "--windows", "3")
    assert "expected all, none or" in refused(capsys, *words, "--windows", "8,1")
    found = refused(capsys, *forecast_words(files, files["test"], tmp_path / "x.txt"))
    assert "expected a name that ends in .npz" in found
    assert not out.exists()


def test_a_run_refuses_the_forecasts_of_another_trace(capsys, files, tmp_path):
    out = tmp_path / "x.npz"
    run(capsys, *forecast_words(files, files["train"], out))
    words = ["run", "--policy", "predictive", "--trace", files["test"], "--cache", "50%"]
    found = refused(capsys, *words, "--forecaster", f"routing-path:{out}")
    assert "x.npz" in found
    assert "forecasts of another trace (train.parquet)" in found
    (plain,) = drawn_sequences([(3, 4)])
    none = written(tmp_path / "none.parquet", [dataclasses.replace(plain, tokens=None)])
    words[4] = none
    found = refused(capsys, *words, "--forecaster", f"routing-path:{out}")
    assert "'routing-path' needs tokens" in found
    words[4] = SAMPLES["coarse-8x2"]
    found = refused(capsys, *words, "--forecaster", f"routing-path:{out}")
    assert "layers is 3, expected 8" in found


@pytest.mark.parametrize(("name", "least"), [("coarse-8x2", 0.88), ("granular-64x8", 0.74)])
def test_those_that_ship_know_the_samples(capsys, tmp_path, name, least):
    """Recall at top-k of decoded tokens, as docs/predictor.md says it, less some air."""
    predictor = ROOT / "traces" / "predictors" / f"{name}.safetensors"
    sample = open_trace(str(SAMPLES[name]))
    trace = tmp_path / "few.parquet"
    few = itertools.islice(sample.sequences(), 12)
    write_trace(trace, sample.model, few, source="", license="")
    words = ("predictor", "evaluate", "--predictor", predictor, "--trace", trace, "--json", "-")
    found = json.loads(run(capsys, *words))["methods"]["routing-path"]["decode"]
    assert found["at"][str(sample.model.top_k)]["recall"] > least
