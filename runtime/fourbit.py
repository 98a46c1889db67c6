"""Experts stored in four bits (MXFP4, as gpt-oss is published) turned into bfloat16."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

#: Values that share one scale, and bytes that hold them.
_GROUP, _GROUP_BYTES = 32, 16


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """The two values of every byte, as the bits of one int32 [256]; the factor of every scale.

    Asked of transformers' own unpacking, which is right but takes a second per expert: the
    low four bits come first, a scale of 127 leaves them as they are, and the byte 0x22 is
    twice the value 1.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    unpack: Any = convert_moe_packed_tensors
    every = torch.arange(256, dtype=torch.uint8)
    plain = torch.full((1, 1, 256 // _GROUP_BYTES), 127, dtype=torch.uint8)
    pairs = unpack(every.view(1, 1, -1, _GROUP_BYTES), plain, dtype=torch.bfloat16)
    ones = torch.full((1, 1, 256, _GROUP_BYTES), 0x22, dtype=torch.uint8)
    factors = unpack(ones, every.view(1, 1, 256), dtype=torch.bfloat16)
    return pairs.flatten().view(torch.int32), factors.flatten()[::_GROUP].contiguous()


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Bfloat16 weights [in, out] of *blocks* uint8 [out, in / 32, 16] and *scales* [out, in / 32].

    Every product of a four-bit value and a power of two is a bfloat16, so nothing is lost.
    The scale 255, which the format calls not a number, gives no finite weight.
    """
    pairs, factors = _tables()
    values = pairs[blocks.flatten().int()].view(torch.bfloat16).view(*scales.shape, _GROUP)
    values *= factors[scales.int()][..., None]
    return values.view(len(blocks), -1).T.contiguous()
