"""One token of each of several sequences: on a GPU one CUDA graph, so that the host has little
to launch while the model decodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.errors import warn_uncaptured
from runtime.predictor.live import LivePredictor, Place
from runtime.predictor.packing import Packing
from traces.errors import first_line

Rows = npt.NDArray[np.uint8]


class Pending:
    """Rows of packed forecasts on their way to the host.

    *begun* and *done* are CUDA events of the predictor's stream, None on a CPU. :attr:`wait_s` is
    how long the host waited for them, :attr:`stream_s` how long the stream took, both once taken.
    """

    def __init__(self, host: Tensor, begun: Any = None, done: Any = None) -> None:
        self._host, self._begun, self._done = host, begun, done
        self.wait_s = self.stream_s = 0.0

    def wait(self) -> None:
        """Let the host wait until the rows are there."""
        if self._done is not None:
            start = time.perf_counter()
            self._done.synchronize()
            self.wait_s += time.perf_counter() - start
            self.stream_s = float(self._begun.elapsed_time(self._done)) * 1e-3
            self._done = None

    def take(self) -> Rows:
        """The rows, in memory that is written again by a later step."""
        self.wait()
        rows: Rows = self._host.numpy()
        return rows


def marked(live: LivePredictor) -> Any:
    """An event on the predictor's stream as it is now; None on a CPU."""
    if live.stream is None:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(live.stream)
    return event


class Stepper:
    """Issues steps of one token for each of B sequences; one graph for every B, if *graphs*.

    The first step of a shape runs as it is, the second is captured: what is set up lazily must not
    be captured. A cache that has grown makes a new shape.
    """

    def __init__(self, live: LivePredictor, packing: Packing, *, graphs: bool) -> None:
        self._live, self._packing = live, packing
        self._graphs = graphs and live.stream is not None
        self._shapes: dict[int, _Shape] = {}

    def issue(self, sequences: Sequence[int], tokens: Sequence[int] | Tensor) -> _Shape:
        """Start reading the next of *tokens* of each of *sequences*, without advancing them.

        *tokens* may be a tensor [B] of the model's device and current stream. The answer of the
        step before must have been taken, or not be wanted any more.
        """
        live = self._live
        with live.beside():
            where = live.where(sequences, 1)
        known = live.own.address, live.prompt.address
        shape = self._shapes.get(len(sequences))
        if shape is None or shape.known != known:
            if shape is not None:
                shape.finish()
            shape = _Shape(live, self._packing, len(sequences), self._graphs)
            self._shapes[len(sequences)] = shape
        shape.issue(where, tokens)
        return shape


class _Shape:
    """Buffers and graph of steps of *count* sequences over caches as they are now."""

    def __init__(self, live: LivePredictor, packing: Packing, count: int, graphs: bool) -> None:
        self._live, self._packing = live, packing
        self.known = live.own.address, live.prompt.address
        pin = live.stream is not None
        self._in = torch.zeros(4, count, dtype=torch.int64, pin_memory=pin)
        self._read = torch.zeros(count, dtype=torch.int64, pin_memory=pin)
        self._out = torch.zeros(count, packing.row_bytes, dtype=torch.uint8, pin_memory=pin)
        with live.beside():
            self._inputs = torch.zeros(4, count, dtype=torch.int64, device=live.device)
        self._graph: Any = None
        self._capture_in = 1 if graphs else -1
        self.pending = Pending(self._out)

    @property
    def tokens(self) -> list[int]:
        """The ids that were read, once the step has been taken."""
        found: list[int] = self._read.tolist()
        return found

    def finish(self) -> None:
        """Wait until nothing of this is in use."""
        self.pending.wait()

    def issue(self, where: Sequence[Sequence[int]], tokens: Sequence[int] | Tensor) -> None:
        """Start the step at *where* (rows, columns and lengths [B]) with *tokens* [B]."""
        # The buffers below may still be read by a step that nobody wanted.
        self.pending.wait()
        chosen = tokens if isinstance(tokens, Tensor) else None
        values = [*where, [0] * len(where[0]) if chosen is not None else list(tokens)]
        self._in.numpy()[:] = values
        live = self._live
        if chosen is not None and live.stream is not None:
            cuda: Any = torch.cuda
            live.stream.wait_stream(cuda.current_stream(live.device))
            chosen.record_stream(live.stream)
        with live.beside():
            begun = marked(live)
            self._inputs.copy_(self._in, non_blocking=True)
            if chosen is not None:
                self._inputs[3].copy_(chosen)
            self._run()
            self.pending = Pending(self._out, begun, marked(live))

    def _run(self) -> None:
        """Replay the step, capture it or run it as it is."""
        if self._capture_in == 0:
            self._graph = self._captured()
        self._capture_in -= 1
        if self._graph is not None:
            self._graph.replay()
        else:
            self._work()

    def _captured(self) -> Any:
        """A graph of :meth:`_work`; None where the device does not take it."""
        cuda: Any = torch.cuda
        graph = cuda.CUDAGraph()
        try:
            # What other threads and streams do meanwhile is their own.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._work()
            finally:
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warn_uncaptured(f"predictor: {first_line(error)[:160]}")
            return None
        return graph

    def _work(self) -> None:
        """From the inputs on the device to the rows on the host; the device alone is asked."""
        live = self._live
        place = Place(self._inputs[0], self._inputs[1], self._inputs[2])
        # A model may have more outputs than ids: a wrong guess must not read beyond the table.
        tokens = self._inputs[3].clamp(max=live.model.spec.vocabulary - 1)
        states = live.decode(place, tokens[:, None], live.own.columns, live.prompt.columns)
        self._out.copy_(self._packing.pack(*live.chances(states[:, 0])), non_blocking=True)
        self._read.copy_(self._inputs[3], non_blocking=True)
