"""The miss ratio that theory expects of LRU, from nothing but each expert's popularity.

Che, Tung and Wang, "Hierarchical Web caching systems: modeling, design and experimental
results", IEEE JSAC 20(7), 2002. If requests come independently, each object at its own rate
p_i, an object stays in an LRU cache of C slots for about the same characteristic time t, the
root of sum(1 - exp(-p_i t)) = C. A request for object i misses with probability exp(-p_i t).

Real routing is not independent. LRU above this line suffers from the order of the layers,
which comes round like a loop; LRU below it profits from tokens that repeat experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Halvings of the bracket: enough for every bit of a double.
HALVINGS = 200


def lru_miss_ratio(popularity: npt.NDArray[Any], slots: int) -> float:
    """Misses per access that Che's approximation expects of LRU with *slots* slots.

    *popularity* holds one count or rate per object; those never used take no part.
    """
    rates = _rates(popularity)
    if slots >= len(rates):
        return 0.0
    if slots <= 0:
        return 1.0
    time = characteristic_time(rates, slots)
    return float(np.sum(rates * np.exp(-rates * time)))


def static_miss_ratio(popularity: npt.NDArray[Any], slots: int) -> float:
    """Misses per access when the *slots* most popular objects are held for ever.

    With independent requests no policy that does not know the future misses less.
    """
    rates = np.sort(_rates(popularity))[::-1]
    return float(np.sum(rates[max(slots, 0) :]))


def characteristic_time(rates: Floats, slots: float) -> float:
    """The t with sum(1 - exp(-rates * t)) = *slots*, by bisection; needs slots < len(rates)."""
    low, high = 0.0, 1.0
    while _occupied(rates, high) < slots:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _occupied(rates, middle) < slots:
            low = middle
        else:
            high = middle
    return high


def _occupied(rates: Floats, time: float) -> float:
    return float(np.sum(-np.expm1(-rates * time)))


def _rates(popularity: npt.NDArray[Any]) -> Floats:
    """Shares of all requests, without the objects that get none."""
    counts = np.asarray(popularity, dtype=np.float64).reshape(-1)
    counts = counts[counts > 0]
    shares: Floats = counts / counts.sum()
    return shares
