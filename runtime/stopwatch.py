"""Where a device's time goes: marks between stretches of the computing lane, read afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policies.result import CAUSES
from runtime.lanes import Lanes, Mark

#: The same in seconds of the device's clock.
Timed = tuple[str, float, float]

#: A stretch of the computing lane: its cause, and the marks before and after it.
Stretch = tuple[str, Mark, Mark]


class Stopwatch:
    """Splits the computing lane into stretches by cause, while :attr:`on`.

    Marks are read when the step is over, so that measuring costs no waiting.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.on = False
        self._last: Mark | None = None
        self._stretches: list[Stretch] = []
        self._deferred: Callable[[], Sequence[Timed]] | None = None

    def start(self) -> None:
        """A step begins on the computing lane."""
        if self.on:
            self._stretches = []
            self._last = self._lanes.mark()

    def split(self, cause: str) -> Mark | None:
        """What the computing lane did since the last split was *cause*; the mark between."""
        if not self.on or self._last is None:
            return None
        mark = self._lanes.mark()
        self._stretches.append((cause, self._last, mark))
        self._last = mark
        return mark

    def defer(self, read: Callable[[], Sequence[Timed]]) -> None:
        """Once the step is over *read* tells of stretches within those split, in order."""
        self._deferred = read

    def stretches(self) -> list[Timed]:
        """(cause, start, end) in seconds of the device's clock; the step must be over."""
        read = self._lanes.read
        found = [(cause, read(begin), read(end)) for cause, begin, end in self._stretches]
        if self._deferred is not None:
            found = _parted(found, self._deferred())
            self._deferred = None
        self._lanes.recycle([begin for _, begin, _ in self._stretches])
        self._stretches = []
        return found


def _parted(stretches: Sequence[Timed], inside: Sequence[Timed]) -> list[Timed]:
    """*stretches* with those *inside* them cut out, each with its own cause."""
    parts: list[Timed] = []
    for cause, begin, end in stretches:
        at = begin
        for other, first, last in inside:
            first, last = max(first, at), min(last, end)
            if first < last:
                parts += [(cause, at, first), (other, first, last)]
                at = last
        parts.append((cause, at, end))
    return parts


def by_cause(stretches: Sequence[Timed]) -> dict[str, float]:
    """Seconds of each cause."""
    seconds = dict.fromkeys(CAUSES, 0.0)
    for cause, begin, end in stretches:
        seconds[cause] += end - begin
    return seconds
