"""Experts computed from slots: against float64, and bit for bit against transformers.

The Triton kernels run here only in Triton's interpreter:
TRITON_INTERPRET=1 pytest tests/unit/test_runtime_kernels.py, with triton installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations import moe  # noqa: E402

from runtime.kernels import FusedExperts, Gating, ReferenceExperts, gating_of  # noqa: E402
from runtime.kernels.banks import Banks  # noqa: E402
from runtime.kernels.gating import ACTIVATIONS  # noqa: E402
from runtime.kernels.prefill import run_prefill  # noqa: E402
from runtime.kernels.routes import Call  # noqa: E402
from runtime.layout import ExpertLayout, LowLayout  # noqa: E402
from tests.helpers_kernels import LAYOUTS, TOP_K, Placed, experts_module, routes  # noqa: E402
from traces.errors import InputError  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = {"bits": 8, "low_experts": (1, 4, 6)}


def fused(placed):
    return FusedExperts(
        placed.layout, placed.full, placed.gating, top_k=TOP_K,
        low_layout=placed.low_layout, low=placed.low,
    )  # fmt: skip


def same_bits(ours, theirs):
    """The share of values that are equal to the last bit."""
    return float((ours == theirs).double().mean())


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


def _asked(*arguments):
    raise AssertionError("the host asked the device, and had to wait")


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("most", [1, 3, 5, 1000])
def test_windows_of_slots_are_computed_without_asking_the_device(kind, most, monkeypatch):
    """Whichever windows the experts in use lie in, some of which have none."""
    monkeypatch.setattr("runtime.kernels.prefill.MAX_GROUPS", most)
    placed = Placed(experts_module(kind, torch.float32), absent=(2,))
    banks = Banks(placed.layout, placed.full)
    hidden, index, weights = routes(33, torch.float32)
    for seed in range(6):
        unseen = torch.rand(len(placed.table), generator=torch.Generator().manual_seed(seed))
        table = torch.where(unseen < seed / 6, -1, placed.table)
        out = torch.ones_like(hidden)
        call = Call(hidden, index, weights, table, out, accumulate=True)
        with monkeypatch.context() as asking:
            for name in ("tolist", "item", "cpu", "nonzero"):
                asking.setattr(torch.Tensor, name, _asked)
            run_prefill(banks, placed.gating, call, grouped=True)
        expected = sum(
            placed.exact(hidden, index, weights, only=slot) for slot in table.tolist() if slot >= 0
        )
        torch.testing.assert_close(out.double() - 1, expected, rtol=1e-4, atol=1e-4)


def test_more_slots_than_a_grouped_matmul_takes(monkeypatch):
    import runtime.kernels.prefill as prefill
    import runtime.kernels.reference as reference

    monkeypatch.setattr(prefill, "MAX_GROUPS", 5)
    monkeypatch.setattr(reference, "MAX_GROUPS", 5)
    placed = Placed(experts_module("concatenated", torch.float32), **LOW)
    monkeypatch.setattr("policies.memory.RAISED_BYTES", 2 * placed.layout.size_bytes)
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


def test_who_computes_how_many_tokens():
    """None stands for the sorted path."""
    kernels = fused(Placed(experts_module("concatenated", torch.bfloat16)))
    pairs, groups = object(), object()
    kernels._pairs, kernels._groups = pairs, groups
    assert [kernels._kernels(n) for n in (1, 2, 64, 65)] == [pairs, groups, groups, None]
    kernels._groups = None
    assert [kernels._kernels(n) for n in (1, 32, 33)] == [pairs, pairs, None]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sorted_path_rounds_where_transformers_does(kind, dtype):
    placed = Placed(experts_module(kind, dtype))
    banks = Banks(placed.layout, placed.full)
    for weights_dtype in (dtype, torch.float32):
        hidden, index, weights = routes(33, dtype, weights_dtype)
        theirs = moe.grouped_mm_experts_forward(placed.module, hidden, index, weights)
        out = torch.empty_like(hidden)
        call = Call(hidden, index, weights, placed.table, out)
        run_prefill(banks, placed.gating, call, grouped=False, rounds=True)
        assert same_bits(out, theirs) > 0.98
        run_prefill(banks, placed.gating, call, grouped=False)
        # Without a gate, the only rounding between the matmuls is the activation's.
        assert kind == "ungated" or same_bits(out, theirs) < 0.9


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton and TRITON_INTERPRET=1",
)


def cut_of(name):
    """Cuts that take every way through the kernels, for the small sizes of these tests."""
    from runtime.kernels.decode import Cut, Tiles

    def dot(n, k, splits=1):
        return Tiles(n, k, splits=splits, dot=True, stages=2)

    return {
        "default": None,
        "split": Cut(Tiles(8, 16, splits=2), Tiles(8, 16, splits=2)),
        "odd": Cut(Tiles(8, 32), Tiles(4, 16, splits=2)),
        "dot": Cut(dot(8, 16, 2), dot(8, 16)),
        "groups": Cut(dot(8, 16), dot(16, 16, 2), group=16),
        "small groups": Cut(dot(8, 16, 2), dot(16, 16), group=2),
        "narrow": Cut(Tiles(16, 16, splits=2), Tiles(32, 32, splits=2)),
        "wide dot": Cut(dot(32, 32, 2), dot(64, 64)),
        "wide": Cut(Tiles(32, 64, splits=2, low_k=32), Tiles(64, 128)),
        "wide groups": Cut(Tiles(32, 32, dot=True, low_k=128, low_stages=3), dot(64, 32), group=4),
    }[name]


CUTS = ("default", "split", "odd", "dot", "groups", "small groups")


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("cut", CUTS)
def test_decode_kernels_in_the_interpreter(kind, bits, cut):
    from runtime.kernels.decode import DecodeKernels

    low = {"bits": bits, "low_experts": (1, 4, 6)} if bits else {}
    placed = Placed(experts_module(kind, torch.bfloat16), absent=(2,), **low)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    kernels = DecodeKernels(banks, placed.gating, TOP_K, 6, cut_of(cut))
    for tokens, accumulate in ((5, False), (2, True)):
        hidden, index, weights = routes(tokens, torch.bfloat16)
        only = int(placed.table[index[0, 0]]) if accumulate else -1
        out = torch.ones(hidden.shape)
        kernels.run(hidden, index, weights, placed.table, out, only, accumulate)
        exact = placed.exact(hidden, index, weights, only=only) + accumulate
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def gathering(monkeypatch):
    """No more runs of bytes: every low-precision weight is read by itself."""
    monkeypatch.setattr("runtime.kernels.cuts.LEAST_RUN", 1 << 30)


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["narrow", "wide"])
def test_runs_of_bytes_are_raised_to_the_bits_of_single_weights(
    kind, bits, dtype, cut, monkeypatch
):
    from runtime.kernels.decode import DecodeKernels

    placed = Placed(experts_module(kind, dtype, 128, 64), absent=(2,), bits=bits,
                    low_experts=(1, 4, 6))  # fmt: skip
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    rounds = dtype != torch.float32
    hidden, index, weights = routes(2, dtype, hidden=128)
    index[1] = torch.tensor([4, 0, 6])
    outs = []
    for by_bytes in (True, False):
        kernels = DecodeKernels(banks, placed.gating, TOP_K, 2, cut_of(cut), rounds=rounds)
        assert all(told[-3] for told in (kernels._first_constants(rounds),
                   kernels._second_constants(rounds, False))) == by_bytes  # fmt: skip
        out = torch.empty(hidden.shape)
        kernels.run(hidden, index, weights, placed.table, out, -1, False)
        outs.append(out)
        gathering(monkeypatch)
    assert torch.equal(*outs)
    # The interpreter cuts bfloat16 off instead of rounding it.
    exact = placed.exact(hidden, index, weights)
    bound = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 8e-2}[dtype]
    assert largest(outs[0] - exact) <= bound * largest(exact)


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cut", ["wide dot", "wide groups"])
def test_runs_of_bytes_with_matrix_instructions(kind, bits, cut, monkeypatch):
    """Their sums may come in another order than those of single weights."""
    from runtime.kernels.decode import DecodeKernels

    placed = Placed(experts_module(kind, torch.float16, 128, 64), absent=(2,), bits=bits,
                    low_experts=(1, 4, 6))  # fmt: skip
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    hidden, index, weights = routes(2, torch.float16, hidden=128)
    index[1] = torch.tensor([4, 0, 6])
    exact = placed.exact(hidden, index, weights)
    outs = []
    for _ in range(2):
        kernels = DecodeKernels(banks, placed.gating, TOP_K, 2, cut_of(cut), rounds=True)
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out, -1, False)
        assert largest(out - exact) <= 4e-3 * largest(exact)
        outs.append(out)
        gathering(monkeypatch)
    assert same_bits(*outs) > 0.98


@interpreted
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("cut", ["default", "split", "dot", "groups"])
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32], ids=str)
def test_rounding_kernels_in_the_interpreter(kind, cut, weights_dtype):
    """float16: the interpreter cuts bfloat16 off instead of rounding, and multiplies its bits."""
    from runtime.kernels.decode import DecodeKernels

    placed = Placed(experts_module(kind, torch.float16))
    banks = Banks(placed.layout, placed.full)
    hidden, index, weights = routes(8, torch.float16, weights_dtype)
    exact = placed.exact(hidden, index, weights)
    theirs = moe.batched_mm_experts_forward(placed.module, hidden, index, weights)
    found = {}
    for rounds in (False, True):
        kernels = DecodeKernels(banks, placed.gating, TOP_K, 8, cut_of(cut), rounds=rounds)
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out, -1, False)
        assert largest(out - exact) <= 1.05 * largest(theirs - exact)
        found[rounds] = same_bits(out, theirs)
    assert found[True] > 0.98
    assert found[False] < 0.6


@interpreted
def test_rounding_kernels_raise_low_weights_into_the_dtype():
    from runtime.kernels.decode import DecodeKernels

    placed = Placed(experts_module("gpt-oss", torch.float16), **LOW)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    hidden, index, weights = routes(8, torch.float16)
    reference = ReferenceExperts(placed.layout, placed.full, placed.module, "batched_mm",
                                 low_layout=placed.low_layout, low=placed.low)  # fmt: skip
    reference.begin(hidden, index, weights)
    reference.add(placed.table[index])
    theirs = reference.finish()
    for cut in ("split", "groups"):
        kernels = DecodeKernels(banks, placed.gating, TOP_K, 8, cut_of(cut), rounds=True)
        out = torch.empty_like(hidden)
        kernels.run(hidden, index, weights, placed.table, out, -1, False)
        assert same_bits(out, theirs) > 0.98


@interpreted
@pytest.mark.parametrize(
    ("tokens", "top_k", "group"), [(1, 3, 16), (7, 3, 2), (64, 8, 16), (31, 7, 3)]
)
@pytest.mark.parametrize("only", [-1, 5])
def test_groups_of_pairs_in_the_interpreter(tokens, top_k, group, only):
    """The groups are told by a plain walk over the pairs."""
    from runtime.kernels import triton_kernels
    from runtime.kernels.decode import _most_groups, _power_of_two

    experts, pairs = 9, tokens * top_k
    draw = torch.Generator().manual_seed(pairs)
    index = torch.rand(tokens, experts, generator=draw).argsort(dim=1)[:, :top_k].contiguous()
    table = torch.randperm(experts + 3, generator=draw)[:experts].to(torch.int32)
    table[4] = -1
    expected = []
    for pair, expert in enumerate(index.view(-1).tolist()):
        slot = int(table[expert])
        if slot < 0 or only not in (-1, slot):
            continue
        room = [g for s, g in expected if s == slot and len(g) < group]
        if room:
            room[0].append(pair)
        else:
            expected.append((slot, [pair]))
    items, padded = _most_groups(pairs, experts, group), _power_of_two(pairs)
    slots = torch.full((items + 1,), 99, dtype=torch.int32)
    members = torch.full((items, group), 99, dtype=torch.int32)
    notes = torch.empty(3 * padded, dtype=torch.int32)
    triton_kernels.prepare_kernel[(1, 1, 1)](
        index, table, slots, members, notes, pairs, items, only, group, padded, min(16, padded),
        False,
    )  # fmt: skip
    assert len(expected) <= items
    assert slots.tolist() == [s for s, _ in expected] + [-1] * (items - len(expected)) + [99]
    for row, (_, mine) in zip(members.tolist(), expected, strict=False):
        assert row == mine + [-1] * (group - len(mine))


def test_groups_take_matrix_instructions():
    from runtime.kernels.cuts import Cut, Tiles

    with pytest.raises(InputError, match="group is 16 without dot, expected dot in both Tiles"):
        Cut(Tiles(8, 16, dot=True), Tiles(8, 16), group=16)


def test_runs_of_bytes_are_taken_where_groups_are_whole():
    """Of every real family's sizes; not where a row is no whole number of groups of 64."""
    from runtime.kernels.cuts import group_cut, low_reading, pair_cut

    sizes = [(2048, 768), (2048, 1408), (4096, 14336), (2880, 2880), (1024, 512)]
    for kind, (hidden, intermediate) in itertools.product(LAYOUTS, [*sizes, (32, 24), (96, 64)]):
        part = laid_out(kind, hidden, intermediate)
        gating = Gating("silu", kind != "ungated", kind == "gpt-oss")
        halves = 2 if gating.gated else 1
        cuts = (pair_cut(part, gating, 4, True), pair_cut(part, gating, 4, False),
                group_cut(part, gating))  # fmt: skip
        for cut in cuts:
            first = low_reading(part, part.first, cut.first, halves)
            second = low_reading(part, "down_proj", cut.second, 1)
            whole = ((hidden, intermediate) in sizes,) * 2
            if hidden == 96:
                # gpt-oss's biases end within a group: its scales begin within 4 bytes.
                whole = (False, kind != "gpt-oss")
            assert (first[0], second[0]) == whole, (kind, hidden, cut)
            for tiles, inputs, told in (
                (cut.first, hidden, first), (cut.second, intermediate, second)
            ):  # fmt: skip
                # No tile goes on into the inputs of another program.
                assert tiles.splits == 1 or tiles.split_inputs(inputs) % told[1] == 0


def laid_out(kind, hidden, intermediate):
    """Banks without slots of the experts of one of LAYOUTS, of any size."""
    module = experts_module(kind, torch.bfloat16, 32, 24, experts=1)
    sizes = {32: hidden, 24: intermediate, 48: 2 * intermediate}
    shapes = SimpleNamespace(is_transposed=module.is_transposed,
                             is_concatenated=module.is_concatenated)  # fmt: skip
    for name, value in module.named_parameters():
        shape = (1, *(sizes[size] for size in value.shape[1:]))
        setattr(shapes, name, torch.empty(shape, dtype=value.dtype, device="meta"))
    layout = ExpertLayout.of(shapes)
    full = torch.empty(0, layout.stride_bytes, dtype=torch.uint8)
    low = LowLayout(layout, 4)
    return Banks(layout, full, low, torch.empty(0, low.stride_bytes, dtype=torch.uint8))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_default_cuts_split_inputs_evenly(kind):
    """Every program of a projection has as much to read as the others, but for the last tile."""
    from runtime.kernels.cuts import group_cut, pair_cut

    for hidden, intermediate in ((2048, 768), (2880, 2880), (4096, 6400), (32, 24)):
        placed = Placed(experts_module(kind, torch.bfloat16, hidden, intermediate, experts=1))
        banks = Banks(placed.layout, placed.full)
        cuts = [pair_cut(banks, placed.gating, 4, rounds) for rounds in (False, True)]
        assert not cuts[0].first.dot
        assert cuts[1].first.dot == placed.layout.transposed
        for cut in (*cuts, group_cut(banks, placed.gating)):
            for tiles, inputs in ((cut.first, hidden), (cut.second, intermediate)):
                rounds = -(-inputs // tiles.block_k)
                assert rounds % tiles.splits == 0
                assert tiles.block_n & (tiles.block_n - 1) == 0
                assert not tiles.dot or tiles.block_k >= 16


@pytest.mark.parametrize(
    ("hidden", "intermediate", "transposed", "first", "second"),
    [
        (4096, 14336, False, (2, 2048, 1), (16, 256, 1)),
        (2048, 768, False, (2, 2048, 1), (32, 256, 3)),
        (2048, 1024, False, (2, 2048, 1), (8, 1024, 1)),
        (2880, 2880, True, (64, 32, 5), (64, 64, 5)),
    ],
    ids=["mixtral-8x7b", "qwen3-30b", "olmoe", "gpt-oss-20b"],
)
def test_the_cuts_that_were_fastest_on_an_h200(hidden, intermediate, transposed, first, second):
    """For one token, of those that ``expert_kernels.py --tune`` tries."""
    from runtime.kernels.cuts import pair_cut

    part = SimpleNamespace(low_layout=None, hidden=hidden, intermediate=intermediate, output=hidden)
    part.layout, part.full = SimpleNamespace(transposed=transposed), torch.empty(0)
    top_k = {14336: 2, 2880: 4}.get(intermediate, 8)
    cut = pair_cut(part, Gating("silu"), top_k, rounds=True)
    for tiles, expected in ((cut.first, first), (cut.second, second)):
        assert (tiles.block_n, tiles.block_k, tiles.splits) == expected
        assert tiles.dot == transposed


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
