"""Runs of a trace on a real device: its routing forced on a model of real dimensions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch

from policies.budget import Budget
from policies.decisions import DecisionLog
from policies.memory import predicted_bytes
from policies.outcome import result_of
from policies.planner import Planner
from policies.recording import Recording
from policies.result import Result
from policies.routing import Step
from policies.session import Prepared, Setup, TraceSession, no_garbage_collection
from runtime.bank import SlotBank
from runtime.engine import Engine
from runtime.eventclock import EventClock
from runtime.fullspeed import at_full_speed
from runtime.hook import uninstall
from runtime.lanes import lanes_for
from runtime.load import fitting, pick_device
from runtime.measuring import MARK_EVERY, Measured, RealWorld
from runtime.offloading import Options, make_hook
from runtime.peaks import forget_peaks, host_peak_bytes, peak_bytes
from runtime.replay import Replay
from runtime.replay_model import ReplayModel

__all__ = ["Measured", "ReplaySession"]


class ReplaySession(TraceSession):
    """A trace on this machine's device, ready to be run under any policy and budget.

    The model has the dimensions that the setup names and random weights; its experts lie in a
    pinned store, made once for all runs. *compute* and *kernel* are those of
    :class:`runtime.offloading.Options`. Sessions that differ in nothing but batch, policy
    and the like may share a model: pass that of an open one as *model*.
    """

    def __init__(  # noqa: PLR0913
        self,
        setup: Setup,
        device: str = "auto",
        compute: str = "auto",
        pageable: bool = False,
        kernel: str = "generate",
        graphs: bool = True,
        compiled: bool = False,
        like: ReplaySession | None = None,
    ) -> None:
        super().__init__(setup)
        self.device = pick_device(device)
        self.options = Options(
            compute=compute,
            kernel=kernel,
            graphs=graphs,
            compiled=compiled,
            pin=not pageable,
            depth=setup.depth,
        )
        self._borrowed = like is not None
        self.real: ReplayModel | None = None if like is None else like.real

    def open(self, advance: Callable[[int], None] = lambda experts: None) -> None:
        """Build model and store, telling *advance* of each expert; done by the first run too."""
        if self.real is not None:
            return
        model = ReplayModel(self.stored.model, self.setup.sizes, self.model, self.device)
        model.fill(pin=self.options.pin, seed=self.setup.seed, advance=advance)
        self.real = model

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
        context = prepared.planner.context
        recording = Recording(context, with_spans=spans) if record or spans else None
        with fitting(self.device):
            world, memory = self._run(prepared, watch, recording)
        result = result_of(self, world)
        measured = world.measured()
        measured.gpu_peak_bytes, measured.host_peak_bytes = memory, host_peak_bytes()
        measured.gpu_predicted_bytes = predicted_bytes(result.memory)
        return result, recording, measured

    def _run(
        self,
        prepared: Prepared,
        watch: Callable[[Iterable[Step]], Iterable[Step]],
        recording: Recording | None = None,
        *,
        mark_every: int = MARK_EVERY,
        clock: EventClock | None = None,
    ) -> tuple[RealWorld, int]:
        real, planner = self.real, prepared.planner
        assert real is not None
        store, bank = real.store, self._filled_bank(real, planner)
        forget_peaks(self.device)
        engine = Engine(planner, store, bank, lanes_for(self.device, timed=True), self.setup.depth)
        kind = "gpu" if self.device.type == "cuda" else self.device.type
        world = RealWorld(engine, prepared.costs, kind, recording, mark_every)
        hook = make_hook(real.model, real.gates, engine, self.options)
        engine.clock = clock
        replay = Replay(real.model, hook, self, self.options)
        try:
            quick = at_full_speed(self.device)
            with no_garbage_collection(), torch.no_grad(), quick as world.cores:
                replay.run(watch(prepared.steps()), world)
            return world, peak_bytes(self.device)
        finally:
            engine.lanes.finish()
            replay.close()
            uninstall(real.gates)
            bank.free()
            engine.table.free()
            del hook, replay, engine
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _filled_bank(self, real: ReplayModel, planner: Planner) -> SlotBank:
        """Slots for *planner*, with low-precision copies in the store if it has slots for them."""
        bank = SlotBank.of(planner, real.layout, self.device)
        if bank.low_layout is not None:
            try:
                real.store.add_low(bank.low_layout, self.device)
            except BaseException:
                bank.free()
                raise
        return bank

    def close(self) -> None:
        """Free model and store, unless they are another session's."""
        if self.real is not None and not self._borrowed:
            self.real.close()
        self.real = None
