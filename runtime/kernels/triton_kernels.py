# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0915, SIM114
"""The decode kernels in Triton: one program computes a few outputs of one projection.

Weights are tiles [outer, inner], *inner* running along memory: inputs for [out, in] matrices,
outputs for transposed ones. Products are summed per element of the tile in float32 and
reduced once at the end, in an order that never changes. A slot of -1 reads nothing.
"""

import triton
import triton.language as tl

#: Weights per float16 scale (:data:`traces.model.QUANT_GROUP`).
GROUP = tl.constexpr(64)


@triton.jit
def _slot_of(index, table, pairs, mask, only):
    """The slot of *pairs*; -1 where masked, absent, or not *only*."""
    expert = tl.load(index + pairs, mask=mask, other=0)
    slot = tl.load(table + expert, mask=mask, other=-1)
    return tl.where((only >= 0) & (slot != only), -1, slot).to(tl.int64)


@triton.jit
def _full_tile(full, slot, place, mask, STRIDE: tl.constexpr):
    """Full-precision weights at *place* (elements) of *slot*, float32."""
    at = slot * STRIDE + place
    return tl.load(full + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _low_tile(
    low, slot, place, mask, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr
):
    """Low-precision weights at *place* (elements) of low row *slot*, float32.

    STRIDE is bytes per row, SCALES the byte at which its scales begin.
    """
    base = slot * STRIDE
    if BITS == 8:
        steps = tl.load(low + (base + place), mask=mask, other=0).to(tl.int8, bitcast=True)
        steps = steps.to(tl.float32)
    else:
        byte = tl.load(low + (base + place // 2), mask=mask, other=0).to(tl.int32)
        nibble = (byte >> ((place % 2) * 4).to(tl.int32)) & 15
        # Two's complement of four bits.
        steps = ((nibble ^ 8) - 8).to(tl.float32)
    scales = low.to(tl.pointer_type(tl.float16), bitcast=True)
    scale = tl.load(scales + ((base + SCALES) // 2 + place // GROUP), mask=mask, other=0.0)
    return steps * scale.to(tl.float32)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """An activation of :data:`runtime.kernels.gating.ACTIVATIONS` on float32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)


@triton.jit
def _gate(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """What goes into the second projection, from a gate and an up value."""
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1) * gate * tl.sigmoid(gate * ALPHA)
    else:
        return _activate(gate, ACT) * up


@triton.jit
def _first_rows(
    hidden, bank, slot, row, row_mask, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, FIRST: tl.constexpr, TRANSPOSED: tl.constexpr,
    BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Rows *row* [ROWS] of the first matrix of *slot* times the input at *hidden* [IN]."""
    if TRANSPOSED:
        acc = tl.zeros([BLOCK_K, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(hidden + k, mask=k < IN, other=0.0).to(tl.float32)
        if TRANSPOSED:
            place = FIRST + k[:, None] * OUT + row[None, :]
            mask = (k < IN)[:, None] & row_mask[None, :]
            value = value[:, None]
        else:
            place = FIRST + row[:, None] * IN + k[None, :]
            mask = row_mask[:, None] & (k < IN)[None, :]
            value = value[None, :]
        if BITS == 0:
            acc += _full_tile(bank, slot, place, mask, STRIDE) * value
        else:
            acc += _low_tile(bank, slot, place, mask, BITS, STRIDE, SCALES) * value
    return tl.sum(acc, axis=0 if TRANSPOSED else 1)


@triton.jit
def _bias(
    full, low, slot, full_slots, place, mask,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Biases at *place* of *slot*, whichever bank that is in; 0 where masked."""
    bias = _full_tile(full, slot, place, mask & (slot < full_slots), STRIDE)
    if BITS > 0:
        low_mask = mask & (slot >= full_slots)
        bias += _low_tile(low, slot - full_slots, place, low_mask, BITS, LOW_STRIDE, SCALES)
    return bias


@triton.jit(do_not_specialize=["full_slots", "only"])
def first_kernel(
    hidden, index, table, full, low, inner, full_slots, only,
    TOP_K: tl.constexpr, IN: tl.constexpr, INNER: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, STRIDE: tl.constexpr,
    BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inner [pairs, INNER] float32 = activation(first projection); grid (pairs, blocks).

    BIAS is the first element of the biases, or -1. Pairs without a slot write nothing.
    """
    pair = tl.program_id(0)
    slot = _slot_of(index, table, pair, True, only)
    if slot >= 0:
        n0 = tl.program_id(1) * BLOCK_N
        OUT: tl.constexpr = 2 * INNER if GATED else INNER
        ROWS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
        r = tl.arange(0, ROWS)
        if INTERLEAVED:
            row = 2 * n0 + r
            row_mask = row < OUT
        else:
            # With a gate, BLOCK_N gate rows and then the up rows that belong to them.
            row_mask = n0 + r % BLOCK_N < INNER
            row = n0 + r % BLOCK_N + (r // BLOCK_N) * INNER
        x = hidden + (pair // TOP_K) * IN
        y = tl.zeros([ROWS], tl.float32)
        if BITS == 0:
            y = _first_rows(x, full, slot, row, row_mask, ROWS, BLOCK_K, IN, OUT, FIRST,
                            TRANSPOSED, 0, STRIDE, 0)  # fmt: skip
        elif slot < full_slots:
            y = _first_rows(x, full, slot, row, row_mask, ROWS, BLOCK_K, IN, OUT, FIRST,
                            TRANSPOSED, 0, STRIDE, 0)  # fmt: skip
        else:
            y = _first_rows(x, low, slot - full_slots, row, row_mask, ROWS, BLOCK_K, IN, OUT,
                            FIRST, TRANSPOSED, BITS, LOW_STRIDE, SCALES)  # fmt: skip
        if BIAS >= 0:
            y += _bias(full, low, slot, full_slots, BIAS + row, row_mask, STRIDE, BITS,
                       LOW_STRIDE, SCALES)  # fmt: skip
        if GATED:
            if INTERLEAVED:
                gate, up = tl.split(tl.reshape(y, [BLOCK_N, 2]))
            else:
                gate, up = tl.split(tl.trans(tl.reshape(y, [2, BLOCK_N])))
            value = _gate(gate, up, ACT, ALPHA, LIMIT)
        else:
            value = _activate(y, ACT)
        n = n0 + tl.arange(0, BLOCK_N)
        tl.store(inner + pair * INNER + n, value, mask=n < INNER)


@triton.jit
def _write(out, at, total, mask, ACCUMULATE: tl.constexpr):
    """Store *total*, or add it, in the dtype of *out*."""
    if ACCUMULATE:
        total += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _hand_in(
    out, partial, arrived, total, n, OUT: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Leave one split's sums *total* [BLOCK_N]; the last to arrive adds all up in their order."""
    token = tl.program_id(0)
    split = tl.program_id(2)
    mine = partial + token * SPLITS * OUT + n
    tl.store(mine + split * OUT, total, mask=n < OUT, cache_modifier=".cg")
    # All threads' sums must be out before the one that counts says so.
    tl.debug_barrier()
    counter = arrived + token * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
        whole = tl.zeros([BLOCK_N], tl.float32)
        for other in range(SPLITS):
            whole += tl.load(mine + other * OUT, mask=n < OUT, cache_modifier=".cg")
        _write(out, token * OUT + n, whole, n < OUT, ACCUMULATE)
        # As it was found, for the next call.
        tl.store(counter, 0)


@triton.jit(do_not_specialize=["full_slots", "only"])
def second_kernel(
    inner, index, weights, table, full, low, out, partial, arrived, full_slots, only,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, FIRST: tl.constexpr, BIAS: tl.constexpr, STRIDE: tl.constexpr,
    BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    ACCUMULATE: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, OUT] = sum over a token's pairs of weight * second projection.

    Grid (tokens, blocks, SPLITS). All pairs of a token (PAIRS: TOP_K up to a power of two) are
    one tile, so that their weights are read at once. A program takes SPLIT of the IN inputs;
    with several SPLITS each leaves its sums in *partial* float32 [T, SPLITS, OUT], and the
    last to arrive, by the counters *arrived* int32 [T, blocks], adds them in their order.
    """
    token = tl.program_id(0)
    block = tl.program_id(1)
    split = tl.program_id(2)
    j = tl.arange(0, PAIRS)
    pairs = token * TOP_K + j
    slot = _slot_of(index, table, pairs, j < TOP_K, only)
    here = slot >= 0
    weight = tl.load(weights + pairs, mask=here, other=0.0).to(tl.float32)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        acc = tl.zeros([PAIRS, BLOCK_K, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([PAIRS, BLOCK_N, BLOCK_K], tl.float32)
    slot3 = slot[:, None, None]
    begin = split * SPLIT
    for step in range(0, SPLIT, BLOCK_K):
        k = begin + step + tl.arange(0, BLOCK_K)
        k_mask = k < tl.minimum(begin + SPLIT, IN)
        value = tl.load(
            inner + pairs[:, None] * IN + k[None, :],
            mask=here[:, None] & k_mask[None, :], other=0.0,
        )  # fmt: skip
        if TRANSPOSED:
            place = FIRST + k[:, None] * OUT + n[None, :]
            mask = k_mask[:, None] & (n < OUT)[None, :]
            value = value[:, :, None]
        else:
            place = FIRST + n[:, None] * IN + k[None, :]
            mask = (n < OUT)[:, None] & k_mask[None, :]
            value = value[:, None, :]
        place = place[None, :, :]
        mask = mask[None, :, :] & here[:, None, None]
        is_full = slot3 < full_slots
        tile = _full_tile(full, slot3, place, mask & is_full, STRIDE)
        if BITS > 0:
            tile += _low_tile(low, slot3 - full_slots, place, mask & (slot3 >= full_slots), BITS,
                              LOW_STRIDE, SCALES)  # fmt: skip
        acc += tile * value
    y = tl.sum(acc, axis=1 if TRANSPOSED else 2)
    if BIAS >= 0:
        bias_mask = here[:, None] & (n < OUT)[None, :] & (split == 0)
        y += _bias(full, low, slot[:, None], full_slots, BIAS + n[None, :], bias_mask, STRIDE,
                   BITS, LOW_STRIDE, SCALES)  # fmt: skip
    total = tl.sum(y * weight[:, None], axis=0)
    if SPLITS == 1:
        _write(out, token * OUT + n, total, n < OUT, ACCUMULATE)
    else:
        _hand_in(out, partial, arrived, total, n, OUT, SPLITS, ACCUMULATE, BLOCK_N)
