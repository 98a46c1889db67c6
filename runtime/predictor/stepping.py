"""One token of each of several sequences: on a GPU one CUDA graph, so that the host has little
to launch while the model decodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.errors import warn_uncaptured
from runtime.predictor.live import LivePredictor, Place
from runtime.predictor.packing import Packed, Packing
from traces.errors import first_line


class Pending:
    """Forecasts on their way to the host.

    *host* are views of the memory that they come to. *begun* and *done* are CUDA events of the
    predictor's stream, None on a CPU. :attr:`wait_s` is how long the host waited for them,
    :attr:`stream_s` how long the stream took, both once taken.
    """

    def __init__(self, host: Packed, begun: Any = None, done: Any = None) -> None:
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

    def take(self) -> Packed:
        """The arrays, in memory that is written again by a later step."""
        self.wait()
        return self._host


def marked(live: LivePredictor) -> Any:
    """An event on the predictor's stream as it is now; None on a CPU."""
    event = _event(live, timed=True)
    if event is not None:
        event.record(live.stream)
    return event


def _event(live: LivePredictor, *, timed: bool) -> Any:
    """An event to record, again and again; None on a CPU."""
    if live.stream is None:
        return None
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


class Stepper:
    """Issues steps of one token for each of B sequences; one graph for every B, if *graphs*.

    The first step of a shape runs as it is, the second is captured: what is set up lazily must not
    be captured. A cache that has grown makes a new shape.
    """

    def __init__(self, live: LivePredictor, packing: Packing, *, graphs: bool) -> None:
        self._live, self._packing = live, packing
        self._graphs = graphs and live.stream is not None
        self._shapes: dict[int, _Shape] = {}

    def issue(self, sequences: Sequence[int], tokens: Sequence[int]) -> _Shape:
        """Start reading the next of *tokens* of each of *sequences*, without advancing them.

        The answer of the step before must have been taken, or not be wanted any more.
        """
        where = self._live.where(sequences, 1)
        shape = self._shape(len(sequences))
        shape.issue(where, tokens)
        return shape

    def guess(self, sequences: Sequence[int], logits: Tensor) -> _Shape:
        """The same with the tokens that *logits* [B, V] make most likely.

        *logits* are of the model's device and current stream.
        """
        where = self._live.where(sequences, 1)
        shape = self._shape(len(sequences))
        shape.guess(where, logits)
        return shape

    def _shape(self, count: int) -> _Shape:
        live = self._live
        known = live.own.address, live.prompt.address
        shape = self._shapes.get(count)
        if shape is None or shape.known != known:
            if shape is not None:
                shape.finish()
            shape = self._shapes[count] = _Shape(live, self._packing, count, self._graphs)
        return shape


class _Shape:
    """Buffers and graph of steps of *count* sequences over caches as they are now.

    All that a step needs is kept from step to step: a tensor, a view or an event that is made
    costs the host as much as a launch.
    """

    def __init__(self, live: LivePredictor, packing: Packing, count: int, graphs: bool) -> None:
        self._live, self._packing = live, packing
        self.known = live.own.address, live.prompt.address
        pin = live.stream is not None
        self._in = torch.zeros(3, count, dtype=torch.int64, pin_memory=pin)
        self._ids = torch.zeros(count, dtype=torch.int64, pin_memory=pin)
        self._read = torch.zeros(count, dtype=torch.int64, pin_memory=pin)
        self._out = torch.zeros(count, packing.row_bytes, dtype=torch.uint8, pin_memory=pin)
        self._in_values, self._id_values = self._in.numpy(), self._ids.numpy()
        self._read_values, self._found = self._read.numpy(), packing.unpack(self._out.numpy())
        # No inference tensors: a guess is written outside of that mode.
        with torch.inference_mode(False), live.on_stream():
            self._place = torch.zeros(3, count, dtype=torch.int64, device=live.device)
            self._tokens = torch.zeros(count, dtype=torch.int64, device=live.device)
        self._begun, self._done = _event(live, timed=True), _event(live, timed=True)
        self._asked = _event(live, timed=False)
        if live.stream is not None:
            # The model's stream writes the tokens of a guess: not before these are made, and
            # not while memory that they have taken over is still in use.
            live.stream.synchronize()
        self._graph: Any = None
        self._capture_in = 1 if graphs else -1
        self.pending = Pending(self._found)

    @property
    def tokens(self) -> list[int]:
        """The ids that were read, once the step has been taken."""
        found: list[int] = self._read_values.tolist()
        return found

    def finish(self) -> None:
        """Wait until nothing of this is in use."""
        self.pending.wait()

    def issue(self, where: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
        """Start the step at *where* (rows, columns and lengths [B]) with *tokens* [B]."""
        # The buffers below may still be read by a step that nobody wanted.
        self.pending.wait()
        self._in_values[:] = where
        self._id_values[:] = tokens
        self._start(self._ids)

    def guess(self, where: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Start the step at *where* with the likeliest tokens of *logits* [B, V]."""
        self.pending.wait()
        self._in_values[:] = where
        live = self._live
        if logits.requires_grad:
            logits = logits.detach()
        torch.argmax(logits, dim=-1, out=self._tokens)
        if live.stream is not None:
            cuda: Any = torch.cuda
            self._asked.record(cuda.current_stream(live.device))
            live.stream.wait_event(self._asked)
        self._start(None)

    def _start(self, ids: Tensor | None) -> None:
        """Run the step on the predictor's stream, with *ids* of the host if any are given."""
        live, stream = self._live, self._live.stream
        if stream is not None:
            self._begun.record(stream)
        with live.beside() if self._graph is None else live.on_stream():
            if ids is not None:
                self._tokens.copy_(ids, non_blocking=True)
            self._run()
        if stream is not None:
            self._done.record(stream)
        self.pending = Pending(self._found, self._begun, self._done)

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
        """From where the host says the step is to the rows on the host; one graph holds it all."""
        live = self._live
        self._place.copy_(self._in, non_blocking=True)
        place = Place(self._place[0], self._place[1], self._place[2])
        # A model may have more outputs than ids: a wrong guess must not read beyond the table.
        tokens = self._tokens.clamp(max=live.model.spec.vocabulary - 1)
        states = live.decode(place, tokens[:, None], live.own.columns, live.prompt.columns)
        self._out.copy_(self._packing.pack(*live.chances(states[:, 0])), non_blocking=True)
        self._read.copy_(self._tokens, non_blocking=True)
