"""The randomised stress test on a GPU, as a script too, for compute-sanitizer.

    python tests/gpu/stress.py --events 2000
    compute-sanitizer --tool memcheck python tests/gpu/stress.py --events 200

Every copy spoils its slot, dawdles and then lands; the computing lane dawdles as well. Decode
events replay captured graphs or launch kernel by kernel. ``--device cpu`` runs the same on two
pretended lanes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from policies.planner import Plan
from policies.routing import PREFILL, Routing, Step
from policies.whole_steps import runs_whole
from runtime.handshake import handshake_for
from runtime.hook import HostAnswer
from runtime.kernels.gate import GateKernel
from runtime.lanes import CudaLanes, Mark
from runtime.whole_steps import answer, await_gate
from tests.helpers_stress import Case, Driver, RacingLanes, cases, spoil
from tests.helpers_stress import whole as whole_steps_of

#: GPU cycles that a copy or a piece of work may be held up: up to about 0.15 ms.
CYCLES = (0, 0, 10_000, 60_000, 250_000)

#: Seconds that the host may be held up before it looks for an answer.
PAUSES_S = (0.0, 0.0, 0.0, 1e-5, 2e-4)

#: Decode steps of up to so many tokens replay a graph.
CAPTURED = 3


class SlowLanes(CudaLanes):
    """CUDA's lanes with copies that spoil their target first and take their time."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        draw = random.Random(seed)
        self.delay_cycles = lambda: draw.choice(CYCLES)
        self._draw = draw

    def copy_first(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        with torch.cuda.stream(self._copies):
            spoil(target)
        return super().copy_first(target, source)

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        with torch.cuda.stream(self._copies):
            for target, _ in pairs[1:]:
                spoil(target)
        return super().copy_all(pairs, begun)

    def launch(self, work: Callable[[], None]) -> None:
        """Give *work* to the computing lane, behind a pause now and then."""
        cycles = self._draw.choice(CYCLES)
        if cycles:
            cuda: Any = torch.cuda
            cuda._sleep(cycles)
        work()


class _Captured:
    """The experts of one layer as a graph that reads its inputs from fixed places."""

    def __init__(self, driver: GraphDriver, inputs: Sequence[Tensor], table: Tensor) -> None:
        self.inputs = [torch.empty_like(tensor) for tensor in inputs]
        self.out = torch.zeros_like(inputs[0])
        self.load(inputs)
        kernels = driver.maths.kernels
        # What is set up lazily must not be captured.
        kernels.run(*self.inputs, table, self.out)
        cuda: Any = torch.cuda
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph, capture_error_mode="thread_local"):
            kernels.run(*self.inputs, table, self.out)

    def load(self, inputs: Sequence[Tensor]) -> None:
        """Put *inputs* where the graph reads them."""
        for mine, tensor in zip(self.inputs, inputs, strict=True):
            mine.copy_(tensor, non_blocking=True)


class GraphDriver(Driver):
    """Replays decode events as captured graphs, in the way of ``runtime.graphs``."""

    def __init__(self, case: Case, lanes: SlowLanes) -> None:
        super().__init__(case, lanes, lanes.launch)
        self.replays = 0
        self._graphs: dict[tuple[int, int], _Captured] = {}

    def compute(
        self, routing: Routing, plan: Plan, late: Sequence[int], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        size = len(inputs[0])
        if routing.step.phase == PREFILL or size > CAPTURED:
            return super().compute(routing, plan, late, inputs)
        engine = self.engine
        table = engine.table.slots[routing.layer]
        graph = self._graphs.get((routing.layer, size))
        if graph is None:
            graph = self._graphs[routing.layer, size] = _Captured(self, inputs, table)
        graph.load(inputs)
        if plan.whole:
            engine.at_once(plan, late)
            extra = torch.zeros_like(inputs[0])
        else:
            extra = self.apart(routing, plan, late, inputs)
            engine.hide(routing)
        self.launch(graph.graph.replay)
        self.replays += 1
        return graph.out + extra


class _WholeStep:
    """The experts of all layers of a step as one graph, a gate's kernel before each."""

    def __init__(self, driver: WholeDriver, size: int) -> None:
        case = driver.case
        kernels, shake = driver.maths.kernels, driver.shake
        early = kernels.waits(size) and driver.draw_early()
        gate = GateKernel(shake, served=case.serves, early=early)
        self.inputs = [driver.send(driver.inputs(size)) for _ in range(case.layers)]
        self.outs = [torch.zeros_like(hidden) for hidden, _, _ in self.inputs]
        self.answers = [
            HostAnswer(index, None, case.top_k, 0, pin=True) for _, index, _ in self.inputs
        ]
        cuda: Any = torch.cuda

        def experts(layer: int) -> None:
            hidden, index, weights = self.inputs[layer]
            gate.run(layer, index, weights, index, self.answers[layer])
            kernels.run(hidden, index, weights, shake.slots[layer], self.outs[layer], wait=early)

        # What is set up lazily must not be captured.
        shake.release()
        experts(0)
        shake.renew()
        self.graph = cuda.CUDAGraph()
        with cuda.graph(self.graph, capture_error_mode="thread_local"):
            for layer in range(case.layers):
                cuda._sleep(driver.random.choice(CYCLES))
                experts(layer)


class WholeDriver(Driver):
    """Replays decode steps as one captured graph each, in the way of ``runtime.whole_steps``."""

    def __init__(self, case: Case, lanes: SlowLanes) -> None:
        super().__init__(case, lanes, lanes.launch)
        shake = handshake_for(self.engine)
        assert shake is not None
        self.shake = shake
        self.replays = 0
        self._steps: dict[int, _WholeStep] = {}

    def draw_early(self) -> bool:
        """Whether a graph computes what is there while the rest is awaited."""
        return self.random.random() < 0.7

    def layers(self, step: Step, size: int) -> None:
        if step.phase == PREFILL or not runs_whole(self.planner, size):
            super().layers(step, size)
            return
        if size not in self._steps:
            self.lanes.finish()
            self._steps[size] = _WholeStep(self, size)
        whole = self._steps[size]
        given = [self.inputs(size) for _ in range(self.case.layers)]
        for mine, inputs in zip(whole.inputs, given, strict=True):
            for target, tensor in zip(mine, self.send(inputs), strict=True):
                target.copy_(tensor, non_blocking=True)
        self.launch(whole.graph.replay)
        self.replays += 1
        plans = []
        for layer, inputs in enumerate(given):
            time.sleep(self.random.choice(PAUSES_S))
            await_gate(self.engine, self.shake)
            assert np.array_equal(whole.answers[layer].read().experts, inputs[1].numpy())
            routing = self.routed(step, layer, inputs[1])
            plan, late = answer(self.engine, self.shake, routing, serves=self.case.serves)
            self.note(plan, late)
            plans.append((routing, plan))
        for (routing, plan), inputs, out in zip(plans, given, whole.outs, strict=True):
            self.expect(routing, plan, inputs, out.clone())


@dataclass
class Tally:
    """What a stress run met."""

    cases: int = 0
    events: int = 0
    waves: int = 0
    late: int = 0
    cancelled: int = 0
    replays: int = 0
    served: set[str] = field(default_factory=set)

    def add(self, driver: Driver) -> None:
        """Count what *driver* met."""
        self.cases += 1
        self.events += driver.events
        self.waves += driver.waves
        self.late += driver.late
        self.cancelled += driver.engine.copier.cancelled
        self.replays += getattr(driver, "replays", 0)
        self.served |= driver.served


def small_variety(seed: int) -> Iterator[Case]:
    """Cases without end whose shapes are few: every shape costs kernels to be compiled."""
    draw = random.Random(seed)
    for case in cases(1_000_000, seed):
        layers, experts, top_k = 3, 8, 2
        least = top_k * (layers if case.pool == "layer" else 1)
        slots = draw.randint(least, layers * experts)
        yield replace(
            case, layers=layers, experts=experts, top_k=top_k, slots=slots,
            bits=draw.choice((0, 4)), steps=20,
        )  # fmt: skip


def stress(
    events: int,
    seed: int = 0,
    device: str = "cuda",
    *,
    whole: bool = False,
    seconds: float = float("inf"),
) -> Tally:
    """Run at least *events* random events; AssertionError for the first wrong output.

    With *whole* every decode step is one graph. No case is begun after *seconds*.
    """
    tally = Tally()
    end = time.perf_counter() + seconds
    for case in small_variety(seed):
        if tally.events >= events or time.perf_counter() > end:
            break
        driver: Driver
        if whole:
            lanes = SlowLanes(torch.device(device), case.seed)
            driver = WholeDriver(replace(whole_steps_of(case), steps=60), lanes)
        else:
            driver = _driver(case, device, graphs=tally.cases % 3 > 0)
        driver.run()
        tally.add(driver)
    return tally


def _driver(case: Case, device: str, graphs: bool) -> Driver:
    if device == "cpu":
        racing = RacingLanes(case.seed)
        return Driver(case, racing, racing.do)
    lanes = SlowLanes(torch.device(device), case.seed)
    return GraphDriver(case, lanes) if graphs else Driver(case, lanes, lanes.launch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=2000, help="least number of events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="longest time")
    parser.add_argument("--whole", action="store_true", help="decode steps as one graph each")
    options = parser.parse_args()
    begun = time.perf_counter()
    try:
        tally = stress(
            options.events,
            options.seed,
            options.device,
            whole=options.whole,
            seconds=options.seconds,
        )
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    print(f"passed in {time.perf_counter() - begun:.1f} s: {tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
