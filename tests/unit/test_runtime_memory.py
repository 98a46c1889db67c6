"""Predicted activations against tensors counted as they live, in kernels and in whole runs."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.kernels.fused as fused  # noqa: E402
import runtime.quantise as quantise  # noqa: E402
from policies.budget import Budget  # noqa: E402
from policies.memory import (  # noqa: E402
    PIECE_WEIGHT_BYTES,
    Shape,
    TwoPrecisions,
    activations_bytes,
    predicted_bytes,
)
from policies.session import Setup  # noqa: E402
from runtime.kernels.banks import Banks  # noqa: E402
from runtime.kernels.prefill import run_prefill  # noqa: E402
from runtime.kernels.routes import Call  # noqa: E402
from runtime.layout import LowLayout  # noqa: E402
from runtime.session import ReplaySession  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from tests.helpers_kernels import EXPERTS, TOP_K, Placed, experts_module, routes  # noqa: E402
from tests.helpers_memory import Alive  # noqa: E402
from traces.model import ModelSpec  # noqa: E402
from traces.store import write_trace  # noqa: E402
from traces.synth import SynthSettings, synthesise  # noqa: E402

BF16 = torch.bfloat16


def spec_of(placed, hidden, intermediate, layers=1, kv_bytes=0):
    params = placed if isinstance(placed, int) else placed.layout.params
    return ModelSpec("counted", layers, EXPERTS, TOP_K, hidden, intermediate, params, 0, kv_bytes)


def counted(placed, hidden, tokens, weights_dtype=BF16):
    """Peak bytes of one prefill of a layer's experts, what surrounds them included."""
    states, index, weights = routes(tokens, BF16, weights_dtype, hidden)
    banks = Banks(placed.layout, placed.full, placed.low_layout, placed.low)
    with Alive() as alive:
        residual, normed = states.clone(), states.clone()
        out = torch.empty(states.shape)
        call = Call(normed, index, weights, placed.table, out)
        run_prefill(banks, placed.gating, call, grouped=True, rounds=True)
    assert out.isfinite().all()
    assert len(residual) == tokens
    return alive.peak_bytes


@pytest.mark.parametrize("kind", ["concatenated", "gpt-oss", "ungated"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 32), (64, 512)])
@pytest.mark.parametrize("weights_dtype", [BF16, torch.float32], ids=str)
def test_the_experts_of_a_prompt(kind, hidden, intermediate, weights_dtype):
    """Wide experts hold most between their projections, narrow ones behind them.

    Some families' gates answer in float32, which makes no difference.
    """
    placed = Placed(experts_module(kind, BF16, hidden, intermediate))
    found = counted(placed, hidden, 96, weights_dtype)
    predicted = activations_bytes(spec_of(placed, hidden, intermediate), Shape(96, 0, 0))
    assert predicted == pytest.approx(found, rel=0.03)


def test_low_copies_that_are_raised():
    """Where raised copies weigh more than the rows, they make the peak."""
    hidden, intermediate, low = 128, 256, (1, 4, 6)
    module = experts_module("concatenated", BF16, hidden, intermediate)
    placed = Placed(module, bits=4, low_experts=low)
    spec = spec_of(placed, hidden, intermediate)
    two = TwoPrecisions(EXPERTS - len(low), len(low), spec.expert_bytes_at(4), together=len(low))
    predicted = activations_bytes(spec, Shape(24, 0, 0), two)
    assert predicted == pytest.approx(counted(placed, hidden, 24), rel=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_raising_holds_one_piece_beside_the_result(bits, monkeypatch):
    placed = Placed(experts_module("concatenated", BF16), bits=bits, low_experts=(0, 1))
    params, low = placed.layout.params, placed.low_layout
    for piece in (64, 512):
        monkeypatch.setattr(quantise, "PIECE", piece)
        with Alive() as alive:
            quantise.dequantise(placed.low, low, BF16)
        most = len(placed.low) * params * 2 + PIECE_WEIGHT_BYTES * piece + 4 * len(placed.low) * 64
        assert alive.peak_bytes <= most
    assert most < len(placed.low) * params * 4


def test_making_low_copies_holds_pieces_only(monkeypatch):
    module = experts_module("concatenated", BF16)
    layout = Placed(module).layout
    store = HostStore(1, EXPERTS, layout, pin=False)
    store.fill(
        (0, id, {part.name: getattr(module, part.name)[id] for part in layout.parts})
        for id in range(EXPERTS)
    )
    monkeypatch.setattr(quantise, "PIECE", 128)
    with Alive() as alive:
        store.add_low(LowLayout(layout, 4), torch.device("cpu"))
    # The store's own blocks are no tensors of torch's making.
    assert 0 < alive.peak_bytes < 16 * 128
    store.close()


@pytest.mark.parametrize("batch", [1, 4])
def test_a_whole_replay(tmp_path, monkeypatch, batch):
    """With the GPU's way to run prompts; the cache's padding is there, and nothing unforeseen."""
    monkeypatch.setattr(fused, "run_plain", partial(run_prefill, grouped=True, rounds=True))
    trace, hidden = tmp_path / "long.parquet", 256
    spec = spec_of(3 * hidden * 64, hidden, 64, layers=2, kv_bytes=2 * 2 * 128 * 2)
    settings = SynthSettings(
        layers=2, experts=EXPERTS, top_k=TOP_K, sequences=4, prompt=(40, 60), decode=(2, 6), seed=3
    )
    write_trace(trace, spec, synthesise(settings), source="drawn", license="none")
    session = ReplaySession(Setup(str(trace), batch=batch), device="cpu", compute="fused")
    session.open()
    with Alive() as alive:
        result, _, measured = session.run("lru", Budget(slots=12))
    session.close()
    memory = result.memory
    assert measured.gpu_predicted_bytes == predicted_bytes(memory)
    # The dense part was there before.
    beyond = alive.peak_bytes - memory["slots_bytes"] - memory["kv_bytes"]
    foreseen = memory["padding_bytes"] + memory["activations_bytes"]
    assert foreseen == pytest.approx(beyond, rel=0.1)
