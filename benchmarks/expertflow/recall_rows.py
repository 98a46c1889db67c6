"""Rows of recall: apart from their making, so that tables of them need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One method on one trace; recall of 1 at top-k, by batch size, layer and domain.

    *wider* is the batch recall when 1.5 and 2 times top-k are named for every token, as the
    paper's code may; layers and *domains* have batch 1's, in which every text counts. *table*
    says what a token table was counted on.
    """

    trace: str
    method: str
    known: str
    batch: dict[str, float]
    wider: dict[str, dict[str, float]]
    by_layer: list[float | None]
    domains: dict[str, float]
    tokens: int
    table: str = ""
