"""A trace in memory: sequences of tokens and the experts their gates chose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from traces.model import ModelSpec

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class TokenSequence:
    """One sequence: n tokens through L layers, k experts each.

    *experts* is int16 [n, L, k], by falling gate weight where that is known. *positions* is
    int32 [n]. The first *prefill* tokens belong to the prompt, the rest were decoded one by
    one. *tokens* is int32 [n] token ids, *weights* float [n, L, k]; *ahead* holds up to three
    int16 arrays [n, L, m]: the best m experts of layer + 1, + 2, + 3 by those layers' gates,
    -1 past the last layer. The last three may be absent.
    """

    id: int
    experts: IntArray
    positions: IntArray
    prefill: int = 0
    tokens: IntArray | None = None
    weights: FloatArray | None = None
    ahead: tuple[IntArray, ...] = ()

    def __len__(self) -> int:
        return len(self.experts)


class Trace(Protocol):
    """What simulators, runtimes and statistics read: a model and re-iterable sequences."""

    @property
    def name(self) -> str:
        """Where it came from: a file path or a title."""
        ...

    @property
    def model(self) -> ModelSpec:
        """The model that routed."""
        ...

    @property
    def source(self) -> str:
        """Provenance in words."""
        ...

    @property
    def license(self) -> str:
        """Under which terms it may be used."""
        ...

    def sequences(self, columns: Collection[str] | None = None) -> Iterator[TokenSequence]:
        """Every sequence in file order, streamed; can be called again.

        *columns* limits the optional parts that must be there: any of ``token``,
        ``weights``, ``ahead_1``, ``ahead_2``, ``ahead_3``; by default all there are.
        """
        ...


@dataclass(frozen=True)
class MemoryTrace:
    """A trace whose sequences are already arrays."""

    model: ModelSpec
    items: Sequence[TokenSequence]
    name: str = "memory"
    source: str = ""
    license: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def sequences(self, columns: Collection[str] | None = None) -> Iterator[TokenSequence]:
        """Every sequence in order, whole."""
        return iter(self.items)
