"""``simctl generate`` in groups: who decodes with whom changes no text, and is decided once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import simctl  # noqa: E402
from policies.budget import Budget  # noqa: E402
from policies.registry import SCHEDULERS  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime.generate import encode, open_offloaded, write_on  # noqa: E402
from runtime.grouped import Arrangement, GroupedWriter, arranged  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.names import replayed  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers_checkpoint import WORDS, tiny_checkpoint  # noqa: E402
from tests.helpers_predictor import MODEL, small_predictor  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.store import open_trace  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("EXPERTFLOW_MODELS", ROOT.parent / "shared" / "models"))
PROMPTS = ["w5 w9 w33 w12", "w40 w3", "w11 w60 w22 w7 w8", "w13", "w20 w21 w22"]
LIVE = "routing-path:p.safetensors"
#: Longer than the window of the tiny models that have one.
NEW = 14
SCHEDULES = [
    (2, "none"), (5, "none"), (2, "prompt-length"), (2, "expertflow"), (2, "expertflow:kv=reindex"),
    (2, "expertflow:overlap=true,every=3"), (1, "prompt-routes"), (2, "expertflow:in_a_row=true"),
]  # fmt: skip


def nothing(*values: Any) -> None:
    """Takes text and times."""


def texts(
    folder: Path, batch: int, scheduler: str, sampling: Sampling | None = None, **options: Any
) -> list[str]:
    """What the prompts lead to in groups."""
    with opened(folder, **options) as model:
        arrangement = Arrangement(batch, SCHEDULERS.build(scheduler))
        prompts = list(zip(PROMPTS, encode(model.tokenizer, PROMPTS), strict=True))
        writer = GroupedWriter(model, prompts, sampling or Sampling(), NEW, arrangement)
        return [item.text for item in writer]


def opened(folder: Path, **options: Any) -> Any:
    settings = {"slots": 8, "device": "cpu", "compute": "reference"} | options
    return open_offloaded(folder, "lru", **settings)


def one_by_one(folder: Path, **options: Any) -> list[str]:
    with opened(folder, **options) as model:
        prompts = list(zip(PROMPTS, encode(model.tokenizer, PROMPTS), strict=True))
        found = write_on(model, prompts, Sampling(), NEW, nothing, nothing)
        return [item.text for item in found]


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss", "deepseek_v2"])
def written(request, tmp_path_factory):
    """A tiny model of a family, and what it says to each prompt alone."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    return folder, one_by_one(folder)


@pytest.mark.parametrize(("batch", "scheduler"), SCHEDULES)
def test_no_text_changes(written, batch, scheduler):
    """Token by token: a word of the tiny tokenizer is one token, special ones are not shown."""
    folder, alone = written
    assert max(len(text.split()) for text in alone) == NEW
    assert texts(folder, batch, scheduler) == alone


def test_sequences_that_end_early_leave_the_others_alone(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "olmoe")
    alone = one_by_one(folder)
    # The word that ends two of the texts in their middle ends them for everybody.
    ends = sorted({text.split()[n] for n, text in ((3, alone[0]), (7, alone[2]))})
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) | {"eos_token_id": [WORDS.index(w) for w in ends]}
    path.write_text(json.dumps(settings))
    short = one_by_one(folder)
    assert min(len(text.split()) for text in short) < NEW
    for batch, scheduler in SCHEDULES:
        assert texts(folder, batch, scheduler) == short, scheduler


def test_drawn_text_does_not_depend_on_the_others(written):
    """Every sequence has a random stream of its own."""
    folder, alone = written
    sampling = Sampling(temperature=2.0, top_k=20, seed=4)
    first = texts(folder, 1, "none", sampling)
    assert first != alone
    for batch, scheduler in ((3, "none"), (2, "expertflow"), (2, "expertflow:kv=reindex")):
        assert texts(folder, batch, scheduler, sampling) == first


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the trained models beside the checkout")
@pytest.mark.parametrize("name", ["coarse-8x2", "granular-64x8"])
def test_no_text_of_a_trained_model_changes(name, monkeypatch):
    lines = (MODELS.parent / "prompts" / "val.jsonl").read_text().splitlines()[:5]
    monkeypatch.setattr(
        f"{__name__}.PROMPTS",
        [json.loads(line)["text"][: 40 + 30 * n] for n, line in enumerate(lines)],
    )
    wide = {"dtype": "float32", "slots": 32}
    alone = one_by_one(MODELS / name, **wide)
    for batch, scheduler in ((3, "none"), (2, "expertflow"), (2, "expertflow:kv=reindex")):
        assert texts(MODELS / name, batch, scheduler, **wide) == alone


@pytest.fixture
def wired(monkeypatch):
    monkeypatch.setitem(simctl.COMMANDS, "generate", "runtime.cli_generate:generate")


def run(*words: Any) -> int:
    return simctl.main(["generate", *map(str, words)])


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model of the shape that the small predictor knows."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-mixtral", "mixtral", layers=3)


@pytest.mark.usefixtures("wired")
@pytest.mark.parametrize(
    ("policy", "forecaster", "batch", "scheduler"),
    [
        ("lru", None, 2, "expertflow"),
        ("lru", None, 3, "none"),
        ("predictive", "markov", 2, "none"),
        ("predictive", "markov", 2, "expertflow:kv=reindex"),
        ("predictive", "ahead", 1, "prompt-routes"),
        ("predictive", "routing-path", 2, "expertflow:paths=previous"),
        ("predictive", "routing-path", 1, "prompt-routes"),
        ("predictive", "routing-path", 2, "none"),
    ],
)
def test_the_simulator_decides_alike(
    tiny, prompt_file, tmp_path, policy, forecaster, batch, scheduler
):
    """Groups and moves of experts: what a trace recorded in groups leads to in the simulator."""
    trace, out = tmp_path / "x.parquet", tmp_path / "x.json"
    if forecaster == "routing-path":
        predictor = tmp_path / "p.safetensors"
        save_predictor(predictor, small_predictor(vocabulary=64), {}, "float16")
        forecaster = f"routing-path:{predictor}"
    words = ["--forecaster", forecaster] if forecaster else []
    assert run(
        "--model", tiny, "--device", "cpu", "--slots", 9, "--max-new-tokens", NEW, *words,
        "--prompt-file", prompt_file, "--policy", policy, "--batch", batch,
        "--scheduler", scheduler, "--trace", trace, "--json", out,
    ) == 0  # fmt: skip
    setup = Setup(
        str(trace), batch=batch, scheduler=scheduler, forecaster=replayed(forecaster, trace)
    )
    found, _ = Session(setup).run(policy, Budget(slots=9))
    facts = json.loads(out.read_text())
    assert found.decisions_sha256 == facts["cache"]["decisions_sha256"]
    if found.schedule is not None:
        for name in ("divisions", "moved", "distinct_experts", "distinct_in_file_order"):
            assert facts["schedule"][name] == pytest.approx(found.schedule[name]), name
    assert facts["time"]["tokens_per_s"] > 0
    assert MODEL.layers == open_trace(str(trace)).model.layers


@pytest.mark.usefixtures("wired")
def test_texts_come_in_the_order_of_the_prompts(tiny, prompt_file, tmp_path, capsys):
    words = ["--model", tiny, "--device", "cpu", "--slots", 9, "--max-new-tokens", NEW]
    assert run(*words, "--prompt-file", prompt_file) == 0
    alone = capsys.readouterr().out
    for scheduler in ("none", "prompt-length", "expertflow"):
        more = ["--batch", 2, "--scheduler", scheduler]
        assert run(*words, *more, "--prompt-file", prompt_file) == 0
        printed = capsys.readouterr()
        assert printed.out == alone
        assert ("distinct experts a step" in printed.err) == (scheduler == "expertflow")


@pytest.mark.usefixtures("wired")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scheduler", "no-such"], "no-such"),
        (["--scheduler", "expertflow:kv=other"], "kv is 'other'"),
        (["--scheduler", "expertflow:paths=forecaster"], "no --forecaster"),
        (["--scheduler", "expertflow", "--forecaster", "oracle"], "needs the future"),
        (["--scheduler", "expertflow", "--forecaster", "token"], "expected --train"),
        (
            ["--scheduler", "expertflow:paths=forecaster", "--forecaster", LIVE],
            "runs beside the model",
        ),
    ],
)  # fmt: skip
def test_bad_schedulers_are_one_line(tiny, capsys, words, expected):
    assert run("--model", tiny, "--device", "cpu", "--prompt", "w5", "--batch", 2, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_settings_that_only_transformers_knows_are_refused(tiny):
    with opened(tiny) as model:
        model.model.generation_config.repetition_penalty = 1.2
        with pytest.raises(InputError, match=r"repetition_penalty is 1\.2"):
            GroupedWriter(model, [("w5", [5])], Sampling(), 2, arranged(2, "none", None, None))
