"""Sliding-window caches whose full state can be captured in a CUDA graph."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer

#: The Python number that a sliding window counts its tokens in, beside a tensor.
COUNTER = "cumulative_length_int"


#: Those of caches whose layers are all there from the start: every step asks several times.
_KNOWN: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def windows(cache: Any) -> list[Any]:
    """The layers of *cache* that are sliding windows and count in Python."""
    found = _KNOWN.get(cache)
    if found is None:
        found = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, COUNTER)]
        if getattr(cache, "is_compileable", False):
            _KNOWN[cache] = found
    return found


def is_full(layer: Any) -> bool:
    """Whether *layer* is a sliding window that is full."""
    return hasattr(layer, COUNTER) and getattr(layer, COUNTER) >= layer.max_cache_len


def count_step(cache: Any, tokens: int) -> None:
    """Move the Python counters of *cache* on by the *tokens* of a step that did not move them."""
    for layer in windows(cache):
        setattr(layer, COUNTER, getattr(layer, COUNTER) + tokens)


class CapturableWindow(StaticSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """transformers' sliding window with nothing of the host's in its decode step.

    Once full, a window moves on by one token. The original builds an index tensor on the host
    for that, which a capture refuses; the values kept are the same.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token's (or more) keys and values [B, heads, T, dim]; the whole window."""
        full = self.is_initialized and self.cumulative_length_int >= self.max_cache_len
        if not full or key_states.shape[-2] != 1:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        self.cumulative_length_int += 1
        keys: Any = self.keys
        values: Any = self.values
        for kept, new in ((keys, key_states), (values, value_states)):
            kept.copy_(torch.cat([kept[:, :, 1:], new], dim=2))
        return keys, values


def make_capturable(cache: Any) -> None:
    """Let the sliding windows of *cache* be captured."""
    for layer in getattr(cache, "layers", []):
        if type(layer) is StaticSlidingWindowLayer:
            layer.__class__ = CapturableWindow
