"""A second view of a key-value cache, in which nothing changes from step to step but tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from runtime.window import COUNTER, CapturableWindow, is_full


def twin_of(cache: Any) -> Any:
    """A cache over the same memory as *cache*, a static one, for one decode step.

    A window's counter there says whether it is full and nothing more, for a compiler that has
    seen the count would compile again at each step. Tensors are seen through aliases without
    the marks by which transformers ties compiled code to one cache's addresses; layers that
    share a tensor share its alias.
    """
    twin = copy.copy(cache)
    aliases: dict[int, Tensor] = {}
    twin.layers = [_layer_twin(layer, aliases) for layer in cache.layers]
    return twin


def _layer_twin(layer: Any, aliases: dict[int, Tensor]) -> Any:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(twin, name, aliases.setdefault(id(value), value.detach()))
    if hasattr(layer, COUNTER):
        setattr(twin, COUNTER, layer.max_cache_len if is_full(layer) else 0)
    return twin


def counting_layers(cache: Any) -> list[Any]:
    """The layers of *cache*, a twin, that add one to their length in a decode step.

    A window that is full does not. Kinds of layers that are not known here are left to
    themselves, those whose tokens are placed among them: they do not count.
    """
    return [
        layer
        for layer in cache.layers
        if type(layer) in (StaticLayer, CapturableWindow) and not is_full(layer)
    ]


def add_to_lengths(layers: list[Any], tokens: int) -> None:
    """Add *tokens* to the lengths of *layers*, in one kernel for a hundred of them."""
    if layers:
        torch._foreach_add_([layer.cumulative_length for layer in layers], tokens)


def signature(cache: Any) -> tuple[Any, ...]:
    """What a step's code depends on in *cache*: kinds of layers, shapes, windows that are full."""
    return tuple(
        (type(layer), is_full(layer), layer.max_cache_len, *_tensor_kinds(layer))
        for layer in cache.layers
    )


def _tensor_kinds(layer: Any) -> Iterator[Any]:
    for name, value in sorted(vars(layer).items()):
        if isinstance(value, Tensor):
            yield name, tuple(value.shape), value.stride(), value.dtype, value.device


@contextmanager
def undone(cache: Any) -> Iterator[None]:
    """Take back what twins of *cache* do to its memory inside: at most one decode step each.

    Lengths are put back, and full windows, which move on by a token, are moved back. What was
    written behind the last token stays: the next step writes there before it reads.
    """
    lengths = [(layer.cumulative_length, layer.cumulative_length.clone()) for layer in cache.layers]
    windows = [
        (kept, kept[:, :, :1].clone())
        for layer in cache.layers
        if is_full(layer)
        for kept in (layer.keys, layer.values)
    ]
    try:
        yield
    finally:
        for length, before in lengths:
            length.copy_(before)
        for kept, oldest in windows:
            kept.copy_(torch.cat([oldest, kept[:, :, :-1]], dim=2))
