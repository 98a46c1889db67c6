"""Small random models in the runtime: what a layer takes when its weights hardly matter."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, StaticCache

from runtime.calibration.bench import Bench
from runtime.calibration.fits import line
from runtime.dimensions import config_of
from runtime.families import find_gates
from runtime.lanes import lanes_for
from runtime.offloading import offload
from traces.sizes import Dimensions, dimensions

#: Families that are measured; the others are taken to be as these on average.
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
)  # fmt: skip
#: The one whose steps are taken apart.
TYPICAL = "qwen3_moe"

FEW_LAYERS, MORE_LAYERS = 3, 9
#: Depth of the models whose layers' floor is measured: the layers between are what is timed.
FLOOR_LAYERS = 4
TOP_K = 4
CACHE_TOKENS = 512
PROMPT = 64
STEPS = 60


#: A published model of each family, for the heads that its key-value cache serves.
PUBLISHED = {
    "mixtral": "mixtral-8x7b", "qwen2_moe": "qwen1.5-moe", "qwen3_moe": "qwen3-30b",
    "olmoe": "olmoe", "deepseek_v2": "deepseek-v2-lite", "deepseek_v3": "deepseek-v3",
    "gpt_oss": "gpt-oss-20b",
}  # fmt: skip

#: Lengths of cache between which the time to read it is measured, and numbers of sequences.
SHORT_CACHE, LONG_CACHE = 128, 2176
SEQUENCES = (1, 4)

#: Read before a layer is timed, so that the device's caches hold nothing of it.
SCRUB_BYTES = 256 * 2**20

#: A floor is at least this share of the layer: what is subtracted from it is a model.
LEAST_FLOOR = 0.1
PARAM_BYTES = 2


def tiny_dimensions(family: str, layers: int, wide: bool) -> Dimensions:
    """Dimensions of *family* with small matrices; *wide* as a GPU's kernels like them."""
    unit = 4 if wide else 1
    return Dimensions(
        source="made up",
        published_params=0,
        layers=layers,
        experts=16,
        top_k=TOP_K,
        hidden=128 * unit,
        intermediate=64 * unit,
        heads=8,
        head_dim=16 * unit,
        vocabulary=512,
        kv_heads=8 if family.startswith("deepseek") else 2,
        shared_intermediate=64 * unit,
        dense_intermediate=64 * unit,
        kv_rank=16 * unit,
        nope_dim=16 * unit,
        rope_dim=8 * unit,
    )


def middle_dimensions(family: str, layers: int, *, wide: bool = True) -> Dimensions:
    """Dimensions of *family* on the scale of published models, though none's; else small."""
    unit = 128 if wide else 16
    latent = family.startswith("deepseek")
    # Its norm over all heads has the hidden size.
    heads = 12 if family == "olmoe" else 24
    return Dimensions(
        source="made up",
        published_params=0,
        layers=layers,
        experts=16,
        top_k=TOP_K,
        hidden=12 * unit,
        intermediate=4 * unit,
        heads=heads,
        head_dim=unit,
        vocabulary=1024,
        kv_heads=0 if latent else heads if family in ("olmoe", "qwen2_moe") else 4,
        shared_intermediate=8 * unit if latent or family == "qwen2_moe" else 0,
        dense_intermediate=8 * unit,
        query_rank=6 * unit if family == "deepseek_v3" else 0,
        kv_rank=3 * unit if latent else 0,
        nope_dim=unit if latent else 0,
        rope_dim=unit // 2 if latent else 0,
    )


def with_published_heads(family: str, dims: Dimensions) -> Dimensions:
    """*dims* with as many and as large attention heads as a published model of *family*."""
    names = ("heads", "kv_heads", "head_dim", "query_rank", "kv_rank", "nope_dim", "rope_dim")
    known = dimensions(PUBLISHED[family])
    heads: dict[str, Any] = {name: getattr(known, name) for name in names}
    if known.qk_norm == "full":
        # Its norm over all heads has the hidden size.
        heads["hidden"] = known.heads * known.head_dim
    return dataclasses.replace(dims, **heads)


def tiny_model(family: str, layers: int, bench: Bench, dims: Dimensions | None = None) -> Any:
    """A model of :func:`tiny_dimensions`, or *dims*, with random bfloat16 weights, on the CPU."""
    torch.manual_seed(0)
    maker: Any = AutoModelForCausalLM
    config = config_of(family, dims or tiny_dimensions(family, layers, wide=bench.cuda))
    return maker.from_config(config, dtype=torch.bfloat16).eval()


@contextmanager
def offloaded(
    family: str, layers: int, bench: Bench, dims: Dimensions | None = None
) -> Iterator[Any]:
    """The same in the runtime under ``lru``, with a slot for every expert; freed behind."""
    model = tiny_model(family, layers, bench, dims)
    # Whoever meets every expert in the prompt has them all from then on.
    model = offload(model, policy="lru", cache="100%", device=bench.device.type)
    try:
        yield model
    finally:
        model.expert_cache.close()
        bench.free()


class Decoding:
    """Decode steps of *model* one by one over one static cache, greedily."""

    def __init__(
        self,
        model: Any,
        bench: Bench,
        cache_tokens: int = CACHE_TOKENS,
        sequences: int = 1,
        prompt: int = PROMPT,
    ) -> None:
        self._model, self._bench = model, bench
        self._cache = StaticCache(config=model.config, max_cache_len=cache_tokens)
        self._token = torch.arange(prompt, device=bench.device).repeat(sequences, 1)
        self._length = 0
        self.prefill_s = self._timed()

    @property
    def kept(self) -> list[Any]:
        """The cache's layers."""
        return list(self._cache.layers)

    def _timed(self) -> float:
        """Seconds of one step, from its input until its token is known."""
        begin, self._length = self._length, self._length + self._token.shape[1]
        places = torch.arange(begin, self._length, device=self._bench.device)
        places = places.repeat(len(self._token), 1)
        self._bench.wait()
        start = time.perf_counter()
        with torch.no_grad():
            output = self._model(
                input_ids=self._token,
                # Not worked out by the model from the cache: a graph must not wait for that.
                position_ids=places,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._token = output.logits[:, -1:].argmax(-1)
        self._token.cpu()
        return time.perf_counter() - start

    def step_s(self, steps: int) -> float:
        """Median seconds of a step, the first four (which set up and capture) left out."""
        found = [self._timed() for _ in range(steps + 4)]
        return statistics.median(found[4:])


class Launches(NamedTuple):
    """Work of one layer of a model that is launched kernel by kernel, and what a launch takes."""

    kernel_launch_s: float
    step_s: float
    attention_kernels: int
    expert_kernels: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are kernels: views, and reading shapes, are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether *func* returns a view of what it is given, without writing to it."""
    results = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in results)


def _operations(model: Any, tokens: int, device: torch.device) -> int:
    """Kernels that a forward pass of *tokens* tokens asks for."""
    ids = torch.arange(tokens, device=device).view(1, tokens) % 64
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        counter = _Counter()
        with counter:
            model(input_ids=ids, use_cache=False)
    return counter.count


def measure_launches(bench: Bench) -> Launches:
    """The model's code without graphs, all experts resident, one layer more against one less.

    Time and operations both from models of two depths: what does not depend on the depth is
    the step's. Experts' operations are the runtime's own, for a prompt.
    """
    seconds, operations = [], []
    for layers in (FEW_LAYERS, MORE_LAYERS):
        model = tiny_model(TYPICAL, layers, bench).to(bench.device)
        model.set_experts_implementation("batched_mm")
        decoding = Decoding(model, bench)
        seconds.append(decoding.step_s(10 if bench.quick else 40))
        operations.append(_operations(model, 1, bench.device))
        del model, decoding
    found = line((FEW_LAYERS, MORE_LAYERS), seconds)
    per_layer = (operations[1] - operations[0]) / (MORE_LAYERS - FEW_LAYERS)
    experts = _expert_operations(bench)
    resident = _resident_expert_operations(bench)
    return Launches(
        found.beta / per_layer, max(found.alpha, 1e-6), round(per_layer - resident), experts
    )


def _resident_expert_operations(bench: Bench) -> int:
    """Operations of transformers' own experts of one layer for one token."""
    model = tiny_model(TYPICAL, 1, bench).to(bench.device)
    model.set_experts_implementation("batched_mm")
    return _within_experts(model, 1, bench)


def _expert_operations(bench: Bench) -> int:
    """Operations of the runtime's experts of one layer for a prompt, all of them held."""
    with offloaded(TYPICAL, 2, bench) as model:
        return _within_experts(model, PROMPT, bench)


def _within_experts(model: Any, tokens: int, bench: Bench) -> int:
    """Operations of the first experts module of *model*."""
    experts = find_gates(model)[0].experts
    counted: list[int] = []
    inside = experts.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        counter = _Counter()
        with counter:
            result = inside(*inputs, **options)
        counted.append(counter.count)
        return result

    ids = torch.arange(tokens, device=bench.device).view(1, tokens) % 64
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        experts.forward = forward
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            del experts.forward
    return max(counted[0], 1)


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
