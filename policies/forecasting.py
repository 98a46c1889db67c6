"""What forecasters share: from scores to predictions, and scores over several tokens."""

from __future__ import annotations

import numpy as np

from policies.base import Forecast, Path, Prediction
from policies.routing import Routing, Step
from traces.trace import FloatArray, IntArray

#: Steps of more tokens than this demand nearly every expert: nothing is forecast for them.
MAX_TOKENS = 64


def predictions(scores: FloatArray, first_layer: int, experts: int, floor: float) -> Path:
    """The experts whose chance is at least *floor*, layer by layer, most likely first.

    *scores* lists the chances of all *experts* of consecutive layers from *first_layer* on,
    one layer after the other; the first is one event ahead.
    """
    named = (scores >= floor).nonzero()[0]
    chances = scores.take(named)
    order = np.lexsort((-chances, named // experts))
    ids = (named.take(order) + first_layer * experts).tolist()
    ends = named.searchsorted(np.arange(experts, len(scores) + 1, experts)).tolist()
    return Path.of_layers(ids, chances.take(order).tolist(), ends)


def from_layer(path: Forecast, routing: Routing) -> Forecast:
    """What is left of *path*, made before layer 0, once the layer of *routing* has been routed."""
    passed = routing.layer + 1
    if isinstance(path, Path):
        return path.after(passed)
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
    if len(ids) == 1:
        return ids, np.zeros(1, dtype=int)
    ends = np.flatnonzero(np.append(ids[1:] != ids[:-1], True))
    return ids[ends], ends
