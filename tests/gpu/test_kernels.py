"""The expert kernels on a GPU: right against float64, the same from run to run, captured."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from transformers.integrations import moe  # noqa: E402

from runtime.kernels import FusedExperts, ReferenceExperts  # noqa: E402
from runtime.kernels.banks import Banks  # noqa: E402
from runtime.kernels.fused import DECODE_TOKENS  # noqa: E402
from runtime.kernels.prefill import can_group, run_prefill  # noqa: E402
from runtime.kernels.routes import Call  # noqa: E402
from tests.helpers_kernels import LAYOUTS, TOP_K, Placed, experts_module, routes  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = {"low_experts": (1, 4, 6)}
#: (hidden, intermediate): odd ones, and one whose inputs take several rounds.
SIZES = [(32, 24), (256, 136), (2048, 768)]


def place(kind, dtype, size=(32, 24), **options):
    return Placed(experts_module(kind, dtype, *size, device="cuda"), **options)


def drawn(tokens, dtype, hidden=32, weights_dtype=torch.float32):
    return routes(tokens, dtype, weights_dtype, hidden, device="cuda")


def fused(placed):
    return FusedExperts(
        placed.layout, placed.full, placed.gating, top_k=TOP_K,
        low_layout=placed.low_layout, low=placed.low,
    )  # fmt: skip


def largest(error):
    return float(error.abs().max())


def rms(error):
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 33, 100])
def test_no_further_from_float64_than_transformers(kind, dtype, size, tokens):
    placed = place(kind, dtype, size)
    hidden, index, weights = drawn(tokens, dtype, size[0])
    exact = placed.exact(hidden, index, weights)
    theirs = moe.batched_mm_experts_forward(placed.module, hidden, index, weights)
    for out_dtype in (dtype, torch.float32):
        out = torch.full(hidden.shape, 7.0, dtype=out_dtype, device="cuda")
        fused(placed).run(hidden, index, weights, placed.table, out)
        floor = 1e-6 * rms(exact)
        assert rms(out - exact) <= 1.05 * max(rms(theirs - exact), floor)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_absent_experts_one_slot_and_groups(kind, bits, size, tokens):
    low = {"bits": bits, **LOW} if bits else {}
    placed = place(kind, torch.bfloat16, size, absent=(2,), **low)
    hidden, index, weights = drawn(tokens, torch.bfloat16, size[0])
    kernels = fused(placed)
    exact = placed.exact(hidden, index, weights)
    # The decode path is float32 inside; the grouped one rounds between its matmuls.
    bound = (1e-5 if tokens <= DECODE_TOKENS else 2e-2) * largest(exact)
    out = torch.empty(hidden.shape, device="cuda")
    kernels.run(hidden, index, weights, placed.table, out)
    assert largest(out - exact) <= bound
    total = torch.zeros_like(out)
    for slot in placed.table.tolist():
        if slot >= 0:
            kernels.run(hidden, index, weights, placed.table, out, only=slot)
            single = placed.exact(hidden, index, weights, only=slot)
            assert largest(out - single) <= bound
            kernels.run(hidden, index, weights, placed.table, total, only=slot, accumulate=True)
    assert largest(total - exact) <= 2 * bound


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 8])
def test_both_paths_agree(kind, bits):
    low = {"bits": bits, **LOW} if bits else {}
    placed = place(kind, torch.bfloat16, (256, 128), absent=(2,), **low)
    from runtime.kernels.decode import DecodeKernels

    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    assert can_group(banks)
    hidden, index, weights = drawn(DECODE_TOKENS, torch.bfloat16, 256)
    decode = torch.empty(hidden.shape, device="cuda")
    kernels = DecodeKernels(banks, placed.gating, TOP_K, DECODE_TOKENS)
    kernels.run(hidden, index, weights, placed.table, decode, -1, False)
    for grouped in (True, False):
        prefill = torch.empty_like(decode)
        call = Call(hidden, index, weights, placed.table, prefill)
        run_prefill(banks, placed.gating, call, grouped)
        assert largest(prefill - decode) <= 2e-2 * largest(decode)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 32])
def test_every_run_has_the_same_bits(kind, tokens):
    placed = place(kind, torch.bfloat16, (2048, 768))
    hidden, index, weights = drawn(tokens, torch.bfloat16, 2048)
    kernels = fused(placed)
    first = torch.empty_like(hidden)
    kernels.run(hidden, index, weights, placed.table, first)
    for _ in range(50):
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out)
        assert torch.equal(out, first)


def test_unaligned_inputs_are_read_rightly():
    placed = place("concatenated", torch.bfloat16)
    hidden, index, weights = drawn(2, torch.bfloat16)
    kernels = fused(placed)
    out = torch.empty(2, 32, device="cuda")
    kernels.run(hidden, index, weights, placed.table, out)
    kernels.run(hidden, index, weights, placed.table, out)
    for row in range(2):
        single = torch.empty(1, 32, device="cuda")
        part = slice(row, row + 1)
        kernels.run(hidden[part], index[part], weights[part], placed.table, single)
        assert torch.equal(single, out[part])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_decode_is_captured_and_waits_for_nothing(kind):
    placed = place(kind, torch.bfloat16, (256, 136), absent=(2,), bits=8, **LOW)
    hidden, index, weights = drawn(4, torch.bfloat16, 256)
    kernels = fused(placed)
    out = torch.empty_like(hidden)
    kernels.run(hidden, index, weights, placed.table, out)
    expected = out.clone()
    try:
        torch.cuda.set_sync_debug_mode("error")
        kernels.run(hidden, index.clone(), weights, placed.table, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.run(hidden, index, weights, placed.table, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    # Another routing and another placement reach the captured kernels through memory.
    index.copy_(index.flip(0))
    weights.copy_(weights.flip(0))
    hidden.copy_(hidden.flip(0))
    placed.table[0] = -1
    graph.replay()
    exact = placed.exact(hidden, index, weights)
    assert largest(out - exact) <= 1e-2 * largest(exact)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("size", [(64, 48), (2048, 768)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33, 300])
def test_reference_has_the_bits_of_transformers(kind, dtype, kernel, size, tokens):
    placed = place(kind, dtype, size)
    function = getattr(moe, f"{kernel}_experts_forward")
    kernels = ReferenceExperts(placed.layout, placed.full, placed.module, kernel)
    for weights_dtype in {dtype, torch.float32}:
        hidden, index, weights = drawn(tokens, dtype, size[0], weights_dtype)
        whole = function(placed.module, hidden, index, weights)
        for groups in (1, 2, 4):
            kernels.begin(hidden, index, weights)
            for group in range(groups):
                slots = placed.table[index]
                kernels.add(torch.where(index % groups == group, slots, -1))
            assert torch.equal(kernels.finish(), whole)
