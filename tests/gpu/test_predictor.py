"""The predictor on a GPU: it says what it says on a CPU, beside the model and without waiting."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.decisions import DecisionLog  # noqa: E402
from policies.routing import DECODE, PREFILL, Step  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.live import LiveSettings, run_live  # noqa: E402
from runtime.predictor import caches, following  # noqa: E402
from runtime.predictor.data import Corpus  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.following import Follower  # noqa: E402
from runtime.predictor.inference import score  # noqa: E402
from runtime.predictor.live import LivePredictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from runtime.predictor.names import forecasts_beside  # noqa: E402
from runtime.predictor.spec import PredictorSpec  # noqa: E402
from runtime.predictor.training import Trainer, TrainSettings  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402
from tests.helpers_predictor import (  # noqa: E402
    MODEL,
    drawn_sequences,
    rule_trace,
    small_predictor,
    small_spec,
)
from tests.tiny_models import tiny_model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Kernels of a GPU add in another order; TF32 is off by default.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def test_the_gpu_says_what_the_cpu_says():
    model, sequences = small_predictor(), drawn_sequences([(5, 9), (0, 6), (30, 70)])
    there = copy.deepcopy(model).cuda()
    for one, two in zip(score(model, sequences), score(there, sequences), strict=True):
        np.testing.assert_allclose(two.now, one.now, **CLOSE)
        np.testing.assert_allclose(two.again, one.again, **CLOSE)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_live_on_a_stream_of_its_own():
    """Nothing is waited for, and scores are those of the whole pass."""
    model, sequences = small_predictor(), drawn_sequences([(5, 30), (3, 30), (70, 30)])
    expected = {found.sequence.id: found for found in score(model, sequences)}
    live = LivePredictor(copy.deepcopy(model).cuda())
    assert live.stream != torch.cuda.default_stream()
    for sequence in sequences:
        live.begin(sequence.id, sequence.tokens[: sequence.prefill].tolist())
    found = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for token in range(30):
            tokens = [int(s.tokens[s.prefill + token]) for s in sequences]
            found.append(live.step([s.id for s in sequences], tokens).wait())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for token, scores in enumerate(found):
        for row, sequence in enumerate(sequences):
            whole = expected[sequence.id]
            at = sequence.prefill + token
            np.testing.assert_allclose(scores.now[row].cpu(), whole.now[at], **CLOSE)
            np.testing.assert_allclose(scores.again[row].cpu(), whole.again[at], **CLOSE)


def test_training_on_the_gpu_learns_as_on_the_cpu(tmp_path):
    trace = rule_trace(1, 40)
    corpus = Corpus(trace.name, MODEL, tuple(trace.items), tuple(trace.extra["domains"]))
    settings = TrainSettings(steps=40, batch=8)
    losses = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(small_spec(), settings, corpus, torch.device(device))
        assert not trainer.run(stop=lambda t=trainer: t.step >= 20)
        trainer.save(tmp_path / device)
        again = Trainer(small_spec(), settings, corpus, torch.device(device))
        again.resume(tmp_path / device)
        assert again.run()
        losses.append(again.losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def step_of(phase, members, at):
    """The step in which each of *members* runs its tokens from *at* [first, last)."""
    rows = [(s.id, p, int(s.tokens[p])) for s in members for p in range(*at[s.id])]
    step = Step(0, phase, len(rows))
    step.sequence_ids, step.positions, step.token_ids = np.array(rows).T
    return step


@pytest.mark.parametrize("columns", [16, 256])
def test_steps_are_replayed_from_graphs(monkeypatch, columns):
    """With right guesses, wrong ones and none, in changing company, over caches that grow."""
    monkeypatch.setattr(caches, "FIRST_COLUMNS", columns)
    monkeypatch.setattr(following, "TRIALS", 1000)
    model, sequences = small_predictor(), drawn_sequences([(5, 60), (3, 60), (40, 60)])
    expected = {found.sequence.id: found for found in score(model, sequences)}
    follower = Follower(copy.deepcopy(model).cuda(), 8, whole=True, guesses=True)
    at = {s.id: [0, s.prefill] for s in sequences}
    found = follower.read(step_of(PREFILL, sequences, at))
    whole = np.concatenate([expected[s.id].again[: s.prefill] for s in sequences])
    np.testing.assert_allclose(found["reuse"] / 255, whole, atol=0.004)
    rng = np.random.default_rng(0)
    for round in range(150):
        left = [s for s in sequences if at[s.id][1] < len(s)]
        if not left:
            break
        members = left if round % 3 else [left[rng.integers(len(left))]]
        for sequence in members:
            at[sequence.id] = [at[sequence.id][1], at[sequence.id][1] + 1]
        step = step_of(DECODE, members, at)
        found = follower.read(step)
        for row, sequence in enumerate(members):
            where, ours = at[sequence.id][0], expected[sequence.id]
            np.testing.assert_allclose(found["reuse"][row] / 255, ours.again[where], atol=0.004)
            named = ours.now[where][np.arange(3)[:, None], found["experts"][row]]
            np.testing.assert_allclose(found["scores"][row] / 255, named, atol=0.004)
        # The next tokens, or for every fifth round others.
        tokens = [int(s.tokens[min(at[s.id][1], len(s) - 1)]) for s in members]
        guess = torch.tensor([(t + (round % 5 == 0)) % 20 for t in tokens], device="cuda")
        follower.foresee(torch.nn.functional.one_hot(guess, 20))
    assert follower.costs.guessed > follower.costs.guessed_right > 10
    shapes = follower._stepper._shapes.values()
    assert all(shape._graph is not None for shape in shapes if shape._capture_in < 0)
    assert any(shape._graph is not None for shape in shapes)
    assert follower.costs.phases[DECODE].stream_s > 0


PROMPTS = ["w5 w9 w33 w12", "w40 w3", "w11 w60 w22 w7 w8", "w13", "w20 w21 w22"]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_simulator_replays_its_forecasts(tmp_path, batch):
    tiny = tiny_checkpoint(tmp_path / "tiny-mixtral", layers=4, dtype=torch.bfloat16)
    predictor = tmp_path / "p.safetensors"
    spec = small_spec(dataclasses.replace(MODEL, layers=4), vocabulary=64)
    torch.manual_seed(0)
    made = Predictor(spec)
    torch.nn.init.normal_(made.now.bias)
    save_predictor(predictor, made, {}, "float16")
    settings = {"device": "cuda", "max_new_tokens": 12, "batch": batch}
    settings["forecaster"] = f"routing-path:{predictor}"
    logs = DecisionLog(keep=True), DecisionLog(keep=True)
    path, found, _, _ = run_live(
        tiny, prompts=PROMPTS, policy="predictive", budget=Budget(slots=12),
        out=tmp_path / "live.parquet", log=logs[1], **settings,
    )  # fmt: skip
    assert forecasts_beside(path).is_file()
    session = Session(LiveSettings(**settings).setup(path))
    expected, _ = session.run("predictive", Budget(slots=12), log=logs[0])
    assert list(logs[0].numbers) == list(logs[1].numbers)
    assert expected.decisions_sha256 == found.decisions_sha256
    assert found.moves["prefetch"] > 0


@pytest.mark.parametrize("sample", [False, True])
def test_it_changes_no_text(tmp_path, sample):
    """Greedy, where its guesses come true, and sampled, where they do not."""
    predictor = tmp_path / "p.safetensors"
    save_predictor(predictor, small_predictor(vocabulary=64), {}, "float16")
    ids = torch.tensor([[5, 9, 33, 12, 7], [3, 4, 5, 6, 7]], device="cuda")
    texts, costs = [], []
    for forecaster in ("markov", f"routing-path:{predictor}"):
        model = offload(
            tiny_model("mixtral", dtype=torch.bfloat16), "predictive", slots=9,
            compute="reference", forecaster=forecaster,
        )  # fmt: skip
        torch.manual_seed(0)
        texts.append(
            model.generate(
                ids, max_new_tokens=40, do_sample=sample, temperature=3.0 if sample else None,
                pad_token_id=0,
            )
        )  # fmt: skip
        costs.append(model.expert_cache.stats()["predictor"])
        model.expert_cache.close()
    assert torch.equal(*texts)
    assert costs[0] is None
    right = costs[1]["guessed_right"]
    if sample:
        assert right < costs[1]["guessed"] < 30
    else:
        assert right >= 38


LAYERS, EXPERTS, TOP_K, NEW_TOKENS = 24, 16, 4, 192


def test_it_costs_little(tmp_path, capsys):
    """At most 5 % of decoding, with a predictor of the sizes that are the defaults.

    The model has 24 layers of 16 experts of 4.3 MB, half of which are held.
    """
    model = tiny_model(
        "mixtral", layers=LAYERS, dtype=torch.bfloat16, hidden_size=1024, intermediate_size=704,
        num_attention_heads=16, num_key_value_heads=4, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K, vocab_size=4096, max_position_embeddings=512,
        initializer_range=0.05,
    )  # fmt: skip
    predictor = tmp_path / "p.safetensors"
    torch.manual_seed(0)
    made = Predictor(PredictorSpec("middling", LAYERS, EXPERTS, TOP_K, 4096))
    torch.nn.init.normal_(made.now.bias)
    save_predictor(predictor, made, {}, "float16")
    model = offload(model, "predictive", cache="50%", forecaster=f"routing-path:{predictor}")
    ids = torch.arange(40, 72, device="cuda")[None]
    cache = transformers.StaticCache(config=model.config, max_cache_len=32 + NEW_TOKENS)
    figures, seconds = [], []
    for _ in range(4):
        cache.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=0, past_key_values=cache, cache_implementation=None,
        )  # fmt: skip
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / NEW_TOKENS)
        figures.append(model.expert_cache.stats()["predictor"])
    model.expert_cache.close()
    # Without the first call, in which everything is set up.
    first, last = figures[0]["decode"], figures[-1]["decode"]
    spent = {name: last[name] - first[name] for name in last}
    each = {name: value / spent["passes"] * 1e6 for name, value in spent.items()}
    share = (spent["host_s"] + spent["wait_s"]) / spent["pass_s"]
    prompts = figures[-1]["prefill"]
    with capsys.disabled():
        print(
            f"\npredictor: {share:.1%} of decoding; a pass {each['pass_s']:.0f} us (a token of "
            f"generate {statistics.median(seconds[1:]) * 1e6:.0f} us), of which the predictor on "
            f"the host {each['host_s']:.0f} us, waited for {each['wait_s']:.0f} us; on its stream "
            f"{each['stream_s']:.0f} us; guesses {figures[-1]['guessed_right']} of "
            f"{figures[-1]['guessed']}; prompts: host {prompts['host_s'] / 4 * 1e3:.1f} ms, waited "
            f"{prompts['wait_s'] / 4 * 1e3:.1f} ms of {prompts['pass_s'] / 4 * 1e3:.1f} ms; "
            f"{figures[-1]['device_bytes'] / 2**20:.0f} MiB"
        )
    assert figures[-1]["guessed_right"] > 0.95 * figures[-1]["guessed"]
    assert share <= 0.05
