"""The two banks of slots that the kernels read, and one slot's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from runtime.layout import ExpertLayout, LowLayout
from runtime.quantise import dequantise
from traces.errors import InputError


@dataclass(frozen=True, eq=False)
class Banks:
    """Slots ``0 .. full_slots - 1`` are rows of *full*, the slots above are rows of *low*.

    *full* is uint8 [full_slots, layout.stride_bytes]; *low* uint8
    [low_slots, low_layout.stride_bytes], or None like *low_layout*.
    """

    layout: ExpertLayout
    full: Tensor
    low_layout: LowLayout | None = None
    low: Tensor | None = None

    def __post_init__(self) -> None:
        _check_bank("full", self.full, self.layout.stride_bytes)
        if (self.low is None) != (self.low_layout is None):
            raise InputError("low bank and low layout: found one, expected both or neither")
        if self.low is not None and self.low_layout is not None:
            _check_bank("low", self.low, self.low_layout.stride_bytes)

    @property
    def full_slots(self) -> int:
        """Number of full-precision slots; the first low slot has this number."""
        return len(self.full)

    @property
    def low_slots(self) -> int:
        """Number of low-precision slots."""
        return 0 if self.low is None else len(self.low)

    @property
    def first(self) -> str:
        """The name of the first matrix: without a gate it is ``up_proj``."""
        names = {part.name for part in self.layout.parts}
        return "gate_up_proj" if "gate_up_proj" in names else "up_proj"

    @property
    def intermediate(self) -> int:
        """Inputs of the second matrix."""
        return self.layout.part("down_proj").shape[0 if self.layout.transposed else 1]

    @property
    def hidden(self) -> int:
        """Inputs of the first matrix."""
        return self.layout.part(self.first).shape[0 if self.layout.transposed else 1]

    @property
    def output(self) -> int:
        """Outputs of the second matrix: the hidden size again."""
        return self.layout.part("down_proj").shape[1 if self.layout.transposed else 0]

    @cached_property
    def views(self) -> Mapping[str, Tensor]:
        """Every part of all full slots, each [full_slots, *shape], in place."""
        return self.layout.views(self.full)

    @cached_property
    def edges(self) -> Tensor:
        """Behind every slot the number of the next, int32: made once, on the banks' device."""
        total = self.full_slots + self.low_slots
        return torch.arange(1, total + 1, dtype=torch.int32, device=self.full.device)

    def weights(self, slot: int) -> Mapping[str, Tensor]:
        """The parts of one *slot*: views of a full one, float32 copies of a low one."""
        if slot < self.full_slots:
            return {name: view[slot] for name, view in self.views.items()}
        row = slot - self.full_slots
        return {name: part[0] for name, part in self.raised([row], torch.float32).items()}

    def raised(self, rows: list[int], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The parts of some low *rows*, each [len(rows), *shape], copied into *dtype*."""
        assert self.low is not None
        assert self.low_layout is not None
        flat = dequantise(self.low[rows], self.low_layout, dtype)
        return {
            part.name: flat[:, part.first : part.first + prod(part.shape)].view(-1, *part.shape)
            for part in self.layout.parts
        }


def _check_bank(name: str, bank: Tensor, stride_bytes: int) -> None:
    """A bank of another shape would be read wrongly without a word."""
    if bank.dtype != torch.uint8 or bank.dim() != 2 or bank.shape[1] != stride_bytes:
        raise InputError(
            f"{name} bank is {bank.dtype} {tuple(bank.shape)}, "
            f"expected torch.uint8 (slots, {stride_bytes})"
        )
    if not bank.is_contiguous():
        raise InputError(f"{name} bank is strided {bank.stride()}, expected contiguous slots")
