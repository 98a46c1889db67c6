"""What a trained predictor must beat: the experts that simpler knowledge would name.

Each baseline gives, for every sequence, the experts of each token and layer, best first: int16
[n, L, m], -1 where it names none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.base import Context, Forecast, Training
from policies.batching import Batches
from policies.forecasters.markov import Markov
from policies.routing import Routing, Step
from policies.training import learn
from runtime.predictor.data import Corpus, ids_of
from runtime.predictor.inference import ranked
from traces.model import ModelSpec
from traces.trace import MemoryTrace, TokenSequence

Ranks = npt.NDArray[np.integer[Any]]


def padded(ranks: Ranks, width: int) -> Ranks:
    """*ranks* cut or filled with -1 to *width*."""
    ranks = ranks[..., :width].astype(np.int16)
    missing = width - ranks.shape[-1]
    pads = [(0, 0)] * (ranks.ndim - 1) + [(0, missing)]
    return np.pad(ranks, pads, constant_values=-1) if missing else ranks


def previous(sequence: TokenSequence) -> Ranks:
    """The experts of the token before; none for the first."""
    found = np.full_like(sequence.experts, -1)
    found[1:] = sequence.experts[:-1]
    return found


def ahead(sequence: TokenSequence) -> Ranks | None:
    """What the gate of each layer says when it is applied one layer early; none for layer 0."""
    if not sequence.ahead:
        return None
    guess = sequence.ahead[0]
    found = np.full_like(guess, -1)
    found[:, 1:] = guess[:, :-1]
    return found


class TokenTable:
    """The experts that a token id took most often in a training trace.

    Popularity decides between equals, and names the experts of an id never met.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._model = corpus.model
        trace = MemoryTrace(corpus.model, corpus.sequences, name=corpus.name)
        learned: Training = learn(trace, corpus.model)
        self._tables = learned.token_experts
        self._popular = learned.popularity / (learned.popularity.max() + 1.0)

    def ranks(self, sequence: TokenSequence, width: int) -> Ranks:
        """The best *width* experts of every token."""
        shape = (self._model.layers, self._model.experts)
        ids, inverse = np.unique(ids_of(sequence), return_inverse=True)
        chances = [self._tables.get(int(token), 0) + self._popular for token in ids]
        found: Ranks = ranked(np.stack(chances).reshape(-1, *shape), width)[inverse]
        return found


def markov(
    corpus: Corpus, width: int, advance: Callable[[int], None]
) -> Iterator[tuple[Ranks, Ranks]]:
    """The shipped forecaster, learning as it goes, one token a step.

    For each sequence what it names for a layer before the token's first layer, and what it
    names just before that layer, when it has seen the gates of the layers above.
    """
    model = corpus.model
    forecaster = Markov(floor=0.0)
    forecaster.reset(Context(model.layers, model.experts, model.top_k, model.total_experts))
    event = 0
    for sequence in corpus.sequences:
        alone = MemoryTrace(model, [dataclasses.replace(sequence, prefill=0)])
        early = np.full((len(sequence), model.layers, width), -1, np.int16)
        late = early.copy()
        for token, step in enumerate(Batches(alone).steps()):
            _take(early[token], forecaster.on_step(step), 0, model)
            late[token, 0] = early[token, 0]
            event = _follow(forecaster, step, late[token], event)
        advance(1)
        yield early, late


def _follow(forecaster: Markov, step: Step, late: Ranks, event: int) -> int:
    """Tell *forecaster* every gate of *step*; note what it says of the next. The next event."""
    layers, experts = late.shape[0], forecaster._context.experts
    for layer, demand in enumerate(step.demand):
        found = forecaster.on_route(Routing(step, layer, demand, event))
        if layer + 1 < layers:
            near = [p for p in found if p.ahead == 1]
            for prediction in near:
                named = [e % experts for e in prediction.experts[: late.shape[1]]]
                late[layer + 1, : len(named)] = named
        event += 1
    return event


def _take(ranks: Ranks, forecast: Forecast, first: int, model: ModelSpec) -> None:
    """Write *forecast*, made before layer *first*, into *ranks* [L, m]."""
    for prediction in forecast:
        layer = first + prediction.ahead - 1
        named = [e % model.experts for e in prediction.experts[: ranks.shape[1]]]
        ranks[layer, : len(named)] = named


def recency(sequence: TokenSequence, experts: int) -> npt.NDArray[np.float32]:
    """How lately each expert was used in its sequence, the token itself included: [n, L, E].

    What an LRU cache knows. Among those of one token the one used more often comes first.
    """
    count, layers, _ = sequence.experts.shape
    hot: npt.NDArray[np.float32] = np.zeros((count, layers, experts), np.float32)
    np.put_along_axis(hot, sequence.experts.astype(np.intp), 1.0, axis=2)
    when = hot * np.arange(1, count + 1, dtype=np.float32)[:, None, None]
    last = np.maximum.accumulate(when, axis=0)
    often = hot.cumsum(axis=0, dtype=np.float32) / np.float32(count + 1)
    made: npt.NDArray[np.float32] = (last + often).astype(np.float32)
    return made
