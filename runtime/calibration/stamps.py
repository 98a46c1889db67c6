"""What the stamps of decode steps in one graph tell: arithmetic on the device's clock."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Nanoseconds [steps, layers, 4] of the device's clock, as a gate's kernel writes them.
Stamps = npt.NDArray[np.int64]

#: The columns: the gate has answered; the host had settled the event before; all copies are
#: known; they have landed.
ANSWERED, SETTLED, KNOWN, LANDED = range(4)

#: The host was late for a gate that waited for it more than so many times as long as a first
#: gate does, for which nothing is to be settled.
LATE = 2.0


class GateTimes(NamedTuple):
    """Seconds of one layer in one graph: of its gate's kernel, and from there to the next answer.

    *handshake_s* where the host was not late; *work_s* holds the experts, and attention and
    gate of the next layer.
    """

    handshake_s: float
    work_s: float

    @property
    def layer_s(self) -> float:
        """From one answer to the next where the host is not late."""
        return self.handshake_s + self.work_s


def gate_times(stamps: Stamps) -> GateTimes:
    """What gates and layers of *stamps* take, of steps that miss hardly anything.

    Raises :class:`ValueError` if there are fewer than two layers, or no steps.
    """
    if stamps.ndim != 3 or not len(stamps) or stamps.shape[1] < 2:
        raise ValueError(f"stamps of shape {stamps.shape}, expected steps of two or more layers")
    took = stamps[:, :, SETTLED] - stamps[:, :, ANSWERED]
    in_time = took <= LATE * np.median(took[:, 0])
    gates = (stamps[:, :, LANDED] - stamps[:, :, ANSWERED])[in_time]
    work = stamps[:, 1:, ANSWERED] - stamps[:, :-1, LANDED]
    return GateTimes(middle_mean(gates) * 1e-9, middle_mean(work) * 1e-9)


def answers_apart_s(stamps: Stamps) -> float:
    """Median over the steps of the mean seconds from one answer to the next."""
    gates = stamps.shape[1] - 1
    took_ns = float(np.median(stamps[:, -1, ANSWERED] - stamps[:, 0, ANSWERED]))
    return float(took_ns / gates * 1e-9)


def middle_mean(values: npt.NDArray[np.int64]) -> float:
    """The mean of the middle half of *values*, which a coarse clock does not round as a median."""
    ordered = np.sort(values, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())
