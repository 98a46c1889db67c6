"""Decode steps as chains of CUDA graphs, cut where the host must answer: at every gate.

A graph holds the experts of one layer, what follows, and attention and gate of the next; it
ends with the gate's answer on its way to the host. Launching a layer is then one call, where
transformers' own decode makes about eighty.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from policies.base import Policy
from runtime.compiled import CompiledForward
from runtime.errors import warn_uncaptured
from runtime.hook import Hook, HostAnswer
from runtime.masks import full_windows, masks_are_given
from runtime.maths import Fused, Inputs
from runtime.window import make_capturable

#: Chains kept at a time; one is needed for each batch size and cache. The one that has not run
#: for the longest time makes room.
MOST_CHAINS = 16

#: The most that may be expected; those beyond run as they are.
MOST_SHAPES = 64

#: How often a shape is captured. Where more shapes take turns than there are chains, those that
#: have lost theirs so often run as they are: capturing takes as long as some twenty steps.
MOST_CAPTURES = 2


@cache
def _capture_stream(device: torch.device) -> Any:
    """One stream for all captures: cuBLAS keeps 32 MiB for every stream that it has seen."""
    cuda: Any = torch.cuda
    return cuda.Stream(device)


class DecodeGraphs:
    """The chains of one model, by the shapes of their inputs."""

    def __init__(self, hook: Hook, forward: Callable[..., Any]) -> None:
        self._hook, self._forward = hook, forward
        self._chains: dict[Any, Chain] = {}
        self._met: set[Any] = set()
        self._captures: Counter[Any] = Counter()
        self._most = MOST_CHAINS
        self._broken = False
        #: Chains captured since the start, those of caches that are gone included.
        self.captured = 0

    def suits(self, kwargs: dict[str, Any]) -> bool:
        """Whether a pass can be replayed: static cache, no gradients, shapes met before.

        The first pass of a shape runs as it is: what is set up lazily must not be captured.
        """
        cache = kwargs.get("past_key_values")
        if self._broken or torch.is_grad_enabled() or not getattr(cache, "is_compileable", False):
            return False
        if any(full_windows(cache)) and not masks_are_given(kwargs):
            return False
        key = _key(kwargs)
        if key in self._met:
            return key in self._chains or self._captures[key] < MOST_CAPTURES
        self._met.add(key)
        return False

    def expect(self, shapes: int) -> None:
        """Keep chains for so many *shapes*, which are known to take turns."""
        self._most = min(max(MOST_CHAINS, shapes), MOST_SHAPES)

    @property
    def chains(self) -> Sequence[Chain]:
        """The chains captured so far."""
        return list(self._chains.values())

    def warm(self, kwargs: dict[str, Any]) -> None:
        """Set up, capture and replay a pass once, its experts left out.

        Nothing is planned or counted, but the key-value cache is written to.
        """
        with self._hook.without_experts():
            self._forward(**kwargs)
        key = _key(kwargs)
        self._met.add(key)
        chain = self._capture(key, kwargs)
        if chain is not None:
            chain.replay_blind()

    def run(self, kwargs: dict[str, Any]) -> Any:
        """One decode step, captured now or replayed."""
        key = _key(kwargs)
        chain = self._chains.pop(key, None)
        captured = chain is None
        if chain is None:
            chain = self._capture(key, kwargs)
            if chain is None:
                return self._forward(**kwargs)
        # The last is the one that ran last.
        self._chains[key] = chain
        return chain.replay(kwargs, counted=captured)

    def forget(self, cache: int) -> None:
        """A cache is gone: what was captured for it reads freed memory."""
        self._chains = {key: chain for key, chain in self._chains.items() if key[0] != cache}
        self._met = {key for key in self._met if key[0] != cache}
        self._captures = Counter({k: n for k, n in self._captures.items() if k[0] != cache})

    def _capture(self, key: Any, kwargs: dict[str, Any]) -> Chain | None:
        if len(self._chains) >= self._most:
            self._chains.pop(next(iter(self._chains)))
        self._captures[key] += 1
        cache = kwargs["past_key_values"]
        make_capturable(cache)
        if isinstance(self._forward, CompiledForward):
            # Nothing can be compiled while a graph is captured.
            self._forward.prepare(kwargs)
        counters = _Counters(cache)
        try:
            stream = _capture_stream(self._hook.engine.lanes.device)
            chain = Chain(self._hook, self._forward, kwargs, stream)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            counters.restore()
            self._broken = True
            warn_uncaptured(" ".join(str(error).split())[:160])
            return None
        self._chains[key] = chain
        self.captured += 1
        weakref.finalize(cache, _forget, weakref.ref(self), key[0])
        return chain


def decode_graphs(hook: Hook, forward: Callable[..., Any]) -> DecodeGraphs | None:
    """Room for the chains of a model, where its decode steps can be captured at all."""
    cuda = hook.engine.lanes.device.type == "cuda"
    return DecodeGraphs(hook, forward) if cuda and isinstance(hook.maths, Fused) else None


def _forget(graphs: weakref.ref[DecodeGraphs], cache: int) -> None:
    alive = graphs()
    if alive is not None:
        alive.forget(cache)


class _Counters:
    """Python numbers that a cache keeps beside its tensors: a replay does not move them."""

    def __init__(self, cache: Any) -> None:
        layers = getattr(cache, "layers", [])
        name = "cumulative_length_int"
        self._kept = [(layer, getattr(layer, name)) for layer in layers if hasattr(layer, name)]

    def restore(self) -> None:
        for layer, count in self._kept:
            layer.cumulative_length_int = count


def _advance(cache: Any) -> None:
    """Do to the Python counters of *cache* what one captured decode step would have done."""
    for layer in getattr(cache, "layers", []):
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int += 1


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in *value*: itself, or those of a dict of masks."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in _tensors(inner)]
    return []


def _key(kwargs: dict[str, Any]) -> Any:
    """What a captured pass depends on, other than the values in its input tensors."""
    cache = kwargs["past_key_values"]
    full = full_windows(cache)
    parts: list[Any] = [id(cache), full]
    for name, value in sorted(kwargs.items()):
        tensors = _tensors(value)
        if tensors:
            parts.append((name, *((tuple(t.shape), t.dtype) for t in tensors)))
        elif name != "past_key_values":
            parts.append((name, repr(value)))
    return tuple(parts)


class _Gate:
    """Where a captured gate leaves its answer, and what its experts read."""

    def __init__(self, host: HostAnswer, inputs: Inputs) -> None:
        self.host, self.inputs = host, inputs


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
        self._inputs = {name: _cloned(value) for name, value in kwargs.items()}
        self._gates: list[_Gate] = []
        self._segments: list[Any] = []
        cuda: Any = torch.cuda
        self._pool = cuda.graph_pool_handle()
        #: What was computed outside of the graphs for the present event; added by the next.
        self._extra = self._make_extra()
        self._capture(forward, stream)
        # The chain lives as long as its cache, not the other way round.
        self._inputs["past_key_values"] = self._output["past_key_values"] = None

    def _make_extra(self) -> Tensor | None:
        """Room for experts that a graph cannot compute, if there can be such events."""
        planner = self._hook.engine.planner
        tokens = self._inputs["input_ids"].numel()
        most = min(tokens * planner.context.top_k, planner.context.experts)
        slots = planner.cache.full_slots
        if planner.context.pool == "layer":
            slots //= planner.context.layers
        plain = type(planner.policy).serve is Policy.serve
        if plain and slots >= most:
            return None
        hidden = self._hook.gates[0].hidden
        device = self._hook.engine.lanes.device
        return torch.zeros(tokens, hidden, dtype=torch.float32, device=device)

    def _capture(self, forward: Callable[..., Any], stream: Any) -> None:
        cuda: Any = torch.cuda
        self._hook.capturing = self._experts
        cuda.synchronize()
        stream.wait_stream(cuda.current_stream())
        try:
            with cuda.stream(stream):
                self._open()
                try:
                    self._output = forward(**self._inputs)
                finally:
                    self._segments[-1].capture_end()
        finally:
            self._hook.capturing = None
        cuda.current_stream().wait_stream(stream)

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
        self._gates.append(_Gate(host, (hidden, index, weights, table)))
        self._open()
        out = torch.empty_like(hidden)
        self._kernels.run(hidden, index, weights, table, out)
        if self._extra is not None:
            out = (out + self._extra).to(hidden.dtype)
            self._extra.zero_()
        return out

    def replay(self, kwargs: dict[str, Any], *, counted: bool) -> Any:
        """Run one step; *counted* if the cache's Python counters have moved already."""
        for name, value in kwargs.items():
            _refresh(self._inputs[name], value)
        self._segments[0].replay()
        self._hook.expect_answer()
        for layer, gate in enumerate(self._gates):
            self._hook.await_answer()
            self._event(layer, gate)
        cache = kwargs["past_key_values"]
        if not counted:
            _advance(cache)
        return self._result(cache)

    def segments(self) -> Sequence[Any]:
        """The captured graphs in order: up to the first gate, one per layer, to the end."""
        return self._segments

    def replay_blind(self) -> None:
        """Run every graph once with what the table holds, whatever the gates answer."""
        for segment in self._segments:
            segment.replay()
        torch.cuda.synchronize()

    def _event(self, layer: int, gate: _Gate) -> None:
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

    def _apart(self, layer: int, gate: _Gate, routing: Any, plan: Any, late: Any) -> None:
        """Compute an event's experts here, so that the next graph finds none to compute."""
        engine, extra = self._hook.engine, self._extra
        if extra is None:
            raise RuntimeError(f"event {routing.event}: waves came where none were foreseen")

        def compute(only: int) -> None:
            hidden, index, weights, table = gate.inputs
            self._kernels.run(hidden, index, weights, table, extra, only=only, accumulate=True)

        def on_cpu(experts: Any) -> None:
            extra.add_(self._hook.cpu.rows(layer, experts, *gate.inputs[:3]))

        engine.in_groups(routing, plan, late, compute, on_cpu)
        engine.hide(routing)

    def _result(self, cache: Any) -> Any:
        """The captured output with logits of its own: the next replay overwrites them."""
        output = type(self._output)(**dict(self._output))
        output["logits"] = output.logits.clone()
        output["past_key_values"] = cache
        return output


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _cloned(inner) for name, inner in value.items()}
    return value


def _refresh(mine: Any, value: Any) -> None:
    """Copy the tensors of *value* over those captured."""
    for target, source in zip(_tensors(mine), _tensors(value), strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source, non_blocking=True)
