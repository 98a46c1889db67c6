"""The predictor's network: it is a T5, it is causal, and one token at a time gives the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.predictor import caches  # noqa: E402
from runtime.predictor.files import stored_bytes  # noqa: E402
from runtime.predictor.inference import score  # noqa: E402
from runtime.predictor.live import LivePredictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from runtime.predictor.spec import PredictorSpec  # noqa: E402
from tests.helpers_predictor import drawn_sequences, small_predictor  # noqa: E402
from traces.errors import InputError  # noqa: E402

LENGTHS = [(5, 9), (1, 3), (12, 0), (0, 4), (3, 20)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def as_t5(model):
    """transformers' T5 with the weights of *model*."""
    spec = model.spec
    config = transformers.T5Config(
        vocab_size=spec.vocabulary + 1, d_model=spec.d_model, d_kv=spec.d_kv, d_ff=spec.d_ff,
        num_layers=spec.blocks, num_heads=spec.heads, dropout_rate=0.0,
        relative_attention_num_buckets=spec.buckets,
        relative_attention_max_distance=spec.distance, feed_forward_proj="relu",
    )  # fmt: skip
    other = transformers.T5Model(config).eval()
    with torch.no_grad():
        other.shared.weight.copy_(model.embedding.weight)
        for ours, theirs in ((model.encoder, other.encoder), (model.decoder, other.decoder)):
            theirs.embed_tokens.weight.copy_(model.embedding.weight)
            theirs.final_layer_norm.weight.copy_(ours.norm.weight)
            bias = theirs.block[0].layer[0].SelfAttention.relative_attention_bias
            bias.weight.copy_(ours.positions.table.weight)
            for one, two in zip(ours.blocks, theirs.block, strict=True):
                copy_attention(one.self_attention, two.layer[0].SelfAttention)
                two.layer[0].layer_norm.weight.copy_(one.self_norm.weight)
                if one.cross_attention is not None:
                    copy_attention(one.cross_attention, two.layer[1].EncDecAttention)
                    two.layer[1].layer_norm.weight.copy_(one.cross_norm.weight)
                last = two.layer[-1]
                last.layer_norm.weight.copy_(one.forward_norm.weight)
                last.DenseReluDense.wi.weight.copy_(one.feed_forward.wi.weight)
                last.DenseReluDense.wo.weight.copy_(one.feed_forward.wo.weight)
    return other


def copy_attention(ours, theirs):
    for name in ("q", "k", "v", "o"):
        getattr(theirs, name).weight.copy_(getattr(ours, name).weight)


def test_it_is_a_t5():
    model = small_predictor(1)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs = as_t5(model)
    prompt, decoded = torch.randint(0, 20, (3, 40)), torch.randint(0, 20, (3, 50))
    lengths = torch.tensor([40, 7, 21])
    mask = (torch.arange(40) < lengths[:, None]).long()
    with torch.inference_mode():
        expected = theirs(input_ids=prompt, attention_mask=mask, decoder_input_ids=decoded)
        states = model.encode(prompt, lengths)
        found = model.decode(decoded, states, lengths)
    close(found, expected.last_hidden_state)
    for row, length in enumerate(lengths.tolist()):
        close(states[row, :length], expected.encoder_last_hidden_state[row, :length])


def test_a_forecast_depends_on_nothing_that_comes_later():
    model, (sequence,) = small_predictor(), drawn_sequences([(4, 12)])
    (whole,) = score(model, [sequence])
    changed = sequence.tokens.copy()
    changed[10:] = (changed[10:] + 7) % 20
    (other,) = score(model, [dataclasses.replace(sequence, tokens=changed)])
    close(other.now[:10], whole.now[:10])
    close(other.again[:10], whole.again[:10])
    assert np.abs(other.now[10] - whole.now[10]).max() > 0.01


def test_a_forecast_does_not_depend_on_its_neighbours_in_the_batch():
    model, sequences = small_predictor(), drawn_sequences(LENGTHS)
    together = list(score(model, sequences))
    for sequence, found in zip(sequences, together, strict=True):
        (alone,) = score(model, [sequence])
        assert len(found.now) == len(sequence)
        close(found.now, alone.now)
        close(found.again, alone.again)


def test_the_prompt_reaches_what_is_decoded():
    model = small_predictor(tail=0)
    (sequence,) = drawn_sequences([(6, 4)])
    changed = sequence.tokens.copy()
    changed[0] = (changed[0] + 5) % 20
    (one,), (two,) = (
        score(model, [s]) for s in (sequence, dataclasses.replace(sequence, tokens=changed))
    )
    assert np.abs(one.now[6:] - two.now[6:]).max() > 1e-3


@pytest.mark.parametrize("tail", [0, 2, 100])
def test_one_token_at_a_time_gives_what_one_pass_gives(tail, monkeypatch):
    """Sequences of several lengths, begun at different times, in changing company."""
    # Small enough that they grow.
    monkeypatch.setattr(caches, "FIRST_ROWS", 1)
    monkeypatch.setattr(caches, "FIRST_COLUMNS", 16)
    model = small_predictor(2, tail=tail)
    sequences = drawn_sequences([(5, 9), (1, 70), (0, 30), (80, 4), (3, 20), (7, 2)])
    expected = {found.sequence.id: found for found in score(model, sequences)}
    live, at, waiting = LivePredictor(model), {}, list(sequences)
    rng = np.random.default_rng(0)
    while waiting or at:
        if waiting and (len(at) < 2 or rng.random() < 0.2):
            sequence = waiting.pop(0)
            found = live.begin(sequence.id, sequence.tokens[: sequence.prefill].tolist())
            close(found.now, expected[sequence.id].now[: sequence.prefill])
            close(found.again, expected[sequence.id].again[: sequence.prefill])
            at[sequence.id] = sequence.prefill
        members = [s for s in sequences if s.id in at and rng.random() < 0.7]
        if members:
            tokens = [int(s.tokens[at[s.id]]) for s in members]
            found = live.step([s.id for s in members], tokens).wait()
            for row, sequence in enumerate(members):
                close(found.now[row], expected[sequence.id].now[at[sequence.id]])
                close(found.again[row], expected[sequence.id].again[at[sequence.id]])
                at[sequence.id] += 1
                if at[sequence.id] == len(sequence):
                    live.end(sequence.id)
                    del at[sequence.id]
    assert len(live) == 0


def test_a_live_predictor_refuses_unknown_tokens():
    live = LivePredictor(small_predictor())
    with pytest.raises(InputError, match="token id 20, expected below 20"):
        live.begin(0, [3, 20])
    live.begin(0, [3, 4])
    with pytest.raises(InputError, match="token id -1"):
        live.step([0], [-1])
    with pytest.raises(ValueError, match="followed already"):
        live.begin(0, [3])


def test_the_paper_s_size_fits_into_five_megabytes():
    """ExpertFlow's d_model 32 and d_ff 2048, for the larger of the sample models."""
    model = Predictor(PredictorSpec("granular-64x8", 8, 64, 8, 12288))
    assert stored_bytes(model, "float16") <= 5e6
