"""Attention masks worked out before a pass, where a captured pass could not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate


def full_windows(cache: Any) -> tuple[bool, ...]:
    """For each sliding layer of *cache* whether its window is full."""
    return tuple(
        layer.cumulative_length_int >= layer.max_cache_len
        for layer in getattr(cache, "layers", [])
        if hasattr(layer, "cumulative_length_int")
    )


def masks_are_given(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass is handed the masks of its layers, one [B, 1, T, S] or a dict."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


def with_masks(config: Any, dtype: torch.dtype, kwargs: dict[str, Any]) -> dict[str, Any]:
    """*kwargs* of a pass with its masks, as ``generate`` makes them, where it needs them.

    Eager attention (gpt-oss) makes a tensor on the host for its mask, and a full window's mask
    depends on a number that the host counts: neither can be part of a captured pass.
    """
    cache = kwargs["past_key_values"]
    needed = config._attn_implementation == "eager" or any(full_windows(cache))
    if not needed or masks_are_given(kwargs):
        return kwargs
    ids = kwargs["input_ids"]
    make: Any = create_masks_for_generate
    masks = make(
        config=config,
        # Only its shape, type and device are looked at.
        inputs_embeds=torch.empty((*ids.shape, 0), dtype=dtype, device=ids.device),
        attention_mask=kwargs.get("attention_mask"),
        past_key_values=cache,
        position_ids=kwargs.get("position_ids"),
    )
    return kwargs | {"attention_mask": masks}
