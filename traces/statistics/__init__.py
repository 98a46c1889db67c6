"""Figures of a trace: popularity, locality, reuse, predictability, and synthetic settings.

All are exact and streamed: one look at the lengths, then one pass over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from traces.statistics.locality import Adjacency, Segments
from traces.statistics.partners import TokenPartners, correlation
from traces.statistics.pieces import Outline, Piece, Statistic, in_pieces, outline
from traces.statistics.popularity import Popularity
from traces.statistics.prediction import Ahead, NextLayer, TokenTable
from traces.statistics.reuse import ReuseDistances
from traces.trace import Trace

__all__ = ["Outline", "Piece", "ReuseDistances", "Statistic", "in_pieces", "measure", "outline"]


def measure(
    trace: Trace, seen: Outline | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """All figures of *trace* as plain values; *progress* is told of every tokens taken in.

    *seen* is the trace's :func:`outline` where it is known already. What a figure means says
    the ``result`` of the class that takes it. Under ``settings`` lie the definitions of
    :class:`traces.synth.SynthSettings`, measured.
    """
    seen = seen or outline(trace)
    model = trace.model
    popularity = Popularity(model, seen.names)
    adjacency, tables, ahead = Adjacency(model), NextLayer(model), Ahead(model)
    partners, table = TokenPartners(model, len(seen.names)), TokenTable(model)
    segments, reuse = Segments(model), ReuseDistances(model)
    for piece in in_pieces(trace, seen):
        for statistic in (popularity, adjacency, tables, ahead, partners, table, segments, reuse):
            statistic.add(piece)
        if progress is not None:
            progress(len(piece))
    foretold = {**tables.result(), **ahead.result(), **table.result()}
    if adjacency.overlap is not None:
        foretold["previous_token_recall"] = adjacency.overlap
    depths = foretold.get("ahead", {}).values()
    domains = [name for name in seen.names if name]
    return {
        **_counts(seen),
        "settings": {
            "skew": popularity.skew,
            "repetition": _beyond(adjacency.overlap, popularity.chance),
            "correlation": correlation(tables, popularity),
            "domains": len(domains) or None,
            "token_information": partners.information(),
            "ahead": [figures["recall_k"] for figures in depths],
        },
        "popularity": popularity.result(),
        "locality": {**adjacency.result(), **segments.result()},
        "reuse": reuse.result(),
        "prediction": foretold,
        "domains": popularity.domains() if domains else None,
    }


def _counts(seen: Outline) -> dict[str, Any]:
    lengths = np.array(seen.lengths)
    return {
        "sequences": len(lengths),
        "tokens": seen.tokens,
        "prefill_tokens": seen.prefill,
        "sequence_tokens": {
            "least": int(lengths.min()),
            "median": float(np.median(lengths)),
            "most": int(lengths.max()),
        },
    }


def _beyond(found: float | None, chance: float) -> float | None:
    """How far *found* lies from chance (0) to certainty (1)."""
    return None if found is None or chance >= 1 else (found - chance) / (1 - chance)
