"""A routing that a predictor can learn, and predictors small enough for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from policies.examples import example_model
from runtime.predictor.model import Predictor
from runtime.predictor.spec import PredictorSpec
from traces.model import ModelSpec
from traces.trace import MemoryTrace, TokenSequence

LAYERS, EXPERTS, TOP_K = 3, 8, 2
#: Ids below TOPICS begin a prompt, the others follow.
TOPICS, VOCABULARY = 3, 20

MODEL = example_model(LAYERS, EXPERTS, TOP_K)


def rule_trace(seed: int, count: int, *, prompt: int = 6, decode: int = 10) -> MemoryTrace:
    """Every token takes one expert that its id decides, and one that the prompt's first id does.

    The rule is the same for all seeds; token ids are drawn.
    """
    fixed = np.random.default_rng(99)
    by_token = fixed.integers(0, EXPERTS // 2, (VOCABULARY, LAYERS))
    by_topic = fixed.integers(EXPERTS // 2, EXPERTS, (TOPICS, LAYERS))
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        tokens = rng.integers(TOPICS, VOCABULARY, prompt + decode).astype(np.int32)
        tokens[0] = rng.integers(0, TOPICS)
        topic = np.broadcast_to(by_topic[tokens[0]], (len(tokens), LAYERS))
        experts = np.stack([by_token[tokens], topic], axis=-1).astype(np.int16)
        positions = np.arange(len(tokens), dtype=np.int32)
        items.append(TokenSequence(number, experts, positions, prompt, tokens))
    domains = [f"topic {item.tokens[0]}" for item in items]
    return MemoryTrace(MODEL, items, name=f"rule {seed}", extra={"domains": domains})


def small_spec(model: ModelSpec = MODEL, **sizes: object) -> PredictorSpec:
    """A spec of a few thousand weights."""
    known: dict[str, object] = {
        "vocabulary": VOCABULARY, "d_model": 16, "d_ff": 32, "heads": 2, "d_kv": 8, "blocks": 2,
        "buckets": 8, "distance": 16, "tail": 2, "windows": (1, 3),
    }  # fmt: skip
    return PredictorSpec(model.name, model.layers, model.experts, model.top_k, **{**known, **sizes})


def small_predictor(seed: int = 0, **sizes: object) -> Predictor:
    """A predictor with random weights, in evaluation mode; its heads say something, too."""
    torch.manual_seed(seed)
    model = Predictor(small_spec(**sizes)).eval()
    for head in (model.now, model.again):
        torch.nn.init.normal_(head.weight, std=0.5)
        torch.nn.init.normal_(head.bias, std=0.5)
    return model


def drawn_sequences(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[TokenSequence]:
    """Sequences of random ids and experts with (prompt, decoded) tokens."""
    rng = np.random.default_rng(seed)
    items = []
    for number, (prompt, decoded) in enumerate(lengths):
        count = prompt + decoded
        experts = rng.permuted(np.tile(np.arange(EXPERTS), (count, LAYERS, 1)), axis=2)
        items.append(
            TokenSequence(
                number,
                experts[..., :TOP_K].astype(np.int16),
                np.arange(count, dtype=np.int32),
                prompt,
                rng.integers(0, VOCABULARY, count).astype(np.int32),
            )
        )
    return items
