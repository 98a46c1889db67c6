"""What ExpertFlow (arXiv 2410.17954, second version) reports, as far as it is compared here."""

from __future__ import annotations

from typing import NamedTuple


class Hits(NamedTuple):
    """Hit ratios of 1."""

    lru: float
    plec: float


class Scheduled(NamedTuple):
    """Tokens per second without and with the token scheduler."""

    without: float
    with_it: float


#: Switch-32 with 32 experts a layer: (batch, slots of a layer) -> hit ratios.
HITS = {
    (4, 16): Hits(0.7661, 0.9190),
    (16, 16): Hits(0.5837, 0.8591),
    (16, 8): Hits(0.3622, 0.7189),
}

#: By the name that the drawn traces of the same shape have.
SCHEDULER = {
    "switch-base-32": Scheduled(854.19, 881.91),
    "switch-base-64": Scheduled(680.72, 788.30),
    "switch-base-128": Scheduled(628.36, 735.35),
}

#: Batch recall in domain, and the lower end for a model of 64 experts (Switch-64: 80 to 90 %).
RECALL, RECALL_64 = 0.90, 0.80

#: Speed over systems that load whole layers, and over LRU at most.
OVER_DEMAND, OVER_LRU = (2.0, 10.0), 2.12

#: The largest share of the GPU's memory that is saved.
SAVING = 0.9372
