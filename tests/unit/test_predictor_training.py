"""Training: it learns a rule, twice the same, and an interrupted one ends as a whole one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.predictor.data import (  # noqa: E402
    Corpus,
    batches_of,
    experts_of,
    inputs_of,
    read_corpus,
    shortened,
)
from runtime.predictor.evaluating import Measures, evaluate  # noqa: E402
from runtime.predictor.files import load_predictor, save_predictor  # noqa: E402
from runtime.predictor.inference import ranked, score  # noqa: E402
from runtime.predictor.objective import hot_of, loss_of, used_within, weighted, whole  # noqa: E402
from runtime.predictor.training import Trainer, TrainSettings  # noqa: E402
from tests.helpers_predictor import (  # noqa: E402
    MODEL,
    drawn_sequences,
    rule_trace,
    small_predictor,
    small_spec,
)
from traces.errors import InputError  # noqa: E402

CPU = torch.device("cpu")
SHORT = TrainSettings(steps=12, batch=4, lr=2e-3, dropout=0.1, seed=3)


def corpus_of(trace) -> Corpus:
    return Corpus(trace.name, trace.model, tuple(trace.items), tuple(trace.extra["domains"]))


def trained(settings: TrainSettings, **sizes) -> Trainer:
    return Trainer(small_spec(**sizes), settings, corpus_of(rule_trace(1, 20)), CPU)


def bytes_of(trainer: Trainer, path: Path) -> bytes:
    save_predictor(path, trainer.model, {}, "float32")
    return path.read_bytes()


def test_it_learns_a_rule_of_token_and_prompt(tmp_path):
    """Better than the token before and than a table of token ids, which is blind to the prompt."""
    train, held_out = corpus_of(rule_trace(1, 256)), corpus_of(rule_trace(2, 48))
    settings = TrainSettings(steps=220, batch=16, lr=1e-2, dropout=0.0)
    trainer = Trainer(small_spec(d_model=32), settings, train, CPU)
    assert trainer.run()
    save_predictor(tmp_path / "p.safetensors", trainer.model, {}, "float16")
    judged = load_predictor(tmp_path / "p.safetensors")
    found = evaluate(judged, held_out, train, Measures((2, 4), (1, 4, 16)))
    for phase in ("prompt", "decode"):
        recall = {
            name: method[phase]["at"]["2"]["recall"] for name, method in found["methods"].items()
        }
        assert recall["routing-path"] > 0.9
        assert recall["routing-path"] > recall["token-table"] + 0.1
        assert recall["routing-path"] > recall["previous"] + 0.2
        assert recall["routing-path"] > recall["markov"] + 0.1
        batch = found["methods"]["routing-path"][phase]["batch_recall"]
        assert all(batch[size]["recall"] > 0.9 for size in ("1", "4", "16"))
        assert found[phase]["calibration"]["error"] < 0.05
    # The topic's expert is used by every later token: the second head must know it.
    assert found["decode"]["reuse"]["1"]["recall"] > 0.5


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    runs = [trained(SHORT), trained(SHORT), trained(dataclasses.replace(SHORT, seed=4))]
    for trainer in runs:
        torch.manual_seed(id(trainer) % 1000)
        assert trainer.run()
    files = [bytes_of(trainer, tmp_path / f"{i}") for i, trainer in enumerate(runs)]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_training_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(SHORT).run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_resumed_training_ends_as_a_whole_one(tmp_path, after):
    """With dropout, across an epoch's end, and stopped twice."""
    whole_run = trained(SHORT)
    assert whole_run.run()
    trainer = trained(SHORT)
    for limit in (after, min(after + 3, 11)):
        assert not trainer.run(stop=lambda t=trainer, n=limit: t.step >= n)
        trainer.save(tmp_path / "unfinished")
        trainer = trained(SHORT)
        trainer.resume(tmp_path / "unfinished")
        assert trainer.step == limit
    assert trainer.run()
    assert bytes_of(trainer, tmp_path / "a") == bytes_of(whole_run, tmp_path / "b")
    assert trainer.losses == whole_run.losses


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trainer = trained(SHORT)
    trainer.run(stop=lambda: trainer.step >= 2)
    trainer.save(tmp_path / "unfinished")
    for other, message in (
        (trained(dataclasses.replace(SHORT, lr=1e-4)), "lr was 0.002, expected 0.0001"),
        (trained(SHORT, d_ff=64), "d_ff was 32, expected 64"),
        (
            Trainer(small_spec(), SHORT, corpus_of(rule_trace(5, 20)), CPU),
            "expected the same traces",
        ),
    ):
        with pytest.raises(InputError, match=message):
            other.resume(tmp_path / "unfinished")
    save_predictor(tmp_path / "p.safetensors", trainer.model, {}, "float32")
    with pytest.raises(InputError, match="is of kind 'predictor', expected"):
        trainer.resume(tmp_path / "p.safetensors")


def test_it_begins_at_popularity():
    trainer = trained(SHORT)
    trace = rule_trace(1, 20)
    experts = np.concatenate([item.experts for item in trace.items])
    rate = (experts[..., None] == np.arange(8)).any(axis=2).mean(axis=0)
    biases = torch.sigmoid(trainer.model.now.bias).reshape(3, 8).detach().numpy()
    np.testing.assert_allclose(biases, rate, atol=2e-3)


def test_it_begins_at_what_each_token_id_takes():
    """Before any step the token's own expert is found; an id that never came has no embedding."""
    trace = rule_trace(1, 60)
    trainer = Trainer(small_spec(d_model=24), SHORT, corpus_of(trace), CPU)
    right = []
    for found in score(trainer.model.eval(), trace.items):
        named = ranked(found.now, 2)
        right.append((named == found.sequence.experts[..., :1]).any(axis=-1).mean())
    assert np.mean(right) > 0.9
    without = [item for item in trace.items if 7 not in item.tokens]
    corpus = Corpus("part", MODEL, tuple(without), ("all",) * len(without))
    rows = Trainer(small_spec(), SHORT, corpus, CPU).model.embedding.weight
    assert not rows[7].any()
    assert rows[8].any()


def test_every_sequence_comes_once_an_epoch():
    lengths = list(range(1, 38))
    for epoch in (0, 1):
        groups = list(batches_of(lengths, 5, 7, epoch))
        assert sorted(i for group in groups for i in group) == list(range(37))
        assert max(map(len, groups)) == 5
    assert list(batches_of(lengths, 5, 7, 0)) != list(batches_of(lengths, 5, 7, 1))


def test_targets_of_reuse_are_what_the_next_tokens_use():
    sequences = drawn_sequences([(4, 7)])
    experts = torch.from_numpy(sequences[0].experts)[None]
    hot = hot_of(experts, 8)
    found = used_within(hot, (1, 3))
    known = whole(torch.tensor([11]), 11, (1, 3))
    for token in range(11):
        for i, window in enumerate((1, 3)):
            assert bool(known[0, token, i]) == (token + window <= 10)
            if known[0, token, i]:
                expected = hot[0, token + 1 : token + 1 + window].amax(dim=0)
                assert torch.equal(found[0, token, i], expected)


def test_padding_does_not_count_in_the_loss():
    model, sequences = small_predictor(), drawn_sequences([(4, 7), (2, 3)])
    with torch.no_grad():
        first, second = loss_of(model, inputs_of(sequences, model.spec), *experts_of(sequences))
        each = [loss_of(model, inputs_of([s], model.spec), *experts_of([s])) for s in sequences]
    mean = (11 * each[0][0] + 5 * each[1][0]) / 16
    assert float(first) == pytest.approx(float(mean), rel=1e-5)
    rows = [(10 + 8), (4 + 2)]  # tokens whose next one, and whose next three are known
    mean = (rows[0] * each[0][1] + rows[1] * each[1][1]) / sum(rows)
    assert float(second) == pytest.approx(float(mean), rel=1e-5)


def test_a_weighted_loss_still_asks_for_probabilities():
    """The best logit of an expert used once in five times is that of 0.2, whatever the weight."""
    target = torch.tensor([1.0, 0, 0, 0, 0])
    for positive in (1.0, 4.0, 0.5):
        logit = torch.zeros(1, requires_grad=True)
        optimiser = torch.optim.LBFGS([logit], max_iter=50)

        def closure(logit=logit, optimiser=optimiser, positive=positive):
            optimiser.zero_grad()
            loss = weighted(logit.expand(5), target, positive).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        found = torch.sigmoid(logit.detach()).item()
        assert found == pytest.approx(0.2, abs=1e-3)


def test_long_sequences_are_cut():
    (sequence,) = drawn_sequences([(4, 7)])
    assert len(shortened(sequence, 6)) == 6
    assert shortened(sequence, 3).prefill == 3
    assert len(shortened(sequence, 100)) == 11


def test_a_file_keeps_weights_and_facts(tmp_path):
    trainer = trained(SHORT)
    trainer.run()
    path = tmp_path / "p.safetensors"
    save_predictor(path, trainer.model, {"steps": 12}, "bfloat16")
    found = load_predictor(path)
    assert found.spec == trainer.model.spec
    assert found.training == {"steps": 12}
    for name, values in trainer.model.state_dict().items():
        stored = found.model.state_dict()[name]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, values.to(torch.bfloat16).float())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    trainer = trained(SHORT)
    with torch.no_grad():
        trainer.model.now.bias[0] = 1e6
    path = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match=r"now\.bias has values that float16 cannot hold"):
        save_predictor(path, trainer.model, {}, "float16")
    assert not path.exists()


def test_another_model_of_the_same_file_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    save_predictor(path, trained(SHORT).model, {}, "float32")
    text = path.read_bytes()
    spec = json.dumps({"d_ff": 32})[1:-1].replace('"', '\\"').encode()
    assert spec in text
    path.write_bytes(text.replace(spec, spec.replace(b"32", b"33")))
    with pytest.raises(InputError, match=r"wi.weight is \(32, 16\), expected \(33, 16\)"):
        load_predictor(path)


def test_reading_keeps_domains(tmp_path):
    from traces.store import write_trace

    trace = rule_trace(1, 5)
    path = tmp_path / "t.parquet"
    write_trace(path, MODEL, trace.items, source="", license="", extra=trace.extra)
    assert read_corpus(path).domains == tuple(trace.extra["domains"])
