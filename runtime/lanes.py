"""The lanes of a device: where it computes, and where copies to it run beside that.

A :class:`Mark` is a point of a lane: it can be asked whether it has passed, waited for by the
host or by the computing lane, and says when it passed. CUDA has streams and events for this;
on the CPU copies are made when somebody needs them, or later than that in tests.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.driver import Writes, copy_all_to_device, copy_to_device


class Mark:
    """A point of a lane; *at_s* is when it passed, on the device's clock, once read.

    *ticket* is the number of the copy before it, where copies are counted as they land.
    """

    __slots__ = ("at_s", "event", "ticket")

    def __init__(self, event: Any = None, ticket: int = 0) -> None:
        self.event, self.ticket = event, ticket
        self.at_s = 0.0


def view_of(tensor: Tensor) -> Any:
    """The numbers of a one-dimensional *tensor* on the host, to read and set at little cost."""
    numbers: Any = tensor.numpy()
    return memoryview(numbers)


class Lanes(ABC):
    """One device with a computing lane and a copy lane that run beside each other."""

    device: torch.device
    #: Whether the beginning of each copy is marked too.
    timed = False

    def enter(self) -> None:
        """A step begins: what computes now is the computing lane."""

    @abstractmethod
    def mark(self) -> Mark:
        """The present end of the computing lane."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        """Append a copy to the copy lane; marks before and after it."""

    def copy_first(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        """Append the first of several copies; the others follow in :meth:`copy_all`."""
        return self.copy(target, source)

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        """Append copies to the copy lane, each a (target, source); marks before and after all.

        *begun* is what :meth:`copy_first` answered, if it has appended the first already.
        """
        first = begun or self.copy_first(*pairs[0])
        marks = [first, *(self.copy(target, source) for target, source in pairs[1:])]
        return marks[0][0], marks[-1][1]

    @abstractmethod
    def passed(self, mark: Mark) -> bool:
        """Whether *mark* has been reached; never waits."""

    @abstractmethod
    def compute_after(self, mark: Mark) -> None:
        """Let the computing lane wait for *mark* of the copy lane."""

    @abstractmethod
    def copy_after(self, mark: Mark) -> None:
        """Let the copy lane wait for *mark* of the computing lane."""

    @abstractmethod
    def copy_after_compute(self) -> None:
        """Let the copy lane wait for all that was given to the computing lane so far."""

    @abstractmethod
    def read(self, mark: Mark) -> float:
        """Seconds on the device's clock at which *mark*, which has passed, was reached."""

    def recycle(self, marks: list[Mark]) -> None:
        """Nobody will ask for *marks* again: what they are made of can be used anew."""

    @abstractmethod
    def finish(self) -> None:
        """Wait on the host for both lanes."""

    def finish_all(self) -> None:
        """Wait on the host for everything that the device was given, by whomever."""
        self.finish()

    def write(self, target: Tensor, values: Sequence[tuple[int, int]]) -> None:
        """Let the computing lane set elements of the contiguous int32 *target* to *values*."""
        flat = target.view(-1)
        for at, value in values:
            flat[at] = value

    def count_landings(self) -> Tensor:
        """Number copies from now on; int32 [1] on the device, the last number to have landed."""
        raise NotImplementedError(f"{type(self).__name__} does not count copies")

    def now(self) -> float:
        """The host's clock, in seconds."""
        return time.perf_counter()


class CudaLanes(Lanes):
    """The current CUDA stream computes, a stream of its own copies.

    With *timed* marks can be read and copies are marked; without, marks read as 0.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self.device = device
        self.timed = self._timing = timed
        cuda: Any = torch.cuda
        self._copies = cuda.Stream(device)
        self._copy_handle = int(self._copies.cuda_stream)
        self._compute: Any = torch.cuda.current_stream(device)
        self._new: Callable[[], Any] = lambda: cuda.Event(enable_timing=timed)
        self._spare: list[Any] = []
        self._writes = Writes()
        self._issued = 0
        self._landed: tuple[Tensor, Tensor] | None = None
        self._landed_now: Any = None
        self._origin = cuda.Event(enable_timing=True)
        self._origin.record()
        #: Stretches every copy by so many GPU cycles: for tests.
        self.delay_cycles: Callable[[], int] | None = None

    def _event(self) -> Any:
        return self._spare.pop() if self._spare else self._new()

    def recycle(self, marks: list[Mark]) -> None:
        self._spare += [mark.event for mark in marks]

    def enter(self) -> None:
        self._compute = torch.cuda.current_stream(self.device)

    def mark(self) -> Mark:
        event = self._event()
        event.record(self._compute)
        return Mark(event)

    def copy(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        return self.copy_all([(target, source)])

    def copy_first(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        stream = self._copies
        begin = Mark()
        if self.timed:
            begin.event = self._event()
            begin.event.record(stream)
        if self.delay_cycles is not None:
            cuda: Any = torch.cuda
            with cuda.stream(stream):
                cuda._sleep(self.delay_cycles())
        # By itself: the link is at work while the others are handed over.
        copy_to_device(target.data_ptr(), source.data_ptr(), source.nbytes, self._copy_handle)
        return begin, begin

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        begin, _ = begun or self.copy_first(*pairs[0])
        if len(pairs) > 1:
            rest = [(t.data_ptr(), s.data_ptr(), s.nbytes) for t, s in pairs[1:]]
            copy_all_to_device(rest, self._copy_handle)
        end = Mark(self._event())
        if self._landed is not None:
            self._issued = end.ticket = self._issued + 1
            here, there = self._landed
            written = (here.data_ptr(), end.ticket), (there.data_ptr(), end.ticket)
            self._writes.put(written, self._copy_handle)
        end.event.record(self._copies)
        return begin, end

    def count_landings(self) -> Tensor:
        if self._landed is None:
            there = torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._landed = torch.zeros(1, dtype=torch.int32, device=self.device), there
            self._landed_now = view_of(there)
        return self._landed[0]

    def write(self, target: Tensor, values: Sequence[tuple[int, int]]) -> None:
        self._writes.send(target.data_ptr(), values, int(self._compute.cuda_stream))

    def passed(self, mark: Mark) -> bool:
        if mark.ticket:
            return bool(self._landed_now[0] >= mark.ticket)
        return bool(mark.event.query())

    def compute_after(self, mark: Mark) -> None:
        self._compute.wait_event(mark.event)

    def copy_after(self, mark: Mark) -> None:
        self._copies.wait_event(mark.event)

    def copy_after_compute(self) -> None:
        self._copies.wait_stream(self._compute)

    def read(self, mark: Mark) -> float:
        if not self._timing:
            return 0.0
        if mark.ticket:
            # By its number a copy has landed a moment before its mark has passed.
            mark.event.synchronize()
        return float(self._origin.elapsed_time(mark.event)) * 1e-3

    def finish(self) -> None:
        self._compute.synchronize()
        self._copies.synchronize()

    def finish_all(self) -> None:
        torch.cuda.synchronize(self.device)


class HostLanes(Lanes):
    """The CPU as a device: computing happens at once, copies when they are needed.

    A copy lands when somebody waits for it or for a later one, when the lane is asked
    ``lag()`` times whether it has landed, or at :meth:`finish`. *spoil* is called with the
    target when a copy is issued: a test can make reading too early visible.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        lag: Callable[[], int] = lambda: 0,
        spoil: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._lag, self._spoil = lag, spoil
        self._waiting: deque[tuple[Mark, Mark, Tensor, Tensor]] = deque()

    def mark(self) -> Mark:
        mark = Mark(0)
        mark.at_s = self.now()
        return mark

    def copy(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        begin, end = Mark(0), Mark(max(1, self._lag() + 1))
        if self._spoil is not None:
            self._spoil(target)
        self._waiting.append((begin, end, target, source))
        return begin, end

    def _land(self) -> None:
        begin, end, target, source = self._waiting.popleft()
        begin.at_s = self.now()
        target.copy_(source)
        end.at_s = self.now()
        end.event = 0

    def passed(self, mark: Mark) -> bool:
        if mark.event:
            mark.event -= 1
            if mark.event == 0:
                mark.event = 1
                self.compute_after(mark)
        return not mark.event

    def compute_after(self, mark: Mark) -> None:
        while mark.event:
            self._land()

    def copy_after(self, mark: Mark) -> None:
        pass

    def copy_after_compute(self) -> None:
        pass

    def read(self, mark: Mark) -> float:
        return mark.at_s

    def finish(self) -> None:
        while self._waiting:
            self._land()


def random_lag(seed: int, most: int) -> Callable[[], int]:
    """A *lag* for :class:`HostLanes`: 0 to *most* questions, drawn by *seed*."""
    draw = random.Random(seed)
    return lambda: draw.randint(0, most)


def lanes_for(device: torch.device, *, timed: bool = False) -> Lanes:
    """The lanes of *device*."""
    return CudaLanes(device, timed=timed) if device.type == "cuda" else HostLanes(device)
