"""How one expert's weights lie in memory: one block of bytes, the same on host and GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from traces.errors import InputError
from traces.model import QUANT_GROUP

#: Experts begin at multiples of this, so that every kernel may read whole vectors.
ALIGN_BYTES = 256

#: Parameters of an experts module in the order in which they are packed: matrices first.
NAMES = (
    "gate_up_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj_bias",
    "up_proj_bias",
    "down_proj_bias",
)


@dataclass(frozen=True)
class Part:
    """One matrix or bias: its name in the experts module, shape, and first element."""

    name: str
    shape: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class ExpertLayout:
    """The parts of one expert at full precision, packed without gaps.

    *transposed* matrices are [in, out] (gpt-oss) instead of [out, in]; *interleaved* ones
    alternate gate and up instead of stacking them.
    """

    dtype: torch.dtype
    parts: tuple[Part, ...]
    transposed: bool = False
    interleaved: bool = False

    @classmethod
    def of(cls, experts: Any) -> ExpertLayout:
        """The layout of a transformers experts module, whose weights may be on ``meta``."""
        parts, first = [], 0
        for name in NAMES:
            value = getattr(experts, name, None)
            if value is not None:
                shape = tuple(value.shape[1:])
                parts.append(Part(name, shape, first))
                first += prod(shape)
        if not any(part.name == "down_proj" for part in parts):
            raise InputError(
                f"{type(experts).__name__}: no stacked expert weights found, expected down_proj"
            )
        return cls(
            dtype=experts.down_proj.dtype,
            parts=tuple(parts),
            transposed=bool(experts.is_transposed),
            interleaved=not experts.is_concatenated,
        )

    @cached_property
    def params(self) -> int:
        """Weights of one expert, biases included."""
        return sum(prod(part.shape) for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Bytes that cross the link for one expert."""
        return self.params * self.dtype.itemsize

    @property
    def stride_bytes(self) -> int:
        """Bytes from one expert to the next."""
        return _aligned(self.size_bytes)

    def part(self, name: str) -> Part:
        """The part called *name*; :class:`KeyError` if this expert has none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def views(self, block: Tensor) -> Mapping[str, Tensor]:
        """Every part of all experts of *block* uint8 [n, stride_bytes], each [n, *shape]."""
        values = block.view(self.dtype)
        views = {}
        for part in self.parts:
            inner = torch.empty(part.shape, device="meta").stride()
            views[part.name] = values.as_strided(
                (len(block), *part.shape),
                (values.stride(0), *inner),
                values.storage_offset() + part.first,
            )
        return views


@dataclass(frozen=True)
class LowLayout:
    """A low-precision copy: *bits* per weight over the expert's flat weights, then scales.

    The weights of all parts, in packed order, are one vector; every
    :data:`traces.model.QUANT_GROUP` of them share one float16 scale. int8 takes a byte each;
    int4 takes half, the even element in the low four bits.
    """

    full: ExpertLayout
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"low_bits is {self.bits}, expected 4 or 8 on a real device")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights; the scales follow, aligned to their own size."""
        return 2 * -(-self.full.params * self.bits // 16)

    @property
    def scales(self) -> int:
        """Number of float16 scales."""
        return -(-self.full.params // QUANT_GROUP)

    @property
    def size_bytes(self) -> int:
        """Bytes that cross the link for one copy."""
        return self.weight_bytes + 2 * self.scales

    @property
    def stride_bytes(self) -> int:
        """Bytes from one copy to the next."""
        return _aligned(self.size_bytes)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
