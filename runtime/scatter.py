# mypy: ignore-errors
"""One Triton kernel: changes of the expert table, read from pinned host memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _scatter(table, rows, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    expert = tl.load(rows + 2 * at, mask=inside, other=0)
    slot = tl.load(rows + 2 * at + 1, mask=inside, other=0)
    tl.store(table + expert, slot, mask=inside)


def scatter(table: Tensor, rows: Tensor, count: int) -> None:
    """Set ``table[expert] = slot`` for *count* pairs int32 [n, 2] of distinct experts.

    *rows* lies in pinned host memory: going past the copy engine, the kernel does not queue
    behind experts on their way.
    """
    _scatter[(-(-count // _BLOCK),)](table, rows, count, block=_BLOCK)
