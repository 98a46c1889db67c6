"""A trace cut into pieces small enough to hold, with what a statistic needs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from traces.model import ModelSpec
from traces.trace import IntArray, TokenSequence, Trace

#: Cells of a one-hot array of a piece.
PIECE_CELLS = 2**22

#: Tokens of a segment of the segment-routing score; pieces are cut at multiples of it.
SEGMENT_TOKENS = 16


@dataclass(frozen=True)
class Piece:
    """n consecutive tokens of one sequence.

    *half* is 0 in the first half of the trace's tokens and 1 in the second; *previous* holds
    the experts [layers, k] of the token before, unless the sequence begins here; *ends* says
    whether the sequence does.
    """

    model: ModelSpec
    experts: IntArray
    half: int
    domain: int
    ends: bool
    previous: IntArray | None = None
    tokens: IntArray | None = None
    ahead: tuple[IntArray, ...] = ()

    def __len__(self) -> int:
        return len(self.experts)

    @cached_property
    def hot(self) -> npt.NDArray[np.bool_]:
        """Which experts each token takes: bool [n, layers, experts]."""
        count, layers, _ = self.experts.shape
        hot = np.zeros((count, layers, self.model.experts), bool)
        np.put_along_axis(hot, self.experts.astype(np.intp), True, axis=2)
        return hot


class Statistic(Protocol):
    """Fed with every piece in order, then asked for its figures."""

    def add(self, piece: Piece) -> None:
        """Take *piece* in."""
        ...

    def result(self) -> dict[str, Any]:
        """The figures, as plain values."""
        ...


@dataclass(frozen=True)
class Outline:
    """What a first look at a trace tells: tokens per sequence and in prompts, domains."""

    lengths: tuple[int, ...]
    prefill: int
    names: tuple[str, ...]
    domain_of: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def middle(self) -> int:
        """Where the second half of the tokens begins: between segments of a sequence."""
        start = 0
        for length in self.lengths:
            if start + length > self.tokens // 2:
                break
            start += length
        return start + (self.tokens // 2 - start) // SEGMENT_TOKENS * SEGMENT_TOKENS


def outline(trace: Trace) -> Outline:
    """Count *trace* without its optional columns."""
    lengths, prefill = [], 0
    for sequence in _plain(trace):
        lengths.append(len(sequence))
        prefill += sequence.prefill
    labels = domains_of(trace, len(lengths))
    names = sorted(set(labels))
    return Outline(tuple(lengths), prefill, tuple(names), tuple(names.index(x) for x in labels))


def domains_of(trace: Trace, sequences: int) -> Sequence[str]:
    """The domain of each sequence in file order; all the same where none are known."""
    extra: dict[str, Any] = getattr(trace, "extra", {})
    labels = extra.get("domains")
    if isinstance(labels, list) and len(labels) == sequences:
        return [str(label) for label in labels]
    return [""] * sequences


def in_pieces(trace: Trace, seen: Outline) -> Iterator[Piece]:
    """Cut *trace*; the half of its tokens and long sequences end a piece."""
    model = trace.model
    most = max(PIECE_CELLS // (model.layers * model.experts), 1)
    most = max(most // SEGMENT_TOKENS, 1) * SEGMENT_TOKENS
    middle, start = seen.middle, 0
    for sequence, domain in zip(trace.sequences(), seen.domain_of, strict=True):
        count = len(sequence)
        cuts = set(range(0, count, most)) | {count}
        if 0 < middle - start < count:
            cuts.add(middle - start)
        edges = sorted(cuts)
        for i, first in enumerate(edges[:-1]):
            half = int(start + first >= middle)
            yield _piece(model, sequence, (first, edges[i + 1]), half, domain)
        start += count


def _piece(
    model: ModelSpec, sequence: TokenSequence, edges: tuple[int, int], half: int, domain: int
) -> Piece:
    part = slice(*edges)
    return Piece(
        model,
        sequence.experts[part],
        half,
        domain,
        ends=edges[1] == len(sequence),
        previous=sequence.experts[edges[0] - 1] if edges[0] else None,
        tokens=None if sequence.tokens is None else sequence.tokens[part],
        ahead=tuple(array[part] for array in sequence.ahead),
    )


def _plain(trace: Trace) -> Iterator[TokenSequence]:
    from traces.store import StoredTrace

    return trace.sequences(columns=()) if isinstance(trace, StoredTrace) else trace.sequences()
