"""Times of experts: one alone in plain torch, all of an event by our kernels, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.calibration.bench import Bench, median_s
from runtime.calibration.fits import (
    ExpertTime,
    Line,
    activation_passes,
    nonnegative,
    read_efficiency,
    significant,
)
from runtime.calibration.kernels import Rates
from runtime.kernels import FusedExperts
from runtime.kernels.gating import Gating
from runtime.layout import ExpertLayout, LowLayout, Part

#: Name, hidden and intermediate size of the experts that are timed, the largest first.
SHAPES = (
    ("mixtral-8x7b", 4096, 14336), ("deepseek-v2-lite", 2048, 1408), ("qwen3-30b", 2048, 768),
)  # fmt: skip
Shapes = Sequence[tuple[str, int, int]]
SMALL_SHAPES = (("small", 512, 1024), ("smaller", 256, 512))
TOKENS = (1, 16, 256, 1024, 4096)
FEW_TOKENS = (1, 16, 64)

#: Sizes (hidden, intermediate) and experts of an event for the fused kernels' reading rate.
FUSED = ((2048, 768, 8), (2048, 1408, 6), (2048, 1024, 8), (2880, 2880, 4), (4096, 14336, 2))
FEW_FUSED = ((256, 512, 4), (512, 1024, 4))

#: The same for several tokens at a time, and how many experts they choose among.
SHARED = ((2048, 768, 8), (2048, 1408, 6), (4096, 14336, 2))
SHARED_TOKENS, SHARED_EXPERTS = 8, 16

#: Precisions of the copies that ``mixed`` may use.
LOW_BITS = (4, 8)

#: Weights read in turns, so that caches hold none of them.
ROUNDS_BYTES = 512 * 2**20

#: Kernels of one expert alone in plain torch: gate, up, activation, product, down.
EXPERT_KERNELS = 5
PARAM_BYTES = 2


class ExpertRow(NamedTuple):
    """One expert's measured seconds: eager by tokens, and in a graph for one token."""

    model: str
    expert_bytes: int
    tokens: list[int]
    eager_s: list[float]
    graph_s: float


class Experts(NamedTuple):
    """What a profile says of experts."""

    memory_efficiency: float
    activation_passes: float
    rows: list[ExpertRow]


class Low(NamedTuple):
    """Low-precision copies: share of the memory rate by bits, and what a further token takes."""

    efficiency: dict[str, float]
    token_share: float


class CpuRates(NamedTuple):
    """Experts computed by the host, with all cores: reading bound, and bound by operations."""

    expert_bytes_per_s: float
    flops_per_s: float


def _weights(hidden: int, inner: int, device: torch.device) -> list[Tensor]:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [torch.randn(s, device=device).mul_(s[1] ** -0.5).bfloat16() for s in shapes]


def swiglu(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert on *rows* [n, H]; weights [I, H], [I, H] and [H, I]."""
    return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)


def measure_experts(bench: Bench, rates: Rates, advance: Callable[[], None]) -> Experts:
    """Rows of single experts by plain torch, and what a profile makes of them."""
    large = bench.cuda and not bench.quick
    shapes: Shapes = SHAPES if large else SMALL_SHAPES
    tokens: Sequence[int] = TOKENS if large else FEW_TOKENS
    if bench.cuda and bench.quick:
        shapes, tokens = SHAPES[1:], TOKENS[:4]
    rows = []
    for name, hidden, inner in shapes:
        rows.append(_row(bench, name, hidden, inner, list(tokens)))
        advance()
    largest = rows[0]
    read_rate = min(largest.expert_bytes / largest.graph_s, rates.memory_bytes_per_s)
    timed = [
        _timed(row.expert_bytes, hidden, inner, n, seconds)
        for row, (_, hidden, inner) in zip(rows, shapes, strict=True)
        for n, seconds in zip(row.tokens, row.eager_s, strict=True)
        if n >= 256 or not large
    ]
    passes = activation_passes(timed, read_rate, rates.bf16_flops_per_s, rates.memory_bytes_per_s)
    return Experts(significant(read_rate / rates.memory_bytes_per_s), significant(passes), rows)


def _timed(size: int, hidden: int, inner: int, tokens: int, seconds: float) -> ExpertTime:
    flops = 2.0 * tokens * size / PARAM_BYTES
    one_pass = tokens * (hidden * inner) ** 0.5 * PARAM_BYTES
    return ExpertTime(size, flops, one_pass, seconds)


def _row(bench: Bench, name: str, hidden: int, inner: int, tokens: list[int]) -> ExpertRow:
    size = 3 * hidden * inner * PARAM_BYTES
    copies = max(1, (ROUNDS_BYTES if bench.cuda else 2**20) // size)
    experts = [_weights(hidden, inner, bench.device) for _ in range(copies)]
    eager = []
    for count in tokens:
        rows = torch.randn(count, hidden, device=bench.device).bfloat16()

        def alone(rows: Tensor = rows) -> None:
            swiglu(rows, *experts[0])

        eager.append(significant(bench.device_s(alone, 9)))
    one = torch.randn(1, hidden, device=bench.device).bfloat16()

    def every() -> None:
        for expert in experts:
            swiglu(one, *expert)

    graph_s = bench.graph_s(every, repeats=7) / copies
    return ExpertRow(name, size, tokens, eager, significant(graph_s))


def measure_fused(bench: Bench, rate: float, low_bits: int = 0) -> Line:
    """How the time of one event's experts grows with their bytes; ``beta`` is a share of *rate*.

    With *low_bits* they are read from low-precision copies of so many bits.
    """
    shapes: Sequence[tuple[int, int, int]] = FUSED if bench.cuda else FEW_FUSED
    if bench.cuda and bench.quick:
        shapes = FUSED[:-1]
    sizes, seconds = [], []
    for hidden, inner, top_k in shapes:
        event = Event(hidden, inner, top_k, low_bits=low_bits)
        sizes.append(event.expert_bytes * top_k)
        seconds.append(_fused_s(bench, event))
        bench.free()
    return read_efficiency(sizes, seconds, rate)


def swiglu_layout(hidden: int, inner: int) -> ExpertLayout:
    """The packed form of one SwiGLU expert, gate and up stacked, in bfloat16."""
    first = Part("gate_up_proj", (2 * inner, hidden), 0)
    second = Part("down_proj", (hidden, inner), 2 * inner * hidden)
    return ExpertLayout(torch.bfloat16, (first, second))


def measure_token_share(bench: Bench, rate: float, fused: Line, low_bits: int = 0) -> float:
    """What each further token of an expert takes in our kernels, as a share of reading it.

    *fused* is what :func:`measure_fused` found at *rate* for one token; *low_bits* as there.
    What an event of several tokens takes once is fitted beside it over several sizes.
    """
    shapes = SHARED if bench.cuda else FEW_FUSED
    rows, work = [], []
    for hidden, inner, top_k in shapes:
        event = Event(hidden, inner, top_k, SHARED_TOKENS, low_bits)
        read_s, distinct = event.expert_bytes / (fused.beta * rate), event.distinct()
        seconds = _fused_s(bench, event)
        # Relative to the event's time, so that the largest does not decide alone.
        further_s = read_s * (SHARED_TOKENS * top_k - distinct)
        rows.append((1 / seconds, further_s / seconds))
        work.append(max(seconds - distinct * read_s, 0.0) / seconds)
        bench.free()
    return float(nonnegative(np.array(rows), np.array(work))[1])


def measure_low(bench: Bench, rate: float) -> Low:
    """The same of experts that are read from low-precision copies."""
    efficiency, shares = {}, []
    for bits in LOW_BITS if not bench.quick else LOW_BITS[:1]:
        found = measure_fused(bench, rate, bits)
        efficiency[str(bits)] = significant(found.beta)
        shares.append(measure_token_share(bench, rate, found, bits))
    return Low(efficiency, significant(sum(shares) / len(shares)))


class Event(NamedTuple):
    """Sizes of an event: several tokens choose among :data:`SHARED_EXPERTS` experts.

    With *low_bits* all of them are served from low-precision copies.
    """

    hidden: int
    inner: int
    top_k: int
    tokens: int = 1
    low_bits: int = 0

    @property
    def layout(self) -> ExpertLayout:
        """Its experts at full precision."""
        return swiglu_layout(self.hidden, self.inner)

    @property
    def low_layout(self) -> LowLayout | None:
        """Its experts as they are served, if that is not at full precision."""
        return LowLayout(self.layout, self.low_bits) if self.low_bits else None

    @property
    def expert_bytes(self) -> float:
        """Bytes that one of its experts is read from."""
        low = self.low_layout
        return float(low.size_bytes if low else 3 * self.hidden * self.inner * PARAM_BYTES)

    @property
    def experts(self) -> int:
        """Experts that its layer has."""
        return self.top_k if self.tokens == 1 else SHARED_EXPERTS

    def chosen(self) -> Tensor:
        """Chosen experts int64 [tokens, k]: the same at every call."""
        draw = torch.Generator().manual_seed(self.top_k)
        return torch.rand(self.tokens, self.experts, generator=draw).topk(self.top_k).indices

    def distinct(self) -> int:
        """How many experts are chosen."""
        return len(torch.unique(self.chosen()))


def _fused_s(bench: Bench, event: Event) -> float:
    """Device seconds of one *event*, its experts read from slots that follow each other."""
    tokens, top_k, layout, low = event.tokens, event.top_k, event.layout, event.low_layout
    served = low or layout
    most = ROUNDS_BYTES if bench.cuda else 2**20
    events = max(2, min(64, most // (served.stride_bytes * event.experts)))
    slots = events * event.experts

    def bank(stride_bytes: int, slots: int) -> Tensor:
        return torch.zeros(slots, stride_bytes, dtype=torch.uint8, device=bench.device)

    # Beside a low bank one full slot, so that there is a full bank.
    full = bank(layout.stride_bytes, 1 if low else slots)
    lows = bank(low.stride_bytes, slots) if low else None
    kernels = FusedExperts(layout, full, Gating("silu"), top_k=top_k, low_layout=low, low=lows)
    hidden_rows = torch.randn(tokens, event.hidden, device=bench.device).bfloat16()
    weights = torch.full((tokens, top_k), 1 / top_k, device=bench.device, dtype=torch.bfloat16)
    table = torch.arange(slots, dtype=torch.int32, device=bench.device) + (1 if low else 0)
    chosen = event.chosen().to(bench.device)
    index = [chosen + event.experts * i for i in range(events)]
    out = torch.empty_like(hidden_rows)

    def every() -> None:
        for one in index:
            kernels.run(hidden_rows, one, weights, table, out)

    return bench.graph_s(every, repeats=7) / events


def measure_dense(bench: Bench, rate: float) -> Line:
    """How the time of dense matrices for one token grows with their bytes, as a share of *rate*.

    Sizes from a small to a large attention projection.
    """
    widths = (1024, 2048, 3072, 4096, 6144) if bench.cuda else (256, 512, 1024)
    sizes, seconds = [], []
    for width in widths:
        size = width * width * PARAM_BYTES
        count = max(2, (ROUNDS_BYTES if bench.cuda else 2**21) // size)
        weights = [
            torch.zeros(width, width, device=bench.device, dtype=torch.bfloat16)
            for _ in range(min(count, 128))
        ]
        row = torch.zeros(1, width, device=bench.device, dtype=torch.bfloat16)

        def every(row: Tensor = row, weights: list[Tensor] = weights) -> None:
            for weight in weights:
                F.linear(row, weight)

        sizes.append(float(size))
        seconds.append(bench.graph_s(every, repeats=7) / len(weights))
    bench.free()
    return read_efficiency(sizes, seconds, rate)


def measure_cpu(quick: bool) -> CpuRates:
    """bf16 SwiGLU on the host: one token reads weights, many tokens compute."""
    hidden, inner = (512, 1024) if quick else (2048, 1408)
    size = 3 * hidden * inner * PARAM_BYTES
    count = max(2, (2**24 if quick else 2**28) // size)
    host = torch.device("cpu")
    experts = [_weights(hidden, inner, host) for _ in range(count)]
    one = torch.randn(1, hidden).bfloat16()

    def every() -> None:
        for expert in experts:
            swiglu(one, *expert)

    read_s = median_s(every, 3) / count
    tokens = 64 if quick else 512
    rows = torch.randn(tokens, hidden).bfloat16()
    flops = 2.0 * tokens * size / PARAM_BYTES
    compute_s = median_s(lambda: swiglu(rows, *experts[0]), 3)
    return CpuRates(significant(size / read_s), significant(flops / compute_s))
