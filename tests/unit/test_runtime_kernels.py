"""Experts computed from slots: against float64, and bit for bit against transformers.

The Triton kernels run here only in Triton's interpreter:
TRITON_INTERPRET=1 pytest tests/unit/test_runtime_kernels.py, with triton installed.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations import moe  # noqa: E402

from runtime.kernels import FusedExperts, Gating, ReferenceExperts, gating_of  # noqa: E402
from runtime.kernels.banks import Banks  # noqa: E402
from runtime.kernels.fused import DECODE_TOKENS, decode_tokens  # noqa: E402
from runtime.kernels.gating import ACTIVATIONS  # noqa: E402
from runtime.kernels.prefill import run_prefill  # noqa: E402
from runtime.kernels.routes import Call  # noqa: E402
from tests.helpers_kernels import LAYOUTS, TOP_K, Placed, experts_module, routes  # noqa: E402
from traces.errors import InputError  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = {"bits": 8, "low_experts": (1, 4, 6)}


def fused(placed):
    return FusedExperts(
        placed.layout, placed.full, placed.gating, top_k=TOP_K,
        low_layout=placed.low_layout, low=placed.low,
    )  # fmt: skip


def largest(error):
    return float(error.abs().max())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_no_further_from_float64_than_transformers(kind, dtype, tokens):
    placed = Placed(experts_module(kind, dtype))
    hidden, index, weights = routes(tokens, dtype)
    exact = placed.exact(hidden, index, weights)
    theirs = moe.batched_mm_experts_forward(placed.module, hidden, index, weights)
    for out_dtype in (dtype, torch.float32):
        out = torch.full(hidden.shape, 7.0, dtype=out_dtype)
        fused(placed).run(hidden, index, weights, placed.table, out)
        floor = 1e-6 * float(exact.abs().max())
        assert largest(out - exact) <= 1.05 * max(largest(theirs - exact), floor)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_absent_experts_one_slot_and_groups(kind, bits):
    low = {"bits": bits, "low_experts": (1, 4, 6)} if bits else {}
    placed = Placed(experts_module(kind, torch.float32), absent=(2,), **low)
    hidden, index, weights = routes(7, torch.float32)
    kernels = fused(placed)
    exact = placed.exact(hidden, index, weights)
    out = torch.empty_like(hidden)
    kernels.run(hidden, index, weights, placed.table, out)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    total = torch.zeros_like(hidden)
    for slot in placed.table.tolist():
        if slot >= 0:
            kernels.run(hidden, index, weights, placed.table, out, only=slot)
            single = placed.exact(hidden, index, weights, only=slot)
            torch.testing.assert_close(out.double(), single, rtol=1e-5, atol=1e-5)
            kernels.run(hidden, index, weights, placed.table, total, only=slot, accumulate=True)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [{}, LOW], ids=["full", "low"])
def test_the_sorted_path_computes_the_same(kind, dtype, low):
    """Its grouping is plain torch, so the CPU can prove all but torch's own grouped matmul."""
    placed = Placed(experts_module(kind, dtype), absent=(2,), **low)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    hidden, index, weights = routes(33, dtype)
    for only in (-1, int(placed.table[1]), int(placed.table[5])):
        exact = placed.exact(hidden, index, weights, only=only)
        out = torch.ones(hidden.shape)
        call = Call(hidden, index, weights, placed.table, out, only, accumulate=True)
        run_prefill(banks, placed.gating, call, grouped=False)
        scale = float(exact.abs().max())
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert largest(out - 1 - exact) <= bound * scale


def test_more_slots_than_a_grouped_matmul_takes(monkeypatch):
    import runtime.kernels.prefill as prefill
    import runtime.kernels.reference as reference

    monkeypatch.setattr(prefill, "MAX_GROUPS", 5)
    monkeypatch.setattr(prefill, "RAISED", 2)
    monkeypatch.setattr(reference, "MAX_GROUPS", 5)
    placed = Placed(experts_module("concatenated", torch.float32), **LOW)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    hidden, index, weights = routes(33, torch.float32)
    exact = placed.exact(hidden, index, weights)
    out = torch.empty_like(hidden)
    call = Call(hidden, index, weights, placed.table, out)
    run_prefill(banks, placed.gating, call, grouped=True)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    kernels = ReferenceExperts(placed.layout, placed.full, placed.module, "grouped_mm",
                               low_layout=placed.low_layout, low=placed.low)  # fmt: skip
    kernels.begin(hidden, index, weights)
    kernels.add(placed.table[index])
    torch.testing.assert_close(kernels.finish().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_reference_has_the_bits_of_transformers(kind, dtype, kernel, tokens):
    placed = Placed(experts_module(kind, dtype))
    function = getattr(moe, f"{kernel}_experts_forward")
    kernels = ReferenceExperts(placed.layout, placed.full, placed.module, kernel)
    for weights_dtype in {dtype, torch.float32}:
        hidden, index, weights = routes(tokens, dtype, weights_dtype)
        whole = function(placed.module, hidden, index, weights)
        for groups in (1, 2, 4):
            kernels.begin(hidden, index, weights)
            for group in range(groups):
                slots = placed.table[index]
                kernels.add(torch.where(index % groups == group, slots, -1))
            assert torch.equal(kernels.finish(), whole)


def test_reference_leaves_out_what_was_never_added():
    placed = Placed(experts_module("gpt-oss", torch.float32), absent=(2,), **LOW)
    hidden, index, weights = routes(9, torch.float32)
    exact = placed.exact(hidden, index, weights)
    for kernel in ("batched_mm", "grouped_mm"):
        kernels = ReferenceExperts(placed.layout, placed.full, placed.module, kernel,
                                   low_layout=placed.low_layout, low=placed.low)  # fmt: skip
        kernels.begin(hidden, index, weights)
        kernels.add(placed.table[index])
        torch.testing.assert_close(kernels.finish().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("concatenated", Gating("silu")),
        ("gpt-oss", Gating("clamped_swiglu", True, True, 1.702, 7.0)),
        ("ungated", Gating("relu2", gated=False)),
    ],
)
def test_gating_is_read_off_the_module(kind, expected):
    assert gating_of(experts_module(kind, torch.bfloat16)) == expected


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_every_known_activation_is_recognised(name, gated):
    module = experts_module("concatenated" if gated else "ungated", torch.float32)
    module.act_fn = ACT2FN[name]
    gating = gating_of(module)
    assert gating.activation in ACTIVATIONS
    x = torch.linspace(-3, 3, 40)
    expected = module._apply_gate(x) if gated else module.act_fn(x)
    torch.testing.assert_close(gating.apply(x), expected)


@pytest.mark.parametrize("kind", ["concatenated", "ungated"])
def test_an_unknown_activation_is_refused(kind):
    module = experts_module(kind, torch.float32)
    module.act_fn = torch.nn.Hardswish()
    with pytest.raises(InputError, match=r"Experts: activation Hardswish is not supported"):
        gating_of(module)


def test_an_unknown_gate_is_refused():
    module = experts_module("gpt-oss", torch.float32)
    module._apply_gate = lambda x: x[..., ::2] * x[..., 1::2]
    with pytest.raises(InputError, match="GptOssExperts: activation _apply_gate"):
        gating_of(module)


def test_a_norm_after_each_expert_is_refused():
    module = experts_module("concatenated", torch.float32)
    module.has_post_expert_norm = True
    with pytest.raises(InputError, match="MixtralExperts: normalises each expert's output"):
        gating_of(module)


def test_banks_of_another_shape_are_refused():
    placed = Placed(experts_module("concatenated", torch.float32), **LOW)
    with pytest.raises(InputError, match=r"full bank is torch\.uint8"):
        Banks(placed.layout, placed.full[:, 256:].contiguous())
    with pytest.raises(InputError, match="expected contiguous slots"):
        Banks(placed.layout, placed.full[::2])
    with pytest.raises(InputError, match="low bank and low layout"):
        Banks(placed.layout, placed.full, placed.low_layout)
    with pytest.raises(InputError, match="gating is interleaved"):
        FusedExperts(placed.layout, placed.full, Gating("silu", interleaved=True), top_k=2)
    with pytest.raises(InputError, match="kernel is 'eager'"):
        ReferenceExperts(placed.layout, placed.full, placed.module, "eager")


def test_the_crossover_follows_how_often_experts_are_shared():
    # Mixtral's few large experts are soon shared by several tokens, Qwen3's hardly ever.
    mixtral = decode_tokens(352_321_536, experts=8, top_k=2)
    qwen = decode_tokens(9_437_184, experts=128, top_k=8)
    assert 4 <= mixtral <= 12
    assert qwen == DECODE_TOKENS
    assert decode_tokens(1000, experts=8, top_k=8) == DECODE_TOKENS
    assert decode_tokens(10**12, experts=2, top_k=2) == 2


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1",
)


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("cut", ["default", "split", "odd"])
def test_decode_kernels_in_the_interpreter(kind, bits, cut):
    from runtime.kernels.decode import DecodeKernels, Tiles

    tiles = {
        "default": (None, None),
        "split": (Tiles(4, 16), Tiles(8, 16, splits=3)),
        "odd": (Tiles(8, 32), Tiles(2, 16)),
    }[cut]
    low = {"bits": bits, "low_experts": (1, 4, 6)} if bits else {}
    placed = Placed(experts_module(kind, torch.bfloat16), absent=(2,), **low)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    kernels = DecodeKernels(banks, placed.gating, TOP_K, 4, *tiles)
    hidden, index, weights = routes(2, torch.bfloat16)
    for only, accumulate in ((-1, False), (int(placed.table[index[0, 0]]), True)):
        out = torch.ones(hidden.shape)
        kernels.run(hidden, index, weights, placed.table, out, only, accumulate)
        exact = placed.exact(hidden, index, weights, only=only) + accumulate
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_the_interpreter(name):
    from runtime.kernels.decode import DecodeKernels

    placed = Placed(experts_module("ungated", torch.float32))
    banks = Banks(placed.layout, placed.full)
    gating = Gating(name, gated=False)
    kernels = DecodeKernels(banks, gating, TOP_K, 1)
    hidden, index, weights = routes(1, torch.float32)
    out, plain = torch.empty_like(hidden), torch.empty_like(hidden)
    kernels.run(hidden, index, weights, placed.table, out, -1, False)
    FusedExperts(placed.layout, placed.full, gating, top_k=TOP_K).run(
        hidden, index, weights, placed.table, plain
    )
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
