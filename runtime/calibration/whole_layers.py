"""What a layer takes where a whole decode step is one graph, by family."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from runtime.calibration.bench import Bench
from runtime.calibration.shapes import FIRST_STEPS, LEAST_FLOOR, Decoding, short_prompt
from runtime.calibration.stamps import GateTimes, Stamps, gate_times
from runtime.graphs import DecodeGraphs, decode_graphs
from runtime.whole_steps import WholeStep


class WholeLayer(NamedTuple):
    """One layer in a step that is one graph, and the distinct experts that it computed."""

    times: GateTimes
    experts: float


class WholeLayers(NamedTuple):
    """By family, a layer less its reads: *one_s* for one token, *several_s* for several.

    The handshake is still part of it; *handshakes_s* are those of all shapes.
    """

    one_s: dict[str, float]
    several_s: dict[str, float]
    handshakes_s: list[float]

    @classmethod
    def empty(cls) -> WholeLayers:
        """Nothing measured yet."""
        return cls({}, {}, [])

    @property
    def handshake_s(self) -> float:
        """What a gate's kernel takes: it is the same for every family."""
        return statistics.median(self.handshakes_s)

    def note(self, family: str, layer: WholeLayer, known_s: float, *, several: bool) -> None:
        """A *layer* of *family* was measured, whose reads take *known_s*."""
        handshake_s, work_s = layer.times
        floor_s = max(work_s - known_s, LEAST_FLOOR * work_s)
        (self.several_s if several else self.one_s)[family] = floor_s + handshake_s
        self.handshakes_s.append(handshake_s)

    def floors(self) -> tuple[dict[str, float], dict[str, float]]:
        """The floors of one token and of several: with :attr:`handshake_s` as long as measured.

        ``any`` is the mean of the families.
        """
        one, several = (
            {name: max(s - self.handshake_s, 0.0) for name, s in found.items()}
            for found in (self.one_s, self.several_s)
        )
        for floors in (one, several):
            if floors:
                floors["any"] = statistics.mean(floors.values())
        return one, several


def whole_graphs(model: Any) -> DecodeGraphs | None:
    """Room for steps of the offloaded *model* in one graph each; None where there are none.

    The model must not have run: the device's table of experts knows the moves from now on.
    """
    runner = model.expert_cache.runner
    if runner.engine.events:
        raise ValueError("the model has run before, expected one whose slots are empty")
    graphs = decode_graphs(runner.hook, runner.plain_forward, whole=True)
    return graphs if graphs is not None and graphs.handshake is not None else None


def whole_layer(
    model: Any, graphs: DecodeGraphs, bench: Bench, cache_tokens: int, sequences: int
) -> list[WholeLayer]:
    """What a layer of *model* takes in *graphs* for one shape, every expert held: one, or none."""
    runner, before = model.expert_cache.runner, graphs.captured
    chains, runner.graphs = runner.graphs, graphs
    try:
        prompt = short_prompt(cache_tokens)
        decoding = Decoding(model, bench, cache_tokens, sequences, prompt)
        decoding.step_s(2)
        if graphs.captured == before or not isinstance(graphs.chains[-1], WholeStep):
            return []
        engine = runner.engine
        events, accesses = engine.events, engine.accesses
        stamps = stamped(graphs, decoding.step, min(40, cache_tokens // 2))
        experts = (engine.accesses - accesses) / (engine.events - events)
    finally:
        runner.graphs = chains
    return [WholeLayer(gate_times(stamps), experts)]


def stamped(graphs: DecodeGraphs, step: Callable[[], Any], steps: int) -> Stamps:
    """The stamps of *steps* runs of *step*, each over when it returns, and replayed by *graphs*."""
    shake = graphs.handshake
    assert shake is not None
    found = []
    for _ in range(FIRST_STEPS + steps):
        step()
        found.append(shake.stamps.numpy().copy())
    return np.array(found[FIRST_STEPS:], dtype=np.int64)
