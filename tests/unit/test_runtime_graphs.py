"""Which decode steps are captured, and which make room: without a device that captures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime import graphs  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.graphs import MOST_CAPTURES, MOST_CHAINS, MOST_SHAPES, DecodeGraphs  # noqa: E402


class Chain:
    """Stands where a captured step does."""

    def __init__(self, hook: Any, forward: Any, kwargs: dict[str, Any], stream: Any) -> None:
        self.size = len(kwargs["input_ids"])

    def replay(self, kwargs: dict[str, Any], begin: Any, *, counted: bool) -> str:
        begin()
        return f"replayed {self.size}"


class Cache:
    """A static cache, as far as captures look at it."""

    is_compileable = True
    layers = ()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    monkeypatch.setattr(graphs, "Chain", Chain)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: None)
    monkeypatch.setattr(graphs, "make_capturable", lambda cache: None)
    hook: Any = SimpleNamespace(engine=SimpleNamespace(lanes=SimpleNamespace(device=None)))
    return DecodeGraphs(hook, lambda **kwargs: "ran")


def step(made: DecodeGraphs, cache: Cache, size: int) -> str:
    """One decode step of *size* sequences, as the runner runs it."""
    kwargs = {"input_ids": torch.zeros(size, 1), "past_key_values": cache}
    with torch.no_grad():
        return str(made.run(kwargs)) if made.suits(kwargs) else "ran"


def test_a_shape_runs_once_and_is_then_captured(made: DecodeGraphs) -> None:
    cache = Cache()
    assert [step(made, cache, 3) for _ in range(3)] == ["ran", "replayed 3", "replayed 3"]
    assert made.captured == 1


def test_a_capture_does_not_hide_that_a_step_was_given_up(made: DecodeGraphs) -> None:
    def check() -> None:
        raise OffloadError("event 7 of the captured decode steps: the step was given up")

    cache, handshake = Cache(), SimpleNamespace(check=check)
    made.handshake = handshake  # type: ignore[assignment]
    assert step(made, cache, 3) == "ran"
    with pytest.raises(OffloadError, match="event 7"):
        step(made, cache, 3)


def test_the_shape_that_has_waited_longest_makes_room(made: DecodeGraphs) -> None:
    cache = Cache()
    for size in range(1, MOST_CHAINS + 1):
        step(made, cache, size)
        step(made, cache, size)
    step(made, cache, 1)
    for _ in range(2):
        step(made, cache, 99)
    sizes = [chain.size for chain in made.chains]
    assert len(sizes) == MOST_CHAINS
    assert 1 in sizes
    assert 2 not in sizes


def test_many_shapes_that_take_turns_are_not_captured_for_ever(made: DecodeGraphs) -> None:
    cache, shapes = Cache(), MOST_CHAINS + 4
    for _ in range(20):
        for size in range(1, shapes + 1):
            step(made, cache, size)
    assert made.captured <= MOST_CAPTURES * shapes
    before = made.captured
    ran = [step(made, cache, size) for size in range(1, shapes + 1)]
    assert made.captured == before
    assert ran.count("ran") == shapes - MOST_CHAINS


def test_shapes_that_are_known_beforehand_are_all_kept(made: DecodeGraphs) -> None:
    cache, shapes = Cache(), MOST_CHAINS + 4
    made.expect(shapes)
    for _ in range(5):
        for size in range(1, shapes + 1):
            step(made, cache, size)
    assert made.captured == len(made.chains) == shapes
    made.expect(10_000)
    for _ in range(3):
        for size in range(1, MOST_SHAPES + 10):
            step(made, cache, size)
    assert len(made.chains) == MOST_SHAPES


def test_a_cache_that_is_gone_is_forgotten(made: DecodeGraphs) -> None:
    cache = Cache()
    for _ in range(2):
        step(made, cache, 2)
    assert made.chains
    del cache
    assert not made.chains
    assert not made._captures


def test_a_second_output_has_what_the_first_has() -> None:
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    from runtime.captured import _twin

    first = MoeCausalLMOutputWithPast(logits=torch.ones(2), past_key_values="kept")
    twin = _twin(first)
    assert type(twin) is type(first)
    assert list(twin.items()) == list(first.items())
    assert twin.to_tuple() == first.to_tuple()
    twin["logits"] = torch.zeros(2)
    twin["past_key_values"] = None
    assert bool(first.logits.all())
    assert not bool(twin.logits.any())
    assert twin.loss is None
    assert first["past_key_values"] == "kept"
