"""Routing set beforehand: every router computes as always, then answers what it was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.families import Gate, Routed
from runtime.router_hooks import RouterHooks
from traces.errors import InputError


class ForcedRouting(RouterHooks):
    """A context in which the routers of *gates* return the routing given to :meth:`set`.

    A hook on each router replaces its weights and experts and leaves its logits. The values
    lie in buffers on *device*, one pair per number of tokens, allocated when that number is
    first set and written in place afterwards: a CUDA graph captured meanwhile replays with
    whatever was set last for its number of tokens. Nothing waits for the device. The hooks
    are gone when the context ends, however it ends; the buffers stay, for a graph that was
    captured here reads them as long as it lives.
    """

    def __init__(self, gates: Sequence[Gate], device: torch.device | str) -> None:
        super().__init__(gates)
        self._device = torch.device(device)
        self._dtype = self.gates[0].weights_dtype()
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._current: tuple[Tensor, Tensor] | None = None

    def set(self, layer_experts: Tensor, weights: Tensor | None = None) -> None:
        """Route the next passes, of T tokens, by *layer_experts* int64 [L, T, k].

        *weights* [L, T, k] are taken as they are; None gives each of a token's k experts 1/k.
        Tokens are counted over the batch, in the order in which a pass flattens them.
        """
        gate, shape = self.gates[0], tuple(layer_experts.shape)
        if len(shape) != 3 or shape[0] != len(self.gates) or shape[2] != gate.top_k:
            raise InputError(
                f"forced routing has shape {list(shape)}, expected "
                f"[{len(self.gates)} layers, tokens, {gate.top_k} experts]"
            )
        if weights is not None and tuple(weights.shape) != shape:
            raise InputError(
                f"forced weights have shape {list(weights.shape)}, expected {list(shape)}"
            )
        experts, values = self._current = self._of_size(shape[1])
        experts.copy_(layer_experts, non_blocking=True)
        if weights is None:
            values.fill_(1 / gate.top_k)
        else:
            values.copy_(weights, non_blocking=True)

    def _of_size(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The buffers experts int64 and weights, both [L, *tokens*, k]."""
        if tokens not in self._buffers:
            shape = (len(self.gates), tokens, self.gates[0].top_k)
            experts = torch.zeros(shape, dtype=torch.int64, device=self._device)
            self._buffers[tokens] = experts, torch.zeros_like(experts, dtype=self._dtype)
        return self._buffers[tokens]

    def _hook(self, layer: int) -> Any:
        def replace(module: Any, inputs: tuple[Any, ...], output: Routed) -> Routed:
            tokens = self.gates[layer].parts(output)[2].shape[0]
            if self._current is None:
                raise InputError(f"layer {layer}: no routing was set, expected it before the pass")
            experts, weights = self._current
            if experts.shape[1] != tokens:
                raise InputError(
                    f"layer {layer}: routing was set for {experts.shape[1]} tokens, "
                    f"expected {tokens}, the pass's"
                )
            return self.gates[layer].replaced(output, weights[layer], experts[layer])

        return replace
