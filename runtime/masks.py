"""Attention masks and positions worked out before a pass, where a captured pass could not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from runtime.window import is_full, windows


def full_windows(cache: Any) -> tuple[bool, ...]:
    """For each sliding layer of *cache* whether its window is full."""
    return tuple(map(is_full, windows(cache)))


def masks_are_given(kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass is handed the masks of its layers, one [B, 1, T, S] or a dict."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


def with_masks(config: Any, dtype: torch.dtype, kwargs: dict[str, Any]) -> dict[str, Any]:
    """*kwargs* of a pass with masks and positions, as ``generate`` makes them, where it needs them.

    Eager attention (gpt-oss) makes a tensor on the host for its mask, and the mask of a window
    and what comes after it depend on a number that the host counts: none of these can be part
    of a captured pass.
    """
    cache, ids = kwargs["past_key_values"], kwargs["input_ids"]
    windows = full_windows(cache)
    if windows and kwargs.get("position_ids") is None:
        length = cache.get_seq_length()
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        kwargs = kwargs | {"position_ids": positions + length}
    needed = config._attn_implementation == "eager" or windows
    if not needed or masks_are_given(kwargs):
        return kwargs
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
