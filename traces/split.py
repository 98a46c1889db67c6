"""Parts of a trace, cut between sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.statistics.pieces import domains_of
from traces.store import StoredTrace, write_trace
from traces.trace import TokenSequence, Trace


def divide(trace: Trace, count: int, share: float, seed: int) -> list[bool]:
    """Which of the *count* sequences belong to the first part, of about *share* of them.

    The draw is by domain where domains are known, so that both parts have them alike. Raises
    :class:`InputError` when a part would be empty.
    """
    rng = np.random.default_rng(seed)
    labels = np.array(domains_of(trace, count))
    order = rng.permutation(count)
    # Domain by domain in random order, then evenly spaced: every run of a domain is shared out.
    order = order[np.argsort(labels[order], kind="stable")]
    steps = np.floor(np.arange(count + 1) * share + 0.5)
    first = np.zeros(count, bool)
    first[order] = np.diff(steps) > 0
    if first.all() or not first.any():
        raise InputError(
            f"{trace.name}: a share of {share:g} of {count} sequences leaves one part empty, "
            "expected sequences for both"
        )
    return [bool(chosen) for chosen in first]


def write_part(trace: StoredTrace, path: Path, chosen: Sequence[bool], part: str) -> StoredTrace:
    """Write the *chosen* sequences to *path*; *part* says in the source what they are.

    Sequences keep their ids, and the domains noted for them go along.
    """
    labels = trace.extra.get("domains")
    extra: dict[str, Any] = dict(trace.extra)
    if isinstance(labels, list) and len(labels) == len(chosen):
        extra["domains"] = [name for name, taken in zip(labels, chosen, strict=True) if taken]
    return write_trace(
        path,
        trace.model,
        _chosen(trace, chosen),
        source=f"{trace.source} ({part})" if trace.source else part,
        license=trace.license,
        extra=extra,
    )


def _chosen(trace: StoredTrace, chosen: Sequence[bool]) -> Iterator[TokenSequence]:
    last = max((i for i, taken in enumerate(chosen) if taken), default=-1)
    for i, sequence in enumerate(trace.sequences()):
        if chosen[i]:
            yield sequence
        if i == last:
            return
