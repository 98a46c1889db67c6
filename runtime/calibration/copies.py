"""Copies between host and device: tables by size, pinning, and what issuing one costs."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.calibration.bench import Bench
from runtime.calibration.fits import queued_within, rising, significant
from runtime.lanes import lanes_for
from runtime.store import PinnedBlock, available_bytes

KIB, MIB, GIB = 2**10, 2**20, 2**30

#: From four kibibytes to the largest experts, four steps for each factor of 32 or so.
SIZES = (
    4 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 12 * MIB, 16 * MIB, 32 * MIB,
    64 * MIB, 128 * MIB, 352 * MIB, GIB,
)  # fmt: skip
PAGE = 4 * KIB
QUICK_MOST = 256 * MIB
HOST_MOST = 16 * MIB

#: Host memory that copies are taken from, at most so large a share of what is free: experts lie
#: in so much that no address translation is remembered from one copy to the next.
SPREAD_BYTES, FREE_SHARE = 8 * GIB, 0.25

#: Experts have at least so many bytes.
EXPERT_LEAST = MIB

#: Bytes of one measurement of copies back to back.
QUEUED_BYTES = 512 * MIB
MOST_QUEUED = 64

#: How often all sizes are measured; the mean counts.
PASSES = 3


class Table(NamedTuple):
    """Seconds of one direction's copies by size, into an idle engine and back to back."""

    sizes_bytes: list[int]
    isolated_s: list[float]
    queued_s: list[float]

    def longer(self, seconds: float) -> Table:
        """The same with copies as large as experts are longer by *seconds* each."""
        more = [seconds if size >= EXPERT_LEAST else 0.0 for size in self.sizes_bytes]
        isolated, queued = (
            [significant(a + b, 6) for a, b in zip(table, more, strict=True)]
            for table in (self.isolated_s, self.queued_s)
        )
        return Table(self.sizes_bytes, isolated, queued)


class Copies(NamedTuple):
    """All that was measured of copies."""

    h2d: Table
    d2h: Table
    pinned_alloc_bytes_per_s: float
    issue_s: float
    wake_s: float


def measure_copies(bench: Bench, advance: Callable[[], None]) -> Copies:
    """Both directions' tables; *advance* is called after each."""
    most = SIZES[-1] if bench.cuda else HOST_MOST
    if bench.quick:
        most = min(most, QUICK_MOST)
    sizes = [size for size in SIZES if size <= most]
    spread = most
    if bench.cuda and not bench.quick:
        spread = max(most, min(SPREAD_BYTES, int(FREE_SHARE * available_bytes()) // PAGE * PAGE))
    started = time.perf_counter()
    block = PinnedBlock(spread, pin=bench.cuda, what="calibration")
    if not bench.cuda:
        block.bytes.zero_()  # without registering, the first touch allocates
    pinned = spread / (time.perf_counter() - started)
    try:
        there = torch.zeros(most, dtype=torch.uint8, device=bench.device)
        h2d = _table(bench, sizes, there, block.bytes, advance)
        d2h = _table(bench, sizes, block.bytes, there, advance)
        issue = _issue_s(bench, there, block.bytes)
        wake = _wake_s(bench, there, block.bytes)
    finally:
        bench.wait()
        block.close()
    return Copies(h2d, d2h, significant(pinned), issue, wake)


def _table(
    bench: Bench, sizes: list[int], target: Tensor, source: Tensor, advance: Callable[[], None]
) -> Table:
    passes = [_pass(bench, sizes, target, source) for _ in range(PASSES)]
    advance()
    # A neighbour on the link stays for longer than one measurement; runs meet it as often.
    isolated, queued = (_mean_of(of_kind) for of_kind in zip(*passes, strict=True))
    isolated = [significant(s, 6) for s in rising(isolated)]
    queued = [significant(s, 6) for s in rising(queued_within(rising(queued), isolated))]
    return Table(list(sizes), isolated, queued_within(queued, isolated))


def _mean_of(passes: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each size over *passes*."""
    return [statistics.fmean(seconds) for seconds in zip(*passes, strict=True)]


def _pass(
    bench: Bench, sizes: list[int], target: Tensor, source: Tensor
) -> tuple[list[float], list[float]]:
    """Seconds of copies of all *sizes*, into an idle engine and back to back."""
    isolated, queued = [], []
    for size in sizes:
        copy = _walking(bench, target, source, size)
        # Issuing a copy is the host's time, not the copy's.
        isolated.append(bench.device_s(copy, 5 if size > 64 * MIB else 15, held=True))
        queued.append(_queued_s(bench, copy, size))
    return isolated, queued


def _walking(bench: Bench, target: Tensor, source: Tensor, size: int) -> Callable[[], None]:
    """A copy of *size* bytes, each from and to the next place: experts lie here and there.

    As in the runtime, what waits for the copy waits for a mark behind it.
    """
    cuda: Any = torch.cuda
    there, here = (_places(memory.numel(), size) for memory in (target, source))

    def copy() -> None:
        to, at = next(there), next(here)
        target[to : to + size].copy_(source[at : at + size], non_blocking=True)
        if bench.cuda:
            cuda.Event().record()

    return copy


def _places(room: int, size: int) -> Iterator[int]:
    """Where pieces of *size* bytes begin in *room* bytes, page by page, again and again.

    Neighbours in the order lie far from each other.
    """
    step = -(-size // PAGE) * PAGE
    count = max(1, (room - size) // step + 1)
    stride = max(1, round(count * 0.382))
    while math.gcd(stride, count) > 1:
        stride += 1
    return (i * stride % count * step for i in itertools.count())


def _queued_s(bench: Bench, copy: Callable[[], None], size: int) -> float:
    """Seconds of one of many copies on one stream, all issued before the first runs."""
    count = max(3, min(MOST_QUEUED, QUEUED_BYTES // size))
    if not bench.cuda:
        count = min(count, 4)

    def many() -> None:
        for _ in range(count):
            copy()

    return bench.device_s(many, 3 if size > 64 * MIB else 7, held=True) / count


def _wake_s(bench: Bench, there: Tensor, here: Tensor) -> float:
    """Device seconds from a copy's end until a lane that waits for it goes on."""
    if not bench.cuda:
        return 0.0
    lanes, size, found = lanes_for(bench.device, timed=True), 8 * MIB, []
    for _ in range(30):
        bench.wait()
        begin, landed = lanes.copy(there[:size], here[:size])
        lanes.compute_after(landed)
        awake = lanes.mark()
        lanes.finish()
        found.append(lanes.read(awake) - lanes.read(landed))
        lanes.recycle([begin, landed, awake])
    return significant(max(statistics.median(found), 0.0))


def _issue_s(bench: Bench, there: Tensor, here: Tensor) -> float:
    """Host seconds to issue one copy as the runtime does: its marks, and a wait for it."""
    lanes, size, count = lanes_for(bench.device), 4 * KIB, 16

    def issue() -> None:
        for i in range(count):
            _, end = lanes.copy(there[i * size : (i + 1) * size], here[i * size : (i + 1) * size])
            lanes.compute_after(end)

    seconds = bench.host_s(issue) / count
    lanes.finish()
    return significant(seconds)
