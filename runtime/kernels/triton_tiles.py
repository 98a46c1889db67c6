# mypy: ignore-errors
# ruff: noqa: PLR0913, SIM114
"""Reading weights where they lie, and multiplying tiles of them with a few rows of inputs.

Tiles are [outer, inner], *inner* running along memory: inputs for [out, in] matrices, outputs
for transposed ones. Sums are float32, in an order that never changes.
"""

import triton
import triton.language as tl

from runtime.kernels.triton_maths import rounded

#: Weights per float16 scale (:data:`traces.model.QUANT_GROUP`).
GROUP = tl.constexpr(64)


@triton.jit
def slot_of(index, table, pairs, mask, only):
    """The slot of *pairs*; -1 where masked, absent, or not *only*."""
    expert = tl.load(index + pairs, mask=mask, other=0)
    slot = tl.load(table + expert, mask=mask, other=-1)
    return tl.where((only >= 0) & (slot != only), -1, slot).to(tl.int64)


@triton.jit
def item_of(
    index, table, slots, members, only, GROUPED: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr
):
    """The slot of this program's work, and its pairs int [M], -1 where there are fewer.

    GROUPED: an entry of *slots* and *members* (:func:`prepare_kernel`), else one pair.
    """
    item = tl.program_id(0)
    m = tl.arange(0, M)
    if GROUPED:
        slot = tl.load(slots + item).to(tl.int64)
        pairs = tl.load(members + item * CHUNK + m, mask=m < CHUNK, other=-1)
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
def low_tile(
    low, slot, place, mask, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr
):
    """Low-precision weights at *place* (elements) of low row *slot*, float32.

    STRIDE is bytes per row, SCALES the byte at which its scales begin.
    """
    base = low + slot * STRIDE
    if BITS == 8:
        steps = tl.load(base + place, mask=mask, other=0).to(tl.int8, bitcast=True)
        steps = steps.to(tl.float32)
    else:
        byte = tl.load(base + place // 2, mask=mask, other=0).to(tl.int32)
        nibble = (byte >> ((place % 2) * 4).to(tl.int32)) & 15
        # Two's complement of four bits.
        steps = ((nibble ^ 8) - 8).to(tl.float32)
    scales = (base + SCALES).to(tl.pointer_type(tl.float16), bitcast=True)
    scale = tl.load(scales + place // GROUP, mask=mask, other=0.0)
    return steps * scale.to(tl.float32)


@triton.jit
def biases(
    full, low, slot, full_slots, place, mask, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Biases float32 at *place* of *slot*, whichever bank that is in; 0 where masked."""
    bias = full_tile(full, slot, place, mask & (slot < full_slots), STRIDE).to(tl.float32)
    if BITS > 0:
        low_mask = mask & (slot >= full_slots)
        raised = low_tile(low, slot - full_slots, place, low_mask, BITS, LOW_STRIDE, SCALES)
        bias += rounded(raised, DTYPE, ROUND)
    return bias


@triton.jit
def _tile(
    bank, slot, outer, inner, mask, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr,
    BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Weights at rows *outer* and columns *inner* of a matrix WIDTH wide.

    In DTYPE if nothing is lost by it or ROUND, else float32.
    """
    place = FIRST + outer[:, None] * WIDTH + inner[None, :]
    if BITS == 0:
        return full_tile(bank, slot, place, mask, STRIDE)
    else:
        raised = low_tile(bank, slot, place, mask, BITS, STRIDE, SCALES)
        if ROUND:
            return raised.to(DTYPE)
        else:
            return raised


@triton.jit
def _by_dot(
    inputs, rows, here, bank, slot, row, row_mask, begin, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` by matrix instructions; in float32 unless ROUND."""
    acc = tl.zeros([ROWS, M], tl.float32)
    for step in tl.range(0, SPLIT, BLOCK_K, num_stages=STAGES):
        k = begin + step + tl.arange(0, BLOCK_K)
        k_mask = k < IN
        if TRANSPOSED:
            mask = k_mask[:, None] & row_mask[None, :]
            tile = _tile(bank, slot, k, row, mask, DTYPE, ROUND, OUT, FIRST, BITS, STRIDE, SCALES)
            tile = tl.trans(tile)
        else:
            mask = row_mask[:, None] & k_mask[None, :]
            tile = _tile(bank, slot, row, k, mask, DTYPE, ROUND, IN, FIRST, BITS, STRIDE, SCALES)
        value = tl.load(
            inputs + rows[None, :] * IN + k[:, None],
            mask=k_mask[:, None] & here[None, :], other=0.0,
        )  # fmt: skip
        if ROUND:
            acc = tl.dot(tile, value, acc)
        else:
            value = value.to(tl.float32)
            acc = tl.dot(tile.to(tl.float32), value, acc, input_precision="ieee")
    return acc


@triton.jit
def _by_sums(
    inputs, input_row, bank, slot, row, row_mask, begin, DTYPE: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` of one row of inputs: summed per element of the tile, reduced at the end."""
    if TRANSPOSED:
        acc = tl.zeros([BLOCK_K, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for step in tl.range(0, SPLIT, BLOCK_K, num_stages=STAGES):
        k = begin + step + tl.arange(0, BLOCK_K)
        k_mask = k < IN
        value = tl.load(inputs + input_row * IN + k, mask=k_mask, other=0.0).to(tl.float32)
        if TRANSPOSED:
            mask = k_mask[:, None] & row_mask[None, :]
            tile = _tile(bank, slot, k, row, mask, DTYPE, ROUND, OUT, FIRST, BITS, STRIDE, SCALES)
            value = value[:, None]
        else:
            mask = row_mask[:, None] & k_mask[None, :]
            tile = _tile(bank, slot, row, k, mask, DTYPE, ROUND, IN, FIRST, BITS, STRIDE, SCALES)
            value = value[None, :]
        acc += tile.to(tl.float32) * value
    return tl.sum(acc, axis=0 if TRANSPOSED else 1)[:, None]


@triton.jit
def _by_either(
    inputs, input_row, rows, here, bank, slot, row, row_mask, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """:func:`product` for a slot of one bank."""
    if DOT:
        return _by_dot(
            inputs, rows, here, bank, slot, row, row_mask, begin, DTYPE, ROUND, ROWS, M, BLOCK_K,
            SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, BITS, STRIDE, SCALES,
        )  # fmt: skip
    else:
        tl.static_assert(M == 1)
        return _by_sums(
            inputs, input_row, bank, slot, row, row_mask, begin, DTYPE, ROUND, ROWS, BLOCK_K,
            SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, BITS, STRIDE, SCALES,
        )  # fmt: skip


@triton.jit
def product(
    inputs, input_row, rows, here, full, low, slot, full_slots, row, row_mask, begin,
    DTYPE: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, FIRST: tl.constexpr,
    STRIDE: tl.constexpr, BITS: tl.constexpr, LOW_STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Sums float32 [ROWS, M]: rows *row* of a matrix of *slot* times rows *rows* of *inputs*.

    Over the inputs *begin* .. *begin* + SPLIT. Without DOT, M is 1 and *input_row* the row.
    """
    y = tl.zeros([ROWS, M], tl.float32)
    if BITS == 0:
        y = _by_either(
            inputs, input_row, rows, here, full, slot, row, row_mask, begin, DTYPE, ROUND, DOT,
            ROWS, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, 0, STRIDE, 0,
        )  # fmt: skip
    elif slot < full_slots:
        y = _by_either(
            inputs, input_row, rows, here, full, slot, row, row_mask, begin, DTYPE, ROUND, DOT,
            ROWS, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, 0, STRIDE, 0,
        )  # fmt: skip
    else:
        y = _by_either(
            inputs, input_row, rows, here, low, slot - full_slots, row, row_mask, begin, DTYPE,
            ROUND, DOT, ROWS, M, BLOCK_K, SPLIT, STAGES, IN, OUT, TRANSPOSED, FIRST, BITS,
            LOW_STRIDE, SCALES,
        )  # fmt: skip
    return y
