"""One forward pass per step of a trace, with the routing that the trace recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from policies.batching import Batches
from policies.routing import DECODE, Step
from policies.session import TraceSession
from runtime.forcing import ForcedRouting
from runtime.graphs import decode_graphs
from runtime.hook import Hook
from runtime.maths import Reference
from runtime.measuring import RealWorld
from runtime.offloading import Options
from runtime.steps import ReplayedSteps


class Replay:
    """Drives a model through the steps of a trace and times each.

    A prefill step runs the prompts of its batch as one row of tokens; a decode step runs one
    token of each live sequence over a static cache as long as the trace's last position.
    Tokens are drawn at random (the trace decides where they go). What is set up lazily, and
    the capture of graphs, is done before the clock starts.
    """

    def __init__(self, model: Any, hook: Hook, session: TraceSession, options: Options) -> None:
        self._model, self._hook = model, hook
        hook.steps = ReplayedSteps(session.model)
        self._forced = ForcedRouting(hook.gates, hook.engine.lanes.device)
        self._forced.__enter__()
        self._graphs = decode_graphs(hook, model.forward) if options.graphs else None
        self._device = hook.engine.lanes.device
        self._sizes = _decode_sizes(session.batches())
        self._longest, self._most = session.shape.cache_tokens, session.shape.prompt_tokens
        self._caches: dict[int, Any] = {}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._random = np.random.default_rng(0)

    def run(self, steps: Iterable[Step], world: RealWorld) -> None:
        """Run *steps* and add each to *world*."""
        self._warm_up()
        sequences: frozenset[int] = frozenset()
        for step in steps:
            ids = frozenset(step.sequence_ids.tolist())  # type: ignore[union-attr]
            if not ids <= sequences:
                self._rewind()
            sequences = ids
            self._run_step(step, world)
        world.finish()

    def close(self) -> None:
        """Take the hooks off the model and forget its caches."""
        self._forced.__exit__(None, None, None)
        self._graphs = None
        self._caches.clear()
        self._inputs.clear()

    def _run_step(self, step: Step, world: RealWorld) -> None:
        """One step, from its tokens on the host to the next ones on the host."""
        hook, engine = self._hook, self._hook.engine
        chosen = torch.from_numpy(np.ascontiguousarray(step._experts.swapaxes(0, 1)))  # type: ignore[union-attr]
        self._forced.set(chosen.to(torch.int64).to(self._device))
        tokens = torch.from_numpy(self._random.integers(0, self._vocabulary, step.size))
        decoding = step.phase == DECODE
        if isinstance(hook.maths, Reference):
            hook.maths.decoding = decoding
        engine.lanes.finish()
        world.begin(decoding)
        begun = engine.lanes.now()
        hook.step = step
        engine.begin(step)
        logits = self._decode(tokens) if decoding else self._prefill(tokens)
        engine.watch.split("attention")
        # The next token, on the host: a step lasts until it is there.
        logits.argmax(dim=-1).cpu()
        world.add(step, engine.lanes.now() - begun)
        engine.end()
        hook.step = None

    @property
    def _vocabulary(self) -> int:
        return int(self._model.config.vocab_size)

    def _prefill(self, tokens: Tensor) -> Tensor:
        ids = tokens.unsqueeze(0).to(self._device, non_blocking=True)
        logits: Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def _decode(self, tokens: Tensor) -> Tensor:
        size = len(tokens)
        inputs = self._inputs[size]
        inputs["input_ids"].copy_(tokens.unsqueeze(1), non_blocking=True)
        if self._graphs is not None and self._graphs.suits(inputs):
            logits: Tensor = self._graphs.run(inputs).logits
        else:
            logits = self._model(**inputs).logits
        return logits

    def _warm_up(self) -> None:
        """Caches, graphs and everything that is set up when it is first used."""
        for size in sorted(self._sizes, reverse=True):
            self._inputs[size] = self._make_inputs(size)
            self._force_anything(size)
            with self._hook.without_experts():
                self._model(**self._inputs[size])
            self._share_cache(size)
            if self._graphs is not None:
                self._graphs.warm(self._inputs[size])
        if self._most:
            self._force_anything(self._most)
            with self._hook.without_experts():
                self._prefill(torch.zeros(self._most, dtype=torch.int64))
        self._rewind()

    def _force_anything(self, tokens: int) -> None:
        gates = self._hook.gates
        chosen = torch.arange(gates[0].top_k).expand(len(gates), tokens, -1)
        self._forced.set(chosen.to(self._device))

    def _make_inputs(self, size: int) -> dict[str, Any]:
        cache = StaticCache(config=self._model.config, max_cache_len=self._longest)
        self._caches[size] = cache
        return {
            "input_ids": torch.zeros(size, 1, dtype=torch.int64, device=self._device),
            "position_ids": torch.full((size, 1), self._longest // 2, device=self._device),
            "attention_mask": self._masks(cache, size),
            "past_key_values": cache,
            "use_cache": True,
        }

    def _masks(self, cache: Any, size: int) -> Any:
        """Masks that show the whole cache: the cost of attention is that of its length."""
        config = self._model.config
        boolean = config._attn_implementation == "sdpa"

        def visible(length: int) -> Tensor:
            shape = (size, 1, 1, length)
            if boolean:
                return torch.ones(shape, dtype=torch.bool, device=self._device)
            return torch.zeros(shape, dtype=self._model.dtype, device=self._device)

        kinds = set(getattr(config, "layer_types", None) or ())
        if "sliding_attention" not in kinds:
            return visible(self._longest)
        window = min(int(config.sliding_window), self._longest)
        return {
            "full_attention": visible(self._longest),
            "sliding_attention": visible(window),
        }

    def _share_cache(self, size: int) -> None:
        """Smaller batches use the memory of the largest: they run when others have ended."""
        largest = self._caches[max(self._caches)]
        if self._caches[size] is largest:
            return
        for mine, whole in zip(self._caches[size].layers, largest.layers, strict=True):
            mine.keys, mine.values = whole.keys[:size], whole.values[:size]

    def _rewind(self) -> None:
        """New sequences begin: the caches start from their first token."""
        for cache in self._caches.values():
            cache.reset()


def _decode_sizes(batches: Batches) -> set[int]:
    """How many sequences decode together, every number that occurs."""
    sizes: set[int] = set()
    for members in batches.members():
        decoded = [len(m) - m.prefill for m in members]
        sizes |= {sum(1 for d in decoded if d >= end) for end in decoded if end}
    return sizes
