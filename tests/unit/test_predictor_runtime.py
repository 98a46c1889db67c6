"""A predictor beside a running model: what it says, that a replay says so too, what it refuses."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.routing import DECODE, PREFILL, Step  # noqa: E402
from policies.session import Setup  # noqa: E402
from policies.sidecar import read_sidecar  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.families import model_spec  # noqa: E402
from runtime.predictor import caches, stepping, window  # noqa: E402
from runtime.predictor.data import read_corpus  # noqa: E402
from runtime.predictor.files import load_predictor, save_predictor  # noqa: E402
from runtime.predictor.following import Follower, device_bytes  # noqa: E402
from runtime.predictor.forecasting import forecast  # noqa: E402
from runtime.predictor.inference import score  # noqa: E402
from runtime.predictor.names import forecasts_beside, is_live, replayed  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers_predictor import drawn_sequences, small_predictor  # noqa: E402
from tests.tiny_models import VOCABULARY, tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.store import open_trace, write_trace  # noqa: E402

ONE = torch.tensor([[5, 9, 33, 12, 7]])
LONG = torch.arange(70)[None] % VOCABULARY
PADDED = torch.tensor([[0, 0, 5, 9, 33], [40, 3, 7, 11, 60], [0, 8, 8, 21, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A random predictor for the tiny models: 3 layers of 8 experts, 2 for each token."""
    path = tmp_path_factory.mktemp("predictor") / "p.safetensors"
    save_predictor(path, small_predictor(vocabulary=VOCABULARY), {}, "float32")
    return path


def offloaded(predictor, options="", *, guesses=None, **others):
    chosen = {"slots": 7, "device": "cpu", "record": True, **others}
    found = offload(
        tiny_model("mixtral", max_position_embeddings=128),
        "predictive", forecaster=f"routing-path:{predictor}{options}", **chosen,
    )  # fmt: skip
    if guesses is not None:
        planner = found.expert_cache.runner.engine.planner
        planner.forecaster._guesses = guesses
        planner.forecaster.reset(planner.context)
    return found


def generate(model, ids=ONE, tokens=6, **options):
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, max_new_tokens=tokens, **options)


def recorded(model, folder):
    """The trace of *model*'s runs, its own forecasts beside it."""
    out = folder / "live.parquet"
    spec = model_spec(tiny_model("mixtral"), "tiny")
    sequences = model.expert_cache.trace()
    write_trace(out, spec, sequences, source="here", license="none")
    model.expert_cache.runner.engine.planner.forecaster.write(out, spec, sequences)
    return out


def assert_forecasts_alike(found, expected):
    """Two files of forecasts say the same, but where a score lies between two roundings."""
    for name in ("sequences", "starts", "first_positions", "tokens"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("scores", "reuse"):
        assert found[name].shape == expected[name].shape
        apart = np.abs(found[name].astype(int) - expected[name].astype(int))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
    assert (found["experts"] == expected["experts"]).mean() > 0.999
    assert len(np.unique(found["scores"])) > 50


@pytest.mark.parametrize("guesses", [False, True])
def test_it_says_what_the_file_of_forecasts_says(predictor, tmp_path, guesses):
    """Prompts of several lengths, alone and padded, sampled and greedy, call after call."""
    model = offloaded(predictor, guesses=guesses)
    torch.manual_seed(0)
    generate(model)
    generate(model, PADDED, attention_mask=MASK)
    generate(model, LONG, tokens=4)
    generate(model, ONE[:, :1], tokens=40, do_sample=True, temperature=2.0)
    out = recorded(model, tmp_path)
    live = read_sidecar(forecasts_beside(out))
    live.check_trace(open_trace(out))
    forecast(load_predictor(predictor), read_corpus(out), tmp_path / "x.npz", 4, (1, 3))
    made = read_sidecar(tmp_path / "x.npz")
    assert_forecasts_alike(live.arrays, made.arrays)
    assert (live.windows, live.predictor, live.model) == (made.windows, made.predictor, made.model)
    costs = model.expert_cache.stats()["predictor"]
    if guesses:
        assert costs["guessed"] > costs["guessed_right"] > 12
    else:
        assert costs["guessed"] == 0


@pytest.mark.parametrize("options", ["", ",floor=0.7", ",beyond=true"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_simulator_takes_the_decisions_of_a_live_run(predictor, tmp_path, options, batch):
    model = offloaded(predictor, options, batch=batch)
    if batch == 1:
        generate(model)
        generate(model, LONG, tokens=9)
        generate(model, ONE + 1, tokens=4)
    else:
        generate(model, PADDED, attention_mask=MASK)
        generate(model, PADDED[:, 2:].flip(0), tokens=3)
    out, stats = recorded(model, tmp_path), model.expert_cache.stats()
    asked = replayed(f"routing-path:{predictor}{options}", out)
    session = Session(Setup(str(out), batch=batch, forecaster=asked))
    result, _ = session.run("predictive", Budget(slots=7))
    assert result.decisions_sha256 == stats["decisions_sha256"]
    assert result.moves["prefetch"] == stats["moves"]["prefetch"] > 0
    assert result.policy["forecaster"]["name"] == "routing-path"
    other = offloaded(predictor, options, batch=batch, record=False)
    if batch == 1:
        generate(other)
        generate(other, LONG, tokens=9)
        generate(other, ONE + 1, tokens=4)
        # Whether it is recorded makes no difference to what is decided.
        assert other.expert_cache.stats()["decisions_sha256"] == stats["decisions_sha256"]


def test_text_is_that_of_the_model_alone(predictor):
    plain = tiny_model("mixtral", max_position_embeddings=128)
    for guesses in (False, True):
        model = offloaded(predictor, guesses=guesses)
        torch.testing.assert_close(generate(model), generate(plain))
        found = generate(model, PADDED, attention_mask=MASK)
        torch.testing.assert_close(found, generate(plain, PADDED, attention_mask=MASK))


def test_what_it_costs_is_counted(predictor):
    model = offloaded(predictor)
    before = model.expert_cache.stats()["predictor"]
    assert before["decode"] == {
        "passes": 0, "host_s": 0.0, "wait_s": 0.0, "stream_s": 0.0, "pass_s": 0.0
    }  # fmt: skip
    generate(model)
    generate(model)
    after = model.expert_cache.stats()["predictor"]
    assert (after["prefill"]["passes"], after["decode"]["passes"]) == (2, 10)
    for phase in ("prefill", "decode"):
        found = after[phase]
        assert 0 < found["host_s"] < found["pass_s"]
        assert 0 <= found["wait_s"] < found["pass_s"]
        assert found["stream_s"] == 0.0
    assert (
        offload(tiny_model("mixtral"), slots=7, device="cpu").expert_cache.stats()["predictor"]
        is None
    )


def test_tokens_that_come_together_without_being_a_prompt(predictor, tmp_path):
    """A second turn of a conversation over the same key-value cache."""
    model = offloaded(predictor)
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        for ids in (ONE, ONE[:, :3] + 1, ONE[:, :1], ONE + 2):
            model(input_ids=ids, past_key_values=cache)
    (sequence,) = model.expert_cache.trace()
    assert (sequence.prefill, len(sequence)) == (5, 14)
    live = read_sidecar(forecasts_beside(recorded(model, tmp_path))).arrays
    (expected,) = score(load_predictor(predictor).model, [sequence])
    named = np.take_along_axis(expected.now, live["experts"].astype(np.intp), axis=-1)
    np.testing.assert_allclose(live["scores"] / 255, named, atol=0.003)
    np.testing.assert_allclose(live["reuse"] / 255, expected.again, atol=0.003)


def step_of(phase, sequences, positions, tokens):
    step = Step(0, phase, len(tokens))
    step.sequence_ids, step.positions = np.array(sequences), np.array(positions)
    step.token_ids = np.array(tokens)
    return step


def steps_of(sequence):
    """The steps of *sequence* alone."""
    cut = sequence.prefill
    if cut:
        yield step_of(PREFILL, [sequence.id] * cut, range(cut), sequence.tokens[:cut])
    for at in range(cut, len(sequence)):
        yield step_of(DECODE, [sequence.id], [at], sequence.tokens[at : at + 1])


def followed(model, sequence, *, whole=True):
    """What a follower says of *sequence*: scores by token."""
    follower = Follower(model, 8, whole=whole, guesses=False)
    found = [follower.read(step).fetch()["reuse"] for step in steps_of(sequence)]
    return np.concatenate(found) / 255


@pytest.mark.parametrize("lengths", [(40, 30), (3, 80), (0, 90), (60, 0)])
def test_a_long_sequence_is_read_in_part(monkeypatch, lengths):
    """The end of its prompt, and what is decoded until the decoder is full: nothing is said of
    the rest, live as in one pass.
    """
    monkeypatch.setattr(window, "PROMPT_TOKENS", 16)
    monkeypatch.setattr(window, "DECODED_TOKENS", 24)
    model = small_predictor()
    (sequence,) = drawn_sequences([lengths])
    (expected,) = score(model, [sequence])
    found = followed(model, sequence)
    np.testing.assert_allclose(found, expected.again, atol=0.003)
    prompt, decoded = lengths
    read = found.any(axis=(1, 2, 3))
    first, tail = max(0, prompt - 16), min(2, prompt)
    said = slice(first, prompt + min(decoded, 24 - tail))
    assert read[said].all()
    assert read.sum() == said.stop - said.start
    # What is said does not depend on what is not read.
    (alone,) = score(model, [window.read_of(sequence, model.spec)[0]])
    np.testing.assert_allclose(found[said], alone.again, atol=0.003)


def test_of_a_long_prompt_only_the_last_token_is_forecast_unless_it_is_kept():
    model = small_predictor()
    (sequence,) = drawn_sequences([(70, 4)])
    (expected,) = score(model, [sequence])
    found = followed(model, sequence, whole=False)
    assert not found[:69].any()
    np.testing.assert_allclose(found[69:], expected.again[69:], atol=0.003)


@pytest.mark.parametrize(("batch", "turns"), [(1, 1), (3, 4)])
def test_its_memory_is_taken_off_what_slots_may_have(predictor, batch, turns):
    """As much as it takes when every sequence has become as long as it may."""
    spec = model_spec(tiny_model("mixtral"), "mixtral")
    expected = device_bytes(
        load_predictor(predictor).model, batch * max(turns, 2), 40, torch.device("cpu")
    )
    fixed = spec.dense_bytes + batch * turns * 40 * spec.kv_bytes_per_token
    memory = f"{fixed + expected + 9 * spec.expert_bytes}B"
    sizes = {"slots": None, "gpu_memory": memory, "batch": batch, "turns": turns, "max_tokens": 40}
    model = offloaded(predictor, **sizes)
    assert model.expert_cache.stats()["slots"] == 9
    generate(model, ONE.expand(batch, -1), tokens=40 - ONE.shape[1])
    taken = model.expert_cache.stats()["predictor"]["device_bytes"]
    model.expert_cache.close()
    assert taken <= expected
    assert batch > 1 or taken == expected
    plain = offload(tiny_model("mixtral"), "lru", device="cpu", **sizes)
    assert plain.expert_cache.stats()["slots"] > 9
    plain.expert_cache.close()


def test_as_many_batches_are_followed_as_take_turns():
    """Of four batches of one sequence all are followed, or the last two."""
    model = small_predictor()
    for batches, kept in ((4, 4), (2, 2)):
        follower = Follower(model, 4, whole=False, guesses=False, batches=batches)
        for sequence in range(4):
            follower.read(step_of(PREFILL, [sequence] * 2, [0, 1], [3, 4]))
        assert len(follower) == kept


def test_old_sequences_are_forgotten_and_begin_anew():
    """Two batches are followed; what comes again after that is followed from there on."""
    model = small_predictor()
    sequences = drawn_sequences([(5, 9), (4, 9), (6, 9)])
    follower = Follower(model, 8, whole=True, guesses=False)
    for sequence in sequences:
        for step in list(steps_of(sequence))[:5]:
            follower.read(step)
        assert len(follower) == min(2, sequence.id + 1)
    # The second is still known, the first is not: its ninth token is the first that is read.
    for number, known in ((1, True), (0, False)):
        sequence = sequences[number]
        at = sequence.prefill + 4
        found = follower.read(list(steps_of(sequence))[5])["reuse"] / 255
        if known:
            (expected,) = score(model, [sequence])
            np.testing.assert_allclose(found[0], expected.again[at], atol=0.003)
        else:
            part = {"tokens": sequence.tokens[at:], "experts": sequence.experts[at:]}
            part |= {"positions": sequence.positions[at:], "prefill": 0}
            (expected,) = score(model, [dataclasses.replace(sequence, **part)])
            np.testing.assert_allclose(found[0], expected.again[0], atol=0.003)


def test_sequences_in_changing_company():
    """A scheduler may take turns with two batches and mix them."""
    model = small_predictor()
    sequences = drawn_sequences([(5, 40), (4, 40), (6, 40), (1, 40)])
    expected = {found.sequence.id: found for found in score(model, sequences)}
    follower = Follower(model, 8, whole=True, guesses=True)
    for pair in (sequences[:2], sequences[2:]):
        ids = np.concatenate([[s.id] * s.prefill for s in pair])
        places = np.concatenate([np.arange(s.prefill) for s in pair])
        tokens = np.concatenate([s.tokens[: s.prefill] for s in pair])
        follower.read(step_of(PREFILL, ids, places, tokens)).fetch()
    at, rng = {s.id: s.prefill for s in sequences}, np.random.default_rng(3)
    for _ in range(30):
        members = [sequences[i] for i in rng.permutation(4)[: rng.integers(1, 5)]]
        tokens = [int(s.tokens[at[s.id]]) for s in members]
        places = [at[s.id] for s in members]
        found = follower.read(step_of(DECODE, [s.id for s in members], places, tokens))
        for row, sequence in enumerate(members):
            whole = expected[sequence.id].again[at[sequence.id]]
            np.testing.assert_allclose(found["reuse"][row] / 255, whole, atol=0.003)
            at[sequence.id] += 1
        # A guess, right for some of the members at most.
        follower.foresee(torch.nn.functional.one_hot(torch.tensor(tokens), 20))
    assert follower.costs.guessed > 0


@pytest.mark.parametrize("guesses", [False, True])
def test_a_step_that_goes_on_is_read_as_any_other(monkeypatch, guesses):
    """Two sequences together, of which the second begins anew without a prompt."""
    model = small_predictor()
    sequences = drawn_sequences([(5, 20), (3, 20)])

    def said(follower):
        ids = np.repeat([0, 1], [5, 3])
        places = np.concatenate([np.arange(5), np.arange(3)])
        tokens = np.concatenate([s.tokens[: s.prefill] for s in sequences])
        found = [follower.read(step_of(PREFILL, ids, places, tokens)).fetch()]
        for at in range(20):
            tokens = [int(s.tokens[s.prefill + at]) for s in sequences]
            places = [5 + at, 3 + at if at < 12 else at - 12]
            found.append(follower.read(step_of(DECODE, [0, 1], places, tokens)).fetch())
            coming = [int(s.tokens[min(s.prefill + at + 1, len(s) - 1)]) for s in sequences]
            guess = torch.nn.functional.one_hot(torch.tensor(coming), 20)
            # Whoever runs a model may want gradients of it.
            follower.foresee(guess.float().requires_grad_())
        return found, follower.costs.guessed_right

    quick, right = said(Follower(model, 8, whole=True, guesses=guesses))
    assert right > 10 if guesses else right == 0
    monkeypatch.setattr(Follower, "_goes_on", lambda self, step: False)
    slow, same = said(Follower(model, 8, whole=True, guesses=guesses))
    assert right == same
    for one, two in zip(quick, slow, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in two)


def test_ids_out_of_the_vocabulary(predictor):
    follower = Follower(load_predictor(predictor).model, 4, whole=False, guesses=False)
    with pytest.raises(InputError, match="token id 64, expected below 64, the predictor's voc"):
        follower.read(step_of(PREFILL, [0, 0], [0, 1], [3, 64]))


def saved(folder: Path, **changes) -> Path:
    """A predictor for another model."""
    model = small_predictor(vocabulary=VOCABULARY)
    spec = dataclasses.replace(model.spec, **changes)
    torch.manual_seed(0)
    path = folder / "other.safetensors"
    save_predictor(path, type(model)(spec), {}, "float32")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 4}, "model mixtral has layers = 3, expected 4: the predictor was trained"),
        ({"experts": 9}, "model mixtral has experts = 8, expected 9"),
        ({"top_k": 1}, "model mixtral has top_k = 2, expected 1"),
        ({"vocabulary": 63}, "vocabulary is 63, expected 64 as model mixtral has (predictor train"),
        ({"vocabulary": 257}, "vocabulary is 257, expected 64"),
    ],
)
def test_a_predictor_of_another_model_is_refused(tmp_path, changes, said):
    path = saved(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        offloaded(path)
    assert said in str(caught.value)
    assert "other.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    # The model was not touched, and one that fits is taken.
    assert offloaded(saved(tmp_path, vocabulary=256)) is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("routing-path:absent.safetensors", "absent.safetensors: no such file, expected a pred"),
        ("routing-path:BROKEN.safetensors", "not a readable safetensors file"),
        ("routing-path:P,flor=0.2", "unknown parameter 'flor'; did you mean 'floor'"),
        ("routing-path:P,floor=2", "floor is 2.0, expected 0 to 1"),
        ("routing-path:W.safetensors,beyond=true", "has the windows (4,), expected 1 for beyond"),
    ],
)
def test_what_cannot_be_built(predictor, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BROKEN.safetensors").write_bytes(b"no")
    saved(tmp_path, windows=(4,)).rename(tmp_path / "W.safetensors")
    model = tiny_model("mixtral")
    with pytest.raises(InputError) as caught:
        offload(model, "predictive", slots=7, device="cpu",
                forecaster=text.replace("P,", f"{predictor},"))  # fmt: skip
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interruption_between_two_passes_leaves_it_usable(predictor):
    model, expected = offloaded(predictor, guesses=True), generate(offloaded(predictor))

    class Interrupting(transformers.generation.streamers.BaseStreamer):
        count = 0

        def put(self, value):
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(model, PADDED[1:2], streamer=Interrupting())
    torch.testing.assert_close(generate(model), expected)


def test_an_error_within_a_pass_frees_it_with_the_model(predictor, monkeypatch):
    model = offloaded(predictor)
    generate(model)
    runner = model.expert_cache.runner
    forecaster = runner.engine.planner.forecaster

    def broken(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(Follower, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    assert forecaster._follower is None
    assert runner.engine.store.size_bytes == 0
    with pytest.raises(OffloadError, match="was freed after KeyboardInterrupt in mid-step"):
        generate(model)
    assert model.expert_cache.stats()["predictor"]["decode"]["passes"] == 5


def test_names(tmp_path):
    trace = tmp_path / "x.parquet"
    assert forecasts_beside(trace) == tmp_path / "x.forecast.npz"
    for text in (None, "ahead", "routing-path:a.npz", "markov:x.safetensors", "routing-path"):
        assert not is_live(text)
        assert replayed(text, trace) == text
    texts = ("routing-path:p.safetensors", "routing-path:floor=0.2,file=p.safetensors")
    assert [is_live(text) for text in texts] == [True, True]
    # Nothing was recorded: the policy took no forecaster.
    assert [replayed(text, trace) for text in texts] == [None, None]
    forecasts_beside(trace).touch()
    assert replayed(texts[0], trace) == f"routing-path:file={tmp_path}/x.forecast.npz"
    assert replayed(texts[1], trace) == f"routing-path:floor=0.2,file={tmp_path}/x.forecast.npz"


class FakeGraph:
    """What a CUDA graph does as seen from outside: it repeats what ran while it was captured."""

    replayed = 0
    broken = False
    shape = None

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        if self.broken:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    def capture_end(self):
        pass

    def replay(self):
        FakeGraph.replayed += 1
        # Nothing that a graph does is differentiated.
        with torch.inference_mode():
            FakeGraph.shape._work()


@pytest.mark.parametrize("broken", [False, True])
def test_the_second_step_of_a_shape_is_captured(monkeypatch, broken):
    """From then on it is replayed, until the caches grow; where it cannot be, it runs as it is."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "broken", broken)
    monkeypatch.setattr(FakeGraph, "replayed", 0)
    monkeypatch.setattr(caches, "FIRST_COLUMNS", 16)
    model = small_predictor()
    (sequence,) = drawn_sequences([(5, 40)])
    (expected,) = score(model, [sequence])
    follower = Follower(model, 8, whole=True, guesses=False)
    follower._stepper._graphs = True
    run = stepping._Shape._run

    def running(self):
        FakeGraph.shape = self
        run(self)

    monkeypatch.setattr(stepping._Shape, "_run", running)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [follower.read(step).fetch()["reuse"] for step in steps_of(sequence)]
    np.testing.assert_allclose(np.concatenate(found) / 255, expected.again, atol=0.003)
    # Columns 2 to 15, 16 to 31 and 32 to 41, the first of each as it is.
    assert FakeGraph.replayed == (0 if broken else 13 + 15 + 9)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (3 if broken else 0)
    assert all("captured as CUDA graphs (predictor: operation not permitted)" in s for s in said)
