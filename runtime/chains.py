"""Decode steps as chains of CUDA graphs, cut where the host must answer: at every gate.

A graph holds the experts of one layer, what follows, and attention and gate of the next; it
ends with the gate's answer on its way to the host. Launching a layer is then one call, where
transformers' own decode makes about eighty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from policies.whole_steps import runs_whole
from runtime.captured import Captured, GateAnswer, capturing
from runtime.hook import Hook
from runtime.maths import Fused


class Chain:
    """One decode step of one shape: a graph up to the first gate, then one per layer."""

    def __init__(
        self, hook: Hook, forward: Callable[..., Any], kwargs: dict[str, Any], stream: Any
    ) -> None:
        self._hook = hook
        maths = hook.maths
        if not isinstance(maths, Fused):
            raise TypeError("only fused experts can be captured")
        self._kernels = maths.kernels
        self._step = Captured(kwargs)
        self._gates: list[GateAnswer] = []
        self._segments: list[Any] = []
        cuda: Any = torch.cuda
        self._pool = cuda.graph_pool_handle()
        #: What was computed outside of the graphs for the present event; added by the next.
        self._extra = self._make_extra()
        self._capture(forward, stream)
        self._step.let_go()

    def _make_extra(self) -> Tensor | None:
        """Room for experts that a graph cannot compute, if there can be such events."""
        planner = self._hook.engine.planner
        tokens = self._step.inputs["input_ids"].numel()
        if not planner.serves and runs_whole(planner, tokens):
            return None
        hidden = self._hook.gates[0].hidden
        device = self._hook.engine.lanes.device
        return torch.zeros(tokens, hidden, dtype=torch.float32, device=device)

    def _capture(self, forward: Callable[..., Any], stream: Any) -> None:
        with capturing(self._hook, self._experts, stream):
            self._open()
            try:
                self._step.output = forward(**self._step.inputs)
            finally:
                self._segments[-1].capture_end()

    def _open(self) -> None:
        cuda: Any = torch.cuda
        graph = cuda.CUDAGraph()
        self._segments.append(graph)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """While capturing: end this graph with the gate's answer, begin the next with experts."""
        hook = self._hook
        rows = hook.reader.gather(layer, hidden, index)
        host = hook.reader.new_buffers(rows, weights)
        host.take(rows, weights)
        self._segments[-1].capture_end()
        table = hook.engine.table.slots[layer]
        self._gates.append(GateAnswer(host, (hidden, index, weights, table)))
        self._open()
        out = torch.empty_like(hidden)
        self._kernels.run(hidden, index, weights, table, out)
        if self._extra is not None:
            out = (out + self._extra).to(hidden.dtype)
            self._extra.zero_()
        return out

    def replay(self, kwargs: dict[str, Any], begin: Callable[[], None], *, counted: bool) -> Any:
        """Run the step that *begin* begins; *counted* if the cache's Python counters have moved."""
        begin()
        self._step.refresh(kwargs)
        self._segments[0].replay()
        self._hook.expect_answer()
        for layer, gate in enumerate(self._gates):
            self._hook.await_answer()
            self._event(layer, gate)
        return self._step.result(kwargs["past_key_values"], counted=counted)

    def segments(self) -> Sequence[Any]:
        """The captured graphs in order: up to the first gate, one per layer, to the end."""
        return self._segments

    def replay_blind(self) -> None:
        """Run every graph once with what the table holds, whatever the gates answer."""
        for segment in self._segments:
            segment.replay()
        torch.cuda.synchronize()

    def _event(self, layer: int, gate: GateAnswer) -> None:
        engine = self._hook.engine
        routing = self._hook.route(layer, gate.host.read())
        plan, late = engine.decide(routing, together=True)
        if plan.whole:
            engine.at_once(plan, late)
        else:
            self._apart(layer, gate, routing, plan, late)
        self._segments[layer + 1].replay()
        if layer + 1 < len(self._gates):
            self._hook.expect_answer()
        engine.note()
        engine.after(plan, late)

    def _apart(self, layer: int, gate: GateAnswer, routing: Any, plan: Any, late: Any) -> None:
        """Compute an event's experts here, so that the next graph finds none to compute."""
        engine, extra = self._hook.engine, self._extra
        if extra is None:
            raise RuntimeError(f"event {routing.event}: waves came where none were foreseen")

        def compute() -> None:
            hidden, index, weights, table = gate.inputs
            self._kernels.run(hidden, index, weights, table, extra, accumulate=True)

        def on_cpu(experts: Any) -> None:
            extra.add_(self._hook.cpu.rows(layer, experts, *gate.inputs[:3]))

        engine.in_groups(routing, plan, late, compute, on_cpu)
        engine.hide(routing)
