"""What does not belong together is refused in one line: predictors, forecasts, traces, models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import simctl  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402
from tests.helpers_predictor import (  # noqa: E402
    EXPERTS,
    LAYERS,
    MODEL,
    TOP_K,
    VOCABULARY,
    rule_trace,
    small_spec,
)
from traces.store import write_trace  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Traces of one model, a predictor for it and its forecasts; and what belongs to others."""
    folder = tmp_path_factory.mktemp("files")
    items = rule_trace(1, 5).items
    changed = {
        "x": items,
        "none": [dataclasses.replace(s, tokens=None) for s in items],
        "high": [dataclasses.replace(s, tokens=np.full_like(s.tokens, 700)) for s in items],
        "other": rule_trace(2, 5).items,
    }
    found: dict[str, Path] = {}
    for name, sequences in changed.items():
        found[name] = folder / f"{name}.parquet"
        write_trace(found[name], MODEL, sequences, source="drawn", license="CC0-1.0")
    wide = dataclasses.replace(MODEL, name="wide", experts=2 * EXPERTS)
    found["wide"] = folder / "wide.parquet"
    write_trace(found["wide"], wide, items, source="drawn", license="CC0-1.0")
    for name, model, vocabulary in (
        ("p", MODEL, VOCABULARY), ("w", wide, VOCABULARY), ("v", MODEL, 64), ("big", MODEL, 700),
    ):  # fmt: skip
        found[name] = folder / f"{name}.safetensors"
        predictor = Predictor(small_spec(model, vocabulary=vocabulary))
        save_predictor(found[name], predictor, {}, "float32")
    found["f"] = folder / "f.npz"
    words = ["predictor", "forecast", "--predictor", found["p"], "--trace", found["x"]]
    assert simctl.main([str(word) for word in (*words, "--out", found["f"])]) == 0
    found["prompts"] = folder / "prompts.jsonl"
    found["prompts"].write_text(json.dumps({"text": "w5 w9"}) + "\n")
    found["model"] = tiny_checkpoint(
        folder / "tiny", "mixtral", layers=LAYERS, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )  # fmt: skip
    return SimpleNamespace(**found)


TRAIN = "predictor train --steps 1 --d-ff 32 --blocks 1 --out t.safetensors"
RUN = "run --policy predictive --cache 50%"
GENERATE = "generate --device cpu --slots 9 --max-new-tokens 2 --prompt w5 --model {model}"
VALIDATE = "validate --device cpu --policy predictive --slots 9 --max-tokens 2"
LIVE = f"{VALIDATE} --model {{model}} --prompts {{prompts}}"
PREDICTIVE = f"{GENERATE} --policy predictive"

CASES = [
    (f"{TRAIN} --trace {{none}}", "none.parquet: has no token ids"),
    (f"{TRAIN} --trace {{x}} --trace {{none}}", "none.parquet: has no token ids"),
    (f"{TRAIN} --trace {{x}} --trace {{wide}}", "wide.parquet: model has name = wide"),
    (f"{TRAIN} --trace {{high}} --vocabulary 20", "token id 700, expected below 20"),
    ("predictor evaluate --predictor {w} --trace {x}", "experts = 8, expected 16"),
    ("predictor evaluate --predictor {p} --trace {none}", "none.parquet: has no token ids"),
    ("predictor evaluate --predictor {p} --trace {high}", "token id 700, expected below 20"),
    ("predictor evaluate --predictor {p} --trace {x} --train {none}", "none.parquet: has no"),
    ("predictor evaluate --predictor {p} --trace {x} --train {high}", "high.parquet: sequence 0"),
    ("predictor evaluate --predictor {p} --trace {x} --train {wide}", "wide.parquet: model wide"),
    ("predictor forecast --out y.npz --predictor {w} --trace {x}", "experts = 8, expected 16"),
    ("predictor forecast --out y.npz --predictor {p} --trace {none}", "has no token ids"),
    ("predictor forecast --out y.npz --predictor {p} --trace {high}", "expected below 20"),
    (f"{RUN} --trace {{other}} --forecaster routing-path:{{f}}", "of another trace (x.parquet)"),
    (f"{RUN} --trace {{wide}} --forecaster routing-path:{{f}}", "f.npz: experts is 8, expected 16"),
    (f"{RUN} --trace {{none}} --forecaster routing-path:{{f}}", "none.parquet: forecaster"),
    (f"{RUN} --trace {{x}} --forecaster routing-path:{{p}}", "not a file of forecasts but a pred"),
    (f"{RUN} --trace {{x}} --forecaster routing-path:{{x}}", "no numpy archive, expected one that"),
    (f"{RUN} --trace {{x}} --forecaster token --train {{none}}", "expected a training trace with"),
    (
        "run --policy lru --cache 50% --batch 2 --scheduler expertflow --trace {other} "
        "--forecaster routing-path:{f}",
        "of another trace (x.parquet)",
    ),
    (f"{PREDICTIVE} --forecaster routing-path:{{w}}", "experts = 8, expected 16"),
    (f"{PREDICTIVE} --forecaster routing-path:{{p}}", "vocabulary is 20, expected 64"),
    (f"{PREDICTIVE} --forecaster routing-path:{{big}}", "vocabulary is 700, expected 64"),
    (f"{PREDICTIVE} --forecaster routing-path:{{f}}", "forecasts are of a recorded trace"),
    (f"{PREDICTIVE} --forecaster token --train {{none}}", "expected a training trace with tokens"),
    (
        f"{GENERATE} --batch 2 --scheduler expertflow --forecaster routing-path:{{f}}",
        "forecasts are of a recorded trace",
    ),
    (f"{VALIDATE} --trace {{other}} --forecaster routing-path:{{f}}", "of another trace"),
    (f"{VALIDATE} --trace {{none}} --forecaster routing-path:{{f}}", "{none}: forecaster"),
    (f"{VALIDATE} --trace {{x}} --forecaster routing-path:{{p}}", "not a file of forecasts but"),
    (f"{LIVE} --forecaster routing-path:{{w}}", "experts = 8, expected 16"),
    (f"{LIVE} --forecaster routing-path:{{p}}", "vocabulary is 20, expected 64"),
    (f"{LIVE} --forecaster routing-path:{{f}}", "forecasts are of a recorded trace"),
]


@pytest.mark.parametrize(("words", "said"), CASES)
def test_one_line_and_exit_code_2(
    files: Any,
    words: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert simctl.main(words.format(**vars(files)).split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said.format(**vars(files)) in lines[0]
    assert list(tmp_path.iterdir()) == []
