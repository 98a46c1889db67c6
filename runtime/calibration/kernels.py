"""The device's rates and smallest times: memory, operations, launches, graphs, an answer."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from runtime.calibration.bench import Bench
from runtime.calibration.fits import significant
from runtime.lanes import lanes_for

MIB = 2**20


class Rates(NamedTuple):
    """Achievable memory rate (reads and writes together) and dense bf16 operations."""

    memory_bytes_per_s: float
    bf16_flops_per_s: float
    kernel_min_s: float


def measure_rates(bench: Bench) -> Rates:
    """From a large copy within the device, a large matmul, and many smallest kernels."""
    size = (1024 if bench.cuda else 32) * MIB
    memory_rate = 2 * size / _copy_s(bench, size)
    width = 8192 if bench.cuda else 256
    left = torch.randn(width, width, device=bench.device).bfloat16()
    out = torch.empty_like(left)
    matmul_s = bench.device_s(lambda: torch.matmul(left, left, out=out), 7)
    small = torch.zeros(256, device=bench.device)
    kernel_s = bench.graph_s(lambda: small.add_(1.0), times=200)
    bench.free()
    return Rates(
        significant(memory_rate), significant(2 * width**3 / matmul_s), significant(kernel_s)
    )


def _copy_s(bench: Bench, size: int) -> float:
    """Device seconds of a copy of *size* bytes within the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return bench.device_s(lambda: target.copy_(source), 7)


#: Kernels of the graph whose round trip is timed: about as many as one layer has.
GRAPH_KERNELS = 40

#: No part of a round trip is taken to be shorter: the clocks of host and device differ.
LEAST_PART_S = 5e-7


class Graphs(NamedTuple):
    """Seconds around a captured graph that ends with an answer in pinned memory.

    *launch_s*: what passes on the device between marks around a replay beside the graph
    itself; *sync_s*: what the host waits for the answer beside that.
    """

    launch_s: float
    sync_s: float


def measure_graphs(bench: Bench) -> Graphs:
    """One graph round trip, taken apart; on the CPU only the answer's copy."""
    lanes = lanes_for(bench.device, timed=True)
    there = torch.zeros(1, 8, dtype=torch.int64, device=bench.device)
    here = torch.zeros(1, 8, dtype=torch.int64, pin_memory=bench.cuda)

    def answer() -> None:
        for _ in range(GRAPH_KERNELS if bench.cuda else 1):
            there.add_(1)
        here.copy_(there, non_blocking=True)

    replay = bench.graph(answer)
    between: list[float] = []

    def round_trip() -> None:
        begin = lanes.mark()
        replay()
        end = lanes.mark()
        while not lanes.passed(end):
            pass
        here.numpy()[0].tolist()
        between.append(lanes.read(end) - lanes.read(begin))
        lanes.recycle([begin, end])

    both_s = bench.host_s(round_trip, 200)
    sync_s, launch_s = round_trip_parts(
        both_s, statistics.median(between), bench.device_s(replay, 50, held=True)
    )
    return Graphs(launch_s if bench.cuda else 0.0, sync_s)


def round_trip_parts(whole_s: float, between_s: float, graph_s: float) -> tuple[float, float]:
    """Answer and launch of a round trip of *whole_s* on the host.

    *between_s* lies between marks around the graph, *graph_s* takes the graph when it is
    queued up before it starts.
    """
    sync_s = max(whole_s - between_s, LEAST_PART_S)
    return significant(sync_s), significant(max(between_s - graph_s, LEAST_PART_S))
