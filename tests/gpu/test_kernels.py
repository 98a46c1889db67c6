"""The expert kernels on a GPU: right against float64, the same from run to run, captured."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from transformers.integrations import moe  # noqa: E402

from runtime.kernels import FusedExperts, ReferenceExperts  # noqa: E402
from runtime.kernels.banks import Banks  # noqa: E402
from runtime.kernels.fused import DECODE_TOKENS, PAIR_TOKENS  # noqa: E402
from runtime.kernels.prefill import can_group, run_prefill  # noqa: E402
from runtime.kernels.routes import Call  # noqa: E402
from runtime.kernels.triton_low import by_bytes, gathered  # noqa: E402
from tests.helpers_kernels import LAYOUTS, TOP_K, Placed, experts_module, routes  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOW = {"low_experts": (1, 4, 6)}
#: (hidden, intermediate): odd ones, of whole groups of 64, and of inputs that take several rounds.
SMALL, ODD, EVEN, REAL = (32, 24), (256, 136), (256, 192), (2048, 768)

#: Compiling takes most of the time here, so of kind, dtype and size every two meet, not every
#: three; and the tests share what they compile.
CASES = [
    ("concatenated", torch.float32, SMALL),
    ("concatenated", torch.bfloat16, ODD),
    ("concatenated", torch.float16, REAL),
    ("gpt-oss", torch.float32, ODD),
    ("gpt-oss", torch.bfloat16, REAL),
    ("gpt-oss", torch.float16, SMALL),
    ("ungated", torch.float32, REAL),
    ("ungated", torch.bfloat16, SMALL),
    ("ungated", torch.float16, ODD),
]
HALVES = [case for case in CASES if case[1] != torch.float32]

#: The same of kind, bits of the low-precision experts and size: mostly of whole groups of 64,
#: which are read by runs of bytes.
LOW_CASES = [
    ("concatenated", 0, ODD),
    ("concatenated", 8, REAL),
    ("concatenated", 4, EVEN),
    ("gpt-oss", 0, REAL),
    ("gpt-oss", 8, EVEN),
    ("gpt-oss", 4, REAL),
    ("ungated", 0, SMALL),
    ("ungated", 8, ODD),
    ("ungated", 4, REAL),
]
#: Of others, read one by one.
SINGLE_CASES = [("concatenated", 4, SMALL), ("gpt-oss", 8, ODD)]

#: Outputs over which errors are compared at least: with fewer, the few that a sum of another
#: order rounds to the other side can outweigh all others.
OUTPUTS = 16384


def place(kind, dtype, size=(32, 24), **options):
    return Placed(experts_module(kind, dtype, *size, device="cuda"), **options)


def drawn(tokens, dtype, hidden=32, weights_dtype=torch.float32):
    return routes(tokens, dtype, weights_dtype, hidden, device="cuda")


def fused(placed, rounds=None):
    return FusedExperts(
        placed.layout, placed.full, placed.gating, top_k=TOP_K,
        low_layout=placed.low_layout, low=placed.low, rounds=rounds,
    )  # fmt: skip


def both_kinds(banks, gating):
    """The decode kernels of pairs, and those of experts with all their tokens."""
    from runtime.kernels.decode import DecodeKernels, group_cut, pair_cut

    return [
        DecodeKernels(banks, gating, TOP_K, DECODE_TOKENS, cut, rounds=True)
        for cut in (pair_cut(banks, gating, TOP_K, rounds=True), group_cut(banks, gating))
    ]


def same_bits(ours, theirs):
    """The share of values that are equal to the last bit."""
    return float((ours == theirs).double().mean())


def largest(error):
    return float(error.abs().max())


def rms(error):
    return float(error.double().square().mean().sqrt())


def check_errors(kind, dtype, size, rounds, counts, out_dtype):
    """Calls of so many tokens err, over many outputs, no more than transformers' kernel."""
    placed = place(kind, dtype, size)
    rows = max(*counts, OUTPUTS // size[0])
    hidden, index, weights = drawn(rows, dtype, size[0])
    exact = placed.exact(hidden, index, weights)
    theirs = moe.batched_mm_experts_forward(placed.module, hidden, index, weights)
    kernels = fused(placed, rounds)
    for tokens in counts:
        out = torch.full(hidden.shape, 7.0, dtype=out_dtype, device="cuda")
        whole = slice(0, rows // tokens * tokens)
        for first in range(0, whole.stop, tokens):
            some = slice(first, first + tokens)
            # Clones are aligned, as what a gate answers is.
            given = (tensor[some].clone() for tensor in (hidden, index, weights))
            kernels.run(*given, placed.table, out[some])
        ours, others = (rms((found - exact)[whole]) for found in (out, theirs))
        # Pooled like this, sums of another order change the third digit after the point at most;
        # one rounding more makes it 1.01 to 1.04, cutting off instead of rounding 1.15.
        bound = 1.05 if dtype == torch.float32 else 1.02
        assert ours <= bound * max(others, 1e-6 * rms(exact)), (tokens, ours / others)


@pytest.mark.parametrize(("kind", "dtype", "size"), CASES, ids=str)
def test_no_further_from_float64_than_transformers(kind, dtype, size):
    counts = (1, 2, 8, DECODE_TOKENS, DECODE_TOKENS + 1, 100)
    check_errors(kind, dtype, size, None, counts, dtype)


@pytest.mark.parametrize(("kind", "dtype", "size"), HALVES, ids=str)
def test_unrounded_sums_are_no_further_from_float64(kind, dtype, size):
    check_errors(kind, dtype, size, False, (1, 8, PAIR_TOKENS + 1), torch.float32)


@pytest.mark.parametrize(("kind", "dtype", "size"), HALVES, ids=str)
def test_rounded_sums_have_nearly_all_bits_of_transformers(kind, dtype, size):
    """Those that differ are float32 sums of another order, on the other side of a rounding."""
    placed = place(kind, dtype, size)
    banks = Banks(placed.layout, placed.full)
    for kernels in both_kinds(banks, placed.gating):
        for tokens, weights_dtype in ((1, dtype), (17, dtype), (2, torch.float32), (64, dtype)):
            hidden, index, weights = drawn(tokens, dtype, size[0], weights_dtype)
            theirs = moe.batched_mm_experts_forward(placed.module, hidden, index, weights)
            out = torch.empty_like(hidden)
            kernels.run(hidden, index, weights, placed.table, out, -1, False)
            assert same_bits(out, theirs) > 0.8, (tokens, weights_dtype)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rounded_prefill_has_nearly_all_bits_of_transformers(kind):
    for size in (SMALL, ODD, REAL):
        placed = place(kind, torch.bfloat16, size)
        hidden, index, weights = drawn(100, torch.bfloat16, size[0], torch.bfloat16)
        theirs = moe.grouped_mm_experts_forward(placed.module, hidden, index, weights)
        out = torch.empty_like(hidden)
        fused(placed).run(hidden, index, weights, placed.table, out)
        assert same_bits(out, theirs) > 0.9, size


@pytest.mark.parametrize(
    ("kind", "bits", "size", "rounds"),
    [(*case, None) for case in LOW_CASES + SINGLE_CASES]
    + [(*case, False) for case in LOW_CASES[1::3]],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 7, 40, 70])
def test_absent_experts_one_slot_and_groups(kind, bits, size, tokens, rounds):
    low = {"bits": bits, **LOW} if bits else {}
    placed = place(kind, torch.bfloat16, size, absent=(2,), **low)
    hidden, index, weights = drawn(tokens, torch.bfloat16, size[0])
    kernels = fused(placed, rounds)
    exact = placed.exact(hidden, index, weights)
    # Without rounding the decode path is float32 inside; matmuls of many tokens never are.
    inside = rounds is False and tokens <= PAIR_TOKENS
    bound = (1e-5 if inside else 3e-2) * largest(exact)
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


@pytest.mark.parametrize(("kind", "bits", "size"), LOW_CASES, ids=str)
def test_both_paths_agree(kind, bits, size):
    low = {"bits": bits, **LOW} if bits else {}
    placed = place(kind, torch.bfloat16, size, absent=(2,), **low)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    assert can_group(banks)
    hidden, index, weights = drawn(DECODE_TOKENS, torch.bfloat16, size[0])
    decode = torch.empty(hidden.shape, device="cuda")
    for kernels in both_kinds(banks, placed.gating):
        kernels.run(hidden, index, weights, placed.table, decode, -1, False)
        for grouped in (True, False):
            prefill = torch.empty_like(decode)
            call = Call(hidden, index, weights, placed.table, prefill)
            run_prefill(banks, placed.gating, call, grouped, rounds=True)
            assert largest(prefill - decode) <= 2e-2 * largest(decode)


@triton.jit
def raise_tile(
    low, out, begin, DTYPE: tl.constexpr, WIDE: tl.constexpr, RUNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    BITS: tl.constexpr, STRIDE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """out float32 [ROWS, BLOCK] = a tile of low row 1, by runs of bytes or one by one."""
    row = tl.arange(0, ROWS)
    mask = row < ROWS - 1
    inner = begin + tl.arange(0, BLOCK)
    slot = tl.program_id(0).to(tl.int64) + 1
    if RUNS:
        tile = by_bytes(low, slot, row, mask, begin, DTYPE, WIDE, BLOCK, WIDTH, FIRST, BITS,
                        STRIDE, SCALES)  # fmt: skip
    else:
        place = FIRST + row[:, None] * WIDTH + inner[None, :]
        inside = mask[:, None] & (inner < WIDTH)[None, :]
        tile = gathered(low, slot, place, inside, BITS, STRIDE, SCALES).to(DTYPE)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, tile.to(tl.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(tl.bfloat16, False), (tl.bfloat16, True), (tl.float16, True), (tl.float32, False)],
    ids=str,
)
@pytest.mark.parametrize("block", [16, 64, 256])
def test_runs_of_bytes_are_raised_to_the_values_of_single_weights(bits, dtype, wide, block):
    rows, width, first = 8, 320, 128
    params = first + rows * width
    scales, count = params * bits // 8, params // 64
    stride = -(-(scales + 2 * count) // 256) * 256
    torch.manual_seed(bits)
    low = torch.randint(0, 256, (2, stride), dtype=torch.uint8, device="cuda")
    # Subnormal scales too.
    drawn_scales = torch.rand(2, count, device="cuda").pow(8) * 0.1
    low[:, scales : scales + 2 * count] = drawn_scales.half().view(torch.uint8)
    for begin in range(0, width, block):
        tiles = [torch.full((rows, block), 7.0, device="cuda") for _ in range(2)]
        for runs, tile in zip((True, False), tiles, strict=True):
            raise_tile[(1,)](low, tile, begin, dtype, wide, runs, rows, block, width, first,
                             bits, stride, scales)  # fmt: skip
        assert tiles[0].abs().max() > 0
        # Equal but for the sign of zeros, which no sum can tell.
        assert torch.equal(*tiles), begin


@pytest.mark.parametrize(
    ("kind", "way"),
    [("concatenated", 0), ("concatenated", 1), ("gpt-oss", 0), ("ungated", 1)],
    ids=["one-pairs", "one-groups", "gpt-oss-pairs", "ungated-groups"],
)
def test_calls_that_overlap_leave_each_other_alone(kind, way):
    """Each call's kernels begin while the ones before end, and all share their scratch."""
    from runtime.kernels.decode import DecodeKernels

    placed = place(kind, torch.bfloat16, REAL)
    banks = Banks(placed.layout, placed.full)
    kernels = both_kinds(banks, placed.gating)[way]
    given = [drawn(tokens, torch.bfloat16, 2048) for tokens in (1, 64, 3, 17)]
    serial = DecodeKernels(banks, placed.gating, TOP_K, DECODE_TOKENS,
                           replace(kernels._cut, overlap=False), rounds=True)  # fmt: skip
    expected = [torch.empty_like(hidden) for hidden, _, _ in given]
    outs = [torch.empty_like(out) for out in expected]
    for call, out in zip(given, expected, strict=True):
        serial.run(*call, placed.table, out, -1, False)
        torch.cuda.synchronize()

    def run_all():
        for call, out in zip(given, outs, strict=True):
            kernels.run(*call, placed.table, out, -1, False)

    run_all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run_all()
    for _ in range(10):
        for out in outs:
            out.zero_()
        graph.replay()
        run_all()
        for out, right in zip(outs, expected, strict=True):
            assert torch.equal(out, right)


def test_an_expert_of_every_token_takes_several_groups():
    placed = place("concatenated", torch.bfloat16, ODD)
    banks = Banks(placed.layout, placed.full)
    hidden, index, weights = drawn(DECODE_TOKENS, torch.bfloat16, ODD[0])
    index[:] = torch.tensor([5, 2, 7], device="cuda")
    exact = placed.exact(hidden, index, weights)
    for kernels in both_kinds(banks, placed.gating):
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out, -1, False)
        assert largest(out - exact) <= 2e-2 * largest(exact)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_every_run_has_the_same_bits(kind, tokens):
    placed = place(kind, torch.bfloat16, REAL)
    hidden, index, weights = drawn(tokens, torch.bfloat16, 2048)
    kernels = fused(placed)
    first = torch.empty_like(hidden)
    kernels.run(hidden, index, weights, placed.table, first)
    for _ in range(50):
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out)
        assert torch.equal(out, first)


def test_unaligned_inputs_are_read_rightly():
    placed = place("concatenated", torch.bfloat16, ODD)
    hidden, index, weights = drawn(4, torch.bfloat16, ODD[0])
    kernels = fused(placed)
    for tokens in (1, 2):
        # Three int64 a row: the second row begins in the middle of a vector.
        part = hidden[1 : 1 + tokens], index[1 : 1 + tokens], weights[1 : 1 + tokens]
        assert part[1].data_ptr() % 16
        out = torch.empty(tokens, ODD[0], device="cuda")
        aligned = torch.empty_like(out)
        kernels.run(*part, placed.table, out)
        kernels.run(*(tensor.clone() for tensor in part), placed.table, aligned)
        assert torch.equal(out, aligned)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("kind", "bits", "size"), LOW_CASES[1::3], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_decode_is_captured_and_waits_for_nothing(kind, bits, size, tokens):
    placed = place(kind, torch.bfloat16, size, absent=(2,), bits=bits, **LOW)
    hidden, index, weights = drawn(tokens, torch.bfloat16, size[0])
    kernels = fused(placed)
    out = torch.empty(hidden.shape, device="cuda")
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
    assert largest(out - exact) <= 2e-2 * largest(exact)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    ("size", "tokens"), [((64, 48), 1), ((64, 48), 33), ((64, 48), 300), (REAL, 2), (REAL, 33)]
)
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
