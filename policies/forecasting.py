"""What forecasters share: from scores to predictions, and scores over several tokens."""

from __future__ import annotations

import numpy as np

from policies.base import Context, Forecast, Prediction
from policies.routing import Step
from traces.trace import FloatArray, IntArray

#: Steps of more tokens than this demand nearly every expert: nothing is forecast for them.
MAX_TOKENS = 64


def predictions(scores: FloatArray, first_layer: int, context: Context, width: int) -> Forecast:
    """The best *width* experts of consecutive layers, most likely first.

    *scores* is [n, experts] for the layers from *first_layer* on, one event ahead each.
    """
    width = min(width, scores.shape[1])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :width]
    values = np.take_along_axis(scores, best, axis=1).tolist()
    base = (first_layer + np.arange(len(scores)))[:, None] * context.experts
    experts = (best + base).tolist()
    return [
        Prediction(ahead + 1, experts[ahead], values[ahead]) for ahead in range(len(experts))
    ]


def any_of(chances: FloatArray) -> FloatArray:
    """Chance that at least one of T independent tokens takes each expert, from [T, ...]."""
    if len(chances) == 1:
        alone: FloatArray = chances[0]
        return alone
    none: FloatArray = np.prod(1.0 - np.minimum(chances, 1.0), axis=0)
    return 1.0 - none


def last_rows(step: Step) -> tuple[IntArray, IntArray]:
    """Sequences of *step* and the row of each one's last token."""
    ids = step.sequence_ids if step.sequence_ids is not None else np.zeros(step.size, dtype=int)
    ends = np.flatnonzero(np.append(ids[1:] != ids[:-1], True))
    return ids[ends], ends
