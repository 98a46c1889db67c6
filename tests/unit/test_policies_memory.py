"""Predicted memory: the shape of a run, and what its activations amount to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.budget import Budget
from policies.examples import example_model
from policies.memory import (
    PIECE,
    PIECE_WEIGHT_BYTES,
    PREDICTED,
    RAISED_BYTES,
    Shape,
    TwoPrecisions,
    activations_bytes,
    predicted_bytes,
    raised_at_once,
    shape_of,
)
from policies.session import Setup, check_pool
from reports.validation.cut import Cut, cut_trace
from sim.session import Session
from tests.helpers import SAMPLES, trace_of
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import model_sizes, resize

MIB = 2**20


def played(name: str, layers: int, experts: int, top_k: int) -> ModelSpec:
    """Sizes of the published model *name* under a trace's routing."""
    routing = replace(
        example_model(layers, experts, top_k), name="routing", dense_params=0, kv_bytes_per_token=0
    )
    return resize(routing, model_sizes(name))


def prompts_of(tokens: int) -> Shape:
    """Prompts of so many tokens, nothing decoded."""
    return Shape(tokens, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "experts", "top_k", "tokens", "found_mb"),
    [
        ("qwen3-30b", 64, 8, 40, 11.5),
        ("qwen3-30b", 64, 8, 320, 86.5),
        ("olmoe", 64, 8, 40, 13.5),
    ],
)
def test_peaks_measured_on_an_h200_machine(
    sizes: str, experts: int, top_k: int, tokens: int, found_mb: float
) -> None:
    """What a replay held at its peak beside slots, dense part, cache and cuBLAS's 64 MiB.

    With experts as narrow as these that is behind the projections.
    """
    predicted = activations_bytes(played(sizes, 8, experts, top_k), prompts_of(tokens))
    assert predicted == pytest.approx(found_mb * 1e6, abs=9e6)


def test_twice_the_tokens_need_twice_the_memory() -> None:
    model = played("mixtral-8x7b", 8, 8, 2)
    nothing, once, twice = (activations_bytes(model, prompts_of(n)) for n in (0, 128, 256))
    assert nothing == 0
    assert twice == 2 * once


def test_low_copies_are_raised_a_few_at_a_time() -> None:
    assert raised_at_once(RAISED_BYTES // 5 - 1, 9) == 5
    assert raised_at_once(RAISED_BYTES // 5, 3) == 3
    assert raised_at_once(RAISED_BYTES + 1, 3) == 1


def test_raised_copies_are_held_beside_the_rows() -> None:
    """Of sixteenths of an expert as many as were used together, of whole ones one at a time."""
    model = played("olmoe", 8, 64, 8)
    for parts, together, raised in ((1, 0, 0), (1, 1, 1), (1, 9, 1), (16, 2, 2), (16, 99, 21)):
        spec = replace(
            model, intermediate=1024 // parts, expert_params=model.expert_params // parts
        )
        low = TwoPrecisions(96, 120, spec.expert_bytes_at(4), together)
        without = activations_bytes(spec, prompts_of(1))
        assert activations_bytes(spec, prompts_of(1), replace(low, low_slots=0)) == without
        each = spec.expert_bytes + spec.expert_bytes_at(4)
        found = activations_bytes(spec, prompts_of(1), low) - without
        assert raised * each <= found + MIB
        assert found <= raised * each + PIECE_WEIGHT_BYTES * min(raised * spec.expert_params, PIECE)


@pytest.mark.parametrize(
    ("batch", "cache", "found_bytes"),
    [
        (1, "25%", 7_016_355_840),
        (1, "50%", 12_648_519_680),
        (8, "25%", 6_733_128_704),
        (8, "50%", 12_365_292_544),
    ],
)
def test_mixed_raises_what_its_prompts_found_unimportant(
    batch: int, cache: str, found_bytes: int
) -> None:
    """Peaks measured on an H100, of cells in ``docs/validation``.

    To the tokens of eight prompts in one step every expert of Mixtral's is important.
    """
    with cut_trace(str(SAMPLES["coarse-8x2"]), Cut(sequences=8, max_tokens=24)) as part:
        session = Session(Setup(part, batch=batch, sizes="mixtral-8x7b"))
        memory = session.run("mixed", Budget(cache=cache))[0].memory
    # What that machine's profile (``h100-captured``) has as the workspace.
    memory["workspace_bytes"] = 69_017_856
    assert predicted_bytes(memory) == pytest.approx(found_bytes, rel=0.005)


def test_the_shape_is_that_of_the_largest_passes() -> None:
    model = example_model(1, 4, 1)
    lengths, prompts = (9, 5, 12, 3), (4, 3, 2, 3)
    trace = trace_of(model, [[[0]] * n for n in lengths], prompts)
    first, second = trace.items[:2], trace.items[2:]
    # The last sequence has a prompt and nothing else.
    assert shape_of([first, second]) == Shape(7, 2, 12)
    assert shape_of([[item] for item in trace.items]) == Shape(4, 1, 12)
    assert shape_of([second]) == Shape(5, 1, 12)
    assert Shape(4, 6, 12).tokens == 6
    assert Shape(7, 2, 12).padding_tokens(14) == 10
    assert Shape(7, 1, 12).padding_tokens(15) == 0


def test_a_result_says_what_its_memory_is_made_of() -> None:
    trace = str(SAMPLES["granular-64x8"])
    session = Session(Setup(trace, batch=8, sizes="olmoe"))
    lru, mixed = (session.run(policy, Budget(cache="25%"))[0].memory for policy in ("lru", "mixed"))
    assert lru["activations_bytes"] == activations_bytes(played("olmoe", 8, 64, 8), prompts_of(320))
    room = session.shape.sequences * session.longest * session.model.kv_bytes_per_token
    assert lru["padding_bytes"] + lru["kv_bytes"] == room
    assert predicted_bytes(lru) == sum(int(lru[name]) for name in PREDICTED)
    assert mixed["activations_bytes"] >= lru["activations_bytes"]
    assert {**mixed, "activations_bytes": 0} == {**lru, "activations_bytes": 0}


def test_a_pool_for_each_layer_needs_room_for_a_token() -> None:
    model = example_model(3, 8, 2)
    check_pool("global", 2, model, option="pool")
    check_pool("layer", 6, model, option="pool")
    with pytest.raises(InputError, match=r"^--pool layer: 5 slots are fewer.*at least 6$"):
        check_pool("layer", 5, model, option="--pool")
