# mypy: ignore-errors
# ruff: noqa: PLR0913
"""What a gate would choose: its scores for a few tokens, and the best experts by them in order."""

import triton
import triton.language as tl


@triton.jit
def scores_kernel(
    hidden, weight, bias, scores, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """*scores* float32 [T, EXPERTS] = *hidden* [T, HIDDEN] times *weight* [EXPERTS, HIDDEN];
    grid (blocks of ROWS experts, T).
    """
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, HIDDEN, BLOCK):
        h = begin + tl.arange(0, BLOCK)
        x = tl.load(hidden + token * HIDDEN + h, mask=h < HIDDEN, other=0.0).to(tl.float32)
        mask = (e < EXPERTS)[:, None] & (h < HIDDEN)[None, :]
        w = tl.load(weight + e[:, None] * HIDDEN + h[None, :], mask=mask, other=0.0)
        total += w.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1)
    if BIAS:
        y += tl.load(bias + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
    tl.store(scores + token * EXPERTS + e, y, mask=e < EXPERTS)


@triton.jit
def _keys(x, e, here, NAN: tl.constexpr):
    """int64 in the order of *x*, of equals the smaller *e* higher, below them what is not *here*.

    NAN stands in place of what is no number.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    order = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)
    keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - e).to(tl.int64)
    return tl.where(here, keys, -0x8000000000000000)


@triton.jit
def best_kernel(
    scores, values, best, EXPERTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
    VALUES: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """*best* int64 [rows, WIDTH] of *scores* [rows, EXPERTS], falling, and with VALUES their
    *values*; one program a row. Of equal scores the one with the smaller number comes first, a
    score that is no number where NAN, the bits of one that is, would come.
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    here = e < EXPERTS
    keys = _keys(tl.load(scores + row * EXPERTS + e, mask=here, other=0.0), e, here, NAN)
    for place in range(WIDTH):
        key = tl.max(keys, axis=0)
        tl.store(best + row * WIDTH + place, 0x7FFFFFFF - (key & 0x7FFFFFFF))
        if VALUES:
            order = (key >> 32).to(tl.int32)
            bits = order ^ ((order >> 31) & 0x7FFFFFFF)
            tl.store(values + row * WIDTH + place, bits.to(tl.float32, bitcast=True))
        keys = tl.where(keys == key, -0x8000000000000000, keys)
