"""Runs of a trace on a real device: its routing forced on a model of real dimensions."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from policies.budget import Budget
from policies.decisions import DecisionLog
from policies.outcome import result_of
from policies.recording import Recording
from policies.result import Result
from policies.routing import Step
from policies.session import Prepared, Setup, TraceSession, no_garbage_collection
from runtime.bank import SlotBank
from runtime.dimensions import replay_model
from runtime.engine import Engine
from runtime.errors import OffloadError
from runtime.families import find_gates, model_spec
from runtime.lanes import lanes_for
from runtime.layout import ExpertLayout, LowLayout
from runtime.load import fitting, pick_device
from runtime.measuring import Measured, RealWorld
from runtime.offloading import Options, make_hook
from runtime.replay import Replay
from runtime.store import HostStore, Loaded

__all__ = ["Measured", "ReplaySession"]

#: Spread of the random expert weights: keeps activations of the size they had.
_SPREAD = 0.02


class ReplaySession(TraceSession):
    """A trace on this machine's device, ready to be run under any policy and budget.

    The model has the dimensions that the setup names and random weights; its experts lie in a
    pinned store, made once for all runs. *compute* and *kernel* are those of
    :class:`runtime.offloading.Options`.
    """

    def __init__(
        self,
        setup: Setup,
        device: str = "auto",
        compute: str = "auto",
        pageable: bool = False,
        kernel: str = "generate",
        graphs: bool = True,
    ) -> None:
        super().__init__(setup)
        self.device = pick_device(device)
        self.options = Options(
            compute=compute, kernel=kernel, graphs=graphs, pin=not pageable, depth=setup.depth
        )
        self._model: Any = None
        self._store: HostStore | None = None

    def open(self, advance: Callable[[int], None] = lambda experts: None) -> None:
        """Build model and store, telling *advance* of each expert; done by the first run too."""
        if self._store is not None:
            return
        with fitting(self.device):
            self._model = replay_model(self.stored.model, self.setup.sizes, self.device)
        self.gates = find_gates(self._model)
        self.layout = ExpertLayout.of(self.gates[0].experts)
        self._check_shape()
        pin = self.options.pin and self.device.type == "cuda"
        store = HostStore(self.model.layers, self.model.experts, self.layout, pin=pin)
        store.fill(self._random_experts(), advance)
        for gate in self.gates:
            for name in list(gate.experts._parameters):
                delattr(gate.experts, name)
        self._store = store

    def _check_shape(self) -> None:
        found = model_spec(self._model, self.model.name)
        for name in ("layers", "experts", "top_k", "expert_params"):
            if getattr(found, name) != getattr(self.model, name):
                raise OffloadError(
                    f"{self.model.name}: the model that was built has {name} "
                    f"{getattr(found, name)}, expected {getattr(self.model, name)}"
                )

    def _random_experts(self) -> Iterator[Loaded]:
        """Experts with random weights, drawn on the device, where that is fast."""
        layout = self.layout
        source = torch.Generator(self.device).manual_seed(self.setup.seed)
        flat = torch.empty(layout.params, dtype=layout.dtype, device=self.device)
        for layer in range(self.model.layers):
            for id in range(self.model.experts):
                flat.normal_(std=_SPREAD, generator=source)
                parts = {
                    p.name: flat[p.first : p.first + _size(p.shape)].view(p.shape)
                    for p in layout.parts
                }
                yield layer, id, parts

    def run(
        self,
        policy_text: str,
        budget: Budget,
        *,
        record: bool = False,
        spans: bool = False,
        watch: Callable[[Iterable[Step]], Iterable[Step]] = iter,
        log: DecisionLog | None = None,
    ) -> tuple[Result, Recording | None, Measured]:
        """Run one policy over the trace on the device; arguments as in the simulator's run."""
        prepared = self.prepare(policy_text, budget, log=log)
        self.open()
        planner = prepared.planner
        recording = Recording(planner.context, with_spans=spans) if record or spans else None
        _forget_peaks(self.device)
        with fitting(self.device):
            world, memory = self._run(prepared, recording, watch)
        result = result_of(self, world)
        measured = world.measured()
        measured.gpu_peak_bytes, measured.host_peak_bytes = memory, _host_peak_bytes()
        parts = result.memory
        measured.gpu_predicted_bytes = int(
            parts["slots_bytes"] + parts["dense_bytes"] + parts["kv_bytes"]
        )
        return result, recording, measured

    def _run(
        self,
        prepared: Prepared,
        recording: Recording | None,
        watch: Callable[[Iterable[Step]], Iterable[Step]],
    ) -> tuple[RealWorld, int]:
        store, planner = self._store, prepared.planner
        assert store is not None
        cache = planner.cache
        low = LowLayout(self.layout, planner.policy.low_bits) if cache.low_slots else None
        if low is not None:
            store.add_low(low, self.device)
        bank = SlotBank(
            self.layout, cache.full_slots, self.device, low_layout=low, low=cache.low_slots
        )
        lanes = lanes_for(self.device, timed=True)
        engine = Engine(planner, store, bank, lanes, self.setup.depth)
        engine.watch.on = True
        world = RealWorld(engine, prepared.costs, self.device.type, recording)
        if world.kind == "cuda":
            world.kind = "gpu"
        hook = make_hook(self._model, self.gates, engine, self.options)
        replay = Replay(self._model, hook, self.model, self.options, self.batches())
        try:
            with no_garbage_collection(), torch.no_grad():
                replay.run(watch(prepared.steps()), world)
            return world, _peak_bytes(self.device)
        finally:
            lanes.finish()
            replay.close()
            bank.free()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Free model and store."""
        if self._store is not None:
            self._store.close()
        self._store = self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _forget_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def _host_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
