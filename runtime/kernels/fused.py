"""One object that computes a layer's experts from their slots, by the path that fits."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor

from runtime.kernels.banks import Banks
from runtime.kernels.cpu import run_plain
from runtime.kernels.gating import Gating
from runtime.kernels.prefill import MAX_GROUPS, can_group, run_prefill
from runtime.kernels.routes import Call
from runtime.layout import ExpertLayout, LowLayout
from traces.errors import InputError

if TYPE_CHECKING:
    from runtime.kernels.decode import DecodeKernels

#: The decode kernels take at most this many tokens; their scratch is made for so many.
DECODE_TOKENS = 32

#: What :func:`decode_tokens` weighs: bytes per second that the decode kernels and torch's
#: grouped matmul read on an H200 (4.2e12 at best; the grouped one reaches about half for few
#: rows per expert), and the seconds that sorting pairs and its twenty launches take.
DECODE_RATE = 4.2e12
GROUPED_RATE = 2.1e12
SORTING_S = 100e-6


def decode_tokens(expert_bytes: int, experts: int, top_k: int) -> int:
    """Up to how many tokens the decode kernels are the faster path, at most DECODE_TOKENS.

    They read an expert of *expert_bytes* once per pair that uses it, the sorted path once.
    With *top_k* of *experts* drawn at random by each of T tokens, an expert is used with
    probability 1 - (1 - top_k / experts) ** T.
    """
    for tokens in range(2, DECODE_TOKENS + 1):
        distinct = experts * (1 - (1 - top_k / experts) ** tokens)
        sorted_s = SORTING_S + distinct * expert_bytes / GROUPED_RATE
        if tokens * top_k * expert_bytes / DECODE_RATE > sorted_s:
            return tokens - 1
    return DECODE_TOKENS


class FusedExperts:
    """Experts computed straight from a slot bank, one object for all layers of a model.

    *full* uint8 [full_slots, layout.stride_bytes] and *low* uint8
    [low_slots, low_layout.stride_bytes] (or None) are read in place at every call, so what
    the slots hold may change between calls. *top_k* is the model's; it sizes the scratch of
    the decode path, which no call then allocates.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        full: Tensor,
        gating: Gating,
        *,
        top_k: int,
        low_layout: LowLayout | None = None,
        low: Tensor | None = None,
    ) -> None:
        self.banks = Banks(layout, full, low_layout, low)
        self.gating = gating
        if gating.interleaved != (layout.interleaved and gating.gated):
            raise InputError(
                f"gating is {'' if gating.interleaved else 'not '}interleaved, expected the "
                "layout's own order of gate and up"
            )
        self._grouped = can_group(self.banks)
        self._top_k = top_k
        self._limits: dict[int, int] = {}
        self._decode: DecodeKernels | None = None
        if full.device.type == "cuda" and importlib.util.find_spec("triton"):
            # Not before: a machine without a GPU needs no triton.
            from runtime.kernels.decode import DecodeKernels

            self._decode = DecodeKernels(self.banks, gating, top_k, DECODE_TOKENS)

    def run(  # noqa: PLR0913
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        table: Tensor,
        out: Tensor,
        *,
        only: int = -1,
        accumulate: bool = False,
    ) -> None:
        """Write the weighted sum of each token's experts to *out* [T, H].

        *hidden* [T, H]; *index* int64 [T, k] and *weights* [T, k] come from the gate; *table*
        int32 [E] holds each expert's slot in this layer, -1 for an expert that contributes
        nothing. With *only*, pairs of other slots contribute nothing either. *out* has the
        dtype of *hidden* or float32, and is added to if *accumulate*. All tensors lie on the
        bank's device. With triton, a call for at most :data:`DECODE_TOKENS` tokens waits for
        nothing, and a CUDA graph may capture it once it has run.
        """
        decode, experts = self._decode, table.shape[0]
        if decode is not None and hidden.shape[0] <= (
            self._limits.get(experts) or self._decode_limit(experts)
        ):
            decode.run(hidden, index, weights, table, out, only, accumulate)
            return
        call = Call(hidden, index, weights, table, out, only, accumulate)
        if hidden.device.type == "cuda":
            run_prefill(self.banks, self.gating, call, self._grouped)
        else:
            run_plain(self.banks, self.gating, call)

    def _decode_limit(self, experts: int) -> int:
        """Most tokens for the decode kernels in a layer of *experts*; worked out once.

        Where the sorted path would wait for the device, they take all that they can: a call
        for few tokens must be one that a graph can capture.
        """
        banks = self.banks
        waits = not self._grouped or banks.low_slots or banks.full_slots > MAX_GROUPS
        size_bytes = banks.layout.size_bytes
        limit = DECODE_TOKENS if waits else decode_tokens(size_bytes, experts, self._top_k)
        self._limits[experts] = limit
        return limit
