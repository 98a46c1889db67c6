"""The part of a trace that both worlds run, written once so that both see the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from traces.errors import InputError
from traces.store import StoredTrace, open_trace, write_trace
from traces.trace import TokenSequence


@dataclass(frozen=True)
class Cut:
    """How much of a trace is run: the first *sequences*, *max_tokens* decode tokens of each."""

    sequences: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--sequences", self.sequences), ("--max-tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: expected at least 1")

    @property
    def all(self) -> bool:
        """Whether nothing is cut."""
        return self.sequences is None and self.max_tokens is None

    def apply(self, trace: StoredTrace) -> Iterator[TokenSequence]:
        """The sequences of *trace* that remain, each as long as it may be."""
        for sequence in islice(trace.sequences(), self.sequences):
            yield _shortened(sequence, self.max_tokens)


@contextmanager
def cut_trace(path: str, cut: Cut) -> Iterator[str]:
    """A trace file with what *cut* leaves of the trace at *path*, gone after the block."""
    trace = open_trace(path)
    if cut.all:
        yield path
        return
    with TemporaryDirectory(prefix="simctl-") as folder:
        part = Path(folder) / Path(path).name
        write_trace(
            part,
            trace.model,
            cut.apply(trace),
            source=trace.source,
            license=trace.license,
            extra=_extra(trace, cut.sequences),
        )
        yield str(part)


def count_sequences(path: str) -> int:
    """How many sequences the trace at *path* has."""
    return sum(1 for _ in open_trace(path).sequences(()))


def _shortened(sequence: TokenSequence, most: int | None) -> TokenSequence:
    """*sequence* with its whole prompt and at most *most* decode tokens."""
    if most is None or len(sequence) <= sequence.prefill + most:
        return sequence
    kept = slice(0, sequence.prefill + most)
    return replace(
        sequence,
        experts=sequence.experts[kept],
        positions=sequence.positions[kept],
        tokens=None if sequence.tokens is None else sequence.tokens[kept],
        weights=None if sequence.weights is None else sequence.weights[kept],
        ahead=tuple(guess[kept] for guess in sequence.ahead),
    )


def _extra(trace: StoredTrace, sequences: int | None) -> dict[str, Any]:
    """What the trace's writer noted, its domains only for the sequences that remain."""
    extra = dict(trace.extra)
    if isinstance(extra.get("domains"), list):
        extra["domains"] = extra["domains"][:sequences]
    return extra
