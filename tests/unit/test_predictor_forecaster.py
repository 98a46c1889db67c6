"""The forecaster ``routing-path``: it replays a file, and only for the trace it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from policies.base import Context
from policies.batching import Batches
from policies.examples import example_trace
from policies.forecasters.routing_path import RoutingPath
from policies.registry import FORECASTERS
from policies.routing import Routing
from policies.sidecar import quantised, read_sidecar, trace_fingerprint, write_sidecar
from policies.testing import ForecasterContract
from tests.helpers import context_of, replay
from traces.errors import InputError
from traces.trace import MemoryTrace

WINDOWS = (1, 4)


def sidecar_of(
    path: Path, trace: MemoryTrace, *, windows: tuple[int, ...] = WINDOWS, width: int = 3
) -> Path:
    """Random forecasts for *trace*, as a predictor would leave them."""
    model, rng = trace.model, np.random.default_rng(5)
    count = sum(map(len, trace.items))
    chances = rng.random((count, model.layers, model.experts))
    experts = np.argsort(-chances, axis=-1)[..., : min(width, model.experts)]
    header = {
        "model": {k: getattr(model, k) for k in ("name", "layers", "experts", "top_k")},
        "trace": {"name": trace.name, "fingerprint": trace_fingerprint(model, trace.items)},
        "predictor": {"name": "none", "fingerprint": "0"},
        "windows": list(windows),
    }
    shape = (count, len(windows), model.layers, model.experts)
    arrays = {
        "sequences": np.array([s.id for s in trace.items], np.int32),
        "starts": np.append(0, np.cumsum([len(s) for s in trace.items])).astype(np.int64),
        "first_positions": np.array([s.positions[0] for s in trace.items], np.int32),
        "tokens": np.concatenate([s.tokens for s in trace.items]).astype(np.int32),
        "experts": experts.astype(np.int16),
        "scores": quantised(np.take_along_axis(chances, experts, axis=-1)),
        "reuse": quantised(rng.random(shape)),
    }
    write_sidecar(path, header, arrays)
    return path


def changed(path: Path, **arrays: object) -> Path:
    """*path* with some of its arrays replaced; None takes one away."""
    with np.load(path) as data:
        known = dict(data)
    known |= arrays
    np.savez_compressed(path, **{name: a for name, a in known.items() if a is not None})
    return path


def windowed(windows: list[object]) -> np.ndarray:
    """A header with all that is needed, and *windows*."""
    header = {
        "version": 1,
        "model": {"name": "tiny", "layers": 3, "experts": 6, "top_k": 2},
        "trace": {"name": "x", "fingerprint": "0"},
        "predictor": {"fingerprint": "0"},
        "windows": windows,
    }
    return np.array(json.dumps(header))


@pytest.fixture
def trace() -> MemoryTrace:
    return example_trace(3)


@pytest.fixture
def path(tmp_path: Path, trace: MemoryTrace) -> Path:
    return sidecar_of(tmp_path / "x.npz", trace)


@pytest.mark.parametrize("options", ["", ",beyond=true", ",floor=0"])
class TestRoutingPath(ForecasterContract):
    @pytest.fixture(autouse=True)
    def choose(self, tmp_path: Path, options: str) -> None:
        self.folder, self.options = tmp_path, options
        self.forecaster = f"routing-path:{sidecar_of(tmp_path / 'any.npz', example_trace(1))}"

    def run(self, trace, *, batch=1, forecaster=None):
        """Every trace has a file of its own: one object cannot serve two."""
        path = sidecar_of(self.folder / f"{trace.name}.npz", trace)
        own = FORECASTERS.build(f"routing-path:{path}{self.options}")
        return super().run(trace, batch=batch, forecaster=own)


def test_it_says_what_the_file_says(path: Path, trace: MemoryTrace) -> None:
    """One sequence at a time: the experts above the floor, in order, with their scores."""
    forecaster = RoutingPath(str(path), floor=0.5)
    forecaster.reset(context_of(trace, 8))
    stored, row = read_sidecar(path).arrays, 0
    for step in Batches(trace, 1).steps():
        found = forecaster.on_step(step)
        if step.phase == "decode":
            for prediction in found:
                layer = prediction.ahead - 1
                scores = stored["scores"][row, layer] / 255
                named = stored["experts"][row, layer] + layer * trace.model.experts
                # Equal scores, as rounding makes them, come by id.
                pairs = sorted((-s, e) for s, e in zip(scores, named, strict=True) if s >= 0.5)
                assert prediction.experts == [int(e) for _, e in pairs]
                assert prediction.scores == pytest.approx([-s for s, _ in pairs], abs=1e-6)
            found = forecaster.reuse()
            assert found is not None
            assert list(found.windows) == [1, 4]
            np.testing.assert_allclose(
                found.chances, stored["reuse"][row].reshape(2, -1) / 255, atol=1e-6
            )
        row += step.size


@pytest.mark.parametrize("floor", [1 / 255, 0.2, 0.35, 90 / 255, 0.9, 1.0])
def test_one_token_is_read_off_as_several_are(path: Path, trace: MemoryTrace, floor: float) -> None:
    """The sorted file spares the sorting of all: in the same order, equal scores included."""
    one, any_number = RoutingPath(str(path), floor=floor), RoutingPath(str(path), floor=floor)
    for forecaster in (one, any_number):
        forecaster.reset(context_of(trace, 8))
    any_number._least = 0
    for step in Batches(trace, 1).steps():
        assert list(one.on_step(step)) == list(any_number.on_step(step))


def test_tokens_of_a_batch_are_taken_together(path: Path, trace: MemoryTrace) -> None:
    forecaster = RoutingPath(str(path), floor=0.0)
    forecaster.reset(context_of(trace, 8))
    steps = [step for step in Batches(trace, 3).steps() if step.phase == "decode"]
    stored = read_sidecar(path)
    rows = stored.rows(steps[0].sequence_ids, steps[0].positions, steps[0].token_ids)
    assert len(rows) == 3
    forecast = {p.ahead - 1: dict(zip(p.experts, p.scores, strict=True)) for p in
                forecaster.on_step(steps[0])}  # fmt: skip
    experts = trace.model.experts
    for layer in range(trace.model.layers):
        for expert in range(experts):
            none = 1.0
            for row in rows:
                at = np.flatnonzero(stored.arrays["experts"][row, layer] == expert)
                none *= 1 - (stored.arrays["scores"][row, layer, at[0]] / 255 if len(at) else 0)
            found = forecast[layer].get(layer * experts + expert, 0.0)
            assert found == pytest.approx(1 - none, abs=1e-6)


def test_beyond_the_step_lies_the_next_one(path: Path, trace: MemoryTrace) -> None:
    layers = trace.model.layers
    forecaster = RoutingPath(str(path), beyond=True)
    forecaster.reset(context_of(trace, 8))
    step = list(Batches(trace, 1).steps())[-1]
    found = forecaster.on_step(step)
    assert {p.ahead for p in found} <= set(range(1, 2 * layers + 1))
    later = [p for p in found if p.ahead > layers]
    assert later
    for prediction in later:
        chances = forecaster.reuse().chances[0][list(prediction.experts)]
        assert prediction.scores == pytest.approx(chances.tolist())
    event = step.number * layers
    after = forecaster.on_route(Routing(step, 0, step.demand[0], event))
    assert [p.ahead for p in after] == [p.ahead - 1 for p in found if p.ahead > 1]


def test_predictive_runs_with_it(path: Path, trace: MemoryTrace) -> None:
    planner = replay("predictive", trace, 8, forecaster=RoutingPath(str(path), floor=0.1))
    assert planner.counts["prefetch"] > 0


def test_the_file_may_be_named_or_not(path: Path) -> None:
    assert FORECASTERS.build(f"routing-path:{path}").file == str(path)
    built = FORECASTERS.build(f"routing-path:floor=0.2,file={path}")
    assert (built.file, built.floor) == (str(path), 0.2)
    assert FORECASTERS.build(f"routing-path:{path},floor=0.3").floor == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("routing-path", "no file given, expected routing-path:FILE"),
        ("routing-path:nowhere.npz", "nowhere.npz: no such file"),
        ("routing-path:a.npz,b.npz", "'b.npz' found, expected key=value"),
        ("routing-path:flor=0.2", "unknown parameter 'flor'; did you mean 'floor'"),
        ("markov:a.npz", "'a.npz' found, expected key=value"),
    ],
)
def test_what_cannot_be_built(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        FORECASTERS.build(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_that_is_not_there(tmp_path: Path, trace: MemoryTrace) -> None:
    path = sidecar_of(tmp_path / "x.npz", trace, windows=(4,))
    with pytest.raises(InputError, match=r"holds the windows \(4,\), expected 1 for beyond"):
        FORECASTERS.build(f"routing-path:{path},beyond=true")
    path = sidecar_of(tmp_path / "none.npz", trace, windows=())
    forecaster = FORECASTERS.build(f"routing-path:{path}")
    forecaster.reset(context_of(trace, 8))
    for step in Batches(trace, 2).steps():
        forecaster.on_step(step)
        assert forecaster.reuse() is None


def test_reuse_is_of_the_last_tokens_taken_together_and_windows_rise(tmp_path: Path) -> None:
    """After a prompt too long for a path as well; a file may list its windows in any order."""
    trace = example_trace(3, lengths=(90, 70, 5), prefill=60)
    path = sidecar_of(tmp_path / "x.npz", trace, windows=(8, 2))
    forecaster = RoutingPath(str(path))
    forecaster.reset(context_of(trace, 8))
    step = next(Batches(trace, 3).steps())
    assert list(forecaster.on_step(step)) == []
    found = forecaster.reuse()
    assert found is not None
    assert list(found.windows) == [2, 8]
    said = read_sidecar(path).arrays["reuse"][[59, 90 + 59, 90 + 70 + 4]] / 255
    none = np.prod(1 - said, axis=0).reshape(2, -1)[::-1]
    np.testing.assert_allclose(found.chances, 1 - none, atol=1e-5)


def test_another_trace_is_refused(path: Path, trace: MemoryTrace) -> None:
    """By its fingerprint where it can be asked, else at the first token that differs."""
    forecaster = RoutingPath(str(path))
    forecaster.check_trace(trace)
    other = example_trace(4)
    with pytest.raises(
        InputError, match=r"x.npz: trace fingerprint \w+, expected \w+ of example 4"
    ):
        forecaster.check_trace(other)
    with pytest.raises(InputError, match=r"x.npz: holds .* expected the trace's token id \d"):
        replay("predictive", other, 8, forecaster=forecaster)
    longer = example_trace(3, lengths=(9, 5, 12, 4))
    with pytest.raises(InputError, match=r"holds (nothing|token)"):
        replay("predictive", longer, 8, forecaster=RoutingPath(str(path)))


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="experts is 6, expected 7"):
        RoutingPath(str(path)).reset(Context(3, 7, 2, 8))
    with pytest.raises(InputError, match="layers is 3, expected 2"):
        RoutingPath(str(path)).check_trace(example_trace(3, shape=(2, 6, 2)))


def test_a_fingerprint_is_of_tokens_and_places_alone(trace: MemoryTrace) -> None:
    first = trace_fingerprint(trace.model, trace.items)
    rerouted = example_trace(3)
    rerouted.items[0].experts[:] = rerouted.items[0].experts[..., ::-1]
    assert trace_fingerprint(trace.model, rerouted.items) == first
    rerouted.items[0].tokens[2] += 1
    assert trace_fingerprint(trace.model, rerouted.items) != first
    assert trace_fingerprint(trace.model, trace.items[:2]) != first


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"scores": None}, "not a file of forecasts"),
        ({"header": None}, "not a file of forecasts"),
        ({"header": np.array("{}")}, "header has version None, expected 1"),
        ({"header": np.array("no json")}, "header has version 'no json', expected 1"),
        ({"header": np.array(json.dumps({"version": 1}))}, "header has no model.name"),
        ({"header": windowed([0, 1])}, "header has windows [0, 1], expected numbers of tokens"),
        ({"header": windowed(["1"])}, "header has windows ['1'], expected numbers of tokens"),
        ({"header": windowed([1, 1])}, "header has windows [1, 1], expected each once"),
        ({"tokens": np.zeros(3, np.int32)}, "experts is int16"),
        ({"scores": np.zeros((26, 3, 3))}, "scores is float64"),
        ({"reuse": np.zeros((26, 1, 3, 6), np.uint8)}, "expected (26, 2, 3, 6)"),
        ({"starts": np.array([0, 9, 14, 25])}, "starts end at 25, expected 26"),
        ({"experts": np.full((26, 3, 3), 6, np.int16)}, "names expert 6, expected below 6"),
    ],
)
def test_damaged_files(path: Path, damage: dict[str, object], message: str) -> None:
    changed(path, **damage)
    with pytest.raises(InputError) as caught:
        FORECASTERS.build(f"routing-path:{path}")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_files_cut_short(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a file of forecasts"):
        read_sidecar(path)
