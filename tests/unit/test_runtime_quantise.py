"""Quantised experts: how far a weight may be off, and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

from runtime import quantise as module  # noqa: E402
from runtime.layout import ExpertLayout, LowLayout, Part  # noqa: E402
from runtime.quantise import dequantise, quantise  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.model import QUANT_GROUP  # noqa: E402

SIZES = (1, 2, 63, 64, 65, 127, 128, 1000, 4097)


def low_layout(params, bits, dtype=torch.float32):
    return LowLayout(ExpertLayout(dtype, (Part("down_proj", (params, 1), 0),)), bits)


def block_of(flat, low):
    """A bank of one row: padding after the copy must not matter."""
    block = torch.full((1, low.stride_bytes), 255, dtype=torch.uint8)
    block[0, : low.size_bytes] = quantise(flat, low)
    return block


def scales_of(block, low):
    return block[0, low.weight_bytes : low.size_bytes].clone().view(torch.float16).float()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("params", SIZES)
@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-3, 1.0, 1e4])
def test_no_weight_is_off_by_more_than_half_a_step(bits, params, magnitude):
    torch.manual_seed(params)
    flat = torch.randn(params) * magnitude
    low = low_layout(params, bits)
    block = block_of(flat, low)
    (found,) = dequantise(block, low, torch.float32)
    steps = scales_of(block, low).repeat_interleave(QUANT_GROUP)[:params]
    assert ((found - flat).abs() <= 0.5001 * steps).all()
    # The steps are as fine as the bits allow, down to the smallest float16.
    largest = torch.nn.functional.pad(flat.abs(), (0, -params % QUANT_GROUP))
    finest = largest.view(-1, QUANT_GROUP).amax(dim=1) / (2 ** (bits - 1) - 1)
    assert (scales_of(block, low) <= finest * 1.001 + 2.0**-24).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("params", SIZES)
def test_multiples_of_the_scale_come_back_exactly(bits, params):
    most = 2 ** (bits - 1) - 1
    torch.manual_seed(params)
    steps = torch.randint(-most, most + 1, (params,))
    # Every group holds its largest step, so that its scale is the one meant.
    steps[::QUANT_GROUP] = most
    flat = steps * 0.25
    low = low_layout(params, bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (found,) = dequantise(block_of(flat, low), low, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.float(), flat)


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_groups_stay_zero_beside_large_ones(bits):
    flat = torch.zeros(3 * QUANT_GROUP)
    flat[QUANT_GROUP : 2 * QUANT_GROUP] = 50.0
    low = low_layout(len(flat), bits)
    (found,) = dequantise(block_of(flat, low), low, torch.float32)
    assert (found[:QUANT_GROUP] == 0).all()
    assert (found[2 * QUANT_GROUP :] == 0).all()
    assert (found[QUANT_GROUP : 2 * QUANT_GROUP] - 50).abs().max() < 0.05


def test_int4_keeps_the_even_weight_in_the_low_bits():
    low = low_layout(QUANT_GROUP, 4)
    flat = torch.zeros(QUANT_GROUP)
    flat[:4] = torch.tensor([7.0, -1.0, -7.0, 2.0])
    assert quantise(flat, low)[:2].tolist() == [0xF7, 0x29]


@pytest.mark.parametrize("bits", [8, 4])
def test_chunks_make_no_difference(bits, monkeypatch):
    torch.manual_seed(0)
    flat = torch.randn(5 * QUANT_GROUP + 3)
    low = low_layout(len(flat), bits)
    whole = quantise(flat, low)
    found = dequantise(block_of(flat, low), low, torch.float32)
    monkeypatch.setattr(module, "PIECE", 2 * QUANT_GROUP)
    assert torch.equal(quantise(flat, low), whole)
    assert torch.equal(dequantise(block_of(flat, low), low, torch.float32), found)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_copy_can_be_written_where_it_belongs(bits):
    """Worked out on another device, every byte of *out* is that of the copy."""
    flat = torch.randn(3 * QUANT_GROUP + 1)
    low = low_layout(len(flat), bits)
    out = torch.full((low.size_bytes,), 0xAB, dtype=torch.uint8)
    assert quantise(flat, low, device=torch.device("cpu"), out=out) is out
    assert torch.equal(out, quantise(flat, low))


def test_several_copies_at_once():
    torch.manual_seed(0)
    low = low_layout(130, 4)
    flats = [torch.randn(130) for _ in range(3)]
    blocks = torch.cat([block_of(flat, low) for flat in flats])
    found = dequantise(blocks, low, torch.float32)
    for row, flat in zip(found, flats, strict=True):
        assert torch.equal(row, dequantise(block_of(flat, low), low, torch.float32)[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", [0, 70, 129])
def test_weights_without_a_scale_are_refused(bits, bad, where):
    flat = torch.ones(130)
    flat[where] = bad
    with pytest.raises(InputError, match=r"as large as 1e\+30" if bad == 1e30 else "not finite"):
        quantise(flat, low_layout(130, bits))


def test_an_expert_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"\(7,\), expected 8 weights"):
        quantise(torch.ones(7), low_layout(8, 8))
