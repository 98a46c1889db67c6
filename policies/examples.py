"""Small models and traces with random routing, for tests of policies and of what runs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from traces.model import ModelSpec
from traces.trace import IntArray, MemoryTrace, TokenSequence

#: Bytes of one expert of the models in example traces.
EXPERT_BYTES = 3000


def example_model(layers: int, experts: int, top_k: int) -> ModelSpec:
    """A small model whose experts take ``EXPERT_BYTES``."""
    return ModelSpec("tiny", layers, experts, top_k, 10, 50, EXPERT_BYTES // 2, 1000, 8)


def example_trace(
    seed: int = 0,
    *,
    shape: tuple[int, int, int] = (3, 6, 2),
    lengths: Sequence[int] = (9, 5, 12),
    prefill: int = 3,
    skew: float = 1.0,
) -> MemoryTrace:
    """Random routing with every optional column, of *shape* (layers, experts, top_k).

    The popularity of experts falls as 1 / rank to the power of *skew*, and a token often
    repeats the one before.
    """
    random = np.random.default_rng(seed)
    model = example_model(*shape)
    odds = -skew * np.log(np.arange(1, model.experts + 1))
    items = []
    for number, length in enumerate(lengths):
        score = random.gumbel(size=(length, model.layers, model.experts)) + odds
        repeats = random.random((length, model.layers, 1)) < 0.3
        for token in range(1, length):
            score[token] = np.where(repeats[token], score[token - 1], score[token])
        ranked = np.argsort(-score, axis=-1).astype(np.int16)
        share = random.dirichlet(np.ones(model.top_k), (length, model.layers))
        items.append(
            TokenSequence(
                id=number,
                experts=ranked[..., : model.top_k],
                positions=np.arange(length, dtype=np.int32),
                prefill=min(prefill, length),
                tokens=random.integers(0, 5, length).astype(np.int32),
                weights=-np.sort(-share).astype(np.float32),
                ahead=tuple(_ahead(ranked, distance, 2 * model.top_k) for distance in (1, 2, 3)),
            )
        )
    return MemoryTrace(model, items, name=f"example {seed}")


def _ahead(ranked: IntArray, distance: int, width: int) -> IntArray:
    guess = np.full_like(ranked[..., :width], -1)
    guess[:, :-distance] = ranked[:, distance:, :width]
    return guess
