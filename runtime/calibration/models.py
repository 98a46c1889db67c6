"""What a captured layer takes: its floor, its share of the cache, the wake after a copy."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.calibration.bench import Bench
from runtime.calibration.fits import line
from runtime.calibration.shapes import (
    FAMILIES,
    FEW_LAYERS,
    FLOOR_LAYERS,
    LEAST_FLOOR,
    LONG_CACHE,
    PARAM_BYTES,
    PROMPT,
    SCRUB_BYTES,
    SEQUENCES,
    SHORT_CACHE,
    TYPICAL,
    Decoding,
    middle_dimensions,
    offloaded,
    tiny_dimensions,
    with_published_heads,
)
from runtime.lanes import lanes_for
from traces.sizes import Dimensions


class Layers(NamedTuple):
    """What one captured layer takes on the GPU beside reading weights, by family.

    *floor_s*: seconds; *kv_efficiency*: the share of the memory rate at which each sequence's
    cache is read; *kv_token_s*: seconds per position of the cache for all sequences together.
    ``any`` is the mean of those measured.
    """

    floor_s: dict[str, float]
    kv_efficiency: dict[str, float]
    kv_token_s: dict[str, float]


class Reads(NamedTuple):
    """How fast the GPU reads one token's weights: its memory rate, and the shares of it."""

    memory_rate: float
    dense_efficiency: float
    fused_efficiency: float

    def weights_s(self, dims: Dimensions) -> float:
        """Seconds to read what one layer of *dims* needs for one token, as costs count it."""
        dense = dataclasses.replace(dims, vocabulary=0).dense_params() / dims.all_layers
        experts = dims.top_k * dims.expert_params() / self.fused_efficiency
        return (dense / self.dense_efficiency + experts) * PARAM_BYTES / self.memory_rate


class KvTime(NamedTuple):
    """Seconds of one cached token and layer: together, and more for each sequence."""

    token_s: float
    sequence_s: float

    def efficiency(self, full_s: float) -> float:
        """The share of the memory rate, at which a token takes *full_s*; at most 1."""
        return min(full_s / self.sequence_s, 1.0) if self.sequence_s > 0 else 1.0


def kv_time(sequences: Sequence[int], short_s: Sequence[float], long_s: Sequence[float]) -> KvTime:
    """From a layer's seconds with a short and a long cache, by number of *sequences*."""
    pairs = zip(short_s, long_s, strict=True)
    found = line(sequences, [max(b - a, 0.0) / (LONG_CACHE - SHORT_CACHE) for a, b in pairs])
    return KvTime(found.alpha, found.beta)


def measure_layers(bench: Bench, reads: Reads, advance: Callable[[], None]) -> Layers:
    """Floors and cache reading of every family; empty where nothing can be captured."""
    found = Layers({}, {}, {})
    for family in FAMILIES if not bench.quick else (TYPICAL,):
        if bench.cuda:
            _measure_layer(family, bench, reads, found)
        advance()
    if found.floor_s:
        for figures in found:
            figures["any"] = statistics.mean(figures.values())
    return found


def _measure_layer(family: str, bench: Bench, reads: Reads, into: Layers) -> None:
    """Note what one layer of *family* takes, unless its decode steps run eagerly."""
    dims = middle_dimensions(family, FLOOR_LAYERS)
    middle = layer_graphs_s(family, bench, dims, [(SHORT_CACHE, 1)])
    if not middle:
        return
    headed = with_published_heads(family, tiny_dimensions(family, FEW_LAYERS, wide=True))
    shapes = [(length, n) for length in (SHORT_CACHE, LONG_CACHE) for n in SEQUENCES]
    seconds = layer_graphs_s(family, bench, headed, shapes)
    if not seconds:
        return
    kept = kv_time(SEQUENCES, seconds[: len(SEQUENCES)], seconds[len(SEQUENCES) :])
    into.kv_efficiency[family] = kept.efficiency(_token_bytes(headed) / reads.memory_rate)
    into.kv_token_s[family] = kept.token_s
    cached = _token_bytes(dims) / (into.kv_efficiency[family] * reads.memory_rate)
    known = reads.weights_s(dims) + SHORT_CACHE * (kept.token_s + cached)
    into.floor_s[family] = max(middle[0] - known, LEAST_FLOOR * middle[0])


def _token_bytes(dims: Dimensions) -> float:
    """Bytes of one token's keys and values in one layer, as costs count them."""
    return dims.kv_bytes_per_token(PARAM_BYTES) / dims.all_layers


def _segments(model: Any) -> list[Any]:
    """The graphs that were captured last of *model*, in order; none if it runs eagerly."""
    graphs = model.expert_cache.runner.graphs
    chains = graphs.chains if graphs is not None else []
    return list(chains[-1].segments()) if chains else []


def measure_workspace(bench: Bench) -> int:
    """Device bytes that a run allocates beside slots, dense weights and key-value cache.

    With a prompt of :data:`PROMPT` tokens: libraries' workspaces and the graphs' pools, and
    hardly any activations.
    """
    if not bench.cuda:
        return 0
    bench.free()
    cuda: Any = torch.cuda
    before = cuda.memory_allocated(bench.device)
    cuda.reset_peak_memory_stats(bench.device)
    with offloaded(TYPICAL, FEW_LAYERS, bench) as model:
        decoding = Decoding(model, bench)
        decoding.step_s(4)
        known = model.expert_cache.runner.engine.bank.size_bytes
        known += sum(p.numel() * p.element_size() for p in model.parameters())
        known += sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in decoding.kept)
        peak = cuda.max_memory_allocated(bench.device) - before
    return max(int(peak - known), 0)


def layer_graphs_s(
    family: str, bench: Bench, dims: Dimensions, shapes: Sequence[tuple[int, int]]
) -> list[float]:
    """Device seconds of one layer's graph for each (cache tokens, sequences) of *shapes*.

    Replayed behind others, so that no launch counts; empty where decode steps run eagerly.
    """
    with offloaded(family, dims.layers, bench, dims) as model:
        return [s for shape in shapes for s in _layer_s(model, bench, *shape)]


def woken_s(family: str, bench: Bench, dims: Dimensions, source: Tensor) -> float:
    """Device seconds from a copy's end until a layer that waits for it is done, beyond its own.

    The copy brings the pinned bytes of *source*. 0 where decode steps run eagerly.
    """
    with offloaded(family, dims.layers, bench, dims) as model:
        Decoding(model, bench, SHORT_CACHE, prompt=SHORT_CACHE // 8).step_s(4)
        layers = _segments(model)[1:-1]
        if not layers:
            return 0.0
        scrub = torch.zeros(SCRUB_BYTES // 4, device=bench.device)
        alone_s = bench.device_s(layers[0].replay, 20, held=True, first=scrub.max)
        target = torch.empty_like(source, device=bench.device)
        lanes, found = lanes_for(bench.device, timed=True), []
        for _ in range(20):
            scrub.max()
            bench.wait()
            _, landed = lanes.copy(target, source)
            lanes.compute_after(landed)
            layers[0].replay()
            done = lanes.mark()
            lanes.finish()
            found.append(lanes.read(done) - lanes.read(landed))
        return max(statistics.median(found) - alone_s, 0.0)


def _layer_s(model: Any, bench: Bench, cache_tokens: int, sequences: int) -> list[float]:
    """The same for one shape: one figure, or none."""
    # A prompt of few tokens leaves room for what is replayed below.
    prompt = min(PROMPT, cache_tokens // 8)
    decoding = Decoding(model, bench, cache_tokens, sequences, prompt)
    decoding.step_s(4)
    # The first ends with the first gate, the last has the head: a layer is between them.
    layers = _segments(model)[1:-1]
    if not layers:
        return []
    scrub = torch.zeros(SCRUB_BYTES // 4, device=bench.device)

    def replay() -> None:
        for graph in layers:
            graph.replay()

    # Every replay moves the cache on by a token.
    repeats = min(30, cache_tokens // 2)
    return [bench.device_s(replay, repeats, held=True, first=scrub.max) / len(layers)]
