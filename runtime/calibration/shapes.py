"""Models whose time says what a machine takes: tiny ones, middle-sized ones, offloaded ones."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from runtime.calibration.bench import Bench
from runtime.dimensions import config_of
from runtime.kernels.fused import DECODE_TOKENS
from runtime.offloading import offload
from traces.sizes import Dimensions, dimensions

#: Families that are measured; the others are taken to be as these on average.
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss",
)  # fmt: skip
#: The one whose steps are taken apart.
TYPICAL = "qwen3_moe"

FEW_LAYERS, MORE_LAYERS = 3, 9
#: Depth of the models whose layers' floor is measured: more than a GPU's caches hold.
FLOOR_LAYERS = 6
TOP_K = 4
#: Token ids that every model below has.
VOCABULARY = 512
CACHE_TOKENS = 512
PROMPT = 64
#: A prompt whose experts are not computed by the kernels of decode steps.
LONG_PROMPT = 2 * DECODE_TOKENS
STEPS = 60
#: Steps that are run before others count: they set up and capture.
FIRST_STEPS = 4

#: A published model of each family, for the heads that its key-value cache serves.
PUBLISHED = {
    "mixtral": "mixtral-8x7b", "qwen2_moe": "qwen1.5-moe", "qwen3_moe": "qwen3-30b",
    "olmoe": "olmoe", "deepseek_v2": "deepseek-v2-lite", "deepseek_v3": "deepseek-v3",
    "gpt_oss": "gpt-oss-20b",
}  # fmt: skip

#: Lengths of cache between which the time to read it is measured, and numbers of sequences.
SHORT_CACHE, LONG_CACHE = 128, 2176
SEQUENCES = (1, 4)

#: Sequences of a step of several tokens, whose layers have a floor of their own.
SEVERAL = 8

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
        vocabulary=VOCABULARY,
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
    # Weights are drawn on the device: the CPU takes seconds for a model.
    with torch.device(bench.device):
        model = maker.from_config(config, dtype=torch.bfloat16).eval()
    return model.to("cpu")


def short_prompt(cache_tokens: int) -> int:
    """Tokens of a prompt that leaves room in the cache for steps."""
    return min(PROMPT, cache_tokens // 8)


@contextmanager
def offloaded(
    family: str, layers: int, bench: Bench, dims: Dimensions | None = None, compute: str = "fused"
) -> Iterator[Any]:
    """The same in the runtime under ``lru``, with a slot for every expert; freed behind.

    On a GPU it computes as *compute* says (:class:`runtime.offloading.Options`).
    """
    model = tiny_model(family, layers, bench, dims)
    # Whoever meets every expert in the prompt has them all from then on.
    compute = compute if bench.cuda else "auto"
    model = offload(model, "lru", cache="100%", device=bench.device.type, compute=compute)
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
        # Sequences that differ from the start choose different experts.
        starts = torch.arange(sequences, device=bench.device)[:, None] * prompt
        self._token = (starts + torch.arange(prompt, device=bench.device)) % VOCABULARY
        self._length = 0
        self.prefill_s = self.step()

    @property
    def kept(self) -> list[Any]:
        """The cache's layers."""
        return list(self._cache.layers)

    def step(self) -> float:
        """Run one step; its seconds from its input until its token is known."""
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
        """Median seconds of a step, the first (which set up and capture) left out."""
        found = [self.step() for _ in range(steps + FIRST_STEPS)]
        return statistics.median(found[FIRST_STEPS:])
