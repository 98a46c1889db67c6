"""What one captured layer takes on the GPU, by what its stream waited for before it.

Run it on a CUDA machine: ``python -m tests.gpu.segments``; it prints one table within half a
minute. A layer of middle-sized experts is replayed after nothing, after an idle time, after a
kernel of another stream, and after copies into slots or elsewhere, with and without writes to
the table of experts; so are its experts alone, small kernels, and an answer to the host.

Columns are microseconds, medians: *gpu* between marks of the computing stream around the
graph, the first behind whatever is waited for; *after* from the end of the last copy (or of
the other stream's kernel) to the graph's end; *wake* from there to the first of these marks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from runtime.calibration.bench import Bench
from runtime.calibration.experts import swiglu_layout
from runtime.calibration.models import _segments
from runtime.calibration.shapes import (
    Decoding,
    middle_dimensions,
    offloaded,
)
from runtime.kernels import FusedExperts
from runtime.kernels.gating import Gating
from runtime.lanes import CudaLanes, Mark

MIB = 2**20
#: One expert of Qwen3-30B's size.
COPY_BYTES = 9 * MIB
STALL_CYCLES = 600_000
CUDA: Any = torch.cuda


class Case(NamedTuple):
    """One row: what happens before the graph is launched."""

    name: str
    idle_s: float = 0.0
    copies: int = 0
    into_slots: bool = False
    sleeps: bool = False
    writes: int = 0
    landed: bool = False


CASES = (
    Case("quiet"),
    Case("host idle 100 us", idle_s=1e-4),
    Case("host idle 400 us", idle_s=4e-4),
    Case("waits for a kernel", sleeps=True),
    Case("1 copy elsewhere", copies=1),
    Case("2 copies elsewhere", copies=2),
    Case("3 copies elsewhere", copies=3),
    Case("1 copy to a slot", copies=1, into_slots=True),
    Case("2 copies to slots", copies=2, into_slots=True),
    Case("3 copies to slots", copies=3, into_slots=True),
    Case("3 copies, landed before launch", copies=3, into_slots=True, landed=True),
    Case("2 writes", writes=2),
    Case("8 writes", writes=8),
    Case("8 writes, waits for a kernel", writes=8, sleeps=True),
    Case("3 copies to slots, 6 writes", copies=3, into_slots=True, writes=6),
)


class Machine:
    """Lanes and memory that the cases use; *slots* are what the timed layer reads."""

    def __init__(self, slots: torch.Tensor) -> None:
        device = torch.device("cuda")
        self.bench = Bench(device)
        self.lanes = CudaLanes(device, timed=True)
        self.slots = slots
        self.elsewhere = torch.zeros(4, COPY_BYTES, dtype=torch.uint8, device=device)
        self.source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        self.table = torch.zeros(64, dtype=torch.int32, device=device)
        self.other = CUDA.Stream(device)

    def time(self, case: Case, replay: Callable[[], None]) -> tuple[float, float, float]:
        """Seconds *gpu*, *after* and *wake* of one replay in *case*."""
        lanes = self.lanes
        self.bench.wait()
        # The layer before, as in a step: the device was busy a moment ago.
        replay()
        self.bench.wait()
        lanes.enter()
        until = time.perf_counter() + case.idle_s
        while time.perf_counter() < until:
            pass
        last: Mark | None = None
        for i in range(case.copies):
            target = self.slots[i] if case.into_slots else self.elsewhere[i]
            size = min(target.nbytes, COPY_BYTES)
            _, last = lanes.copy(target.view(-1)[:size], self.source[:size])
        if case.sleeps:
            with CUDA.stream(self.other):
                CUDA._sleep(STALL_CYCLES)
                last = Mark(CUDA.Event(enable_timing=True))
                last.event.record(self.other)
        if case.landed and last is not None:
            last.event.synchronize()
        for i in range(case.writes):
            lanes.write(self.table, i, 1)
        if last is not None:
            lanes.compute_after(last)
        begin = lanes.mark()
        replay()
        end = lanes.mark()
        lanes.finish()
        at, done = lanes.read(begin), lanes.read(end)
        ended = at if last is None else lanes.read(last)
        return done - at, done - ended, at - ended

    def row(self, case: Case, replay: Callable[[], None], repeats: int) -> tuple[float, ...]:
        """Medians of :meth:`time`, the first three left out."""
        found = [self.time(case, replay) for _ in range(repeats + 3)][3:]
        return tuple(statistics.median(column) for column in zip(*found, strict=True))


def experts_alone(machine: Machine) -> Callable[[], None]:
    """A graph of one event's fused experts, read from slots of their own."""
    bench = machine.bench
    layout = swiglu_layout(1536, 512)
    bank = torch.zeros(64, layout.stride_bytes, dtype=torch.uint8, device=bench.device)
    kernels = FusedExperts(layout, bank, Gating("silu"), top_k=4)
    rows = torch.randn(1, 1536, device=bench.device).bfloat16()
    weights = torch.full((1, 4), 0.25, device=bench.device, dtype=torch.bfloat16)
    table = torch.arange(64, dtype=torch.int32, device=bench.device)
    index, out = torch.arange(4, device=bench.device).view(1, 4), torch.empty_like(rows)
    return bench.graph(lambda: kernels.run(rows, index, weights, table, out))


def small_kernels(machine: Machine, count: int) -> Callable[[], None]:
    """A graph of *count* smallest kernels."""
    small = torch.zeros(256, device=machine.bench.device)

    def many() -> None:
        for _ in range(count):
            small.add_(1.0)

    return machine.bench.graph(many)


def answers(machine: Machine, *, kernel: bool) -> Callable[[], None]:
    """A graph that sends 64 bytes to the host: by a copy, or by a kernel that writes there."""
    there = torch.zeros(8, dtype=torch.int64, device=machine.bench.device)
    here = torch.zeros(8, dtype=torch.int64, pin_memory=True)
    if not kernel:
        return machine.bench.graph(lambda: here.copy_(there, non_blocking=True))
    from runtime.scatter import scatter

    # Any kernel that reads pinned memory crosses the link as one that writes there would.
    table = torch.zeros(64, dtype=torch.int32, device=machine.bench.device)
    pairs = torch.zeros(8, 2, dtype=torch.int32, pin_memory=True)
    scatter(table, pairs, 8)
    return machine.bench.graph(lambda: scatter(table, pairs, 8))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    bench = Bench(torch.device("cuda"))
    with offloaded(options.family, 4, bench, middle_dimensions(options.family, 4)) as model:
        tokens = 64 + len(CASES) * 2 * (options.repeats + 3) + 64
        Decoding(model, bench, tokens, prompt=16).step_s(4)
        segments = _segments(model)
        machine = Machine(model.expert_cache.runner.engine.bank.full)
        graphs: dict[str, Callable[[], None]] = {
            "layer": segments[1].replay,
            "experts": experts_alone(machine),
            "40 kernels": small_kernels(machine, 40),
            "answer by copy": answers(machine, kernel=False),
            "link read by kernel": answers(machine, kernel=True),
        }
        print(f"{'':<32}" + "".join(f"{name:>24}" for name in graphs))
        print(f"{'us':<32}" + f"{'gpu    after   wake':>24}" * len(graphs))
        for case in CASES:
            cells = []
            for replay in graphs.values():
                found = machine.row(case, replay, options.repeats)
                cells.append("".join(f"{s * 1e6:8.1f}" for s in found))
            print(f"{case.name:<32}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
