"""Which sequences run together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

from traces.trace import TokenSequence


class BatchScheduler(ABC):
    """Arranges sequences into batches; every sequence runs once, unchanged.

    It may look at prompts and their predicted routes, never at what was decoded.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def batches(
        self, sequences: Iterable[TokenSequence], batch: int
    ) -> Iterator[list[TokenSequence]]:
        """Batches of at most *batch* sequences."""


class FileOrder(BatchScheduler):
    """Takes sequences as they come: the canonical order that results are compared in."""

    name = "none"

    def batches(
        self, sequences: Iterable[TokenSequence], batch: int
    ) -> Iterator[list[TokenSequence]]:
        source = iter(sequences)
        while members := list(islice(source, batch)):
            yield members
