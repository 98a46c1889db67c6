# mypy: ignore-errors
# ruff: noqa: PLR0913
"""The decode kernels in Triton: one program computes a few outputs of one projection.

A program's work is one pair of token and expert, or one expert with up to CHUNK of its tokens
(groups, CHUNK above 0), whose weights are then read once for all of them. Every sum has one
order, however the programs come: no float is ever added atomically. A slot of -1 reads nothing.

ROUND rounds where transformers' ``batched_mm`` rounds: each projection, its sum with a bias,
activation and product with the gate, each expert's output, and that times its weight if
weights have the model's dtype too. Sums stay float32 in both.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.triton_maths import activate, gated, halves, rounded
from runtime.kernels.triton_tiles import biases, item_of, product, slot_of


@triton.jit
def _await(OVERLAP: tl.constexpr):
    """Wait for the kernel before if this one began early, and let the next begin early.

    A program that did not wait might end, and with it its kernel, before the one before.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit(do_not_specialize=["count", "items", "only"])
def prepare_kernel(
    index, table, slots, members, notes, count, items, only,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """Group the first *count* of PAIRS pairs by slot, CHUNK at most in a group; one program.

    With WAIT by expert: slots may not be known yet, and this kernel begins before they are.

    *slots* int32 [items] takes each group's slot, -1 behind the last; *members* int32
    [items, CHUNK] its pairs in their order, then -1. Groups come in the order of their first
    pairs. All is counted by comparing every pair with BLOCK others at a time; what others must
    know of a pair goes through *notes* int32 [3, PAIRS].
    """
    if OVERLAP:
        gdc_launch_dependents()
    i = tl.arange(0, PAIRS)
    if WAIT:
        slot = tl.load(index + i, mask=i < count, other=-1).to(tl.int32)
    else:
        slot = slot_of(index, table, i, i < count, only).to(tl.int32)
    tl.store(notes + i, slot)
    tl.debug_barrier()
    # How many pairs of its slot come before a pair.
    rank = tl.zeros([PAIRS], tl.int32)
    for start in tl.range(0, PAIRS, BLOCK, num_stages=1):
        j = start + tl.arange(0, BLOCK)
        same = slot[:, None] == tl.load(notes + j)[None, :]
        rank += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), axis=1)
    leads = (slot >= 0) & (rank % CHUNK == 0)
    item = tl.cumsum(leads.to(tl.int32), axis=0) - 1
    tl.store(notes + PAIRS + i, rank)
    tl.store(notes + 2 * PAIRS + i, item)
    tl.debug_barrier()
    # A group's pairs: the one that leads it, and how many there are.
    head = rank // CHUNK * CHUNK
    leader = tl.zeros([PAIRS], tl.int32)
    size = tl.zeros([PAIRS], tl.int32)
    for start in tl.range(0, PAIRS, BLOCK, num_stages=1):
        j = start + tl.arange(0, BLOCK)
        same = slot[:, None] == tl.load(notes + j)[None, :]
        place = tl.load(notes + PAIRS + j)[None, :] - head[:, None]
        leader += tl.sum(tl.where(same & (place == 0), j[None, :], 0), axis=1)
        size += tl.sum((same & (place >= 0) & (place < CHUNK)).to(tl.int32), axis=1)
    mine = tl.load(notes + 2 * PAIRS + leader)
    tl.store(members + mine * CHUNK + rank - head, i, mask=slot >= 0)
    for m in tl.range(0, CHUNK, num_stages=1):
        tl.store(members + item * CHUNK + m, tl.zeros_like(i) - 1, mask=leads & (m >= size))
    tl.store(slots + item, slot, mask=leads)
    groups = tl.sum(leads.to(tl.int32), axis=0)
    tl.store(slots + i, tl.zeros_like(i) - 1, mask=(i >= groups) & (i < items))


@triton.jit
def _last(counter, target):
    """Whether this program is the last of *target* to come by *counter*; then that is zero again.

    All threads' stores must be out before the one that counts says so.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == target - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _activations(
    y, full, low, slot, full_slots, row, row_mask, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, BIAS: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr, BLOCK_N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Inputs [BLOCK_N, M] of the second projection from sums *y* [rows, M] of the first."""
    y = rounded(y, DTYPE, ROUND)
    if BIAS >= 0:
        bias = biases(full, low, slot, full_slots, BIAS + row, row_mask, DTYPE, ROUND, STRIDE,
                      BITS, LOW_STRIDE, SCALES)  # fmt: skip
        y = rounded(y + bias[:, None], DTYPE, ROUND)
    if GATED:
        gate, up = halves(y, INTERLEAVED, BLOCK_N, M)
        return gated(gate, up, ACT, ALPHA, LIMIT, DTYPE, ROUND)
    else:
        return activate(y, ACT)


@triton.jit(do_not_specialize=["full_slots", "only"])
def first_kernel(
    hidden, index, table, slots, members, full, low, inner, partial, arrived, full_slots, only,
    TOP_K: tl.constexpr, IN: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, STRIDE: tl.constexpr,
    BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    ROUND: tl.constexpr, OVERLAP: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BYTES: tl.constexpr, LOW_K: tl.constexpr,
    LOW_STAGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """inner [pairs, INNER] = activation(first projection); grid (items, blocks, SPLITS).

    BIAS is the first element of the biases, or -1. Pairs without a slot write nothing. With
    several SPLITS, each takes SPLIT inputs and leaves its sums in *partial* float32
    [pairs, SPLITS, rows]; the last to arrive, by *arrived* int32 [items, blocks], adds them.
    """
    DTYPE: tl.constexpr = full.dtype.element_ty
    OUT: tl.constexpr = 2 * INNER if GATED else INNER
    ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    # A pair that waits for its own expert does not wait for the kernel that finds all others.
    _await(OVERLAP and not (WAIT and CHUNK == 0))
    slot, pairs = item_of(index, table, slots, members, only, CHUNK > 0, CHUNK, M, WAIT)
    if slot >= 0:
        n0 = tl.program_id(1) * BLOCK_N
        split = tl.program_id(2)
        r = tl.arange(0, ROWS)
        if INTERLEAVED:
            row = 2 * n0 + r
            row_mask = row < OUT
        else:
            # With a gate, BLOCK_N gate rows and then the up rows that belong to them.
            row_mask = n0 + r % BLOCK_N < INNER
            row = n0 + r % BLOCK_N + (r // BLOCK_N) * INNER
        here = pairs >= 0
        y = product(
            hidden, tl.program_id(0) // TOP_K, pairs // TOP_K, here, full, low, slot, full_slots,
            row, row_mask, n0 * (ROWS // BLOCK_N), split * SPLIT, DTYPE, ROUND, DOT, ROWS, M,
            BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, STRIDE, BITS, LOW_STRIDE, SCALES,
            BYTES, LOW_K, LOW_STAGES,
        )  # fmt: skip
        n = n0 + tl.arange(0, BLOCK_N)
        to = inner + pairs[None, :] * INNER + n[:, None]
        to_mask = (n < INNER)[:, None] & here[None, :]
        if SPLITS == 1:
            value = _activations(
                y, full, low, slot, full_slots, row, row_mask, DTYPE, ROUND, GATED, INTERLEAVED,
                ACT, ALPHA, LIMIT, BIAS, STRIDE, BITS, LOW_STRIDE, SCALES, BLOCK_N, M,
            )  # fmt: skip
            tl.store(to, value.to(inner.dtype.element_ty), mask=to_mask)
        else:
            mine = partial + pairs[None, :] * (SPLITS * OUT) + row[:, None]
            mask = row_mask[:, None] & here[None, :]
            tl.store(mine + split * OUT, y, mask=mask, cache_modifier=".cg")
            counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            if _last(counter, SPLITS):
                whole = tl.zeros([ROWS, M], tl.float32)
                for other in tl.static_range(SPLITS):
                    whole += tl.load(mine + other * OUT, mask=mask, other=0.0, cache_modifier=".cg")
                value = _activations(
                    whole, full, low, slot, full_slots, row, row_mask, DTYPE, ROUND, GATED,
                    INTERLEAVED, ACT, ALPHA, LIMIT, BIAS, STRIDE, BITS, LOW_STRIDE, SCALES,
                    BLOCK_N, M,
                )  # fmt: skip
                tl.store(to, value.to(inner.dtype.element_ty), mask=to_mask)
    _await(OVERLAP and WAIT and CHUNK == 0)


@triton.jit
def _sum_pairs(
    token, n, index, weights, table, full, low, out, partial, full_slots, only,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    ACCUMULATE: tl.constexpr, ROUND: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write outputs *n* of *token*: the weighted sum of its pairs, whose splits are *partial*."""
    DTYPE: tl.constexpr = full.dtype.element_ty
    j = tl.arange(0, PAIRS)
    pairs = token * TOP_K + j
    slot = slot_of(index, table, pairs, j < TOP_K, only)
    here = slot >= 0
    mask = here[:, None] & (n < OUT)[None, :]
    at = partial + pairs[:, None] * (SPLITS * OUT) + n[None, :]
    y = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        y += tl.load(at + split * OUT, mask=mask, other=0.0, cache_modifier=".cg")
    y = rounded(y, DTYPE, ROUND)
    if BIAS >= 0:
        y += biases(full, low, slot[:, None], full_slots, BIAS + n[None, :], mask, DTYPE, ROUND,
                    STRIDE, BITS, LOW_STRIDE, SCALES)  # fmt: skip
        y = rounded(y, DTYPE, ROUND)
    weight = tl.load(weights + pairs, mask=here, other=0.0).to(tl.float32)
    # A product of two dtypes has the wider one: float32 weights keep it unrounded.
    y = rounded(y * weight[:, None], DTYPE, ROUND and weights.dtype.element_ty == DTYPE)
    total = tl.sum(y, axis=0)
    to = out + token * OUT + n
    if ACCUMULATE:
        total += tl.load(to, mask=n < OUT, other=0.0).to(tl.float32)
    tl.store(to, total.to(out.dtype.element_ty), mask=n < OUT)


@triton.jit(do_not_specialize=["full_slots", "only"])
def second_kernel(
    inner, index, weights, table, slots, members, full, low, out, partial, arrived,
    full_slots, only,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, STRIDE: tl.constexpr,
    BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    ACCUMULATE: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
    CHUNK: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr, LOW_K: tl.constexpr, LOW_STAGES: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """partial float32 [pairs, SPLITS, OUT] = second projection; grid (items, blocks, SPLITS).

    Without groups, the last program of a token's block to arrive, by *arrived* int32
    [T, blocks], adds and weighs its pairs into *out* [T, OUT]; else :func:`combine_kernel` does.
    PAIRS is TOP_K up to a power of two.
    """
    DTYPE: tl.constexpr = full.dtype.element_ty
    item = tl.program_id(0)
    split = tl.program_id(2)
    # What the kernel before did not write can be read before it ends.
    slot, pairs = item_of(index, table, slots, members, only, CHUNK > 0, CHUNK, M, WAIT)
    _await(OVERLAP)
    n0 = tl.program_id(1) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    if slot >= 0:
        here = pairs >= 0
        y = product(
            inner, item, pairs, here, full, low, slot, full_slots, n, n < OUT, n0, split * SPLIT,
            DTYPE, ROUND, DOT, BLOCK_N, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST,
            STRIDE, BITS, LOW_STRIDE, SCALES, BYTES, LOW_K, LOW_STAGES,
        )  # fmt: skip
        tl.store(
            partial + (pairs * SPLITS + split)[None, :] * OUT + n[:, None], y,
            mask=(n < OUT)[:, None] & here[None, :], cache_modifier=".cg",
        )  # fmt: skip
    if CHUNK == 0:
        token = item // TOP_K
        counter = arrived + token * tl.num_programs(1) + tl.program_id(1)
        if _last(counter, TOP_K * SPLITS):
            _sum_pairs(
                token, n, index, weights, table, full, low, out, partial, full_slots, only,
                TOP_K, PAIRS, OUT, BIAS, STRIDE, BITS, LOW_STRIDE, SCALES, ACCUMULATE, ROUND,
                SPLITS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["full_slots", "only"])
def combine_kernel(
    index, weights, table, full, low, out, partial, full_slots, only,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    ACCUMULATE: tl.constexpr, ROUND: tl.constexpr, OVERLAP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, OUT] = each token's weighted sum of its pairs; grid (T, blocks)."""
    _await(OVERLAP)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    _sum_pairs(
        tl.program_id(0), n, index, weights, table, full, low, out, partial, full_slots, only,
        TOP_K, PAIRS, OUT, BIAS, STRIDE, BITS, LOW_STRIDE, SCALES, ACCUMULATE, ROUND, SPLITS,
    )  # fmt: skip
