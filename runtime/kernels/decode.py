"""Experts for a few tokens on a GPU: two Triton launches that read the slots in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.kernels import triton_kernels
from runtime.kernels.banks import Banks
from runtime.kernels.gating import Gating
from traces.errors import InputError

#: Programs that the second projection is split into at least, when its outputs alone give
#: fewer: about six for each of an H200's 132 multiprocessors.
PROGRAMS = 800

#: Pointers are 16-byte vectors to a compiled kernel only if all of them are.
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Tiles:
    """How a projection is cut: outputs and inputs of a program's tile, and its warps.

    *splits* divides the inputs of the second projection over several programs.
    """

    block_n: int
    block_k: int
    warps: int = 4
    splits: int = 1


def first_tiles(banks: Banks, gating: Gating) -> Tiles:
    """Tiles of the first projection."""
    weights = _tile(banks)
    if banks.layout.transposed:
        # Pieces of rows of outputs: 128 bytes each.
        return Tiles(block_n=32 if gating.gated else 64, block_k=weights // 64)
    block_k = _within(banks.hidden, weights // 8)
    return Tiles(block_n=max(1, weights // block_k // (2 if gating.gated else 1)), block_k=block_k)


def second_tiles(banks: Banks, top_k: int) -> Tiles:
    """Tiles of the second projection, over all pairs of a token."""
    weights = max(16, _tile(banks) // _power_of_two(top_k))
    if banks.layout.transposed:
        block_n, block_k = 64, max(1, weights // 64)
    else:
        block_n = 4
        block_k = _within(banks.intermediate, weights // 4)
    blocks = -(-banks.output // block_n)
    splits = max(1, min(PROGRAMS // blocks, -(-banks.intermediate // block_k)))
    return Tiles(block_n, block_k, splits=splits)


def _tile(banks: Banks) -> int:
    """Weights in a program's tile of 128 threads.

    64 bfloat16 a thread, in eight loads of 16 bytes, keep the memory busy within 128
    registers. Raising low-precision weights takes twice the registers for each.
    """
    return 8192 if banks.low_layout is None else 4096


class DecodeKernels:
    """The two launches for one model: all that does not change is worked out here.

    Compiles at the first call of each combination of dtypes; *tokens* times *top_k* pairs
    fit the scratch. The scratch is shared by all calls, which must be on one stream.
    """

    def __init__(
        self,
        banks: Banks,
        gating: Gating,
        top_k: int,
        tokens: int,
        first: Tiles | None = None,
        second: Tiles | None = None,
    ) -> None:
        self._banks = banks
        self._top_k = top_k
        self._first = first or first_tiles(banks, gating)
        self._second = second or second_tiles(banks, top_k)
        device = banks.full.device
        layout = banks.layout
        self._full = banks.full.view(layout.dtype)
        # Without a low bank its pointer is never followed.
        self._low = banks.full if banks.low is None else banks.low
        self._grids = (
            -(-banks.intermediate // self._first.block_n),
            -(-banks.output // self._second.block_n),
        )
        splits = self._second.splits
        self._inner = torch.empty(tokens * top_k, banks.intermediate, device=device)
        self._partial = torch.empty(tokens, splits, banks.output, device=device)
        self._arrived = torch.zeros(tokens, self._grids[1], dtype=torch.int32, device=device)
        self._first_constants = _first_constants(banks, gating, top_k, self._first)
        self._second_constants = _second_constants(banks, top_k, self._second)
        self._compiled: dict[Any, tuple[Any, Any]] = {}

    def run(  # noqa: PLR0913
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        table: Tensor,
        out: Tensor,
        only: int,
        accumulate: bool,
    ) -> None:
        """:meth:`runtime.kernels.FusedExperts.run` for at most the *tokens* given."""
        tokens, top_k = index.shape
        if top_k != self._top_k:
            raise InputError(f"index has {top_k} experts per token, expected {self._top_k}")
        if not tokens:
            return
        # Gates hand out slices; the kernels walk rows without strides.
        hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
        full_slots = self._banks.full_slots
        first = (hidden, index, table, self._full, self._low, self._inner, full_slots, only)
        second = (self._inner, index, weights, table, self._full, self._low, out, self._partial,
                  self._arrived, full_slots, only)  # fmt: skip
        aligned = not (
            (hidden.data_ptr() | index.data_ptr() | weights.data_ptr()) % VECTOR_BYTES
            or (table.data_ptr() | out.data_ptr()) % VECTOR_BYTES
        )
        key = (hidden.dtype, weights.dtype, table.dtype, out.dtype, accumulate)
        grids = (
            (tokens * top_k, self._grids[0], 1),
            (tokens, self._grids[1], self._second.splits),
        )
        known = self._compiled.get(key) if aligned else None
        if known is not None:
            # Past Triton's own dispatch, which takes longer than the kernels run.
            known[0][grids[0]](*first, *self._first_constants)
            known[1][grids[1]](*second, *self._second_constants[accumulate])
            return
        kernels = (
            triton_kernels.first_kernel[grids[0]](
                *first, *self._first_constants, num_warps=self._first.warps
            ),
            triton_kernels.second_kernel[grids[1]](
                *second, *self._second_constants[accumulate], num_warps=self._second.warps
            ),
        )
        # Triton's interpreter gives no kernels; unaligned ones are rare and go the long way.
        if aligned and None not in kernels:
            self._compiled[key] = kernels


def _first_constants(
    banks: Banks, gating: Gating, top_k: int, tiles: Tiles
) -> tuple[int | float | bool | str, ...]:
    """The constants of ``first_kernel``, in its order."""
    return (
        top_k, banks.hidden, banks.intermediate, banks.layout.transposed,
        gating.gated, gating.interleaved, gating.activation, gating.alpha, gating.limit,
        *_bank_constants(banks, banks.first), tiles.block_n, tiles.block_k,
    )  # fmt: skip


def _second_constants(banks: Banks, top_k: int, tiles: Tiles) -> Sequence[tuple[int | bool, ...]]:
    """The constants of ``second_kernel``, in its order: overwriting, and accumulating."""
    split = -(-banks.intermediate // tiles.splits)
    split = -(-split // tiles.block_k) * tiles.block_k
    shared = (
        top_k, _power_of_two(top_k), banks.intermediate, banks.output, banks.layout.transposed,
        *_bank_constants(banks, "down_proj"),
    )  # fmt: skip
    return [
        (*shared, accumulate, tiles.splits, split, tiles.block_n, tiles.block_k)
        for accumulate in (False, True)
    ]


def _bank_constants(banks: Banks, matrix: str) -> tuple[int, int, int, int, int, int]:
    """Where *matrix* lies: first element, bias or -1, stride; bits, stride and scales if low."""
    layout, low = banks.layout, banks.low_layout
    biases = [part.first for part in layout.parts if part.name == f"{matrix}_bias"]
    stride = layout.stride_bytes // layout.dtype.itemsize
    first = layout.part(matrix).first
    lows = (0, 0, 0) if low is None else (low.bits, low.stride_bytes, low.weight_bytes)
    return first, (biases[0] if biases else -1), stride, *lows


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least *number*."""
    return 1 << (number - 1).bit_length()


def _within(size: int, most: int) -> int:
    """A block of at most *most*, a power of two, that wastes little on *size* inputs.

    The largest that leaves at most an eighth of the last round idle, or a quarter of *most*.
    """
    block = most
    while block > max(16, most // 4) and -(-size // block) * block > size * 9 / 8:
        block //= 2
    return block
