"""When the host had each gate's answer, its plan, had launched what follows, and looked ahead."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

#: Columns of :meth:`EventClock.take`.
ANSWERED, PLANNED, LAUNCHED, FETCHED = range(4)


class EventClock:
    """Four moments of every event on the host's clock; costs four readings of it.

    Unlike marks on the device they leave the run as it is: from *answered* to *launched* the
    host works, the first copy being issued after *planned*; from *launched* until the next
    answer the device does, and until *fetched* the host beside it: it decides on prefetches.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._at = array("d")
        #: For each event the held copies that were still on their way when it asked for them.
        self.late = array("q")
        #: For each event the prefetches that it issued before its launch.
        self.issued = array("q")

    def note(self) -> None:
        """An answer, its plan, the launch of what follows, its prefetches: in turns."""
        self._at.append(self._now())

    def take(self, layers: int) -> Times:
        """Seconds [steps, layers, 4] since the last time; all is then forgotten."""
        times = np.array(self._at, dtype=np.float64)
        self._at, self.late, self.issued = array("d"), array("q"), array("q")
        return times.reshape(-1, layers, 4)
