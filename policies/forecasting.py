"""What forecasters share: from scores to predictions, and scores over several tokens."""

from __future__ import annotations

import numpy as np

from policies.base import Forecast, Prediction
from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray

#: Steps of more tokens than this demand nearly every expert: nothing is forecast for them.
MAX_TOKENS = 64


def predictions(scores: FloatArray, first_layer: int, experts: int, floor: float) -> Forecast:
    """The experts whose chance is at least *floor*, layer by layer, most likely first.

    *scores* lists the chances of all *experts* of consecutive layers from *first_layer* on,
    one layer after the other; the first is one event ahead.
    """
    named = (scores >= floor).nonzero()[0]
    chances = scores.take(named)
    order = (-chances).argsort(kind="stable")
    base = first_layer * experts
    best: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(scores) // experts)]
    for index, chance in zip(named.take(order).tolist(), chances.take(order).tolist(), strict=True):
        ids, values = best[index // experts]
        ids.append(index + base)
        values.append(chance)
    return [
        Prediction(ahead, ids, values) for ahead, (ids, values) in enumerate(best, start=1) if ids
    ]


def from_layer(path: Forecast, routing: Routing) -> Forecast:
    """What is left of *path*, made before layer 0, once the layer of *routing* has been routed."""
    passed = routing.layer + 1
    return [Prediction(ahead - passed, ids, s) for ahead, ids, s in path if ahead > passed]


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
