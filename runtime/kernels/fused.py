"""One object that computes a layer's experts from their slots, by the path that fits."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
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

#: The decode kernels take at most this many tokens where they group them by expert; from the
#: second token on that reads no more than pairs by themselves, and soon much less.
DECODE_TOKENS = 64

#: Most tokens whose pairs are computed one by one, where they cannot be grouped.
PAIR_TOKENS = 32


class FusedExperts:
    """Experts computed straight from a slot bank, one object for all layers of a model.

    *full* uint8 [full_slots, layout.stride_bytes] and *low* uint8
    [low_slots, low_layout.stride_bytes] (or None) are read in place at every call, so what
    the slots hold may change between calls. *top_k* is the model's; it sizes the scratch of
    the decode path, which no call then allocates.

    With *rounds* sums are rounded where transformers rounds them, in the model's dtype; the
    bits then differ only where float32 sums in another order fall on the other side. By
    default so on CUDA with bfloat16 or float16. Without, all but matmuls of many tokens is
    float32 between hidden states and *out*.
    """

    def __init__(  # noqa: PLR0913
        self,
        layout: ExpertLayout,
        full: Tensor,
        gating: Gating,
        *,
        top_k: int,
        low_layout: LowLayout | None = None,
        low: Tensor | None = None,
        rounds: bool | None = None,
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
        self._pairs: DecodeKernels | None = None
        self._groups: DecodeKernels | None = None
        cuda = full.device.type == "cuda"
        rounded = layout.dtype in (torch.bfloat16, torch.float16)
        self.rounds = cuda and rounded if rounds is None else rounds
        if cuda and importlib.util.find_spec("triton"):
            self._make_kernels(self.rounds and rounded)

    def _make_kernels(self, grouped: bool) -> None:
        """The decode kernels: of pairs, and if *grouped* of experts with all their tokens.

        Matrix instructions take inputs in the model's dtype, so grouping wants rounded ones.
        """
        # Not before: a machine without a GPU needs no triton.
        from runtime.kernels.decode import DecodeKernels, group_cut

        banks, gating, top_k = self.banks, self.gating, self._top_k
        most = 1 if grouped else PAIR_TOKENS
        self._pairs = DecodeKernels(banks, gating, top_k, most, rounds=self.rounds)
        if grouped:
            cut = group_cut(banks, gating)
            self._groups = DecodeKernels(banks, gating, top_k, DECODE_TOKENS, cut, rounds=True)

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
        wait: bool = False,
    ) -> None:
        """Write the weighted sum of each token's experts to *out* [T, H].

        *hidden* [T, H]; *index* int64 [T, k] and *weights* [T, k] come from the gate; *table*
        int32 [E] holds each expert's slot in this layer, -1 for an expert that contributes
        nothing. With *only*, pairs of other slots contribute nothing either. *out* has the
        dtype of *hidden* or float32, and is added to if *accumulate*. All tensors lie on the
        bank's device. With triton, a call for at most :data:`DECODE_TOKENS` tokens (without
        *rounds* :data:`PAIR_TOKENS`) waits for nothing, and a CUDA graph may capture it once
        it has run. With *wait*, where :meth:`waits`, the launch before is that of a gate
        (:class:`runtime.kernels.gate.GateKernel`), which may still be looking for experts.
        """
        kernels = self._kernels(len(hidden))
        if kernels is not None:
            kernels.run(hidden, index, weights, table, out, only, accumulate, wait)
            return
        call = Call(hidden, index, weights, table, out, only, accumulate)
        if hidden.device.type == "cuda":
            run_prefill(self.banks, self.gating, call, self._grouped, self.rounds)
        else:
            run_plain(self.banks, self.gating, call)

    def waits(self, tokens: int) -> bool:
        """Whether calls for *tokens* tokens can compute some experts while others are awaited."""
        kernels = self._kernels(tokens)
        return kernels is not None and kernels.waits

    def _kernels(self, tokens: int) -> DecodeKernels | None:
        """The decode kernels for *tokens*; None if there are too many for them."""
        if self._groups is not None and tokens > 1:
            return self._groups if tokens <= DECODE_TOKENS else None
        return self._pairs if tokens <= PAIR_TOKENS else None
