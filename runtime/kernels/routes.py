"""What one call computes: which token uses which slot, and where the answer goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the experts of one layer.

    *hidden* [T, H]; *index* int64 [T, k] names experts, *weights* [T, k] weigh them; *table*
    int32 [E] gives each expert's slot, -1 for none; *out* [T, H] takes the sum, on top of
    what it holds if *accumulate*. Only pairs in slot *only* count, unless that is -1.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    table: Tensor
    out: Tensor
    only: int = -1
    accumulate: bool = False

    def slots(self) -> Tensor:
        """The slot int32 [T, k] of every pair, -1 where it contributes nothing."""
        slots = self.table[self.index]
        if self.only >= 0:
            slots = torch.where(slots == self.only, slots, -1)
        return slots

    def write(self, rows: Tensor, slots: Tensor, rounds: bool = False) -> None:
        """Weigh and sum expert outputs *rows* [T * k, H] into ``out``, in float32.

        Rows of pairs whose slot in *slots* [T, k] is -1 may hold anything. With *rounds* a
        weighted row has the dtype that multiplying the two gives, as in transformers.
        """
        tokens, top_k = self.index.shape
        taken = slots.view(tokens, top_k, 1) >= 0
        rows, weights = rows.view(tokens, top_k, -1), self.weights.unsqueeze(-1)
        weighted = (rows * weights).float() if rounds else rows.float() * weights.float()
        total = torch.where(taken, weighted, 0).sum(dim=1)
        if self.accumulate:
            self.out.add_(total)
        else:
            self.out.copy_(total)
