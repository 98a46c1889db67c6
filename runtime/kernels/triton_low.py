# mypy: ignore-errors
# ruff: noqa: PLR0913, SIM300
"""Raising low-precision weights where they lie: by runs of bytes where groups are whole, or singly.

A weight is an int8 or int4 step times the float16 scale of its group of 64, in float32, which
holds that product exactly. The layout is :class:`runtime.layout.LowLayout`'s.
"""

import triton
import triton.language as tl

#: Weights per float16 scale (:data:`traces.model.QUANT_GROUP`).
GROUP = tl.constexpr(64)


@triton.jit
def gathered(
    low, slot, place, mask, BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr
):
    """Weights float32 at *place* (elements) of low row *slot*, each read by itself.

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
def _field(steps, scale, MASK: tl.constexpr, ONE: tl.constexpr, ABOVE: tl.constexpr):
    """*scale* times the step that *steps* int32 has under MASK.

    ONE is a float32 whose bits under MASK count ones, but with the step's sign bit, which is
    turned: a step then counts from 0, and ABOVE is what 0 stands for. So no integer is
    converted, which takes a GPU long. Both products have at most 24 bits, so that all is exact,
    fused or not.
    """
    return ((steps & MASK) ^ ONE).to(tl.float32, bitcast=True) * scale - scale * ABOVE


@triton.jit
def _pairs(even, odd, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Float32 *even* and *odd* [..., n], rounded to DTYPE, as [..., n, 2]; float32 again if WIDE.

    Two at a time in 32 bits, where DTYPE is half of float32: a GPU rounds pairs faster.
    """
    even, odd = even.to(DTYPE), odd.to(DTYPE)
    if WIDE and DTYPE == tl.bfloat16:
        high = odd.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        both = high | even.to(tl.uint16, bitcast=True).to(tl.uint32)
        even = (both << 16).to(tl.float32, bitcast=True)
        odd = (both & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif WIDE:
        even, odd = even.to(tl.float32), odd.to(tl.float32)
    return tl.join(even, odd)


@triton.jit
def _scales(at, group, mask, EVEN: tl.constexpr):
    """The float16 scales of *group*, the first of which lies *at* a multiple of 4 bytes.

    EVEN if they come in rows that begin with an even one. Others are read with the one beside
    them: what is copied ahead is 4 bytes at least.
    """
    if EVEN:
        scales = at.to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(scales + group, mask=mask, other=0.0)
    else:
        words = at.to(tl.pointer_type(tl.int32), bitcast=True)
        both = tl.load(words + group // 2, mask=mask, other=0)
        return (both >> (group % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def by_bytes(
    low, slot, outer, outer_mask, begin, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Weights [outer, BLOCK] of rows *outer* of a matrix, from column *begin* on.

    Rounded to DTYPE, but float32 if WIDE. WIDTH and FIRST are multiples of GROUP, *begin* is
    one of BLOCK, a power of two of 16 or more: no byte, and no group but one larger than BLOCK,
    then crosses a tile's edge. Rows are runs of bytes for the compiler to read in vectors.
    """
    ROWS: tl.constexpr = outer.shape[0]
    UNITS: tl.constexpr = BLOCK // min(BLOCK, GROUP)
    BYTES: tl.constexpr = BLOCK * BITS // 8
    base = low + slot * STRIDE
    byte = begin * BITS // 8 + tl.arange(0, BYTES)
    at = FIRST * BITS // 8 + outer[:, None] * (WIDTH * BITS // 8) + byte[None, :]
    mask = outer_mask[:, None] & (byte < WIDTH * BITS // 8)[None, :]
    steps = tl.load(base + at, mask=mask, other=0, eviction_policy="evict_first")
    steps = tl.reshape(steps, [ROWS, UNITS, BYTES // UNITS]).to(tl.int32)
    unit = begin // GROUP + tl.arange(0, UNITS)
    group = FIRST // GROUP + outer[:, None] * (WIDTH // GROUP) + unit[None, :]
    group_mask = outer_mask[:, None] & (unit < WIDTH // GROUP)[None, :]
    EVEN: tl.constexpr = UNITS > 1 and (FIRST // GROUP) % 2 == 0 and (WIDTH // GROUP) % 2 == 0
    scale = _scales(base + SCALES, group, group_mask, EVEN).to(tl.float32)[:, :, None]
    if BITS == 4:
        # 2048 and 128, each with 8 of its ones turned, at the places of the two nibbles.
        steps = steps << 12
        even = _field(steps, scale, 0xF000, 0x45008000, 2048 + 8)
        odd = _field(steps, scale, 0xF0000, 0x43080000, 128 + 8)
    else:
        # 256, with 128 of its ones turned. In pairs here too: what is joined can be copied ahead
        # and brought into any order by the compiler, also where columns are outputs.
        raised = _field(steps << 15, scale, 0x7F8000, 0x43C00000, 256 + 128)
        even, odd = tl.split(tl.reshape(raised, [ROWS, UNITS, BYTES // UNITS // 2, 2]))
    return tl.reshape(_pairs(even, odd, DTYPE, WIDE), [ROWS, BLOCK])
