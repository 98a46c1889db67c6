"""Where a training begins: at popularity and at what each token id is known to take.

A token's id alone tells most of its path. Found by gradient steps that takes many epochs, for
most ids are rare; counted, it is there at once, and training is left with what context adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.predictor.data import ids_of
from runtime.predictor.model import Predictor
from traces.trace import TokenSequence

Floats = npt.NDArray[np.floating[Any]]

#: Cells of the table of token ids; the rarest ids are left out where it would be larger.
TABLE_CELLS = 2**28

#: What the blocks first add to a token's embedding, as a share of what T5 lets them add.
QUIET = 0.1


def start(model: Predictor, sequences: Sequence[TokenSequence]) -> None:
    """Set heads and embedding from counts over *sequences*."""
    rate = _popularity(model, sequences)
    _base_rates(model, rate)
    _token_table(model, sequences, rate)
    _quieten(model)


def _popularity(model: Predictor, sequences: Sequence[TokenSequence]) -> Floats:
    """The share of tokens that take each expert, [L * E], never quite 0 or 1."""
    spec = model.spec
    counts, tokens = np.zeros(spec.paths), 0
    for sequence in sequences:
        counts += np.bincount(_keys(sequence, spec.experts).ravel(), minlength=spec.paths)
        tokens += len(sequence)
    rate: Floats = np.minimum((counts + 0.5) / (tokens + 1.0), 1 - 1e-4)
    return rate


def _keys(sequence: TokenSequence, experts: int) -> npt.NDArray[np.int64]:
    """The experts of every token numbered through all layers, [n, L * k]."""
    layers = np.arange(sequence.experts.shape[1])[:, None] * experts
    return (sequence.experts.astype(np.int64) + layers).reshape(len(sequence), -1)


def _base_rates(model: Predictor, rate: Floats) -> None:
    """The heads' biases as log-odds; over w tokens independence is assumed: 1 - (1 - p)^w.

    That does away with most of the imbalance between used and unused.
    """
    now = torch.from_numpy(rate).float()
    windows = torch.tensor(model.spec.windows, dtype=torch.float32)[:, None]
    again = (1 - (1 - now) ** windows).clamp(1e-6, 1 - 1e-4)
    with torch.no_grad():
        model.now.bias.copy_(torch.logit(now))
        model.again.bias.copy_(torch.logit(again).ravel())


def _token_table(model: Predictor, sequences: Sequence[TokenSequence], rate: Floats) -> None:
    """Embedding and first head as the best factors of each id's log-odds against popularity.

    The directions are the leading eigenvectors of the table's Gram matrix, ids weighed by how
    often they come. An id that never comes gets no embedding: popularity and context speak.
    """
    spec = model.spec
    ids, table, seen = _log_odds(model, sequences, rate)
    weighed = table * np.sqrt(seen)[:, None].astype(np.float32)
    _, vectors = np.linalg.eigh((weighed.T @ weighed).astype(np.float64))
    kept = min(spec.d_model, spec.paths)
    directions = vectors[:, -kept:].astype(np.float32)
    embedded = table @ directions
    size = float(np.sqrt(np.average((embedded**2).mean(axis=1), weights=seen))) or 1.0
    rows = torch.zeros(spec.vocabulary, spec.d_model)
    rows[torch.from_numpy(ids), :kept] = torch.from_numpy(embedded / size)
    with torch.no_grad():
        model.embedding.weight[: spec.vocabulary] = rows
        model.now.weight[:, :kept] = torch.from_numpy(directions * np.float32(size))


def _log_odds(
    model: Predictor, sequences: Sequence[TokenSequence], rate: Floats
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The ids that come most [i], their log-odds above popularity [i, L * E], how often [i].

    Counts are smoothed by one token of popularity.
    """
    spec = model.spec
    seen = np.zeros(spec.vocabulary, np.int64)
    for sequence in sequences:
        seen += np.bincount(ids_of(sequence), minlength=spec.vocabulary)
    often = np.argsort(-seen, kind="stable")[: max(1, TABLE_CELLS // spec.paths)]
    ids = often[seen[often] > 0]
    row_of = np.full(spec.vocabulary, -1)
    row_of[ids] = np.arange(len(ids))
    table = np.zeros((len(ids), spec.paths), np.float32)
    for sequence in sequences:
        rows = row_of[ids_of(sequence)]
        known = rows >= 0
        np.add.at(table, (rows[known, None], _keys(sequence, spec.experts)[known]), 1.0)
    table += rate.astype(np.float32)
    table /= (seen[ids, None] + 1).astype(np.float32)
    np.clip(table, 1e-3, 1 - 1e-3, out=table)
    np.log(table / (1 - table), out=table)
    table -= np.log(rate / (1 - rate)).astype(np.float32)
    return ids, table, seen[ids]


def _quieten(model: Predictor) -> None:
    """Let the blocks add little at first, so that the embedding is what the heads see."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attention.o.weight", "feed_forward.wo.weight")):
                weight.mul_(QUIET)
