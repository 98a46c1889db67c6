"""Asking a predictor about whole sequences: one pass gives every position's probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.predictor.data import inputs_of
from runtime.predictor.model import Inputs, Predictor
from traces.trace import TokenSequence

Floats = npt.NDArray[np.float32]

#: Scores that one pass may make: bounds its memory.
PASS_SCORES = 2**25


@dataclass(frozen=True)
class Scored:
    """Probabilities of one sequence of n tokens.

    *now* [n, L, E] that a token takes an expert, *again* [n, windows, L, E] that the tokens
    after it do.
    """

    sequence: TokenSequence
    now: Floats
    again: Floats


def score(model: Predictor, sequences: Sequence[TokenSequence]) -> Iterator[Scored]:
    """The probabilities of each of *sequences*, in order; token ids must be of the vocabulary."""
    device = next(model.parameters()).device
    for members in _passes(model, sequences):
        inputs = Inputs(*(x.to(device) for x in inputs_of(members, model.spec)))
        with torch.inference_mode():
            now, again = (torch.sigmoid(logits).cpu().numpy() for logits in model(inputs))
        for row, sequence in enumerate(members):
            yield Scored(sequence, now[row, : len(sequence)], again[row, : len(sequence)])


def _passes(model: Predictor, sequences: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
    """Neighbours that run together, as many as memory allows."""
    each = model.spec.paths * (1 + len(model.spec.windows))
    members: list[TokenSequence] = []
    for sequence in sequences:
        longest = max(map(len, [*members, sequence]))
        if members and (len(members) + 1) * longest * each > PASS_SCORES:
            yield members
            members = []
        members.append(sequence)
    if members:
        yield members


def ranked(chances: npt.NDArray[Any], width: int) -> npt.NDArray[np.int16]:
    """The *width* experts of highest *chances* [..., E], best first; ties by lower id."""
    order = np.argsort(-chances, axis=-1, kind="stable")[..., :width]
    return order.astype(np.int16)
