"""Live runs: a checkpoint generates, and a simulation of its routing decides just the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.live  # noqa: E402
import simctl  # noqa: E402
from policies.budget import Budget  # noqa: E402
from policies.decisions import DecisionLog  # noqa: E402
from policies.examples import example_model  # noqa: E402
from policies.memory import predicted_bytes  # noqa: E402
from policies.planner import PolicyError  # noqa: E402
from policies.registry import POLICIES  # noqa: E402
from policies.sidecar import read_sidecar  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.generate import generation_config, open_offloaded  # noqa: E402
from runtime.layout import ExpertLayout  # noqa: E402
from runtime.live import LiveSettings, live_runs, run_live, run_opened  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402
from tests.helpers_kernels import experts_module  # noqa: E402
from tests.helpers_predictor import small_spec  # noqa: E402
from tests.tiny_models import VOCABULARY  # noqa: E402
from tests.unit.test_runtime_session import RAISES  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.store import open_trace  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared"
PROMPTS = ["w5 w9 w33 w12", "w40 w3", "w11 w60 w22 w7 w8", "w13", "w20 w21 w22"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-mixtral", layers=4)


def both(model, out, policy, slots, prompts=PROMPTS, **settings):
    """Logs and results of the live run and of the simulation of what it recorded."""
    logs = DecisionLog(keep=True), DecisionLog(keep=True)
    settings = {"device": "cpu", "max_new_tokens": 6, **settings}
    path, found, recording, measured = run_live(
        model, prompts=prompts, policy=policy, budget=Budget(slots=slots), out=out, log=logs[1],
        spans=True, **settings,
    )  # fmt: skip
    setup = LiveSettings(**settings).setup(path)
    expected, _ = Session(setup).run(policy, Budget(slots=found.slots), log=logs[0])
    assert recording.spans
    assert recording.uses.sum() == found.accesses
    assert len(measured.step_s) == sum(1 for row in recording.steps if row.phase == "decode")
    return logs, expected, found


def assert_alike(logs, expected, found):
    assert logs[0].sha256() == logs[1].sha256() == found.decisions_sha256
    assert list(logs[0].numbers) == list(logs[1].numbers)
    assert len(logs[1].numbers) > 50
    for name in ("steps", "tokens", "accesses", "held", "missed", "quality", "slots"):
        assert getattr(expected, name) == getattr(found, name), name
    assert expected.bytes["demand"] == found.bytes["demand"]
    assert expected.bounds["belady_missed"] == found.bounds["belady_missed"]
    assert found.world == "cpu"
    assert sum(found.breakdown_s.values()) == pytest.approx(found.time["total_s"], rel=0.02)


@pytest.mark.parametrize(
    ("policy", "forecaster", "batch", "slots", "pool"),
    [
        ("lru", None, 1, 9, "global"),
        ("lru", None, 3, 2, "global"),
        ("predictive", "markov", 2, 12, "global"),
        ("predictive", None, 1, 12, "global"),
        ("predictive", "ahead", 3, 12, "layer"),
        ("mixed", None, 1, 14, "global"),
        ("mixed:t1=0.3,low_bits=8", "markov", 2, 14, "global"),
    ],
)
def test_the_simulator_decides_alike(tiny, tmp_path, policy, forecaster, batch, slots, pool):
    out = tmp_path / "live.parquet"
    logs, expected, found = both(
        tiny, out, policy, slots, forecaster=forecaster, batch=batch, pool=pool
    )
    assert_alike(logs, expected, found)
    trace = open_trace(out)
    assert trace.model.name == "tiny-mixtral"
    assert trace.has_tokens
    assert trace.has_weights
    asked = found.policy.get("forecaster", {}).get("name") == "ahead"
    assert trace.ahead_depth == (3 if asked else 0)
    # The last token is made but never run.
    assert [len(s) - s.prefill for s in trace.sequences()] == [5] * len(PROMPTS)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A random predictor for the tiny checkpoint."""
    path = tmp_path_factory.mktemp("predictor") / "p.safetensors"
    model = example_model(4, 8, 2)
    torch.manual_seed(0)
    made = Predictor(small_spec(model, vocabulary=VOCABULARY))
    torch.nn.init.normal_(made.now.bias)
    torch.nn.init.normal_(made.again.bias)
    save_predictor(path, made, {}, "float16")
    return path


@pytest.mark.parametrize(("batch", "options"), [(1, ""), (2, ",floor=0.5,beyond=true")])
def test_the_simulator_replays_the_forecasts_of_a_predictor(
    tiny, tmp_path, predictor, batch, options
):
    """What the predictor said beside the model lies beside the trace afterwards."""
    asked = f"routing-path:{predictor}{options}"
    out = tmp_path / "live.parquet"
    logs, expected, found = both(tiny, out, "predictive", 12, forecaster=asked, batch=batch)
    assert_alike(logs, expected, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live.forecast.npz", "live.parquet"]
    read_sidecar(tmp_path / "live.forecast.npz").check_trace(open_trace(out))
    assert found.policy["forecaster"]["parameters"]["file"] == str(predictor)
    assert open_trace(out).extra["capture"]["vocabulary"] == VOCABULARY
    # A policy that takes no forecaster asks none, in both worlds.
    (tmp_path / "lru").mkdir()
    out = tmp_path / "lru" / "live.parquet"
    assert_alike(*both(tiny, out, "lru", 9, forecaster=asked, batch=batch))
    assert [p.name for p in out.parent.iterdir()] == ["live.parquet"]


def test_the_text_is_that_of_the_plain_model(tiny, tmp_path):
    """The trace holds the tokens that transformers' own greedy decoding makes."""
    out = tmp_path / "live.parquet"
    both(tiny, out, "lru", 6, batch=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    for text, sequence in zip(PROMPTS, open_trace(out).sequences(), strict=True):
        ids = tokenizer(text, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=6, do_sample=False)
        np.testing.assert_array_equal(sequence.tokens, made[0, :-1].numpy())


def test_alone_a_sequence_stops_at_its_end_and_in_a_batch_it_runs_on(tiny, tmp_path):
    both(tiny, tmp_path / "free.parquet", "lru", 9)
    end = int(next(iter(open_trace(tmp_path / "free.parquet").sequences())).tokens[6])
    stopping = tmp_path / "stopping"
    stopping.mkdir()
    for file in tiny.iterdir():
        (stopping / file.name).write_bytes(file.read_bytes())
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    lengths = {}
    for batch in (1, 2):
        out = tmp_path / f"{batch}.parquet"
        assert_alike(*both(stopping, out, "lru", 9, batch=batch))
        lengths[batch] = [len(s) - s.prefill for s in open_trace(out).sequences()]
    assert lengths[1][0] == 2
    assert lengths[2] == [5] * len(PROMPTS)


def test_a_cache_of_fixed_size_is_used_again(tiny, tmp_path, monkeypatch):
    """As on a GPU, where decode graphs need one: each prompt is a new sequence all the same."""
    seen = []

    class Graphs:
        def suits(self, kwargs):
            seen.append(id(kwargs["past_key_values"]))
            return False

        def warm(self, kwargs):
            seen.append("warm")

    def opened(*arguments, **options):
        found = open_offloaded(*arguments, **options)
        found.runner.graphs = Graphs()
        return found

    plain = both(tiny, tmp_path / "plain.parquet", "predictive", 12, batch=2)
    monkeypatch.setattr(runtime.live, "open_offloaded", opened)
    fixed = both(tiny, tmp_path / "fixed.parquet", "predictive", 12, batch=2)
    assert_alike(*fixed)
    assert fixed[2].decisions_sha256 == plain[2].decisions_sha256
    traces = [open_trace(tmp_path / f"{name}.parquet") for name in ("plain", "fixed")]
    for ours, theirs in zip(*(trace.sequences() for trace in traces), strict=True):
        np.testing.assert_array_equal(ours.experts, theirs.experts)
    # One cache for pairs, one for the last prompt alone; each warmed up once.
    assert seen.count("warm") == 2
    assert len(set(seen) - {"warm"}) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "belady"}, "needs the future"),
        ({"policy": "static"}, "popular"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["w5 " * 60]}, "prompt 1: 60 tokens and 6 new ones"),
        ({"budget": Budget(slots=1)}, "slots"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"model": "absent"}, "absent: not found"),
    ],
)
def test_what_cannot_run_is_said(tiny, tmp_path, changes, said):
    out = tmp_path / "x.parquet"
    options = {
        "model": tiny, "prompts": PROMPTS, "policy": "lru", "budget": Budget(slots=9),
        "device": "cpu", "max_new_tokens": 6, "out": out, **changes,
    }  # fmt: skip
    with pytest.raises(InputError, match=said):
        run_live(options.pop("model"), **options)
    assert not list(tmp_path.iterdir())


def test_the_store_is_freed_when_a_run_breaks(tiny, tmp_path, monkeypatch):
    opened = []

    def opening(*arguments, **options):
        opened.append(open_offloaded(*arguments, **options))
        return opened[-1]

    def broken(self, step, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime.live, "open_offloaded", opening)
    monkeypatch.setattr(runtime.live.RealWorld, "add", broken)
    with pytest.raises(KeyboardInterrupt):
        both(tiny, tmp_path / "x.parquet", "lru", 9)
    assert opened[0].runner.engine.store.size_bytes == 0
    assert not list(tmp_path.iterdir())


def test_experts_are_read_once_for_several_runs(tiny, tmp_path, monkeypatch):
    """The same experts serve policies of one and two precisions; each run decides as ever."""
    file = tmp_path / "mine.py"
    file.write_text(RAISES)
    read = []
    fill = HostStore.fill
    monkeypatch.setattr(HostStore, "fill", lambda *given: read.append(given[0]) or fill(*given))
    with live_runs() as run:
        policies = ("mixed", "lru", "mixed:low_bits=8", f"{file}:Raises", "lru")
        for number, policy in enumerate(policies):
            out = tmp_path / f"{number}.parquet"
            options = {
                "prompts": PROMPTS[:2], "policy": policy, "budget": Budget(slots=14), "out": out,
                "device": "cpu", "max_new_tokens": 4,
            }  # fmt: skip
            if "Raises" in policy:
                with pytest.raises(PolicyError, match="raised ZeroDivisionError: by nought"):
                    run(tiny, **options)
                continue
            _, found, _, measured = run(tiny, **options)
            setup = LiveSettings(device="cpu", max_new_tokens=4).setup(out)
            expected, _ = Session(setup).run(policy, Budget(slots=14))
            assert found.decisions_sha256 == expected.decisions_sha256
            assert measured.gpu_predicted_bytes >= predicted_bytes(found.memory)
        assert read[0].size_bytes > 0
    assert len(read) == 1
    assert read[0].size_bytes == 0


def test_a_store_of_another_model_is_refused(tiny):
    layout = ExpertLayout.of(experts_module("concatenated", torch.float32))
    other = HostStore(2, 8, layout, pin=False)
    with pytest.raises(OffloadError, match="the store holds 2 layers of 8 experts of"):
        open_offloaded(tiny, "lru", slots=9, device="cpu", store=other)


def test_sampling_overrides_what_the_files_say(tiny):
    model = SimpleNamespace(
        generation_config=transformers.GenerationConfig(
            do_sample=True, temperature=0.6, eos_token_id=[3, 1], cache_implementation="static"
        )
    )
    greedy = generation_config(model, Sampling(), 9)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, 9, [1, 3])
    assert greedy.cache_implementation is None
    drawn = generation_config(model, Sampling(0.8, 5, 0.9), 9, stop=False)
    assert (drawn.do_sample, drawn.temperature, drawn.top_k, drawn.top_p) == (True, 0.8, 5, 0.9)
    assert drawn.eos_token_id is None


def test_validate_judges_a_live_run(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(simctl.COMMANDS, "validate", "reports.cli_validate:validate")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in PROMPTS))
    words = ["validate", "--model", tiny, "--prompts", prompts, "--device", "cpu", "--slots", 12]
    words += ["--policy", "predictive", "--policy", "mixed", "--forecaster", "markov"]
    words += ["--max-tokens", 6, "--batch", 2, "--timeline", tmp_path / "both.gz", "--json", "-"]
    assert simctl.main([*map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["mode"] for cell in found["cells"]] == ["live", "live"]
    for cell in found["cells"]:
        assert not cell["failed"]
        assert cell["decisions_equal"]
        assert cell["demand_bytes_equal"]
        assert cell["forecaster"] == "markov"
        assert cell["tpot_gpu_s"] > 0
    assert (tmp_path / "both.gz").exists()


def test_validate_runs_a_predictor(tiny, tmp_path, predictor, capsys, monkeypatch):
    """Beside the model in one world, by what it said there in the other; not for ``lru``."""
    monkeypatch.setitem(simctl.COMMANDS, "validate", "reports.cli_validate:validate")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in PROMPTS))
    words = ["validate", "--model", tiny, "--prompts", prompts, "--device", "cpu", "--slots", 12]
    words += ["--policy", "predictive", "--policy", "lru", "--batch", 2, "--max-tokens", 6]
    words += ["--forecaster", f"routing-path:{predictor}", "--json", "-"]
    assert simctl.main([*map(str, words)]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["decisions_equal"] for cell in cells] == [True, True]
    assert cells[0]["policy"] == f"predictive (routing-path:{predictor})"
    assert [cell["forecaster"] for cell in cells] == ["routing-path", ""]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the trained models in ../shared")
@pytest.mark.parametrize("name", ["coarse-8x2", "granular-64x8"])
@pytest.mark.parametrize("policy", ["lru", "predictive", "mixed"])
def test_a_trained_model_decides_alike(tmp_path, name, policy):
    lines = (SHARED / "prompts/val.jsonl").read_text().splitlines()[:3]
    prompts = [json.loads(line)["text"][:200] for line in lines]
    slots = 16 if name == "coarse-8x2" else 128
    logs = both(
        SHARED / "models" / name, tmp_path / "x.parquet", policy, slots, prompts, max_new_tokens=8
    )
    assert_alike(*logs)


def test_policies_know_the_same_as_in_a_simulation_of_what_was_recorded(tiny, tmp_path):
    """By a profile of captured steps too, whose times depend on the model's name."""
    settings = LiveSettings(hardware="h100-captured", device="cpu", max_new_tokens=5, batch=2)
    out, budget = tmp_path / "live.parquet", Budget(slots=14)
    named = tmp_path / "qwen3-30b"
    shutil.copytree(tiny, named)
    for model in (tiny, named):
        with open_offloaded(model, "predictive", record=True, **settings.options(budget, 40)) as it:
            known = it.runner.engine.planner.context
            run_opened(it, settings, [[5, 6, 7], [8, 9]], policy="predictive", out=out)
        session, policy = Session(settings.setup(out)), POLICIES.build("predictive")
        told = session.context(14, session.costs(policy), policy.name)
        assert told == replace(known, has_weights=True)
