"""What a captured layer takes: its floor, and its share of the key-value cache."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from runtime.calibration.bench import Bench
from runtime.calibration.fits import line
from runtime.calibration.shapes import (
    FAMILIES,
    FEW_LAYERS,
    FLOOR_LAYERS,
    LEAST_FLOOR,
    LONG_CACHE,
    PARAM_BYTES,
    SEQUENCES,
    SEVERAL,
    SHORT_CACHE,
    TYPICAL,
    Decoding,
    middle_dimensions,
    offloaded,
    short_prompt,
    tiny_dimensions,
    with_published_heads,
)
from runtime.calibration.timed import quiet_layer_s
from runtime.calibration.whole_layers import WholeLayer, WholeLayers, whole_graphs, whole_layer
from runtime.eventclock import EventClock, Times
from traces.sizes import Dimensions


class Layers(NamedTuple):
    """What one captured layer takes on the GPU beside reading weights, by family.

    *floor_s*: seconds for one token, *several_s* for several; *kv_efficiency*: the share of
    the memory rate at which each sequence's cache is read; *kv_token_s*: seconds per position
    of the cache for all sequences together. ``any`` is the mean of those measured.
    """

    floor_s: dict[str, float]
    several_s: dict[str, float]
    kv_efficiency: dict[str, float]
    kv_token_s: dict[str, float]

    @classmethod
    def empty(cls) -> Layers:
        """Nothing measured yet."""
        return cls({}, {}, {}, {})


class LayerTime(NamedTuple):
    """Seconds of one layer, from its launch to its answer, and the experts that it computed."""

    seconds: float
    experts: float


class Reads(NamedTuple):
    """How fast the GPU reads weights: its memory rate, and the shares of it.

    *token_share* is what a further token of an expert takes of reading that expert.
    """

    memory_rate: float
    dense_efficiency: float
    fused_efficiency: float
    token_share: float = 0.0

    def weights_s(self, dims: Dimensions, experts: float, tokens: int) -> float:
        """Seconds to read what one layer of *dims* needs, as costs count it.

        *experts* are the distinct ones of *tokens* tokens.
        """
        dense = dataclasses.replace(dims, vocabulary=0).dense_params() / dims.all_layers
        read = experts + self.token_share * (tokens * dims.top_k - experts)
        read *= dims.expert_params() / self.fused_efficiency
        return (dense / self.dense_efficiency + read) * PARAM_BYTES / self.memory_rate


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


def measure_layers(
    bench: Bench, reads: Reads, sync_s: float, advance: Callable[[], None]
) -> tuple[Layers, WholeLayers]:
    """Floors and cache reading of every family; empty where nothing can be captured.

    Of chains of graphs, and of the same layers where steps are one graph each, if they can be.
    *sync_s* is what a gate's answer takes to the host: no part of a layer.
    """
    found, wholes = Layers.empty(), WholeLayers.empty()
    for family in FAMILIES if not bench.quick else (TYPICAL,):
        if bench.cuda:
            _measure_layer(family, bench, reads, sync_s, (found, wholes))
        advance()
    if found.floor_s:
        for figures in found:
            figures["any"] = statistics.mean(figures.values())
    return found, wholes


def _measure_layer(
    family: str, bench: Bench, reads: Reads, sync_s: float, found: tuple[Layers, WholeLayers]
) -> None:
    """Note what one layer of *family* takes, unless its decode steps run eagerly."""
    into, wholes = found
    dims = middle_dimensions(family, FLOOR_LAYERS)
    middle, in_one = _both_ways(family, bench, dims)
    if not middle:
        return
    headed = with_published_heads(family, tiny_dimensions(family, FEW_LAYERS, wide=True))
    shapes = [(length, n) for length in (SHORT_CACHE, LONG_CACHE) for n in SEQUENCES]
    seconds = [one.seconds for one in layer_times(family, bench, headed, shapes)]
    if not seconds:
        return
    kept = kv_time(SEQUENCES, seconds[: len(SEQUENCES)], seconds[len(SEQUENCES) :])
    into.kv_efficiency[family] = kept.efficiency(_token_bytes(headed) / reads.memory_rate)
    into.kv_token_s[family] = kept.token_s
    cached = _token_bytes(dims) / (into.kv_efficiency[family] * reads.memory_rate)

    def read_s(experts: float, tokens: int) -> float:
        kept_s = SHORT_CACHE * (kept.token_s + tokens * cached)
        return reads.weights_s(dims, experts, tokens) + kept_s

    for floors, one, tokens in zip(
        (into.floor_s, into.several_s), middle, (1, SEVERAL), strict=True
    ):
        known = sync_s + read_s(one.experts, tokens)
        floors[family] = max(one.seconds - known, LEAST_FLOOR * one.seconds)
    for whole, tokens in zip(in_one, (1, SEVERAL), strict=False):
        wholes.note(family, whole, read_s(whole.experts, tokens), several=tokens > 1)


def _both_ways(
    family: str, bench: Bench, dims: Dimensions
) -> tuple[list[LayerTime], list[WholeLayer]]:
    """What a layer takes for one sequence and for several, in chains and in one graph.

    One model does for both. Empty where decode steps run eagerly, or not in one graph.
    """
    shapes = [(SHORT_CACHE, 1), (SHORT_CACHE, SEVERAL)]
    with offloaded(family, dims.layers, bench, dims) as model:
        graphs = whole_graphs(model)
        middle = _layer_times(model, bench, shapes)
        if graphs is None or not middle:
            return middle, []
        in_one = [one for shape in shapes for one in whole_layer(model, graphs, bench, *shape)]
        return middle, in_one if len(in_one) == len(shapes) else []


def _token_bytes(dims: Dimensions) -> float:
    """Bytes of one token's keys and values in one layer, as costs count them."""
    return dims.kv_bytes_per_token(PARAM_BYTES) / dims.all_layers


def measure_workspace(bench: Bench) -> int:
    """Device bytes that a run allocates beside slots, dense weights and key-value cache.

    With a prompt of :data:`PROMPT` tokens: libraries' workspaces and the graphs' pools, and
    hardly any activations.
    """
    if not bench.cuda:
        return 0
    # Work space of matrix products is kept for good by whoever came first.
    torch._C._cuda_clearCublasWorkspaces()
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


def layer_times(
    family: str, bench: Bench, dims: Dimensions, shapes: Sequence[tuple[int, int]]
) -> list[LayerTime]:
    """What a layer takes for each (cache tokens, sequences) of *shapes*, every expert held.

    Empty where decode steps run eagerly.
    """
    with offloaded(family, dims.layers, bench, dims) as model:
        return _layer_times(model, bench, shapes)


def _layer_times(model: Any, bench: Bench, shapes: Sequence[tuple[int, int]]) -> list[LayerTime]:
    return [one for shape in shapes for one in _layer_time(model, bench, *shape)]


def _layer_time(model: Any, bench: Bench, cache_tokens: int, sequences: int) -> list[LayerTime]:
    """The same for one shape: one, or none."""
    runner = model.expert_cache.runner
    graphs, engine = runner.graphs, runner.engine
    before = 0 if graphs is None else graphs.captured
    decoding = Decoding(model, bench, cache_tokens, sequences, short_prompt(cache_tokens))
    decoding.step_s(2)
    if graphs is None or graphs.captured == before:
        return []
    events, accesses = engine.events, engine.accesses
    times = noted(model, decoding, min(40, cache_tokens // 2))
    experts = (engine.accesses - accesses) / (engine.events - events)
    return [LayerTime(quiet_layer_s(times), experts)]


def noted(model: Any, decoding: Decoding, steps: int) -> Times:
    """The moments of the events of *steps* decode steps, and of four before them."""
    engine, clock = model.expert_cache.runner.engine, EventClock()
    engine.clock = clock
    decoding.step_s(steps)
    engine.clock = None
    return clock.take(engine.planner.context.layers)
