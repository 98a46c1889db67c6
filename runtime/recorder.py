"""Hooks that note what every gate decides, without touching the model's result."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.families import Gate
from runtime.router_hooks import RouterHooks
from traces.errors import InputError


def _bits(values: Tensor) -> Tensor:
    """The same bits as int16, so that unlike values travel in one tensor."""
    return values.contiguous().view(torch.int16)


class Recorder(RouterHooks):
    """A context in which every forward pass leaves its routing behind.

    For each token and MoE layer it notes the k chosen experts, their weights as float16 and,
    for each of the next *ahead* layers, the *width* experts which that layer's gate ranks
    best given this layer's gate input. Everything stays on the model's device until
    :meth:`take`, which costs the pass its only copy to the host. The hooks are gone when the
    context ends, however it ends.
    """

    def __init__(self, gates: Sequence[Gate], ahead: int, width: int) -> None:
        super().__init__(gates)
        self.top_k = gates[0].top_k
        self.ahead = ahead
        self.width = width
        self._rows: list[Tensor] = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._rows.clear()

    def _hook(self, layer: int) -> Any:
        def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # What a hook returns replaces the router's output: it must return nothing.
            self._rows.append(self._row(layer, inputs[0], output))

        return note

    def _row(self, layer: int, hidden: Tensor, output: Any) -> Tensor:
        """One layer's decisions for all T tokens: int16 [T, columns]."""
        # Some routers are handed [batch, tokens, hidden], others [tokens, hidden].
        hidden = hidden.reshape(-1, hidden.shape[-1])
        experts, weights = self.gates[layer].falling(output)
        parts = [experts.to(torch.int16), _bits(weights.to(torch.float16))]
        for target in range(layer + 1, layer + 1 + self.ahead):
            if target < len(self.gates):
                parts.append(self.gates[target].rank(hidden, self.width).to(torch.int16))
            else:
                parts.append(parts[0].new_full((len(hidden), self.width), -1))
        return torch.cat(parts, dim=1)

    def take(self, tokens: Tensor) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
        """The last pass as int16 [T, L, columns], and *tokens* int32 [B], on the host.

        The sampled tokens come along because both are needed now and each copy waits for
        the device.
        """
        if len(self._rows) != len(self.gates):
            raise InputError(
                f"{len(self._rows)} of {len(self.gates)} gates ran in one pass, expected each "
                "once: the model's experts bypass its router modules"
            )
        rows = torch.stack(self._rows, dim=1)
        self._rows.clear()
        packed = torch.cat([rows.flatten(), _bits(tokens.to(torch.int32))]).cpu().numpy()
        split = rows.numel()
        return packed[:split].reshape(tuple(rows.shape)), packed[split:].view(np.int32)

    def unpack(
        self, rows: npt.NDArray[np.int16]
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float16], tuple[npt.NDArray[np.int16], ...]]:
        """Experts [n, L, k], weights [n, L, k] and the ahead arrays [n, L, m] of *rows*."""
        k, m = self.top_k, self.width
        weights = np.ascontiguousarray(rows[..., k : 2 * k]).view(np.float16)
        starts = range(2 * k, 2 * k + self.ahead * m, m)
        ahead = tuple(np.ascontiguousarray(rows[..., s : s + m]) for s in starts)
        return np.ascontiguousarray(rows[..., :k]), weights, ahead
