"""What evaluation measures, on cases worked out by hand and by plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

from runtime.predictor import baselines
from runtime.predictor.data import Corpus
from runtime.predictor.evaluating import widths_of
from runtime.predictor.scores import (
    BatchRecall,
    Calibration,
    Recall,
    WindowRecall,
    groups,
    hot,
    used_within,
)
from tests.helpers_predictor import MODEL, drawn_sequences, rule_trace


def test_recall_and_precision_by_hand():
    recall = Recall(2, 6, (2, 3))
    truth = np.array([[[0, 1], [2, 3]], [[4, 5], [0, 1]]])
    ranks = np.array([[[1, 2, 0], [4, 5, 0]], [[5, 4, 1], [-1, -1, -1]]])
    recall.add(ranks, truth)
    found = recall.result()
    assert found["at"]["2"]["recall"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["at"]["2"]["precision"] == pytest.approx(3 / 6)
    assert found["at"]["3"]["recall"] == pytest.approx((4 / 4 + 0) / 2)
    assert found["recall_by_layer"] == [0.75, 0.0]


def test_layers_that_a_method_cannot_name_are_left_out():
    recall, batch = Recall(2, 4, (1,)), BatchRecall(2, 4, 1)
    truth, ranks = np.array([[[0], [1]]]), np.array([[[-1], [1]]])
    recall.add(ranks, truth)
    batch.add([ranks], [truth])
    for found in (recall.result()["at"]["1"], batch.result()):
        assert found["recall"] == 1.0
    assert recall.result()["recall_by_layer"] == [None, 1.0]
    assert recall.result()["layers_named"] == 1


def test_batch_recall_by_hand():
    """Two tokens that take {0, 1} and {1, 2}: of {0, 1, 2} the union of what was named has 1, 2."""
    truth = [np.array([[[0, 1]]]), np.array([[[1, 2]], [[3, 4]]])]
    ranks = [np.array([[[1, 5]]]), np.array([[[2, 1]], [[3, 4]]])]
    batch = BatchRecall(1, 6, 2)
    batch.add(ranks, truth)
    assert batch.result() == {
        "recall": pytest.approx(2 / 3),
        "recall_by_layer": [0.6667],
        "batches": 1,
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batch_recall_by_plain_loops(size):
    rng = np.random.default_rng(size)
    sequences = drawn_sequences([(0, 5), (0, 3), (0, 7), (0, 6), (0, 2)])
    truth = [s.experts for s in sequences]
    ranks = [rng.integers(0, 8, t.shape) for t in truth]
    batch = BatchRecall(3, 8, size)
    batch.add(ranks, truth)
    shares = []
    for first in range(0, 5 - size + 1, size):
        for token in range(min(len(t) for t in truth[first : first + size])):
            for layer in range(3):
                members = range(first, first + size)
                true = {int(e) for i in members for e in truth[i][token, layer]}
                named = {int(e) for i in members for e in ranks[i][token, layer]}
                shares.append(len(true & named) / len(true))
    assert batch.result()["recall"] == pytest.approx(np.mean(shares))


def test_no_whole_batch_gives_no_figure():
    batch = BatchRecall(1, 4, 3)
    batch.add([np.array([[[0]]])] * 2, [np.array([[[0]]])] * 2)
    assert batch.result() == {}


def test_calibration_of_honest_and_of_boastful_chances():
    rng = np.random.default_rng(0)
    chances = rng.random((200, 100))
    true = rng.random((200, 100)) < chances
    honest, boastful = Calibration(), Calibration()
    honest.add(chances, true)
    boastful.add(np.minimum(chances + 0.2, 1.0), true)
    assert honest.result()["error"] < 0.02
    assert 0.12 < boastful.result()["error"] <= 0.2
    assert sum(one["share"] for one in honest.result()["bins"]) == pytest.approx(1)


def test_recall_over_windows():
    """As many are named first as are used: a perfect order finds all, a reversed one the rest."""
    (sequence,) = drawn_sequences([(0, 12)])
    true = hot(sequence.experts, 8)
    for window in (1, 3):
        used = used_within(true, window)
        for token in range(len(used)):
            assert (used[token] == true[token + 1 : token + 1 + window].any(axis=0)).all()
        perfect, reverse = WindowRecall(), WindowRecall()
        perfect.add(used.astype(float), used)
        reverse.add(1 - used.astype(float), used)
        assert perfect.result() == 1.0
        expected = np.maximum(2 * used.sum(axis=-1) - 8, 0).sum() / used.sum()
        assert reverse.result() == pytest.approx(expected)
    assert WindowRecall().result() is None
    assert len(used_within(true, 12)) == 0


def test_baselines_say_what_they_know():
    trace = rule_trace(1, 6)
    corpus = Corpus("rule", MODEL, tuple(trace.items), ("all",) * 6)
    sequence = trace.items[0]
    before = baselines.previous(sequence)
    assert (before[0] == -1).all()
    assert (before[1:] == sequence.experts[:-1]).all()
    table = baselines.TokenTable(corpus).ranks(sequence, 2)
    by_token = sequence.experts[..., 0]
    assert (table == by_token[..., None]).any(axis=-1).mean() > 0.95
    lately = baselines.recency(sequence, 8)
    for token in range(len(sequence)):
        top = np.argsort(-lately[token], axis=-1)[:, :2]
        assert (np.sort(top) == np.sort(sequence.experts[token])).all()


def test_markov_is_the_forecaster_that_ships():
    """After many equal steps the table knows the path, before the step and one layer ahead."""
    (sequence,) = drawn_sequences([(0, 40)])
    same = np.broadcast_to(sequence.experts[:1], sequence.experts.shape).copy()
    corpus = Corpus("same", MODEL, (dataclasses.replace(sequence, experts=same),), ("all",))
    told: list[int] = []
    ((early, late),) = baselines.markov(corpus, 2, told.append)
    assert told == [1]
    assert (early[0] == -1).all()
    for ranks in (early, late):
        assert (np.sort(ranks[5:]) == np.sort(same[5:])).all()


def test_ahead_is_read_one_layer_early():
    (sequence,) = drawn_sequences([(0, 3)])
    assert baselines.ahead(sequence) is None
    guess = np.arange(3 * 3 * 4).reshape(3, 3, 4).astype(np.int16) % 8
    found = baselines.ahead(dataclasses.replace(sequence, ahead=(guess,)))
    assert (found[:, 0] == -1).all()
    assert (found[:, 1:] == guess[:, :2]).all()


def test_domains_and_widths():
    assert dict(groups(["b", "a", "b"])) == {"a": [1], "b": [0, 2]}
    assert list(groups(["a", "a"])) == []
    assert widths_of(8, 64) == (8, 12, 16)
    assert widths_of(1, 8) == (1, 2)
    assert widths_of(4, 5) == (4, 5)
