"""KV caches of decode steps over fixed rows, one for each number of sequences that run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from policies.schedule import Schedule, Seating
from runtime.kv_rows import GatheredLayer, KvRows, PlacedLayer, make_gathered
from traces.trace import IntArray

#: First row of the KV cache, and number of sequences, of a decode step.
Key = tuple[int, int]


class ReplayCaches:
    """Static caches of *longest* positions and the other inputs of decode steps, by their key.

    Smaller batches use the memory of the largest: they run when others have ended. Under a
    token scheduler (*schedule*) each of a unit's sequences has a row of its own, of which a
    group sees its part, or from which every layer gathers those of the step. With
    *own_places* each of them has a position of its own, as when it decodes for real.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        longest: int,
        schedule: Schedule | None,
        *,
        own_places: bool = False,
    ) -> None:
        self._model, self._device, self._longest = model, device, longest
        self._rows_needed = schedule.rows if schedule is not None else 0
        self._gathers = schedule is not None and schedule.kv == "reindex"
        self._caches: dict[Key, Any] = {}
        self._inputs: dict[Key, dict[str, Any]] = {}
        self._own_places = own_places
        self._rows: KvRows | None = None
        #: Rows and positions of a step, where its layers ask for them.
        self._gathered: dict[Key, tuple[Tensor, Tensor]] = {}

    def make(self, key: Key) -> dict[str, Any]:
        """The inputs of a decode step, its cache not yet used; the largest key comes first."""
        cache = StaticCache(config=self._model.config, max_cache_len=self._longest)
        self._caches[key] = cache
        size = key[1]
        self._inputs[key] = {
            "input_ids": torch.zeros(size, 1, dtype=torch.int64, device=self._device),
            "position_ids": torch.full((size, 1), self._longest // 2, device=self._device),
            "attention_mask": self._masks(size),
            "past_key_values": cache,
            "use_cache": True,
        }
        return self._inputs[key]

    def settle(self, key: Key) -> None:
        """The cache of *key* has been used once, by which its shapes are known: give it a place."""
        cache, (first, size) = self._caches[key], key
        if not self._rows_needed:
            self._share(cache, size)
            return
        if self._rows is None:
            self._rows = KvRows(cache, self._rows_needed)
        if self._gathers:
            first, size = 0, self._rows_needed
        self._rows.seat(cache, first, size)
        if self._gathers or self._own_places:
            rows = torch.arange(key[1], device=self._device)
            self._gathered[key] = rows, torch.zeros_like(rows)
            kind = GatheredLayer if self._gathers else PlacedLayer
            make_gathered(cache, *self._gathered[key], kind)

    def inputs(self, size: int, seating: Seating | None) -> dict[str, Any]:
        """The inputs of a decode step of *size* sequences."""
        return self._inputs[seating.key if seating is not None else (0, size)]

    def follow(self, seating: Seating, positions: IntArray) -> None:
        """Move the rows that a step needs moved; say which it has, and the *positions* [B]."""
        if seating.moves and self._rows is not None:
            self._rows.move(seating.moves)
        if seating.key in self._gathered:
            rows, places = self._gathered[seating.key]
            rows.copy_(torch.from_numpy(seating.rows - seating.key[0]), non_blocking=True)
            places.copy_(torch.from_numpy(positions), non_blocking=True)

    def show(self, key: Key, positions: IntArray) -> None:
        """Let a step see what each of its sequences holds up to its own of *positions* [B]."""
        inputs, at = self._inputs[key], torch.from_numpy(positions).to(self._device)
        inputs["position_ids"].copy_(at.unsqueeze(1))
        masks = inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else (masks,):
            # A full window holds no other than those that are seen.
            seen = torch.arange(mask.shape[-1], device=self._device) <= at.view(-1, 1, 1, 1)
            if mask.dtype == torch.bool:
                mask.copy_(seen)
            else:
                mask.zero_().masked_fill_(~seen, torch.finfo(mask.dtype).min)

    def take(self, cache: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep the prompts that *cache* holds, as :meth:`KvRows.take`; a key is settled."""
        assert self._rows is not None
        self._rows.take(cache, rows, lengths)

    def rewind(self) -> None:
        """New sequences begin: the caches start from their first token."""
        for cache in self._caches.values():
            cache.reset()

    def clear(self) -> None:
        """Forget them all."""
        self._caches.clear()
        self._inputs.clear()
        self._gathered.clear()
        self._rows = None

    def _share(self, cache: Any, size: int) -> None:
        largest = self._caches[max(self._caches)]
        if cache is largest:
            return
        for mine, whole in zip(cache.layers, largest.layers, strict=True):
            mine.keys, mine.values = whole.keys[:size], whole.values[:size]

    def _masks(self, size: int) -> Any:
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
