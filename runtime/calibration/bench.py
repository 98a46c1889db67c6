"""Timing on one device: on CUDA by events, on the CPU by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.fullspeed import Cores, at_full_speed

Work = Callable[[], Any]

#: GPU cycles that keep a stream busy while work is queued behind them: about 2 ms at 1.5 GHz.
HOLD_CYCLES = 3_000_000


def median_s(work: Work, repeats: int, now: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of *work* by the clock *now*, after one run that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = now()
        work()
        found.append(now() - start)
    return statistics.median(found)


class Bench:
    """What a device is timed with; *quick* asks for fewer and smaller measurements."""

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self.cuda = device.type == "cuda"
        self._cuda: Any = torch.cuda
        self._cores: Cores | None = None

    @contextmanager
    def at_full_speed(self) -> Iterator[None]:
        """Inside, what follows a :meth:`wait` runs on a core that no neighbour slows down."""
        with at_full_speed(self.device) as self._cores:
            yield
        self._cores = None

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.cuda:
            self._cuda.synchronize(self.device)
        if self._cores is not None:
            self._cores.settle()

    def host_s(self, work: Work, repeats: int = 20) -> float:
        """Host seconds of *work*, which only issues; the device is idle before each."""

        def settled() -> float:
            self.wait()
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        settled()
        return statistics.median(settled() for _ in range(repeats))

    def device_s(
        self, work: Work, repeats: int = 10, *, held: bool = False, first: Work | None = None
    ) -> float:
        """Median device seconds of *work*.

        *held* queues it all up before it starts, so that the host's issuing does not count;
        *first* runs before each, untimed.
        """
        if not self.cuda:
            return median_s(work, repeats)
        work()
        return statistics.median(self._between_events(work, held, first) for _ in range(repeats))

    def _between_events(self, work: Work, held: bool, first: Work | None) -> float:
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        if held:
            self._cuda._sleep(HOLD_CYCLES)
        if first is not None:
            first()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def graph(self, work: Work) -> Work:
        """*work* as one captured graph to replay; on the CPU *work* itself."""
        if not self.cuda:
            return work
        stream = self._cuda.Stream(self.device)
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            for _ in range(3):
                work()
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            work()
        return lambda: graph.replay()

    def graph_s(self, work: Work, times: int = 1, repeats: int = 10) -> float:
        """Device seconds of *work* without its launches, from a graph of *times* of it."""

        def many() -> None:
            for _ in range(times):
                work()

        return self.device_s(self.graph(many), repeats) / times

    def free(self) -> None:
        """Give cached device memory back, before something large."""
        if self.cuda:
            self._cuda.empty_cache()
