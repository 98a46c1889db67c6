# mypy: ignore-errors
# ruff: noqa: PLR0913, SIM114
"""Reading weights where they lie, and multiplying tiles of them with a few rows of inputs.

Tiles are [outer, inner], *inner* running along memory: inputs for [out, in] matrices, outputs
for transposed ones. Sums are float32, in an order that never changes.
"""

import triton
import triton.language as tl

from runtime.kernels.triton_low import by_bytes, gathered
from runtime.kernels.triton_maths import rounded


@triton.jit
def slot_of(index, table, pairs, mask, only):
    """The slot of *pairs*; -1 where masked, absent, or not *only*."""
    expert = tl.load(index + pairs, mask=mask, other=0)
    slot = tl.load(table + expert, mask=mask, other=-1)
    return tl.where((only >= 0) & (slot != only), -1, slot).to(tl.int64)


#: What a table says of an expert whose copy has not landed: the kernel behind the gate is about
#: to write its slot there (:mod:`runtime.kernels.triton_gate`).
COMING = tl.constexpr(-2)


@triton.jit
def _awaited(table, expert):
    """The slot of *expert*, -1 if that is -1, once it is there.

    Threads may see it come at different looks: none may take a way with a barrier in it that the
    others do not take. And what a copy has brought is read after this by all of them, also where
    it landed long ago: a kernel that begins before the one before it has ended may find in its
    multiprocessor's cache what lay in the slot before.
    """
    here = expert >= 0
    slot = tl.load(table + expert, mask=here, other=-1, volatile=True)
    while slot == COMING:
        slot = tl.load(table + expert, mask=here, other=-1, volatile=True)
    # One thread asks, and empties that cache; the others get its answer behind a barrier.
    slot = tl.atomic_add(table + expert, 0, mask=here, sem="acquire", scope="gpu")
    return tl.where(here, slot, -1).to(tl.int64)


@triton.jit
def item_of(
    index, table, slots, members, only, GROUPED: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """The slot of this program's work, and its pairs int [M], -1 where there are fewer.

    GROUPED: an entry of *slots* and *members* (:func:`prepare_kernel`), else one pair. With WAIT
    *slots* has experts, and *table* may still say that one is :data:`COMING`.
    """
    item = tl.program_id(0)
    m = tl.arange(0, M)
    if GROUPED:
        slot = tl.load(slots + item).to(tl.int64)
        pairs = tl.load(members + item * CHUNK + m, mask=m < CHUNK, other=-1)
        if WAIT:
            slot = _awaited(table, slot)
    else:
        if WAIT:
            slot = _awaited(table, tl.load(index + item))
        else:
            slot = slot_of(index, table, item, True, only)
        pairs = tl.where(m == 0, item, -1)
    return slot, pairs


@triton.jit
def full_tile(full, slot, place, mask, STRIDE: tl.constexpr):
    """Full-precision weights at *place* (elements) of *slot*, as they are."""
    return tl.load(
        (full + slot * STRIDE) + place, mask=mask, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def biases(
    full, low, slot, full_slots, place, mask, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Biases float32 at *place* of *slot*, whichever bank that is in; 0 where masked."""
    bias = full_tile(full, slot, place, mask & (slot < full_slots), STRIDE).to(tl.float32)
    if BITS > 0:
        low_mask = mask & (slot >= full_slots)
        raised = gathered(low, slot - full_slots, place, low_mask, BITS, LOW_STRIDE, SCALES)
        bias += rounded(raised, DTYPE, ROUND)
    return bias


@triton.jit
def _tile(
    bank, slot, outer, outer_mask, inner, inner_mask, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    BITS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Weights at rows *outer* and columns *inner* of a matrix WIDTH wide.

    In DTYPE if nothing is lost by it or ROUND, else float32; what BYTES raise is float32 also if
    WIDE. With BYTES, *inner* is whatever follows *begin*, as :func:`by_bytes` wants it.
    """
    RAISED: tl.constexpr = DTYPE if ROUND else tl.float32
    if BITS > 0 and BYTES:
        return by_bytes(
            bank, slot, outer, outer_mask, begin, RAISED, WIDE, inner.shape[0], WIDTH, FIRST,
            BITS, STRIDE, SCALES,
        )  # fmt: skip
    else:
        place = FIRST + outer[:, None] * WIDTH + inner[None, :]
        mask = outer_mask[:, None] & inner_mask[None, :]
        if BITS == 0:
            return full_tile(bank, slot, place, mask, STRIDE)
        else:
            return gathered(bank, slot, place, mask, BITS, STRIDE, SCALES).to(RAISED)


@triton.jit
def _tile_at(
    bank, slot, row, row_mask, row_begin, k, k_begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, WIDE: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST: tl.constexpr,
    BITS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`_tile` of outputs *row* and inputs *k*: [k, row] if TRANSPOSED, else [row, k]."""
    if TRANSPOSED:
        return _tile(bank, slot, k, k < IN, row, row_mask, row_begin, DTYPE, ROUND, WIDE, OUT,
                     FIRST, BITS, BYTES, STRIDE, SCALES)  # fmt: skip
    else:
        return _tile(bank, slot, row, row_mask, k, k < IN, k_begin, DTYPE, ROUND, WIDE, IN,
                     FIRST, BITS, BYTES, STRIDE, SCALES)  # fmt: skip


@triton.jit
def _by_dot(
    inputs, rows, here, bank, slot, row, row_mask, row_begin, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` by matrix instructions; in float32 unless ROUND."""
    # The matrix instructions that take raised weights from the registers in which they come
    # are those of small products, and take them as the second factor.
    SWAPPED: tl.constexpr = BITS > 0 and BYTES and ROUND
    acc = tl.zeros([M, ROWS] if SWAPPED else [ROWS, M], tl.float32)
    for step in tl.range(0, SPLIT, BLOCK_K, num_stages=STAGES):
        k = begin + step + tl.arange(0, BLOCK_K)
        k_mask = k < IN
        tile = _tile_at(
            bank, slot, row, row_mask, row_begin, k, begin + step, DTYPE, ROUND, False, IN,
            OUT, TRANSPOSED, FIRST, BITS, BYTES, STRIDE, SCALES,
        )  # fmt: skip
        if SWAPPED:
            value = tl.load(
                inputs + rows[:, None] * IN + k[None, :],
                mask=here[:, None] & k_mask[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(value, tile if TRANSPOSED else tl.trans(tile), acc)
        else:
            value = tl.load(
                inputs + rows[None, :] * IN + k[:, None],
                mask=k_mask[:, None] & here[None, :], other=0.0,
            )  # fmt: skip
            if TRANSPOSED:
                tile = tl.trans(tile)
            if ROUND:
                acc = tl.dot(tile, value, acc)
            else:
                value = value.to(tl.float32)
                acc = tl.dot(tile.to(tl.float32), value, acc, input_precision="ieee")
    return tl.trans(acc) if SWAPPED else acc


@triton.jit
def _by_sums(
    inputs, input_row, bank, slot, row, row_mask, row_begin, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` of one row of inputs: summed per element of the tile, reduced at the end."""
    if TRANSPOSED:
        acc = tl.zeros([BLOCK_K, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for step in tl.range(0, SPLIT, BLOCK_K, num_stages=STAGES):
        k = begin + step + tl.arange(0, BLOCK_K)
        value = tl.load(inputs + input_row * IN + k, mask=k < IN, other=0.0).to(tl.float32)
        tile = _tile_at(
            bank, slot, row, row_mask, row_begin, k, begin + step, DTYPE, ROUND, True, IN,
            OUT, TRANSPOSED, FIRST, BITS, BYTES, STRIDE, SCALES,
        )  # fmt: skip
        acc += tile.to(tl.float32) * (value[:, None] if TRANSPOSED else value[None, :])
    return tl.sum(acc, axis=0 if TRANSPOSED else 1)[:, None]


@triton.jit
def _by_either(
    inputs, input_row, rows, here, bank, slot, row, row_mask, row_begin, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, STRIDE: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` for a slot of one bank."""
    if DOT:
        return _by_dot(
            inputs, rows, here, bank, slot, row, row_mask, row_begin, begin, DTYPE, ROUND, ROWS,
            M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, BITS, BYTES, STRIDE, SCALES,
        )  # fmt: skip
    else:
        tl.static_assert(M == 1)
        return _by_sums(
            inputs, input_row, bank, slot, row, row_mask, row_begin, begin, DTYPE, ROUND, ROWS,
            BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, BITS, BYTES, STRIDE, SCALES,
        )  # fmt: skip


@triton.jit
def product(
    inputs, input_row, rows, here, full, low, slot, full_slots, row, row_mask, row_begin, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
    BYTES: tl.constexpr, LOW_K: tl.constexpr, LOW_STAGES: tl.constexpr,
):  # fmt: skip
    """Sums float32 [ROWS, M]: rows *row* of a matrix of *slot* times rows *rows* of *inputs*.

    Over the inputs *begin* .. *begin* + SPLIT. Without DOT, M is 1 and *input_row* the row.
    Low slots go LOW_K inputs at a time, read in runs of bytes where BYTES (:func:`by_bytes`;
    with TRANSPOSED only if *row* is whatever follows *row_begin*).
    """
    y = tl.zeros([ROWS, M], tl.float32)
    if BITS == 0:
        y = _by_either(
            inputs, input_row, rows, here, full, slot, row, row_mask, row_begin, begin, DTYPE,
            ROUND, DOT, ROWS, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, 0, False,
            STRIDE, 0,
        )  # fmt: skip
    elif slot < full_slots:
        y = _by_either(
            inputs, input_row, rows, here, full, slot, row, row_mask, row_begin, begin, DTYPE,
            ROUND, DOT, ROWS, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, 0, False,
            STRIDE, 0,
        )  # fmt: skip
    else:
        y = _by_either(
            inputs, input_row, rows, here, low, slot - full_slots, row, row_mask, row_begin,
            begin, DTYPE, ROUND, DOT, ROWS, M, LOW_K, SPLIT, LOW_STAGES, IN, OUT, TRANSPOSED,
            FIRST, BITS, BYTES, LOW_STRIDE, SCALES,
        )  # fmt: skip
    return y
