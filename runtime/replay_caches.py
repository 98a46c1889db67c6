"""The KV caches of a replay, one for each number of sequences that decode together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from policies.routing import Step
from policies.schedule import Schedule, Seating
from runtime.kv_rows import KvRows, make_gathered

#: First row of the KV cache, and number of sequences, of a decode step.
Key = tuple[int, int]


class ReplayCaches:
    """Static caches of *longest* positions and the other inputs of decode steps, by their key.

    Smaller batches use the memory of the largest: they run when others have ended. Under a
    token scheduler (*schedule*) each of a unit's sequences has a row of its own, of which a
    group sees its part, or from which every layer gathers those of the step.
    """

    def __init__(
        self, model: Any, device: torch.device, longest: int, schedule: Schedule | None
    ) -> None:
        self._model, self._device, self._longest = model, device, longest
        self._rows_needed = schedule.rows if schedule is not None else 0
        self._gathers = schedule is not None and schedule.kv == "reindex"
        self._caches: dict[Key, Any] = {}
        self._inputs: dict[Key, dict[str, Any]] = {}
        self._rows: KvRows | None = None
        #: Rows and positions of a step that gathers them, by number of sequences.
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}

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
        if not self._gathers:
            self._rows.seat(cache, first, size)
            return
        self._rows.seat(cache, 0, self._rows_needed)
        rows = torch.arange(size, device=self._device)
        self._gathered[size] = rows, torch.zeros_like(rows)
        make_gathered(cache, *self._gathered[size])

    def inputs(self, size: int, seating: Seating | None) -> dict[str, Any]:
        """The inputs of a decode step of *size* sequences."""
        return self._inputs[seating.key if seating is not None else (0, size)]

    def follow(self, step: Step, seating: Seating) -> None:
        """Move the rows that *step* needs moved, or say which it gathers."""
        if seating.moves and self._rows is not None:
            self._rows.move(seating.moves)
        if self._gathers:
            rows, positions = self._gathered[step.size]
            rows.copy_(torch.from_numpy(seating.rows), non_blocking=True)
            assert step.positions is not None
            positions.copy_(torch.from_numpy(step.positions), non_blocking=True)

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
