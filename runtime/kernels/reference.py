"""transformers' own expert kernels, run on the slots, with the bits they give without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import moe

from runtime.kernels.banks import Banks
from runtime.kernels.gating import gating_of
from runtime.kernels.prefill import MAX_GROUPS
from runtime.layout import ExpertLayout, LowLayout
from traces.errors import InputError

KERNELS = ("batched_mm", "grouped_mm")


class ReferenceExperts:
    """transformers' *kernel*, ``batched_mm`` or ``grouped_mm``, on a slot bank.

    *experts* is the transformers module whose functions (activation, gate) are used; its
    weights are not. The banks are those of :class:`runtime.kernels.FusedExperts`.

    A call may be split into groups of pairs: ``begin``, ``add`` for each group as its experts
    land, ``finish``. Every group runs the kernel on all pairs of the call, each pair in the
    place it has in transformers, so that all shapes, and with them the order of every sum, are
    those of one call on the stacked weights. Rows of other pairs are computed with whatever
    slot 0 holds, or not at all, and dropped. An expert's pairs must all be in one group.
    Weighting and summing happen once, at the end. ``batched_mm`` copies one expert per pair,
    as it does in transformers: T * k experts of memory, also in prefill.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        full: Tensor,
        experts: Any,
        kernel: str,
        *,
        low_layout: LowLayout | None = None,
        low: Tensor | None = None,
    ) -> None:
        if kernel not in KERNELS:
            raise InputError(f"kernel is {kernel!r}, expected one of {', '.join(KERNELS)}")
        gating_of(experts)
        self.banks = Banks(layout, full, low_layout, low)
        self._rows_of = _batched_rows if kernel == "batched_mm" else _grouped_rows
        # torch's grouped matmul refuses 1024 experts and more; a gather takes any number.
        self._window = MAX_GROUPS if kernel == "grouped_mm" else max(1, len(full))
        self._experts = experts

    def begin(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Start a call: *hidden* [T, H], *index* int64 [T, k] and *weights* [T, k]."""
        self._hidden = hidden
        self._weights = weights
        flat = index.reshape(-1)
        # The very sort of transformers: it need not be stable, and the order matters.
        order = torch.sort(flat).indices
        self._pairs = _Pairs(hidden.repeat_interleave(index.shape[1], dim=0), order)
        self._rows = torch.zeros_like(self._pairs.inputs)

    def add(self, slots: Tensor) -> None:
        """Compute the pairs of one group: *slots* int [T, k], -1 for pairs not in it."""
        flat = slots.reshape(-1).long()
        full_slots = self.banks.full_slots
        for first in range(0, full_slots, self._window):
            end = min(first + self._window, full_slots)
            window = {name: view[first:end] for name, view in self.banks.views.items()}
            self._merge(window, flat - first)
        if self.banks.low is not None:
            used = torch.unique(flat[flat >= full_slots])
            if len(used):
                views = self.banks.raised((used - full_slots).tolist(), self.banks.layout.dtype)
                found = torch.searchsorted(used, flat).clamp(max=len(used) - 1)
                self._merge(views, torch.where(used[found] == flat, found, -1))

    def finish(self) -> Tensor:
        """The weighted sums [T, H] of all pairs; those never added count as zero rows."""
        weighted = self._rows * self._weights.reshape(-1, 1)
        total = weighted.view(len(self._hidden), -1, weighted.shape[1]).sum(dim=1)
        out = total.to(self._hidden.dtype)
        del self._hidden, self._weights, self._pairs, self._rows
        return out

    def _merge(self, views: Mapping[str, Tensor], local: Tensor) -> None:
        """Compute the pairs whose expert *local* int64 [T * k] is one of *views* [n, ...]."""
        count = len(views["down_proj"])
        mine = (local >= 0) & (local < count)
        rows = self._rows_of(self._experts, views, self._pairs, torch.where(mine, local, -1))
        self._rows = torch.where(mine.unsqueeze(1), rows, self._rows)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs of a call: *inputs* [T * k, H], and the *order* in which experts take them."""

    inputs: Tensor
    order: Tensor


def _batched_rows(
    experts: Any, views: Mapping[str, Tensor], pairs: _Pairs, local: Tensor
) -> Tensor:
    """The output row [T * k, H] of each pair; those whose *local* is -1 hold anything.

    Calls transformers' function with one expert per row and weights of one, which leave each
    pair's row as it is.
    """
    ids = local.clamp(min=0).unsqueeze(1)
    ones = pairs.inputs.new_ones(len(ids), 1)
    stand_in: Any = SimpleNamespace(
        **views,
        num_experts=len(views["down_proj"]),
        has_gate=experts.has_gate,
        has_bias=experts.has_bias,
        has_post_expert_norm=False,
        is_transposed=experts.is_transposed,
        act_fn=getattr(experts, "act_fn", None),
        _apply_gate=experts._apply_gate,
        _is_expert_parallel=False,
    )
    rows: Tensor = moe.batched_mm_experts_forward(stand_in, pairs.inputs, ids, ones)
    return rows


def _grouped_rows(
    experts: Any, views: Mapping[str, Tensor], pairs: _Pairs, local: Tensor
) -> Tensor:
    """The same by transformers' grouped linear layer, whose experts lie in another order here.

    Between the two layers rows are put back in transformers' order, because an activation's
    last bit may depend on where in a vector a value stands.
    """
    count = len(views["down_proj"])
    keys = torch.where(local < 0, count, local)[pairs.order]
    keys, by_slot = keys.sort(stable=True)
    edges = torch.arange(1, count + 1, device=keys.device)
    ends = torch.searchsorted(keys, edges).int()
    owner = keys.clamp(max=count - 1)

    def linear(name: str, rows: Tensor) -> Tensor:
        bias = views[f"{name}_bias"][owner] if experts.has_bias else None
        product = moe._grouped_linear(
            rows[by_slot], views[name], ends, bias=bias, is_transposed=experts.is_transposed
        )
        out = torch.empty_like(product)
        out[by_slot] = product
        return out

    first = "gate_up_proj" if experts.has_gate else "up_proj"
    projected = linear(first, pairs.inputs[pairs.order])
    inner = experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)
    sorted_rows = linear("down_proj", inner)
    rows = torch.empty_like(sorted_rows)
    rows[pairs.order] = sorted_rows
    return rows
