"""int8 and int4 copies of an expert: symmetric, one float16 scale per 64 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.memory import PIECE
from runtime.layout import LowLayout
from traces.errors import InputError
from traces.model import QUANT_GROUP

#: The largest and the smallest positive float16.
MAX_SCALE = float(torch.finfo(torch.float16).max)
MIN_SCALE = 2.0**-24


def quantise(
    flat: Tensor,
    low: LowLayout,
    *,
    device: torch.device | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The low-precision copy uint8 [low.size_bytes] of one expert's weights *flat* [params].

    Each weight becomes the nearest multiple of its group's scale, and is off by at most half
    of it; a group of zeros stays exactly zero. Weights that are not finite, or too large for
    a float16 scale, are an :class:`InputError`. The copy is *out*, if given, else it lies
    beside *flat*; it is worked out on *device* (where *flat* lies by default), which never
    holds more than one piece of the expert.
    """
    params = low.full.params
    if flat.shape != (params,):
        raise InputError(f"expert of shape {tuple(flat.shape)}, expected {params} weights")
    block = out
    if block is None:
        block = torch.empty(low.size_bytes, dtype=torch.uint8, device=flat.device)
    # The bytes that align the scales belong to no weight.
    block[-(-params * low.bits // 8) : low.weight_bytes] = 0
    scales = block[low.weight_bytes :].view(torch.float16)
    for first in range(0, params, PIECE):
        piece = flat[first : first + PIECE].to(device or flat.device)
        values, scale = _steps(piece, 2 ** (low.bits - 1) - 1)
        scales[first // QUANT_GROUP :][: len(scale)] = scale
        packed = _pack(values, low.bits)
        start = first * low.bits // 8
        block[start : start + len(packed)] = packed
    return block


def dequantise(block: Tensor, low: LowLayout, dtype: torch.dtype) -> Tensor:
    """The weights [n, params] in *dtype* of *n* copies, *block* uint8 [n, >= low.size_bytes].

    Raised :data:`policies.memory.PIECE` weights at a time, so that hardly more than the result
    is held.
    """
    count, params = len(block), low.full.params
    out = torch.empty(count, params, dtype=dtype, device=block.device)
    step = max(PIECE // max(count, 1) // QUANT_GROUP, 1) * QUANT_GROUP
    for first in range(0, params, step):
        _raise_piece(block, low, out[:, first : first + step], first)
    return out


def _raise_piece(block: Tensor, low: LowLayout, out: Tensor, first: int) -> None:
    """Weights *first*, which begins a group, and on of the copies *block* into *out* [n, m]."""
    count, wanted = out.shape
    begin, end = first * low.bits // 8, -(-(first + wanted) * low.bits // 8)
    values = _unpack(block[:, begin:end], low.bits)[:, :wanted]
    begin = low.weight_bytes + 2 * (first // QUANT_GROUP)
    groups = -(-wanted // QUANT_GROUP)
    scales = block[:, begin : begin + 2 * groups].contiguous().view(torch.float16)
    whole = wanted // QUANT_GROUP * QUANT_GROUP
    if whole:
        grouped = values[:, :whole].reshape(count, -1, QUANT_GROUP).float()
        grouped *= scales[:, : whole // QUANT_GROUP, None].float()
        out[:, :whole] = grouped.view(count, whole)
    if whole < wanted:
        out[:, whole:] = values[:, whole:].float() * scales[:, -1:].float()


def _steps(flat: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """int8 [n] steps from ``-most`` to *most*, and their float16 scales, one per group."""
    groups = -(-len(flat) // QUANT_GROUP)
    padded = torch.nn.functional.pad(flat.float(), (0, groups * QUANT_GROUP - len(flat)))
    grouped = padded.view(groups, QUANT_GROUP)
    largest = grouped.abs().amax(dim=1)
    scale = _scales(largest, most)
    # A zero scale means a group of zeros: any divisor does.
    divisor = torch.where(scale > 0, scale, 1).float()[:, None]
    steps = (grouped / divisor).round_().clamp_(-most, most)
    return steps.to(torch.int8).view(-1)[: len(flat)], scale


def _scales(largest: Tensor, most: int) -> Tensor:
    """float16 scales [groups] with which the *largest* magnitudes [groups] fit *most* steps.

    A scale rounded down so far that clamping would cost more than half a step (only where
    float16 is subnormal) is taken one float16 up.
    """
    top = float(largest.max()) if len(largest) else 0.0
    if not top <= MAX_SCALE * most:
        found = "not finite" if not torch.isfinite(largest).all() else f"as large as {top:g}"
        raise InputError(
            f"cannot quantise expert: weights are {found}, expected at most {MAX_SCALE * most:g}"
        )
    scale = (largest / most).to(torch.float16)
    short = largest > (most + 0.5) * scale.float()
    return torch.where(short, (scale.float() + MIN_SCALE).to(torch.float16), scale)


def _pack(steps: Tensor, bits: int) -> Tensor:
    """int8 steps [n] as bytes uint8; int4 takes two's complement, the even step low."""
    if bits == 8:
        return steps.view(torch.uint8)
    if len(steps) % 2:
        steps = torch.nn.functional.pad(steps, (0, 1))
    pairs = steps.view(torch.uint8).view(-1, 2) & 15
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The int8 steps [n, weights] of bytes uint8 [n, bytes], padding included."""
    if bits == 8:
        return packed.contiguous().view(torch.int8)
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return (pairs ^ 8).view(torch.int8) - 8
