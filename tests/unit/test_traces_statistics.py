"""Every figure against its definition, written out slowly, on small traces."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces.statistics.pieces
import traces.statistics.prediction
import traces.statistics.reuse
from traces.model import ModelSpec
from traces.statistics import ReuseDistances, in_pieces, measure, outline
from traces.store import open_trace
from traces.synth import SynthSettings, synthesise
from traces.trace import MemoryTrace, TokenSequence

SAMPLE = Path(__file__).resolve().parents[2] / "traces" / "samples" / "granular-64x8.parquet"

SMALL = SynthSettings(
    layers=3,
    experts=6,
    top_k=2,
    sequences=5,
    prompt=(0, 20),
    decode=(10, 40),
    skew=0.1,
    domains=2,
    token_information=0.5,
    ahead=(0.9, 0.8),
    ahead_width=3,
    seed=3,
)


def model_of(settings: SynthSettings) -> ModelSpec:
    return ModelSpec("m", settings.layers, settings.experts, settings.top_k, 8, 8, 8, 0, 0)


def trace_of(settings: SynthSettings) -> MemoryTrace:
    items = list(synthesise(settings))
    return MemoryTrace(model_of(settings), items, extra=settings.notes())


@pytest.fixture(scope="module")
def small() -> MemoryTrace:
    return trace_of(SMALL)


@pytest.fixture(scope="module")
def figures(small: MemoryTrace) -> dict[str, Any]:
    return measure(small)


def sets(trace: MemoryTrace) -> list[list[list[set[int]]]]:
    """Experts by sequence, token and layer."""
    return [[[set(ids.tolist()) for ids in token] for token in s.experts] for s in trace.items]


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def halves(trace: MemoryTrace) -> tuple[list[Any], list[Any]]:
    """All tokens as (experts [layers, k], token id), in two halves."""
    tokens = [(s.experts[t], int(s.tokens[t])) for s in trace.items for t in range(len(s))]
    middle = outline(trace).middle
    assert 0 <= len(tokens) // 2 - middle < 16
    return tokens[:middle], tokens[middle:]


def test_counts(small: MemoryTrace, figures: dict[str, Any]) -> None:
    lengths = [len(s) for s in small.items]
    assert figures["sequences"] == 5
    assert figures["tokens"] == sum(lengths)
    assert figures["prefill_tokens"] == sum(s.prefill for s in small.items)
    assert figures["sequence_tokens"] == {
        "least": min(lengths),
        "median": np.median(lengths),
        "most": max(lengths),
    }


def test_popularity(small: MemoryTrace, figures: dict[str, Any]) -> None:
    found = figures["popularity"]
    every = np.concatenate([s.experts for s in small.items])
    entropies, hottest, deviations = [], [], []
    for layer in range(3):
        counts = np.bincount(every[:, layer].ravel(), minlength=6)
        share = counts / counts.sum()
        entropies.append(-sum(p * np.log(p) for p in share if p) / np.log(6))
        hottest.append(sorted(share)[-1] + sorted(share)[-2])
        deviations.append(np.std(100 * counts / len(every)))
    assert found["entropy_by_layer"] == pytest.approx(entropies, abs=1e-4)
    assert found["entropy"] == pytest.approx(mean(entropies))
    assert found["hottest_2"] == pytest.approx(mean(hottest))
    assert found["hottest_2_layer"] == int(np.argmax(hottest))
    assert found["load_std"] == pytest.approx(mean(deviations))
    uses = sorted(
        Counter(zip(np.tile([0, 0, 1, 1, 2, 2], len(every)), every.ravel(), strict=True)).values()
    )
    needed, total = 0, 0
    while total < 0.95 * sum(uses):
        total += uses[-1 - needed]
        needed += 1
    assert found["traffic_95"] == needed / 18


def test_neighbours(small: MemoryTrace, figures: dict[str, Any]) -> None:
    found = figures["locality"]
    shared, first = [], []
    for sequence, taken in zip(small.items, sets(small), strict=True):
        for t in range(1, len(sequence)):
            for layer in range(3):
                shared.append(len(taken[t][layer] & taken[t - 1][layer]))
                same = sequence.experts[t, layer, 0] == sequence.experts[t - 1, layer, 0]
                first.append(bool(same))
    assert found["overlap_experts"] == pytest.approx(mean(shared))
    assert found["overlap_ratio"] == pytest.approx(mean(shared) / (4 / 6))
    assert found["any_repeat"] == pytest.approx(mean(n > 0 for n in shared))
    assert found["first_choice_repeat"] == pytest.approx(mean(first))
    assert figures["prediction"]["previous_token_recall"] == pytest.approx(mean(shared) / 2)


def test_segments() -> None:
    """The best F1 of any fixed set, tried over all sets."""
    settings = dataclasses.replace(SMALL, prompt=(0, 0), decode=(16, 40), ahead=())
    trace = trace_of(settings)
    scores = []
    for sequence in trace.items:
        for start in range(0, len(sequence) - 15, 16):
            for layer in range(3):
                want = [set(ids.tolist()) for ids in sequence.experts[start : start + 16, layer]]
                best = 0.0
                for mask in range(1, 2**6):
                    fixed = {e for e in range(6) if mask >> e & 1}
                    true = sum(len(fixed & ids) for ids in want)
                    best = max(best, 2 * true / (16 * len(fixed) + 16 * 2))
                scores.append(best)
    assert measure(trace)["locality"]["srp_16"] == pytest.approx(mean(scores))


def slow_distances(trace: MemoryTrace, own_layer: bool) -> Counter[int | None]:
    """Reuse distances by a move-to-front list."""
    stack: list[tuple[int, int]] = []
    found: Counter[int | None] = Counter()
    for taken in sets(trace):
        for token in taken:
            for layer, ids in enumerate(token):
                kin = [e for e in stack if not own_layer or e[0] == layer]
                for e in sorted(ids):
                    used = (layer, e) in kin
                    found[kin.index((layer, e)) if used else None] += 1
                for e in sorted(ids):
                    if (layer, e) in stack:
                        stack.remove((layer, e))
                    stack.insert(0, (layer, e))
    return found


@pytest.mark.parametrize("cells", [2**21, 18 * 3])
def test_reuse_distances(cells: int, small: MemoryTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces.statistics.reuse, "CELLS", cells)
    reuse = ReuseDistances(small.model)
    for piece in in_pieces(small, outline(small)):
        reuse.add(piece)
    for histogram, own_layer in (
        (reuse.histogram, False),
        (reuse.layer_histograms.sum(axis=0), True),
    ):
        slow = slow_distances(small, own_layer)
        assert histogram[-1] == slow.pop(None)
        assert {d: n for d, n in enumerate(histogram[:-1].tolist()) if n} == dict(slow)


def test_reuse_distances_count_the_hits_of_lru(small: MemoryTrace, figures: dict[str, Any]) -> None:
    stack: list[tuple[int, int]] = []
    hits = accesses = 0
    for taken in sets(small):
        for token in taken:
            for layer, ids in enumerate(token):
                held = stack[:9]
                hits += sum((layer, e) in held for e in ids)
                accesses += len(ids)
                for e in sorted(ids):
                    stack = [(layer, e), *(other for other in stack if other != (layer, e))]
    assert figures["reuse"]["global"]["lru_50"] == pytest.approx(hits / accesses)


def top(scores: np.ndarray, k: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:k].tolist())


def test_next_layer_table(small: MemoryTrace, figures: dict[str, Any]) -> None:
    fit, judge = halves(small)
    right, popular = [], []
    for layer in range(2):
        together, uses, after = np.zeros((6, 6)), np.zeros(6), np.zeros(6)
        for experts, _ in fit:
            for e in experts[layer]:
                uses[e] += 1
                together[e, experts[layer + 1]] += 1
            after[experts[layer + 1]] += 1
        table = together / np.maximum(uses, 1)[:, None]
        for experts, _ in judge:
            actual = set(experts[layer + 1].tolist())
            right.append(len(top(table[experts[layer]].sum(axis=0), 2) & actual) / 2)
            popular.append(len(top(after, 2) & actual) / 2)
    assert figures["prediction"]["next_layer_recall"] == pytest.approx(mean(right), abs=0.01)
    assert figures["prediction"]["popularity_recall"] == pytest.approx(mean(popular))


def test_token_table(small: MemoryTrace, figures: dict[str, Any]) -> None:
    fit, judge = halves(small)
    table: dict[int, np.ndarray] = {}
    for experts, token in fit:
        row = table.setdefault(token, np.zeros((3, 6)))
        for layer in range(3):
            row[layer, experts[layer]] += 1
    popular = sum(table.values())
    weak = popular / (2 * popular.max())
    right = []
    for experts, token in judge:
        scores = table[token] + weak if token in table else popular
        for layer in range(3):
            right.append(len(top(scores[layer], 2) & set(experts[layer].tolist())) / 2)
    found = figures["prediction"]
    assert found["token_table_recall"] == pytest.approx(mean(right), abs=0.01)  # ties
    assert found["token_table_known"] == pytest.approx(mean(t in table for _, t in judge))


def test_a_full_token_table_takes_later_ids_for_unknown(
    small: MemoryTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces.statistics.prediction, "TOKEN_CELLS", 2 * 18)
    assert measure(small)["prediction"]["token_table_known"] < 0.7


def test_recorded_predictions(small: MemoryTrace, figures: dict[str, Any]) -> None:
    for depth in (1, 2):
        narrow, wide = [], []
        for sequence, taken in zip(small.items, sets(small), strict=True):
            guess = sequence.ahead[depth - 1]
            for t in range(len(sequence)):
                for layer in range(3 - depth):
                    actual = taken[t][layer + depth]
                    narrow.append(len(set(guess[t, layer, :2].tolist()) & actual) / 2)
                    wide.append(len(set(guess[t, layer].tolist()) & actual) / 2)
        found = figures["prediction"]["ahead"][str(depth)]
        assert found["m"] == 3
        assert found["recall_k"] == pytest.approx(mean(narrow))
        assert found["recall_m"] == pytest.approx(mean(wide))


def test_chance_and_repetition(small: MemoryTrace, figures: dict[str, Any]) -> None:
    """Chance is the overlap of tokens of two sequences of one domain, over all pairs."""
    pairs = []
    for i, one in enumerate(small.items):
        for j, other in enumerate(small.items):
            if i != j and i % 2 == j % 2:
                for a in one.experts:
                    for b in other.experts:
                        pairs.append(
                            mean(len(set(x) & set(y)) / 2 for x, y in zip(a, b, strict=True))
                        )
    chance, overlap = mean(pairs), figures["prediction"]["previous_token_recall"]
    settings = figures["settings"]
    assert settings["skew"] == pytest.approx((chance - 1 / 3) / (1 - 1 / 3))
    assert settings["repetition"] == pytest.approx((overlap - chance) / (1 - chance))


def test_correlation(small: MemoryTrace, figures: dict[str, Any]) -> None:
    domain_of = [i % 2 for i, s in enumerate(small.items) for _ in range(len(s))]
    tokens = np.concatenate([s.experts for s in small.items])
    middle = outline(small).middle
    parts = [range(middle), range(middle, len(tokens))]
    found = chance = total = 0.0
    for layer in range(2):
        together, expected = np.zeros((2, 6, 6)), np.zeros((2, 6, 6))
        for half, part in enumerate(parts):
            for domain in (0, 1):
                mine = [t for t in part if domain_of[t] == domain]
                here, next_ = np.zeros(6), np.zeros(6)
                for t in mine:
                    here[tokens[t, layer]] += 1
                    next_[tokens[t, layer + 1]] += 1
                    for e in tokens[t, layer]:
                        together[half, e, tokens[t, layer + 1]] += 1
                expected[half] += np.outer(here, next_) / max(len(mine), 1)
            total += 2 * len(part)
        lift = together - expected
        for half in (0, 1):
            for e in range(6):
                partner = int(np.argmax(lift[1 - half, e]))
                found += together[half, e, partner]
                chance += expected[half, e, partner]
    assert figures["settings"]["correlation"] == pytest.approx((found - chance) / (total - chance))


def test_domains(figures: dict[str, Any], small: MemoryTrace) -> None:
    lengths = [len(s) for s in small.items]
    share = {"domain-0": sum(lengths[::2]), "domain-1": sum(lengths[1::2])}
    expected = {name: n / sum(lengths) for name, n in share.items()}
    assert figures["domains"]["token_share"] == pytest.approx(expected)
    assert figures["settings"]["domains"] == 2


def test_uniform_routing_has_the_figures_of_chance() -> None:
    plain = SynthSettings(8, 8, 2, 40, (0, 0), (100, 100), 0, 0, 0)
    found = measure(trace_of(plain))
    assert found["locality"]["overlap_experts"] == pytest.approx(2 * 2 / 8, abs=0.01)
    assert found["locality"]["first_choice_repeat"] == pytest.approx(1 / 8, abs=0.01)
    assert found["locality"]["any_repeat"] == pytest.approx(1 - 6 / 8 * 5 / 7, abs=0.01)
    assert found["reuse"]["layer"]["lru_50"] == pytest.approx(4 / 8, abs=0.01)
    assert found["popularity"]["entropy"] > 0.999
    assert found["settings"]["skew"] == pytest.approx(0, abs=0.01)


def test_separation_tells_domains_apart() -> None:
    alike = SynthSettings(8, 16, 2, 24, (0, 0), (100, 100), 0.2, 0, 0, domains=1)
    trace = trace_of(alike)
    named = MemoryTrace(trace.model, trace.items, extra={"domains": ["a", "b"] * 12})
    assert measure(named)["domains"]["separation"] == pytest.approx(0, abs=0.05)
    apart = measure(trace_of(dataclasses.replace(alike, domains=3)))
    assert apart["domains"]["separation"] > 0.8


@pytest.mark.parametrize("cells", [18 * 16, 18 * 32, 2**22])
def test_figures_do_not_depend_on_the_pieces(
    cells: int, small: MemoryTrace, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces.statistics.pieces, "PIECE_CELLS", cells)
    assert measure(small) == figures


@pytest.mark.parametrize(
    "settings",
    [
        SynthSettings(1, 4, 2, 3, (2, 2), (3, 3), repetition=0.2),
        SynthSettings(3, 4, 2, 1, (0, 0), (1, 1), correlation=0.2),
        SynthSettings(2, 4, 4, 3, (0, 0), (20, 20), 0, 0, 0),
        SynthSettings(2, 1, 1, 2, (0, 0), (20, 20), 0, 0, 0),
        SynthSettings(2, 4, 1, 2, (0, 0), (20, 20), ahead=(0.9, 0.9, 0.9)),
    ],
    ids=["one layer", "one token", "all experts", "one expert", "deep predictions"],
)
def test_odd_shapes_have_figures(settings: SynthSettings) -> None:
    found = measure(trace_of(settings))
    assert found["tokens"] > 0
    assert 0 <= found["popularity"]["entropy"] <= 1


def test_progress_is_told_of_every_token(small: MemoryTrace) -> None:
    told: list[int] = []
    measure(small, progress=told.append)
    assert sum(told) == outline(small).tokens


def test_a_recorded_sample_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(open_trace(SAMPLE))
    assert found["settings"]["repetition"] > 0.05
    assert found["prediction"]["next_layer_recall"] > found["prediction"]["popularity_recall"]


def test_labels_that_do_not_fit_are_left_out(small: MemoryTrace) -> None:
    odd = MemoryTrace(small.model, small.items, extra={"domains": ["a"]})
    assert measure(odd)["domains"] is None
    bare = [TokenSequence(s.id, s.experts, s.positions) for s in small.items]
    found = measure(MemoryTrace(small.model, bare))
    assert found["settings"]["token_information"] is None
    assert "token_table_recall" not in found["prediction"]
