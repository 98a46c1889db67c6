"""Decode steps as one CUDA graph each: the host answers while it runs.

Behind every gate a kernel posts what the gate chose and waits for no more than it must: that the
host has settled the event before, and that the experts of this one are there. The host plans an
event while the device computes it, and the copies that it issues are waited for by the kernel
that needs them. Nothing is launched between the first kernel of a step and its last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policies.planner import Plan
from policies.routing import Routing
from policies.whole_steps import awaits_plan
from runtime.captured import Captured, GateAnswer, capturing
from runtime.engine import Engine
from runtime.errors import OffloadError
from runtime.handshake import Handshake
from runtime.hook import Hook
from runtime.kernels.gate import GateKernel, GuessKernel
from runtime.maths import Fused
from runtime.steps import Ints


class WholeStep:
    """One decode step of one shape as one graph."""

    def __init__(
        self,
        hook: Hook,
        handshake: Handshake,
        forward: Callable[..., Any],
        kwargs: dict[str, Any],
        stream: Any,
    ) -> None:
        maths = hook.maths
        if not isinstance(maths, Fused):
            raise TypeError("only fused experts can be captured")
        self._hook, self._shake = hook, handshake
        self._kernels = maths.kernels
        #: Whether the policy decides for held experts too how they are served.
        self._serves = awaits_plan(hook.engine.planner)
        #: Whether the graph is launched before the host has begun with the step.
        reads = hook.steps is not None and hook.steps.reads_ids
        self._at_once = not hook.engine.planner.begins and not reads
        self._guess_kernel = GuessKernel(handshake)
        tokens = kwargs["input_ids"].numel()
        #: Whether what is there is computed while the rest is awaited.
        self._early = self._kernels.waits(tokens)
        self._gate_kernel = GateKernel(handshake, served=self._serves, early=self._early)
        self._load(tokens, stream)
        self._step = Captured(kwargs)
        self._gates: list[GateAnswer] = []
        #: Pinned memory for each layer's guesses of the next gates, [T, width] each.
        self._guesses: list[list[Ints]] = []
        #: A stream beside: guesses are not to hold up the layers. What it reads is kept for it.
        self._beside: Any = None
        self._read: list[Tensor] = []
        cuda = _cuda()
        self._graph = cuda.CUDAGraph()
        self._capture(forward, stream)
        self._step.let_go()

    def segments(self) -> Sequence[Any]:
        """The one captured graph."""
        return [self._graph]

    def replay(self, kwargs: dict[str, Any], begin: Callable[[], None], *, counted: bool) -> Any:
        """Run the step that *begin* begins; *counted* if the cache's Python counters have moved.

        Where *begin* neither reads what the device computes nor makes prefetches, which the first
        gate would have to know of, the device is at work meanwhile.
        """
        self._shake.check()
        if not self._at_once:
            begin()
        self._step.refresh(kwargs)
        stalls: list[str] = []
        try:
            self._graph.replay()
            if self._at_once:
                begin()
            for layer, gate in enumerate(self._gates):
                stalls.append(self._event(layer, gate))
        except BaseException:
            # The device is to be free again, whatever it computes meanwhile.
            self._shake.release()
            raise
        watch = self._hook.engine.watch
        if watch.on:
            watch.defer(partial(self._shake.waits, stalls))
        return self._step.result(kwargs["past_key_values"], counted=counted)

    def replay_blind(self) -> None:
        """Run the graph once with what is there, whatever the gates answer."""
        self._shake.release()
        self._graph.replay()
        self._shake.renew()

    def _load(self, tokens: int, stream: Any) -> None:
        """Compile and load the kernels that are ours."""
        hook, device = self._hook, self._hook.engine.lanes.device
        gate, dtype = hook.gates[0], hook.engine.bank.layout.dtype
        hidden = torch.zeros(tokens, gate.hidden, dtype=dtype, device=device)
        experts = partial(self._kernels.run, wait=self._early)
        self._shake.release()
        with _cuda().stream(stream):
            self._gate_kernel.load(hook.reader, gate, hidden, experts)
            guesses = hook.reader.guesses(0, hidden)
            # Of the last layers fewer gates are guessed.
            for count in range(1, len(guesses) + 1):
                rows = torch.stack(guesses[:count])
                self._guess_kernel.run(rows, _pinned_like(rows))
        self._shake.renew()

    def _capture(self, forward: Callable[..., Any], stream: Any) -> None:
        with capturing(self._hook, self._experts, stream):
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._step.output = forward(**self._step.inputs)
                if self._beside is not None:
                    stream.wait_stream(self._beside)
            finally:
                self._graph.capture_end()
                self._read.clear()
        if len(self._gates) != self._shake.layers:
            raise OffloadError(
                f"a pass asked {len(self._gates)} gates, expected {self._shake.layers}"
            )

    def _experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """While capturing: the gate's kernel, then the experts, from wherever it finds them."""
        reader, slots = self._hook.reader, self._shake.slots[layer]
        index, weights = index.contiguous(), weights.contiguous()
        self._guess(layer, hidden)
        host = reader.new_buffers(index, weights)
        self._gate_kernel.run(layer, index, weights, index, host)
        self._gates.append(GateAnswer(host, (hidden, index, weights, slots)))
        out = torch.empty_like(hidden)
        self._kernels.run(hidden, index, weights, slots, out, wait=self._early)
        return out

    def _guess(self, layer: int, hidden: Tensor) -> None:
        """While capturing: a branch that posts what the next gates would choose."""
        reader, cuda = self._hook.reader, _cuda()
        if not reader.ahead:
            return
        if self._beside is None:
            self._beside = cuda.Stream(hidden.device)
        # What was handed in is written over when the layer has been computed.
        hidden = hidden.clone()
        self._read.append(hidden)
        self._beside.wait_stream(cuda.current_stream())
        with cuda.stream(self._beside):
            guesses = reader.guesses(layer, hidden)
            if guesses:
                rows = torch.stack(guesses)
                ring = _pinned_like(rows)
                self._guess_kernel.run(rows, ring)
                self._guesses.append(list(ring.numpy()))

    def _event(self, layer: int, gate: GateAnswer) -> str:
        """Wait for one gate and answer it; the cause of what the device waits for copies of it."""
        hook = self._hook
        await_gate(hook.engine, self._shake)
        routing = hook.route(layer, gate.host.read())
        look = partial(self._look_ahead, layer) if layer < len(self._guesses) else None
        plan, _ = answer(hook.engine, self._shake, routing, serves=self._serves, look=look)
        return "stall_demand" if plan.waves else "stall_late"

    def _look_ahead(self, layer: int) -> None:
        """Wait for the guesses that go with a gate's answer, which prefetches are decided by."""
        engine = self._hook.engine
        self._shake.await_guesses(engine.copier.poll if engine.copier.pending else None)
        self._hook.note_ahead(layer, self._guesses[layer])


def _cuda() -> Any:
    return torch.cuda


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def await_gate(engine: Engine, shake: Handshake) -> None:
    """Wait on the host for the next gate, moving the link's queue on meanwhile."""
    if engine.on_wait is not None:
        engine.on_wait()
    shake.await_answer(engine.copier.poll if engine.copier.pending else None)
    engine.note()


def answer(
    engine: Engine,
    shake: Handshake,
    routing: Routing,
    *,
    serves: bool,
    look: Callable[[], None] | None = None,
) -> tuple[Plan, list[int]]:
    """Plan one event and settle it; the plan, and the held copies that were still on their way.

    With *serves* the policy decides for held experts too where they are read. *look*, if any, is
    called before it is asked for prefetches.
    """
    plan, late = engine.decide(routing, together=True, early=True)
    if not plan.whole:
        raise OffloadError(
            f"event {routing.event}: policy {engine.planner.policy.name!r} left part of the demand "
            "for a second wave, which a step in one graph does not have, expected "
            "refuses_victims = True in its class (or compute='fused')"
        )
    if serves:
        slot = engine.table.slot
        first = routing.layer * shake.experts
        shake.serve(first, [(expert, slot(expert)) for expert in routing.experts])
    # Even with nothing to do: the device may have looked before the last copy landed.
    shake.planned()
    engine.note()
    if look is not None:
        look()
    engine.after(plan, late, shake.settled)
    return plan, late
