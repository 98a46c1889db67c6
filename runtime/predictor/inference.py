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
from runtime.predictor.window import read_of
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
    """The probabilities of each of *sequences*, in order; token ids must be of the vocabulary.

    0 for tokens that a predictor does not read (:mod:`runtime.predictor.window`).
    """
    device = next(model.parameters()).device
    for members in _passes(model, sequences):
        parts = [read_of(sequence, model.spec) for sequence in members]
        inputs = Inputs(*(x.to(device) for x in inputs_of([s for s, _ in parts], model.spec)))
        with torch.inference_mode():
            now, again = (torch.sigmoid(logits).cpu().numpy() for logits in model(inputs))
        for row, (sequence, (_, part)) in enumerate(zip(members, parts, strict=True)):
            yield Scored(sequence, *(_placed(x[row], part, len(sequence)) for x in (now, again)))


def _placed(chances: Floats, part: slice, length: int) -> Floats:
    """The first of *chances* as those of *part* of a sequence of *length*, 0 elsewhere."""
    count = part.stop - part.start
    if count == length:
        return chances[:length]
    placed = np.zeros((length, *chances.shape[1:]), chances.dtype)
    placed[part] = chances[:count]
    return placed


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
