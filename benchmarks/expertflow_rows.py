"""Rows of ``expertflow_gpu``: one for each cell, also where it failed or was not begun."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from reports.validation.request import failure_words

Row = dict[str, Any]

WORLDS = ("gpu", "sim")


class Clock:
    """Says whether there is still time to begin another cell."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._now = limit_s, now
        self._start = now()

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def over(self) -> bool:
        """Whether nothing more is begun."""
        return self.spent_s >= self._limit_s


def attempt(about: Row, work: Callable[[], Row], clock: Clock) -> Row:
    """*about* with what *work* found, or with why there is nothing: ``failed``, ``skipped``."""
    if clock.over:
        return about | {"skipped": "no time left"}
    begun = clock.spent_s
    try:
        found = work()
    except Exception as error:  # one cell must not take the others with it
        found = {"failed": failure_words(error)}
    return about | found | {"took_s": round(clock.spent_s - begun, 2)}


def ratio(row: Row, base: Row, name: str) -> Row:
    """Tokens per second of *row* over those of *base* in each world, where both are known."""
    found: Row = {}
    for world in WORLDS:
        key = f"tokens_per_s_{world}"
        if row.get(key) and base.get(key):
            found[f"{name}_{world}"] = row[key] / base[key]
    return found
