"""The experts of a layer as one operator that a compiler neither opens nor moves.

``torch.compile`` cannot look into a :class:`~runtime.hook.Hook`: it plans, waits and copies.
Traced code calls ``expertflow::experts`` instead, whose implementation finds the hook by its key.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class ComputesExperts(Protocol):
    """What stands behind the operator: a hook."""

    def experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the experts of *layer*: [T, H], from [T, H], [T, k], [T, k]."""
        ...


#: In bytes, of what compiled code reads in vectors.
_ALIGNMENT = 16

_HOOKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def key_for(hook: ComputesExperts) -> int:
    """A number by which the operator finds *hook* while it lives: the smallest that is free.

    It becomes part of the compiled code, and so of the name under which that is kept on disk:
    the first model of every process has 0, and finds what the one before it compiled.
    """
    key = 0
    while key in _HOOKS:
        key += 1
    _HOOKS[key] = hook
    return key


def _experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int, key: int) -> Tensor:
    hook = _HOOKS.get(key)
    if hook is None:
        raise RuntimeError(f"no model has the key {key}: it was freed")
    result: Tensor = hook.experts(
        layer, hidden.contiguous(), index.contiguous(), weights.contiguous()
    )
    # Compiled code takes the strides of a new tensor for granted, and its alignment.
    whole = result.contiguous()
    return whole if whole.data_ptr() % _ALIGNMENT == 0 else whole.clone()


# No argument is mutated, and calls have effects nonetheless. What keeps them once each and in
# order is their data: a layer's input comes from the output of the layer before, the logits from
# the last. Two calls never look alike, as the number of the layer is among their arguments.
_operator = torch.library.custom_op(
    "expertflow::experts",
    _experts,
    mutates_args=(),
    schema="(Tensor hidden, Tensor index, Tensor weights, int layer, int key) -> Tensor",
)


@_operator.register_fake
def _shape(hidden: Tensor, index: Tensor, weights: Tensor, layer: int, key: int) -> Tensor:
    return hidden.new_empty(hidden.shape)


def experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int, key: int) -> Tensor:
    """``hook.experts`` of the hook with *key*: [T, H] from [T, H], int64 [T, k] and [T, k].

    Compiled code writes over its inputs once the work that this call has launched on the
    current stream is done: who needs them later keeps copies.
    """
    result: Tensor = torch.ops.expertflow.experts(hidden, index, weights, layer, key)
    return result
