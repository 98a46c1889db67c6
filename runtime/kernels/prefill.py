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
    """Some experts and the rows that need them.

    *rows* are theirs among the sorted pairs: a slice, or int64 [pairs], in which those of
    other experts follow and, past the last pair, nobody's. *views* are parts [n, *shape];
    *ends* int32 [n] counts, from the group's first row, where each expert's rows end;
    *expert* int [rows] is each row's expert among the n, for biases: without any it may be None.
    """

    views: Mapping[str, Tensor]
    rows: slice | Tensor
    ends: Tensor
    expert: Tensor | None


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

    Waits for the device only where the rows of each slot must be known on the host: without
    grouped matmuls, or with a low bank.
    """
    rounds = rounds and call.hidden.dtype == banks.layout.dtype
    slots = call.slots()
    total = banks.full_slots + banks.low_slots
    # Pairs that count for nothing are sorted behind all slots, where no expert's rows reach.
    keys, order = slots.reshape(-1).remainder(total + 1).sort(stable=True)
    inputs = call.hidden[order // call.index.shape[1]].to(banks.layout.dtype)
    pairs = len(keys)
    # The last takes what is computed for nobody.
    sorted_rows = torch.empty(pairs + 1, banks.output, dtype=inputs.dtype, device=inputs.device)
    for group in _groups(banks, keys, grouped):
        mine = group.rows if isinstance(group.rows, slice) else group.rows.clamp(max=pairs - 1)
        sorted_rows[group.rows] = _outputs(banks, gating, group, inputs[mine], grouped, rounds)
        # Not beside the next ones.
        del group
    rows = torch.empty_like(sorted_rows[:pairs])
    rows[order] = sorted_rows[:pairs]
    call.write(rows, slots, rounds)


def _groups(banks: Banks, keys: Tensor, grouped: bool) -> Iterator[_Group]:
    """The groups that cover all rows, whose sorted slots are int32 *keys*."""
    ends = torch.searchsorted(keys, banks.edges, out_int32=True)
    if grouped and not banks.low_slots:
        yield from _windows(banks, keys, ends)
        return
    host = [0, *ends.tolist()]
    for first in range(0, banks.full_slots, MAX_GROUPS):
        last = min(first + MAX_GROUPS, banks.full_slots)
        rows = slice(host[first], host[last])
        if rows.start < rows.stop:
            views = {name: view[first:last] for name, view in banks.views.items()}
            yield _Group(views, rows, ends[first:last] - rows.start, keys[rows] - first)
    yield from _raised_groups(banks, keys, host)


def _windows(banks: Banks, keys: Tensor, ends: Tensor) -> Iterator[_Group]:
    """Full slots, as many at a time as a grouped matmul takes; no row's place is asked for.

    *ends* int32 [slots] are where each slot's rows end. Behind a window's rows come those of
    the next ones, for which it computes anything: they are computed again, in their turn.
    """
    pairs, biased = len(keys), f"{banks.first}_bias" in banks.views
    if banks.full_slots <= MAX_GROUPS:
        expert = keys.clamp(max=banks.full_slots - 1) if biased else None
        yield _Group(banks.views, slice(0, pairs), ends, expert)
        return
    places = torch.arange(pairs, device=keys.device)
    for first in range(0, banks.full_slots, MAX_GROUPS):
        last = min(first + MAX_GROUPS, banks.full_slots)
        views = {name: view[first:last] for name, view in banks.views.items()}
        start = ends[first - 1] if first else 0
        rows = (places + start).clamp(max=pairs)
        expert = None
        if biased:
            expert = (keys[rows.clamp(max=pairs - 1)] - first).clamp(max=last - first - 1)
        yield _Group(views, rows, ends[first:last] - start, expert)


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
        known = torch.tensor(some, dtype=keys.dtype, device=keys.device)
        expert = torch.searchsorted(known, keys[rows] - base)
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
