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
def rank_kernel(scores, best, EXPERTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """*best* int64 [rows, WIDTH] of *scores* [rows, EXPERTS], falling; one program a row.

    Of equal scores the one with the smaller number comes first. A score that is no number is last.
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    x = tl.load(scores + row * EXPERTS + e, mask=e < EXPERTS, other=0.0)
    # Above what is not there or taken already, below everything else.
    x = tl.where((x == x) & (x > -3e38), x, -3e38)
    x = tl.where(e < EXPERTS, x, float("-inf"))
    for place in range(WIDTH):
        found = tl.argmax(x, axis=0, tie_break_left=True)
        tl.store(best + row * WIDTH + place, found.to(tl.int64))
        x = tl.where(e == found, float("-inf"), x)
