"""Launches the kernel behind each gate of a decode step that is one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.kernels.cuts import power_of_two

if TYPE_CHECKING:
    from runtime.families import Gate
    from runtime.handshake import Handshake
    from runtime.hook import GateReader, HostAnswer


#: Words of the host's memory, int32, each in a line of the cache of its own where the writers
#: differ: the device writes the first three, the host the others.
POSTED, GUESSED, FAILED, PLANNED, SETTLED, WORDS = 0, 1, 16, 32, 33, 64

#: The number of a copy that has not been issued: higher than that of any which has landed.
NEVER = 2**31 - 2

#: What the host has planned and settled when the device is to wait for nothing more.
RELEASED = 2**31 - 1

#: Computes hidden states [T, H] with experts [T, k], weights [T, k] and slots [E] into [T, H].
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


class GateKernel:
    """The launches of one *handshake*; if *served*, every event waits for its own plan.

    With *early* the next launch begins when the experts are known that are there.
    """

    def __init__(self, handshake: Handshake, *, served: bool, early: bool) -> None:
        # Not before: a machine without a GPU needs no triton.
        from runtime.kernels.triton_gate import gate_kernel

        self._kernel: Any = gate_kernel
        self._shake, self._served, self._early = handshake, served, early

    def load(self, reader: GateReader, gate: Gate, hidden: Tensor, experts: Experts) -> None:
        """Compile for the tokens of *hidden* [T, H], and run once, *experts* behind it.

        What is captured must be loaded before. The handshake has to be released.
        """
        shake, tokens, device = self._shake, len(hidden), hidden.device
        weights = torch.zeros(tokens, gate.top_k, dtype=gate.weights_dtype(), device=device)
        index = torch.zeros(tokens, gate.top_k, dtype=torch.int64, device=device)
        self.run(0, index, weights, index, reader.new_buffers(index, weights))
        experts(hidden, index, weights, shake.slots[0], torch.empty_like(hidden))

    def run(
        self, layer: int, rows: Tensor, weights: Tensor, index: Tensor, host: HostAnswer
    ) -> None:
        """Post *rows* [T, columns] and *weights* [T, k] of *layer*, find the experts *index*."""
        shake = self._shake
        ring, ring_weights = host.buffers
        sent = ring_weights is not None
        self._kernel[(1,)](
            shake.words, shake.count, shake.landed, shake.stamps[layer], rows, ring, weights,
            ring_weights if ring_weights is not None else weights, index,
            shake.table.entries[layer], shake.served, shake.slots[layer], shake.limit_ns,
            rows.numel(), power_of_two(rows.numel()), index.numel(),
            power_of_two(index.numel()), shake.experts, sent, self._served, self._early,
            num_warps=1,
        )  # fmt: skip


class GuessKernel:
    """Posts what the next gates are guessed to choose, beside the gates' own answers."""

    def __init__(self, handshake: Handshake) -> None:
        from runtime.kernels.triton_gate import guess_kernel

        self._kernel: Any = guess_kernel
        self._shake = handshake

    def run(self, rows: Tensor, ring: Tensor) -> None:
        """Post *rows* int64 [T, columns] to pinned memory *ring* of that shape."""
        shake, size = self._shake, rows.numel()
        padded = power_of_two(size)
        self._kernel[(1,)](shake.words, shake.guessed, rows, ring, size, padded, num_warps=1)


def stamp_now(stamp: Tensor) -> None:
    """Let the current stream write the device's time, in nanoseconds, to pinned int64 [1]."""
    from runtime.kernels.triton_gate import stamp_kernel

    kernel: Any = stamp_kernel
    kernel[(1,)](stamp, num_warps=1)
