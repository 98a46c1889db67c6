"""The model's side: gates are read, experts computed from slots, layer by layer.

transformers asks a registered function to compute a layer's experts
(``ExpertsInterface``); ours hands the call to the :class:`Hook` of that layer's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from policies.routing import Routing, Step
from runtime import expert_op
from runtime.engine import Engine
from runtime.families import Gate
from runtime.lanes import Mark
from runtime.maths import CpuExperts, Maths
from runtime.steps import Answer, Ints

#: Our name in transformers' table of experts functions.
NAME = "expertflow"

#: The attribute by which an experts module finds its hook and layer.
_HANDLE = "_expertflow"


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    hook, layer = getattr(module, _HANDLE)
    if torch.compiler.is_compiling():
        return expert_op.experts(hidden, index, weights, layer, hook.key)
    result: Tensor = hook.experts(layer, hidden, index, weights)
    return result


def install(model: Any, gates: Sequence[Gate], hook: Hook) -> None:
    """Let *hook* compute the experts of *model*."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    for layer, gate in enumerate(gates):
        object.__setattr__(gate.experts, _HANDLE, (hook, layer))
    model.set_experts_implementation(NAME)


def uninstall(gates: Sequence[Gate]) -> None:
    """Let go of the hook: its slots can be freed."""
    for gate in gates:
        if hasattr(gate.experts, _HANDLE):
            object.__delattr__(gate.experts, _HANDLE)


class Steps(Protocol):
    """Turns a gate's answer into an event (:class:`runtime.steps.LiveSteps` and others)."""

    #: Whether token ids are read on the host when a step begins.
    reads_ids: bool

    def route(self, step: Step, layer: int, answer: Answer, event: int) -> Routing:
        """The event of *layer* of *step*."""
        ...

    def note_ahead(self, step: Step, layer: int, ahead: Sequence[Ints]) -> None:
        """What the gate input of *layer* lets expect of the next gates, [T, m] each.

        Where it was not part of the answer: before anybody asks for the event's prefetches.
        """
        ...


class GateReader:
    """Brings a gate's answer to the host through pinned memory and one mark.

    One row per token: k experts, then *ahead* guesses of *width* experts each, as int64; the
    weights travel beside them if *with_weights*.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        *,
        with_weights: bool,
        ahead: int = 0,
        width: int = 0,
        pin: bool = False,
    ) -> None:
        self._gates = gates
        self.with_weights = with_weights
        self.ahead, self.width = ahead, width
        self._pin = pin
        self._buffers: dict[tuple[int, ...], HostAnswer] = {}
        self._top_k = gates[0].top_k

    def gather(self, layer: int, hidden: Tensor, index: Tensor) -> Tensor:
        """The rows int64 [T, k + ahead * width] to send, on the device."""
        guesses = self.guesses(layer, hidden)
        return torch.cat([index, *guesses], dim=1) if guesses else index

    def guesses(self, layer: int, hidden: Tensor) -> list[Tensor]:
        """What the next gates would choose for the input of *layer*'s: int64 [T, width] each."""
        targets = self._gates[layer + 1 : layer + 1 + self.ahead]
        return [gate.rank(hidden, self.width) for gate in targets]

    def buffers(self, rows: Tensor, weights: Tensor) -> HostAnswer:
        """Host memory for *rows* and *weights*, pinned beside a GPU.

        The same memory for the same shape: an answer must be used before the next is sent.
        """
        shape = tuple(rows.shape)
        if shape not in self._buffers:
            self._buffers[shape] = self.new_buffers(rows, weights)
        return self._buffers[shape]

    def new_buffers(self, rows: Tensor, weights: Tensor) -> HostAnswer:
        """Host memory as :meth:`buffers` gives, that nobody else has."""
        values = weights if self.with_weights else None
        return HostAnswer(rows, values, self._top_k, self.width, pin=self._pin)


class HostAnswer:
    """Host memory that takes one gate's *rows* int64 [T, columns] and *weights* [T, k]."""

    def __init__(
        self, rows: Tensor, weights: Tensor | None, top_k: int, width: int, *, pin: bool
    ) -> None:
        self._rows = torch.zeros(rows.shape, dtype=torch.int64, pin_memory=pin)
        self._weights: Tensor | None = None
        if weights is not None:
            self._weights = torch.zeros(weights.shape, dtype=weights.dtype, pin_memory=pin)
        values = self._rows.numpy()
        starts = range(top_k, values.shape[1], width) if width else ()
        self._experts = values[:, :top_k]
        #: The same of an only token, to be read without an array.
        self._one = memoryview(values[0])[:top_k] if len(values) == 1 else None
        self._ahead = [values[:, start : start + width] for start in starts]

    @property
    def buffers(self) -> tuple[Tensor, Tensor | None]:
        """The memory for rows and weights, for a kernel that writes it itself."""
        return self._rows, self._weights

    def take(self, rows: Tensor, weights: Tensor) -> None:
        """Have the device send its answer here."""
        self._rows.copy_(rows, non_blocking=True)
        if self._weights is not None:
            self._weights.copy_(weights, non_blocking=True)

    def read(self) -> Answer:
        """What has arrived."""
        weights = None if self._weights is None else self._weights.float().numpy()
        one = None if self._one is None else self._one.tolist()
        return Answer(self._experts, weights, self._ahead, one)


class Hook:
    """Runs the events of one model: reads the gate, asks the engine, computes from the slots."""

    def __init__(
        self, engine: Engine, gates: Sequence[Gate], reader: GateReader, maths: Maths
    ) -> None:
        self.engine, self.gates, self.reader, self.maths = engine, gates, reader, maths
        self.cpu = CpuExperts(engine.store, gates)
        #: By which compiled code finds this hook.
        self.key = expert_op.key_for(self)
        #: Set by whoever runs the step, before the model does.
        self.step: Step | None = None
        self.steps: Steps | None = None
        #: The mark behind an answer that is on its way, and whether nobody else reads it.
        self._expected: tuple[Mark, bool] | None = None
        #: Takes the calls while a graph is captured, or while experts are left out.
        self.capturing: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None

    @contextmanager
    def without_experts(self) -> Iterator[list[int]]:
        """Passes inside leave the experts out: nothing is asked, planned or counted.

        The layers that would have been asked are appended to the list given, as they come.
        """
        before, asked = self.capturing, []

        def leave_out(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            asked.append(layer)
            return torch.zeros_like(hidden)

        self.capturing = leave_out
        try:
            yield asked
        finally:
            self.capturing = before

    def experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the experts of *layer*: [T, H], from [T, H], [T, k], [T, k]."""
        if self.capturing is not None:
            return self.capturing(layer, hidden, index, weights)
        engine = self.engine
        rows = self.reader.gather(layer, hidden, index)
        host = self.reader.buffers(rows, weights)
        host.take(rows, weights)
        self.await_answer()
        routing = self.route(layer, host.read())
        plan, late = engine.decide(routing)
        call = self.maths.begin(layer, hidden, index, weights, engine.table.slots[layer])
        inputs = hidden, index, weights

        def on_cpu(experts: Sequence[int]) -> None:
            call.add(self.cpu.rows(layer, experts, *inputs))

        engine.in_groups(routing, plan, late, call.group, on_cpu)
        engine.note()
        engine.after(plan, late)
        return call.finish()

    def route(self, layer: int, answer: Answer) -> Routing:
        """The event that *answer* of *layer*'s gate makes."""
        if self.step is None or self.steps is None:
            raise RuntimeError("an experts module was called outside of the model's forward")
        return self.steps.route(self.step, layer, answer, self.engine.events)

    def note_ahead(self, layer: int, ahead: Sequence[Ints]) -> None:
        """Guesses that came behind the answer of *layer*'s gate."""
        assert self.step is not None
        assert self.steps is not None
        self.steps.note_ahead(self.step, layer, ahead)

    def expect_answer(self) -> None:
        """What was launched ends with an answer: mark it before the host turns to other work.

        A host that comes back late finds the mark passed, and need not ask the device.
        """
        engine = self.engine
        noted = engine.watch.split("attention")
        self._expected = (noted or engine.lanes.mark()), noted is None

    def await_answer(self) -> None:
        """Wait on the host for what was launched, moving the link's queue on meanwhile."""
        engine = self.engine
        lanes, copier = engine.lanes, engine.copier
        if self._expected is None:
            self.expect_answer()
        assert self._expected is not None
        (mark, own), self._expected = self._expected, None
        if engine.on_wait is not None:
            engine.on_wait()
        passed, poll = lanes.passed, copier.poll
        while not passed(mark):
            if copier.pending:
                poll()
        if own:
            lanes.recycle([mark])
        engine.note()
