"""The predictor on a GPU: it says what it says on a CPU, beside the model and without waiting."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.predictor.data import Corpus  # noqa: E402
from runtime.predictor.inference import score  # noqa: E402
from runtime.predictor.live import LivePredictor  # noqa: E402
from runtime.predictor.training import Trainer, TrainSettings  # noqa: E402
from tests.helpers_predictor import (  # noqa: E402
    MODEL,
    drawn_sequences,
    rule_trace,
    small_predictor,
    small_spec,
)

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
