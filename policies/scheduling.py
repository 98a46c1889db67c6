"""Which sequences run together: schedulers of batches, and of tokens while they decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from policies.base import Context
from traces.trace import IntArray, TokenSequence

BoolArray = npt.NDArray[np.bool_]

#: How the keys and values of a sequence follow it into another group.
KV_MODES = ("merge", "reindex")

#: Where a token scheduler takes the path of a coming token from.
PATH_SOURCES = ("auto", "forecaster", "previous", "history")


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


@dataclass(frozen=True)
class Coming:
    """The coming tokens of a unit's n live sequences, as a token scheduler sees them.

    *paths* is bool [n, L, E]: the experts that each token is expected to take. *present* int
    [n] is the group that each sequence decoded in last, *sequence_ids* int [n] its number and
    *kv_tokens* int [n] the tokens whose keys and values it holds. They are to be divided into
    *groups* groups of at most *most*. Rounds of decode steps count from 0 in every unit.
    """

    unit: int
    round: int
    groups: int
    most: int
    paths: BoolArray
    present: IntArray
    sequence_ids: IntArray
    kv_tokens: IntArray


class TokenScheduler(FileOrder):
    """Divides the live sequences of a *unit* of batches into groups, anew while they decode.

    The rule is that of :mod:`policies.batching`; this class only says who goes with whom. A
    subclass is a dataclass that declares what it lets the user choose; what it does not
    declare stays as here. It is told neither times nor the routing to come.
    """

    #: Batches that decode together.
    unit: int = 2
    #: Rounds of decode steps from one division to the next.
    every: int = 1
    #: A group takes its steps until the next division in a row, not by turns with the others.
    in_a_row: bool = False
    #: How keys and values follow, one of :data:`KV_MODES`.
    kv: str = "merge"
    #: Whose paths are shown, one of :data:`PATH_SOURCES`.
    paths: str = "auto"
    #: Divides beside the step that runs, not knowing its tokens, instead of after it.
    overlap: bool = False

    def reset(self, context: Context) -> None:
        """Forget everything; a run in *context* is about to start."""

    @abstractmethod
    def divide(self, coming: Coming) -> Sequence[int] | IntArray:
        """The group of each sequence, [n] numbers from 0; which group has which is all one.

        Asked only where there is more than one group.
        """

    def host_s(self, tokens: int, values: int) -> float:
        """Host seconds that :meth:`divide` takes for *tokens* paths of *values* (L * E) each.

        A calibrated constant for the simulated world; a real one measures.
        """
        return 0.0
