"""What a synthetic trace is set to is what the statistics measure, within two points."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces.synth
from traces.errors import InputError
from traces.gates import Gate, scores_for, shares_of, skew_of, zipf_exponent, zipf_shares
from traces.model import ModelSpec
from traces.statistics import measure
from traces.store import write_trace
from traces.synth import SynthSettings, synthesise
from traces.trace import MemoryTrace

POINTS = 0.02


def trace_of(wanted: SynthSettings) -> MemoryTrace:
    model = ModelSpec("m", wanted.layers, wanted.experts, wanted.top_k, 1, 1, 1, 0, 0)
    return MemoryTrace(model, list(synthesise(wanted)), extra=wanted.notes())


def assert_measured(wanted: SynthSettings) -> None:
    found = measure(trace_of(wanted))["settings"]
    for name in ("skew", "repetition", "correlation"):
        assert found[name] == pytest.approx(getattr(wanted, name), abs=POINTS), name
    if wanted.token_information is not None:
        told = found["token_information"]
        assert told == pytest.approx(wanted.token_information, abs=POINTS)
    assert found["ahead"] == pytest.approx(wanted.ahead, abs=POINTS)
    assert found["domains"] == wanted.domains


ALONE_AND_TOGETHER = [*itertools.product((0, 0.3), (0, 0.6), (0, 0.6)), (0.6, 0.3, 0.6)]


@pytest.mark.parametrize(
    ("experts", "top_k", "skew", "repetition", "correlation"),
    [
        *((*shape, *wanted) for shape in ((8, 2), (32, 4)) for wanted in ALONE_AND_TOGETHER),
        (64, 8, 0.1, 0.6, 0.3),
        (128, 8, 0.3, 0.3, 0.6),
    ],
)
def test_settings_alone_and_together(
    experts: int, top_k: int, skew: float, repetition: float, correlation: float
) -> None:
    more = {"prompt": (0, 64), "decode": (160, 224), "sequences": 80}
    assert_measured(
        SynthSettings(
            6, experts, top_k, skew=skew, repetition=repetition, correlation=correlation, **more
        )
    )


@pytest.mark.parametrize("information", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("domains", [1, 3])
def test_token_ids_and_predictions_and_domains(information: float, domains: int) -> None:
    assert_measured(
        SynthSettings(
            6,
            32,
            4,
            96,
            domains=domains,
            token_information=information,
            ahead=(0.95, 0.8, 0.5),
            ahead_width=6,
        )
    )


def test_extremes() -> None:
    wanted = SynthSettings(4, 16, 2, 40, repetition=0.95, correlation=0.95, ahead=(1.0,))
    found = measure(trace_of(wanted))["settings"]
    assert found["repetition"] == pytest.approx(0.95, abs=POINTS)
    assert found["correlation"] == pytest.approx(0.95, abs=POINTS)
    assert found["ahead"] == [1.0]


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 40),
    data=st.data(),
    skew=st.floats(0, 0.5),
    seed=st.integers(0, 2**63),
)
def test_any_settings_give_a_valid_trace(
    experts: int, data: st.DataObject, skew: float, seed: int
) -> None:
    layers = data.draw(st.integers(1, 4))
    top_k = data.draw(st.integers(1, experts))
    low = data.draw(st.integers(0, 5))
    wanted = SynthSettings(
        layers,
        experts,
        top_k,
        sequences=data.draw(st.integers(1, 4)),
        prompt=(low, low + data.draw(st.integers(0, 5))),
        decode=(low, low + data.draw(st.integers(1, 9))),
        # Nearly all experts at once leave no room for skew: that is refused, and tested apart.
        skew=skew * (experts - top_k) / experts if 2 * top_k <= experts else 0.0,
        repetition=0,
        correlation=0,
        domains=data.draw(st.integers(1, 3)),
        token_information=data.draw(st.none() | st.floats(0, 1)),
        weights=data.draw(st.booleans()),
        seed=seed,
    )
    for sequence in synthesise(wanted):
        prompt, total = sequence.prefill, len(sequence)
        assert wanted.prompt[0] <= prompt <= wanted.prompt[1]
        assert max(wanted.decode[0], total > 0 and not prompt) <= total - prompt <= wanted.decode[1]
        assert sequence.experts.shape == (total, layers, wanted.top_k)
        assert (np.diff(np.sort(sequence.experts, axis=2), axis=2) > 0).all()
        if sequence.weights is not None:
            assert (np.diff(sequence.weights.astype(float), axis=2) <= 0).all()
            np.testing.assert_allclose(sequence.weights.sum(axis=2, dtype=float), 1, atol=0.01)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def bytes_of(seed: int) -> bytes:
        wanted = SynthSettings(3, 8, 2, 6, token_information=0.5, ahead=(0.9,), seed=seed)
        model = trace_of(wanted).model
        path = tmp_path / "t.parquet"
        write_trace(path, model, synthesise(wanted), source="", license="")
        return path.read_bytes()

    assert bytes_of(1) == bytes_of(1)
    assert bytes_of(1) != bytes_of(2)


def test_a_long_sequence_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = SynthSettings(4, 16, 2, 8, (0, 0), (2000, 2000), repetition=0.6)
    monkeypatch.setattr(traces.synth, "CHUNK_VALUES", 4 * 16 * 3)
    found = measure(trace_of(wanted))["settings"]["repetition"]
    assert found == pytest.approx(0.6, abs=POINTS)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"layers": 0}, "layers is 0, expected 1 to"),
        ({"top_k": 33}, "top_k is 33, expected 1 to 32"),
        ({"skew": 0.99}, "skew is 0.99, expected at most 0."),
        ({"repetition": 1}, "repetition is 1, expected 0 to 0.99"),
        ({"correlation": -0.1}, "correlation is -0.1"),
        ({"experts": 4}, "repetition is 0.3, expected 0: every token takes all experts"),
        ({"ahead": (0.05,)}, "ahead accuracy is 0.05, expected at least chance"),
        ({"ahead": (0.9,) * 4}, "the number of ahead depths is 4, expected 0 to 3"),
        ({"ahead": (0.9,), "ahead_width": 3}, "ahead_width is 3, expected 4 to 32"),
        ({"token_information": 2}, "token_information is 2"),
        ({"prompt": (0, 0), "decode": (0, 0)}, "least prompt + most decode is 0, expected 1"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], expected: str) -> None:
    if "experts" in wrong:
        wrong = {**wrong, "skew": 0}
    with pytest.raises(InputError) as caught:
        synthesise(SynthSettings(**wrong))
    assert expected in str(caught.value)


# ------------------------------------------------------------------ the gate behind it


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(2, 40), exponent=st.floats(0, 3), data=st.data())
def test_scores_give_the_wanted_shares(experts: int, exponent: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    shares = zipf_shares(experts, top_k, exponent)
    assert shares.sum() == pytest.approx(top_k)
    found = shares_of(scores_for(shares, top_k), top_k)
    np.testing.assert_allclose(found, shares, atol=0.005)


@pytest.mark.parametrize("skew", [0.05, 0.2, 0.5])
def test_a_zipf_law_is_found_for_a_skew(skew: float) -> None:
    exponent = zipf_exponent(32, 4, skew)
    assert skew_of(zipf_shares(32, 4, exponent), 4) == pytest.approx(skew, abs=1e-6)


def test_overlap_runs_from_chance_to_one() -> None:
    gate = Gate(zipf_shares(16, 2, 0.7), 2)
    assert gate.overlap(0) == pytest.approx(gate.chance, abs=0.005)
    assert gate.overlap(1) == 1
    assert gate.overlap(gate.correlation_for(0.6)) == pytest.approx(0.6, abs=0.002)
