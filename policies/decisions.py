"""The decision log: every choice of a run, in whole numbers, and its fingerprint."""

from __future__ import annotations

import hashlib
from array import array

#: Numbers buffered before they are hashed.
_CHUNK = 1 << 16


class DecisionLog:
    """What a policy decided, event by event; equal logs mean equal decisions.

    One record per event at which something was missed or moved: ``-1, event, missed`` (their
    number), then per move ``copy, slot, victim``, ``-2`` before each further wave, ``-3``
    before the prefetches, ``-4, expert, service`` for what was not loaded; ``-5, step``
    before a step's prefetches. Events without a record held all of their demand and moved
    nothing. With *keep* the numbers stay readable in :attr:`numbers`.
    """

    def __init__(self, keep: bool = False) -> None:
        self._hash = hashlib.sha256()
        self._buffer: list[int] = []
        self.numbers: array[int] | None = array("q") if keep else None

    def add(self, numbers: list[int]) -> None:
        """Append one record."""
        self._buffer += numbers
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        chunk = array("q", self._buffer)
        self._hash.update(chunk.tobytes())
        if self.numbers is not None:
            self.numbers += chunk
        self._buffer.clear()

    def sha256(self) -> str:
        """Fingerprint of all records so far, in hexadecimal."""
        self._flush()
        return self._hash.hexdigest()
