"""One object that computes a layer's experts from their slots, by the path that fits."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor

from runtime.kernels.banks import Banks
from runtime.kernels.cpu import run_plain
from runtime.kernels.gating import Gating
from runtime.kernels.prefill import can_group, run_prefill
from runtime.kernels.routes import Call
from runtime.layout import ExpertLayout, LowLayout
from traces.errors import InputError

if TYPE_CHECKING:
    from runtime.kernels.decode import DecodeKernels

#: Up to this many tokens the decode kernels run. They read an expert once per pair that uses
#: it, from cache after the first; the grouped path reads it once, but first sorts the pairs
#: and issues about twenty kernels.
DECODE_TOKENS = 32


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
        bank's device, contiguous. With the decode kernels nothing is allocated or waited
        for, and a CUDA graph may capture the call.
        """
        decode = self._decode
        if decode is not None and hidden.shape[0] <= DECODE_TOKENS:
            decode.run(hidden, index, weights, table, out, only, accumulate)
            return
        call = Call(hidden, index, weights, table, out, only, accumulate)
        if hidden.device.type == "cuda":
            run_prefill(self.banks, self.gating, call, self._grouped)
        else:
            run_plain(self.banks, self.gating, call)
