"""Experts for a few tokens on a GPU: Triton launches that read the slots in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.kernels import triton_kernels
from runtime.kernels.banks import Banks
from runtime.kernels.cuts import Cut, Tiles, group_cut, low_reading, pair_cut, power_of_two
from runtime.kernels.gating import Gating
from traces.errors import InputError

__all__ = ["Cut", "DecodeKernels", "Tiles", "group_cut", "pair_cut"]

#: Pointers are 16-byte vectors to a compiled kernel only if all of them are.
VECTOR_BYTES = 16

#: Outputs that a program of the kernel that adds up pairs takes.
COMBINE_N = 256

#: Pairs that the kernel that groups them compares with at a time.
COMPARED = 32

#: dtypes whose sums are rounded where transformers rounds them.
ROUNDED = (torch.bfloat16, torch.float16)

Constants = tuple[Any, ...]


@dataclass(frozen=True)
class _Step:
    """One launch: the Triton function, its constants, and how it is compiled."""

    function: Any
    constants: Constants
    options: dict[str, Any]


class DecodeKernels:
    """The launches of one *cut* for one model: all that does not change is worked out here.

    Compiles at the first call of each combination of dtypes; *tokens* times *top_k* pairs
    fit the scratch. The scratch is shared by all calls, which must be on one stream.
    *rounds* rounds where transformers does, if hidden states have the bank's dtype and that
    is one of :data:`ROUNDED`; else all is float32 inside.
    """

    def __init__(
        self,
        banks: Banks,
        gating: Gating,
        top_k: int,
        tokens: int,
        cut: Cut | None = None,
        *,
        rounds: bool = False,
    ) -> None:
        self._banks, self._gating = banks, gating
        self._top_k, self._tokens = top_k, tokens
        self._rounds = rounds and banks.layout.dtype in ROUNDED
        self._cut = cut = cut or pair_cut(banks, gating, top_k, self._rounds)
        device = banks.full.device
        self._full = banks.full.view(banks.layout.dtype)
        # Without a low bank its pointer is never followed.
        self._low = banks.full if banks.low is None else banks.low
        self._first_grid = (-(-banks.intermediate // cut.first.block_n), cut.first.splits)
        self._second_grid = (-(-banks.output // cut.second.block_n), cut.second.splits)
        pairs, rows = tokens * top_k, banks.intermediate * (2 if gating.gated else 1)
        first_splits = cut.first.splits if cut.first.splits > 1 else 0
        self._inner = torch.empty(pairs, banks.intermediate, device=device)
        self._parts = torch.empty(max(1, pairs * first_splits * rows), device=device)
        self._partial = torch.empty(pairs, cut.second.splits, banks.output, device=device)
        self._arrived = [
            torch.zeros(pairs * blocks, dtype=torch.int32, device=device)
            for blocks, _ in (self._first_grid, self._second_grid)
        ]
        self._slots = torch.full((pairs,), -1, dtype=torch.int32, device=device)
        self._members = torch.full((pairs * max(1, cut.group),), -1, dtype=torch.int32,
                                   device=device)  # fmt: skip
        self._notes = torch.empty(3 * power_of_two(pairs), dtype=torch.int32, device=device)
        self._compiled: dict[Any, Sequence[tuple[Any, Constants]]] = {}

    def run(  # noqa: PLR0913
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        table: Tensor,
        out: Tensor,
        only: int,
        accumulate: bool,
        wait: bool = False,
    ) -> None:
        """:meth:`runtime.kernels.FusedExperts.run` for at most the *tokens* given."""
        tokens, top_k = index.shape
        if top_k != self._top_k:
            raise InputError(f"index has {top_k} experts per token, expected {self._top_k}")
        if not tokens:
            return
        # Gates hand out slices; the kernels walk rows without strides.
        hidden, index, weights = hidden.contiguous(), index.contiguous(), weights.contiguous()
        aligned = not (
            (hidden.data_ptr() | index.data_ptr() | weights.data_ptr()) % VECTOR_BYTES
            or (table.data_ptr() | out.data_ptr()) % VECTOR_BYTES
        )
        rounds = self._rounds and hidden.dtype == self._full.dtype
        given = (hidden, index, weights, table, out, only)
        launches = self._launches(given, rounds)
        padded = power_of_two(tokens * top_k) if self._cut.group else 0
        key = (hidden.dtype, weights.dtype, table.dtype, out.dtype, accumulate, padded, wait)
        known = self._compiled.get(key) if aligned else None
        if known is not None:
            # Past Triton's own dispatch, which takes longer than the kernels run.
            for (kernel, constants), (grid, inputs) in zip(known, launches, strict=True):
                kernel[grid](*inputs, *constants)
            return
        compiled = [
            (step.function[grid](*inputs, *step.constants, **step.options), step.constants)
            for step, (grid, inputs) in zip(
                self._steps(rounds, accumulate, padded, wait), launches, strict=True
            )
        ]
        # Triton's interpreter gives no kernels; unaligned ones are rare and go the long way.
        if aligned and all(kernel is not None for kernel, _ in compiled):
            self._compiled[key] = compiled

    @property
    def waits(self) -> bool:
        """Whether :meth:`run` can *wait*: its kernels begin before the one before has ended."""
        return self._cut.overlap

    def compile(self, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        """Compile for *given* (hidden, index, weights, table, out) of :meth:`run`, run nothing.

        Within triton's ``AsyncCompileMode``, kernels of several objects compile side by side.
        """
        hidden, index = given[:2]
        rounds = self._rounds and hidden.dtype == self._full.dtype
        padded = power_of_two(index.numel()) if self._cut.group else 0
        steps = self._steps(rounds, False, padded, False)
        for step, (grid, inputs) in zip(steps, self._launches((*given, -1), rounds), strict=True):
            step.function.warmup(*inputs, *step.constants, grid=grid, **step.options)

    def _launches(
        self, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int], rounds: bool
    ) -> list[tuple[tuple[int, int, int], tuple[Any, ...]]]:
        """Grid and changing arguments of each launch, in order."""
        hidden, index, weights, table, out, only = given
        tokens, full_slots = len(hidden), self._banks.full_slots
        pairs = tokens * self._top_k
        inner = self._inner.view(-1).view(self._full.dtype) if rounds else self._inner
        slots, members, full, low = self._slots, self._members, self._full, self._low
        grouped = self._cut.group > 0
        items = _most_groups(pairs, table.shape[0], self._cut.group) if grouped else pairs
        launches: list[tuple[tuple[int, int, int], tuple[Any, ...]]] = []
        if grouped:
            found = (index, table, slots, members, self._notes, pairs, items, only)
            launches.append(((1, 1, 1), found))
        launches.append((
            (items, *self._first_grid),
            (hidden, index, table, slots, members, full, low, inner, self._parts,
             self._arrived[0], full_slots, only),
        ))  # fmt: skip
        launches.append((
            (items, *self._second_grid),
            (inner, index, weights, table, slots, members, full, low, out, self._partial,
             self._arrived[1], full_slots, only),
        ))  # fmt: skip
        if grouped:
            blocks = -(-self._banks.output // COMBINE_N)
            launches.append((
                (tokens, blocks, 1),
                (index, weights, table, full, low, out, self._partial, full_slots, only),
            ))  # fmt: skip
        return launches

    def _steps(self, rounds: bool, accumulate: bool, padded: int, wait: bool) -> list[_Step]:
        """What is launched, in the order of :meth:`_launches`; *padded* pairs if grouped."""
        cut, grouped = self._cut, self._cut.group > 0
        steps = []
        if grouped:
            # A pair is compared with every other: at most 16 comparisons a thread at once.
            warps = min(16, max(4, padded // 16))
            constants: Constants = (cut.group, padded, min(padded, COMPARED), cut.overlap, wait)
            options = {"num_warps": warps, **({"launch_pdl": True} if wait else {})}
            steps.append(_Step(triton_kernels.prepare_kernel, constants, options))
        steps.append(
            _Step(
                triton_kernels.first_kernel,
                (*self._first_constants(rounds), wait),
                # Pairs by themselves follow a kernel that is not ours, and wait for all of it,
                # unless it is the gate's.
                _options(cut.first, cut.overlap and (grouped or wait)),
            )
        )
        steps.append(
            _Step(
                triton_kernels.second_kernel,
                (*self._second_constants(rounds, accumulate), wait),
                _options(cut.second, cut.overlap),
            )
        )
        if grouped:
            constants = (
                *self._sum_constants(), accumulate, rounds, cut.overlap, cut.second.splits,
                COMBINE_N,
            )  # fmt: skip
            options = _options(Tiles(COMBINE_N, 1), cut.overlap)
            steps.append(_Step(triton_kernels.combine_kernel, constants, options))
        return steps

    def _first_constants(self, rounds: bool) -> Constants:
        """The constants of ``first_kernel``, in its order."""
        banks, gating, cut = self._banks, self._gating, self._cut
        return (
            self._top_k, banks.hidden, banks.intermediate, banks.layout.transposed,
            gating.gated, gating.interleaved, gating.activation, gating.alpha, gating.limit,
            *_bank_constants(banks, banks.first),
            *_cut_constants(cut, cut.first, banks.hidden, rounds),
            *low_reading(banks, banks.first, cut.first, 2 if gating.gated else 1),
        )  # fmt: skip

    def _second_constants(self, rounds: bool, accumulate: bool) -> Constants:
        """The constants of ``second_kernel``, in its order."""
        banks, cut = self._banks, self._cut
        first, *rest = _bank_constants(banks, "down_proj")
        return (
            self._top_k, power_of_two(self._top_k), banks.intermediate, banks.output,
            # Of groups another kernel writes the sums.
            banks.layout.transposed, first, *rest, accumulate and not cut.group,
            *_cut_constants(cut, cut.second, banks.intermediate, rounds),
            *low_reading(banks, "down_proj", cut.second, 1),
        )  # fmt: skip

    def _sum_constants(self) -> Constants:
        """The constants of ``combine_kernel`` that its model decides, in its order."""
        _, *rest = _bank_constants(self._banks, "down_proj")
        return self._top_k, power_of_two(self._top_k), self._banks.output, *rest


def _cut_constants(cut: Cut, tiles: Tiles, inputs: int, rounds: bool) -> Constants:
    """What the constants of both projections have after those of the bank."""
    return (
        rounds, cut.overlap, cut.group, cut.columns(tiles), tiles.dot, tiles.stages, tiles.splits,
        tiles.split_inputs(inputs), tiles.block_n, tiles.block_k,
    )  # fmt: skip


def _options(tiles: Tiles, overlap: bool) -> dict[str, Any]:
    """How a kernel is compiled; other devices than NVIDIA's know no *overlap*."""
    return {"num_warps": tiles.warps, **({"launch_pdl": True} if overlap else {})}


def _bank_constants(banks: Banks, matrix: str) -> tuple[int, int, int, int, int, int]:
    """Where *matrix* lies: first element, bias or -1, stride; bits, stride and scales if low."""
    layout, low = banks.layout, banks.low_layout
    biases = [part.first for part in layout.parts if part.name == f"{matrix}_bias"]
    stride = layout.stride_bytes // layout.dtype.itemsize
    first = layout.part(matrix).first
    lows = (0, 0, 0) if low is None else (low.bits, low.stride_bytes, low.weight_bytes)
    return first, (biases[0] if biases else -1), stride, *lows


def _most_groups(pairs: int, experts: int, group: int) -> int:
    """Groups of at most *group* pairs of one of *experts* that *pairs* can fall into."""
    distinct = min(pairs, experts)
    return distinct + (pairs - distinct) // group
