"""How long copies between host and GPU take: tables by size, one for each way and situation."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from traces.errors import InputError


@dataclass(frozen=True)
class CopyTable:
    """Seconds of one copy by its size, interpolated between what was measured."""

    sizes_bytes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes_bytes) != len(self.seconds) or len(self.seconds) < 2:
            raise InputError(
                f"{len(self.sizes_bytes)} sizes_bytes and {len(self.seconds)} seconds, "
                "expected as many of each and at least 2"
            )
        if any(a >= b for a, b in pairwise(self.sizes_bytes)):
            raise InputError("sizes_bytes are not rising")
        if self._monotone[-1] <= self._monotone[-2]:
            raise InputError("the last of seconds is not the longest")

    @cached_property
    def _monotone(self) -> tuple[float, ...]:
        """The seconds, lowered where a larger copy was measured to be faster."""
        return tuple(min(self.seconds[i:]) for i in range(len(self.seconds)))

    def copy_s(self, size_bytes: float) -> float:
        """Seconds of a copy of *size_bytes*; beyond either end the nearest segment goes on."""
        sizes, seconds = self.sizes_bytes, self._monotone
        i = min(max(bisect_right(sizes, size_bytes) - 1, 0), len(sizes) - 2)
        slope = (seconds[i + 1] - seconds[i]) / (sizes[i + 1] - sizes[i])
        return max(seconds[i] + (size_bytes - sizes[i]) * slope, 0.0)


@dataclass(frozen=True)
class Direction:
    """One direction of the link: *isolated* copies into an idle engine, *queued* back to back."""

    isolated: CopyTable
    queued: CopyTable

    def copy_s(self, size_bytes: float, queued: bool) -> float:
        """Seconds the copy engine needs for *size_bytes*, right behind another copy or not.

        Never longer behind another, though beyond the largest sizes noise may say so.
        """
        alone_s = self.isolated.copy_s(size_bytes)
        return min(self.queued.copy_s(size_bytes), alone_s) if queued else alone_s


@dataclass(frozen=True)
class Link:
    """Host and GPU are joined by one engine each way; they do not slow each other down.

    *wake_s* passes from the end of a copy until a stream that waits for it goes on.
    """

    h2d: Direction
    d2h: Direction
    wake_s: float = field(default=0.0, metadata={"least": 0})
