"""Rotary embeddings in captured decode steps, where a step must not ask the host for anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_frequencies(model: Any, device: torch.device) -> None:
    """Let embeddings that work out their frequencies in every pass (phimoe's) keep them.

    They do so on the host and copy them to the device, which no captured pass can. The values
    are those of the configuration, once and for all, so they are worked out here in the same
    way and left on *device*.
    """
    for module in model.modules():
        if _asks_every_pass(module) and _kinds(module) == ["default"]:
            frequencies, factor = module.rope_init_fn(module.config)
            module.rope_init_fn = _Frequencies(frequencies.to(device), factor)


def follows_length(model: Any) -> str:
    """What in *model* depends on how long a sequence has become, in a few words; or nothing.

    The embeddings named ``dynamic`` and ``longrope`` ask the device for the longest position
    of a pass and then go one way or the other: a captured pass would keep to one of them.
    """
    for name, module in model.named_modules():
        for kind in _kinds(module):
            asks = "dynamic" in kind or kind == "longrope"
            if asks or (_asks_every_pass(module) and kind != "default"):
                return f"{name} is of type {kind}, which depends on the length of the sequence"
    return ""


def _kinds(module: Any) -> list[str]:
    """The rotary types of *module*, one or one for each kind of layer; none if it is another."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, dict):
        return sorted({str(kind) for kind in found.values()})
    return [found] if isinstance(found, str) else []


def _asks_every_pass(module: Any) -> bool:
    """Whether *module* keeps the function that gives its frequencies: to call it in each pass."""
    return callable(getattr(module, "rope_init_fn", None)) and hasattr(module, "config")


class _Frequencies:
    """Stands where that function was: *frequencies* float [dim / 2] and the *factor* with them."""

    def __init__(self, frequencies: Tensor, factor: float) -> None:
        self._answer = frequencies, factor

    def __call__(self, config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        return self._answer
