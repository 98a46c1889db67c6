"""Experts for many tokens on a GPU: pairs sorted by slot, one grouped matmul per projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from policies.memory import raised_at_once
from runtime.kernels.banks import Banks
from runtime.kernels.gating import Gating
from runtime.kernels.routes import Call

#: Experts that one grouped matmul is given at most: torch refuses 1024 and more.
MAX_GROUPS = 1000

#: torch's grouped matmul wants rows that begin at multiples of this.
VECTOR_BYTES = 16


@dataclass(frozen=True, eq=False)
class _Group:
    """Some experts and the rows that need them: rows first .. of the sorted pairs.

    *views* are parts [n, *shape]; *ends* int32 [n] counts, from the group's first row, where
    each expert's rows end; *expert* int64 [rows] is each row's expert among the n.
    """

    views: Mapping[str, Tensor]
    rows: slice
    ends: Tensor
    expert: Tensor


def can_group(banks: Banks) -> bool:
    """Whether torch's grouped matmul takes these banks on this device, in place."""
    if banks.full.device.type != "cuda" or banks.layout.dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(banks.full.device) < (8, 0):
        return False
    item = banks.layout.dtype.itemsize
    matrices = [part for part in banks.layout.parts if len(part.shape) == 2]
    numbers = [n for part in matrices for n in (part.first, *part.shape)]
    return hasattr(F, "grouped_mm") and all(n * item % VECTOR_BYTES == 0 for n in numbers)


def run_prefill(
    banks: Banks, gating: Gating, call: Call, grouped: bool, rounds: bool = False
) -> None:
    """Compute *call*; matrices multiply in the bank's dtype, their sums stay float32.

    *grouped* is :func:`can_group`'s answer. With *rounds* activations and weighted rows are
    rounded where transformers rounds them, if hidden states have the bank's dtype.

    Waits for the device only where the distinct slots must be known on the host: without
    grouped matmuls, with a low bank, or with more than :data:`MAX_GROUPS` slots.
    """
    rounds = rounds and call.hidden.dtype == banks.layout.dtype
    slots = call.slots()
    flat = slots.reshape(-1).long()
    total = banks.full_slots + banks.low_slots
    # Pairs that count for nothing are sorted behind all slots, where no expert's rows reach.
    keys, order = torch.where(flat < 0, total, flat).sort(stable=True)
    inputs = call.hidden[order // call.index.shape[1]].to(banks.layout.dtype)
    sorted_rows = torch.empty(len(keys), banks.output, dtype=inputs.dtype, device=inputs.device)
    for group in _groups(banks, keys, grouped):
        sorted_rows[group.rows] = _outputs(
            banks, gating, group, inputs[group.rows], grouped, rounds
        )
        # Not beside the next ones.
        del group
    rows = torch.empty_like(sorted_rows)
    rows[order] = sorted_rows
    call.write(rows, slots, rounds)


def _groups(banks: Banks, keys: Tensor, grouped: bool) -> Iterator[_Group]:
    """The groups that cover all rows, whose sorted slots are *keys*."""
    total = banks.full_slots + banks.low_slots
    ends = torch.searchsorted(keys, torch.arange(1, total + 1, device=keys.device))
    if grouped and not banks.low_slots and total <= MAX_GROUPS:
        expert = keys.clamp(max=total - 1)
        yield _Group(banks.views, slice(None), ends.int(), expert)
        return
    host = [0, *ends.tolist()]
    for first in range(0, banks.full_slots, MAX_GROUPS):
        last = min(first + MAX_GROUPS, banks.full_slots)
        rows = slice(host[first], host[last])
        if rows.start < rows.stop:
            views = {name: view[first:last] for name, view in banks.views.items()}
            local = (ends[first:last] - rows.start).int()
            yield _Group(views, rows, local, keys[rows] - first)
    yield from _raised_groups(banks, keys, host)


def _raised_groups(banks: Banks, keys: Tensor, host: list[int]) -> Iterator[_Group]:
    """The groups of the low slots in use; *host* holds where each slot's rows begin."""
    base = banks.full_slots
    used = [row for row in range(banks.low_slots) if host[base + row] < host[base + row + 1]]
    at_once = raised_at_once(banks.layout.size_bytes, max(len(used), 1))
    for first in range(0, len(used), at_once):
        some = used[first : first + at_once]
        rows = slice(host[base + some[0]], host[base + some[-1] + 1])
        ends = [host[base + row + 1] - rows.start for row in some]
        local = torch.tensor(ends, dtype=torch.int32, device=keys.device)
        expert = torch.searchsorted(torch.tensor(some, device=keys.device), keys[rows] - base)
        yield _Group(banks.raised(some, banks.layout.dtype), rows, local, expert)


def _outputs(
    banks: Banks, gating: Gating, group: _Group, inputs: Tensor, grouped: bool, rounds: bool
) -> Tensor:
    """The expert outputs [rows, H] of a *group* for its *inputs* [rows, H]."""
    transposed = banks.layout.transposed
    projected = _linear(group, banks.first, inputs, transposed, grouped)
    inner = gating.apply(projected if rounds else projected.float()).to(inputs.dtype)
    return _linear(group, "down_proj", inner, transposed, grouped)


def _linear(group: _Group, name: str, inputs: Tensor, transposed: bool, grouped: bool) -> Tensor:
    """Every row of *inputs* [rows, in] times its expert's matrix *name*, plus its bias."""
    matrices = group.views[name]
    matrices = matrices if transposed else matrices.transpose(1, 2)
    if grouped:
        product = F.grouped_mm(inputs, matrices, offs=group.ends)
    else:
        product = inputs.new_zeros(len(inputs), matrices.shape[2])
        first = 0
        for expert, last in enumerate(group.ends.tolist()):
            if first < last:
                torch.mm(inputs[first:last], matrices[expert], out=product[first:last])
            first = last
    bias = group.views.get(f"{name}_bias")
    return product if bias is None else product + bias[group.expert]
