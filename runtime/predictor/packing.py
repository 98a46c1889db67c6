"""Forecasts as few bytes: what a file of them holds, made on the device, read on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policies.sidecar import FULL
from runtime.predictor.spec import PredictorSpec

#: Arrays of a token's forecast: ``experts`` int16 [T, L, m], ``scores`` uint8 [T, L, m], best
#: first, ``reuse`` uint8 [T, windows, L, E]; see :mod:`policies.sidecar`.
Packed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Packing:
    """One row of bytes for each token: its *width* best experts of every layer, their scores,
    and the chances of reuse.
    """

    spec: PredictorSpec
    width: int

    @cached_property
    def _parts(self) -> tuple[int, int, int]:
        """Bytes of experts, scores and reuse in a row."""
        named = self.spec.layers * self.width
        return 2 * named, named, len(self.spec.windows) * self.spec.paths

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self._parts)

    def pack(self, now: Tensor, again: Tensor) -> Tensor:
        """Rows uint8 [T, row_bytes] of probabilities [T, L, E] and [T, windows, L, E].

        Rounded as :func:`policies.sidecar.quantised` does, equal chances by lower id as
        :func:`runtime.predictor.inference.ranked` does.
        """
        chances, order = torch.sort(now, dim=-1, descending=True, stable=True)
        experts = order[..., : self.width].to(torch.int16).contiguous().view(torch.uint8)
        parts = experts, _rounded(chances[..., : self.width]), _rounded(again)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def unpack(self, rows: npt.NDArray[np.uint8]) -> Packed:
        """The arrays of *rows* [T, row_bytes], as views of their memory."""
        count, spec, (experts, scores, _) = len(rows), self.spec, self._parts
        named = (count, spec.layers, self.width)
        reuse = (count, len(spec.windows), spec.layers, spec.experts)
        return {
            "experts": rows[:, :experts].view(np.int16).reshape(named),
            "scores": rows[:, experts : experts + scores].reshape(named),
            "reuse": rows[:, experts + scores :].reshape(reuse),
        }

    def nothing(self, count: int) -> Packed:
        """The forecasts of *count* tokens of which nothing is known: no chance of anything."""
        found = self.unpack(np.zeros((count, self.row_bytes), np.uint8))
        found["experts"][:] = np.arange(self.width)
        return found


def _rounded(chances: Tensor) -> Tensor:
    return (chances * FULL).round().to(torch.uint8)
