"""How long a layer's experts take on this GPU, beside transformers' kernels and the memory rate.

PYTHONPATH=. python benchmarks/expert_kernels.py [--model NAME] [--tokens 1,8] [--low 8]
PYTHONPATH=. python benchmarks/expert_kernels.py --tune [--low 8] [--limit 100] [--json FILE]

Every model's layer has its real dimensions, random bfloat16 weights and random routing. Weights
of successive calls differ (several layers in one bank), so that none are found in the GPU's
cache. `fused` is what the runtime calls: `pairs` for one token (an expert is read for every token
that uses it), `groups` for some (read once), `sorted` for many. `--tune` tries other cuts of the
first two (expert_tuning.py). With `--low` there are low-precision copies of all experts too, and
each call is timed twice: with all experts in full precision, and with all in low.
Times are medians of CUDA graph replays (`graph`) and of eager calls timed by CUDA events
(`eager`), in microseconds per layer; `host` is what one call costs the host. The rate counts
every demanded expert's bytes once, and is a share of the device's copy rate, measured first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.integrations import moe

from runtime.kernels import FusedExperts, Gating
from runtime.kernels.fused import DECODE_TOKENS
from runtime.kernels.prefill import run_prefill
from runtime.kernels.routes import Call
from runtime.layout import ExpertLayout, LowLayout
from runtime.quantise import quantise

if TYPE_CHECKING:
    from runtime.kernels.decode import DecodeKernels

#: Bytes of weights in the bank at least: many times an H200's 50 MB cache.
BANK_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Shape:
    """One layer's experts: dimensions, and gpt-oss's layout or the usual one."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    transposed: bool = False


MODELS = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "olmoe": Shape(2048, 1024, 64, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, transposed=True),
}


class Bench:
    """Some layers of one model in a bank, and the calls that are timed."""

    def __init__(self, shape: Shape, low_bits: int) -> None:
        self.shape = shape
        self.gating = (
            Gating("clamped_swiglu", True, True, 1.702, 7.0) if shape.transposed else Gating("silu")
        )
        self.layout = ExpertLayout.of(_meta_experts(shape))
        per_layer = self.layout.stride_bytes * shape.experts
        self.layers = max(2, -(-BANK_BYTES // per_layer))
        slots = self.layers * shape.experts
        self.full = torch.empty(slots, self.layout.stride_bytes, dtype=torch.uint8, device="cuda")
        self.full.view(torch.bfloat16).normal_(std=0.02)
        self.low_layout = LowLayout(self.layout, low_bits) if low_bits else None
        self.low = self._lower()
        self.full_tables = [
            torch.arange(shape.experts, dtype=torch.int32, device="cuda") + start
            for start in range(0, slots, shape.experts)
        ]
        #: Every layer's experts in low precision, if there is such a bank.
        self.tables = (
            [table + slots for table in self.full_tables] if low_bits else self.full_tables
        )
        self.fused = FusedExperts(
            self.layout,
            self.full,
            self.gating,
            top_k=shape.top_k,
            low_layout=self.low_layout,
            low=self.low,
        )

    def _lower(self) -> Tensor | None:
        """A low copy of the first expert in as many slots as the full bank has."""
        if self.low_layout is None:
            return None
        low = torch.empty(
            len(self.full), self.low_layout.stride_bytes, dtype=torch.uint8, device="cuda"
        )
        flat = self.full[0].view(torch.bfloat16)[: self.layout.params]
        low[:, : self.low_layout.size_bytes] = quantise(flat, self.low_layout)
        return low

    def routes(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random inputs [T, H], and k distinct experts and weights of each token."""
        torch.manual_seed(tokens)
        shape = self.shape
        hidden = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        scores = torch.rand(tokens, shape.experts, device="cuda")
        weights, index = scores.topk(shape.top_k, dim=1)
        return hidden, index, weights.to(hidden.dtype)

    def demand_bytes(self, index: Tensor, full: bool = False) -> int:
        """Bytes of the distinct experts in *index*: low precision if there is, unless *full*."""
        low = None if full else self.low_layout
        size = self.layout.size_bytes if low is None else low.size_bytes
        return len(torch.unique(index)) * size

    def calls(self, tokens: int, full: bool = False) -> dict[str, Callable[[int], object]]:
        """What is timed, by name; each takes the layer's number. *full* as above."""
        hidden, index, weights = self.routes(tokens)
        out = torch.empty_like(hidden)
        banks, gating = self.fused.banks, self.gating
        tables = self.full_tables if full else self.tables

        def prefill(layer: int) -> None:
            call = Call(hidden, index, weights, tables[layer], out)
            run_prefill(banks, gating, call, self.fused._grouped, self.fused.rounds)

        def decode(kernels: DecodeKernels, layer: int) -> None:
            kernels.run(hidden, index, weights, tables[layer], out, -1, False)

        found: dict[str, Callable[[int], object]] = {
            "fused": lambda layer: self.fused.run(hidden, index, weights, tables[layer], out),
            "sorted": prefill,
        }
        for name, kernels, most in (
            ("pairs", self.fused._pairs, 1),
            ("groups", self.fused._groups, DECODE_TOKENS),
        ):
            if tokens <= most:
                assert kernels is not None, "triton is not installed"
                found[name] = partial(decode, kernels)
        if self.low is None:
            layers = [self.stacked(layer) for layer in range(self.layers)]
            for kernel in ("batched_mm", "grouped_mm"):
                forward = getattr(moe, f"{kernel}_experts_forward")
                found[kernel] = partial(_theirs, forward, layers, (hidden, index, weights))
        return found

    def stacked(self, layer: int) -> Any:
        """One layer's weights as transformers' kernels take them, without a copy."""
        count = self.shape.experts
        views = self.layout.views(self.full[layer * count : (layer + 1) * count])
        return SimpleNamespace(
            **views,
            num_experts=count,
            has_gate=True,
            has_bias=self.shape.transposed,
            has_post_expert_norm=False,
            is_transposed=self.shape.transposed,
            is_concatenated=not self.shape.transposed,
            _apply_gate=self.gating.apply,
            _is_expert_parallel=False,
        )


def _theirs(forward: Any, layers: list[Any], routes: tuple[Tensor, ...], layer: int) -> Any:
    """One call of transformers' *forward* on one of *layers*."""
    return forward(layers[layer], *routes)


def _meta_experts(shape: Shape) -> Any:
    """An experts module's shapes, without memory."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(shape.experts, *sizes, dtype=torch.bfloat16, device="meta")

    hidden, inner = shape.hidden, shape.intermediate
    if not shape.transposed:
        return SimpleNamespace(
            gate_up_proj=empty(2 * inner, hidden),
            down_proj=empty(hidden, inner),
            is_transposed=False,
            is_concatenated=True,
        )
    return SimpleNamespace(
        gate_up_proj=empty(hidden, 2 * inner),
        gate_up_proj_bias=empty(2 * inner),
        down_proj=empty(inner, hidden),
        down_proj_bias=empty(hidden),
        is_transposed=True,
        is_concatenated=False,
    )


def event_us(work: Callable[[], object], rounds: int = 7) -> float:
    """Median microseconds of *work* on the device, issue included where the host is late."""
    times: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(rounds):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def layer_us(call: Callable[[int], object], layers: int) -> tuple[float, float, float]:
    """Microseconds per layer: graph replay (NaN if it cannot be captured), eager, host."""

    def all_layers() -> None:
        for layer in range(layers):
            call(layer)

    all_layers()
    eager = event_us(all_layers) / layers
    torch.cuda.synchronize()
    start = time.perf_counter()
    all_layers()
    host = (time.perf_counter() - start) * 1e6 / layers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_layers()
    except RuntimeError:
        torch.cuda.synchronize()
        return float("nan"), eager, host
    graph.replay()
    return event_us(graph.replay) / layers, eager, host


def copy_rate() -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 2**30 / (event_us(lambda: target.copy_(source)) * 1e-6)


def table(names: list[str], tokens: list[int], low_bits: int, rate: float) -> None:
    """Print the table."""
    print("| model | tokens | experts | kernel | graph us | GB/s | rate | eager us | host us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        bench = Bench(MODELS[name], low_bits)
        for count in tokens:
            for full in (True, False) if low_bits else (True,):
                _lines(f"| {name} | {count} | {'full' if full else f'int{low_bits}'}",
                       bench, count, full, rate)  # fmt: skip
        del bench
        torch.cuda.empty_cache()


def _lines(begin: str, bench: Bench, tokens: int, full: bool, rate: float) -> None:
    """Print the table's lines for one number of *tokens*, all of which *begin* alike."""
    needed = bench.demand_bytes(bench.routes(tokens)[1], full)
    for kernel, call in bench.calls(tokens, full).items():
        graph, eager, host = layer_us(call, bench.layers)
        per_s = needed / graph * 1e6
        shares = f"{per_s / 1e9:.0f} | {per_s / rate:.0%}" if graph == graph else "- | -"
        print(f"{begin} | {kernel} | {graph:.1f} | {shares} | {eager:.1f} | {host:.1f} |",
              flush=True)  # fmt: skip


def main() -> None:
    """Read the options and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="all if not given")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64", help="tokens per call, by comma")
    parser.add_argument(
        "--low", type=int, default=0, choices=(0, 4, 8), help="bits of copies, timed too"
    )
    parser.add_argument("--tune", action="store_true", help="try other cuts of the work")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds that --tune may take")
    parser.add_argument("--json", type=Path, help="file for what --tune finds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device found, expected one")
    names = options.model or list(MODELS)
    tokens = [int(word) for word in options.tokens.split(",")]
    with torch.inference_mode():
        rate = copy_rate()
        print(f"{torch.cuda.get_device_name()}, device copy {rate / 1e12:.2f} TB/s\n")
        if options.tune:
            from benchmarks.expert_tuning import Tuner

            tuner = Tuner(rate, tokens, options.limit, options.json)
            for name in names:
                tuner.tune(name, Bench(MODELS[name], options.low), names[names.index(name) :])
        else:
            table(names, tokens, options.low, rate)


if __name__ == "__main__":
    main()
