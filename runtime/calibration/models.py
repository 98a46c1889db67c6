"""Small random models in the runtime: what a layer takes when its weights hardly matter."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, StaticCache

from runtime.calibration.bench import Bench
from runtime.calibration.fits import line
from runtime.dimensions import config_of
from runtime.families import find_gates
from runtime.offloading import offload
from traces.sizes import Dimensions, dimensions

#: Families that are measured; the others are taken to be as these on average.
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
)  # fmt: skip
#: The one whose steps are taken apart.
TYPICAL = "qwen3_moe"

FEW_LAYERS, MORE_LAYERS = 3, 9
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

#: Lengths of cache between which the time to read it is measured.
SHORT_CACHE, LONG_CACHE = 256, 2304


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

    def __init__(self, model: Any, bench: Bench, cache_tokens: int = CACHE_TOKENS) -> None:
        self._model, self._bench = model, bench
        self._cache = StaticCache(config=model.config, max_cache_len=cache_tokens)
        self._token = torch.arange(PROMPT, device=bench.device).view(1, PROMPT)
        self._length = 0
        self.prefill_s = self._timed()

    @property
    def kept(self) -> list[Any]:
        """The cache's layers."""
        return list(self._cache.layers)

    def _timed(self) -> float:
        """Seconds of one step, from its input until its token is known."""
        begin, self._length = self._length, self._length + self._token.shape[1]
        places = torch.arange(begin, self._length, device=self._bench.device).unsqueeze(0)
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


class Chain(NamedTuple):
    """A captured decode step of :data:`TYPICAL`: seconds of one layer more, and of the rest."""

    layer_s: float
    rest_s: float


def measure_chain(bench: Bench) -> Chain:
    """Steps in the runtime with graphs, all experts held, at two depths."""
    seconds = []
    for layers in (FEW_LAYERS, MORE_LAYERS):
        with offloaded(TYPICAL, layers, bench) as model:
            seconds.append(Decoding(model, bench).step_s(STEPS))
    found = line((FEW_LAYERS, MORE_LAYERS), seconds)
    return Chain(found.beta, found.alpha)


class Layers(NamedTuple):
    """GPU seconds of one captured layer, and how well it reads its cache, by family.

    *kv_efficiency* is a share of the memory rate. ``any`` is the mean of those measured.
    """

    floor_s: dict[str, float]
    kv_efficiency: dict[str, float]


def measure_layers(bench: Bench, memory_rate: float, advance: Callable[[], None]) -> Layers:
    """Floors and cache reading of every family; empty where nothing can be captured."""
    floors: dict[str, float] = {}
    kept: dict[str, float] = {}
    for family in FAMILIES if not bench.quick else (TYPICAL,):
        if bench.cuda:
            _measure_layer(family, bench, memory_rate, floors, kept)
        advance()
    if floors:
        floors["any"] = statistics.mean(floors.values())
        kept["any"] = statistics.mean(kept.values())
    return Layers(floors, kept)


def _measure_layer(
    family: str,
    bench: Bench,
    memory_rate: float,
    floors: dict[str, float],
    kept: dict[str, float],
) -> None:
    """Note what one layer of *family* takes, unless its decode steps run eagerly."""
    dims = tiny_dimensions(family, FEW_LAYERS, wide=True)
    floor = _layer_s(family, bench, dims, SHORT_CACHE)
    if floor is None:
        return
    headed = with_published_heads(family, dims)
    short, long = (_layer_s(family, bench, headed, n) for n in (SHORT_CACHE, LONG_CACHE))
    token_bytes = headed.kv_bytes_per_token(2) / headed.all_layers
    floors[family] = floor
    kept[family] = cache_share(short or 0.0, long or 0.0, token_bytes * memory_rate**-1)


def cache_share(short_s: float, long_s: float, token_s: float) -> float:
    """The share of the memory rate at which a cache is read, at most 1.

    From a layer's seconds with a short and a long cache; *token_s* is what a token's keys and
    values take at the full rate.
    """
    more_s = (long_s - short_s) / (LONG_CACHE - SHORT_CACHE)
    return min(token_s / more_s, 1.0) if more_s > 0 else 1.0


def _segments(model: Any) -> list[Any]:
    """The graphs of the captured decode step of *model*, in order; none if it runs eagerly."""
    graphs = model.expert_cache.runner.graphs
    chains = graphs.chains if graphs is not None else []
    return list(chains[0].segments()) if chains else []


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


def _layer_s(family: str, bench: Bench, dims: Dimensions, cache_tokens: int) -> float | None:
    """One layer's graph, replayed behind others so that no launch counts; None if eager."""
    with offloaded(family, FEW_LAYERS, bench, dims) as model:
        Decoding(model, bench, cache_tokens).step_s(4)
        # The first ends with the first gate, the last has the head: a layer is between them.
        layers = _segments(model)[1:-1]
        if not layers:
            return None

        def replay() -> None:
            for graph in layers:
                graph.replay()

        # Every replay moves the cache on by a token.
        return bench.device_s(replay, 30, held=True) / len(layers)
