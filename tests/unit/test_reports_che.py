"""Che's approximation of LRU against numbers that are known."""

import numpy as np
import pytest

from reports.che import characteristic_time, lru_miss_ratio, static_miss_ratio

ZIPF = 1 / np.arange(1, 6145) ** 0.8
SLOTS = 1843  # 30 %


def test_zipf_miss_ratios():
    assert lru_miss_ratio(ZIPF, SLOTS) == pytest.approx(0.346918, abs=5e-7)
    assert static_miss_ratio(ZIPF, SLOTS) == pytest.approx(0.253251, abs=5e-7)


def test_equal_popularity_misses_what_does_not_fit():
    assert lru_miss_ratio(np.ones(100), 25) == pytest.approx(0.75)
    assert static_miss_ratio(np.ones(100), 25) == pytest.approx(0.75)


def test_characteristic_time_fills_the_cache():
    rates = ZIPF / ZIPF.sum()
    time = characteristic_time(rates, SLOTS)
    assert np.sum(1 - np.exp(-rates * time)) == pytest.approx(SLOTS)


@pytest.mark.parametrize(("slots", "ratio"), [(0, 1.0), (6144, 0.0), (9000, 0.0)])
def test_ends_of_the_curve(slots, ratio):
    assert lru_miss_ratio(ZIPF, slots) == ratio


def test_falls_with_the_cache_and_never_below_the_static_optimum():
    sizes = range(1, 6144, 307)
    lru = [lru_miss_ratio(ZIPF, s) for s in sizes]
    assert lru == sorted(lru, reverse=True)
    assert all(miss >= static_miss_ratio(ZIPF, s) for miss, s in zip(lru, sizes, strict=True))


def test_unused_experts_take_no_slot():
    counts = np.array([0, 5, 0, 5, 5, 0, 5])
    assert lru_miss_ratio(counts, 4) == 0.0
    assert lru_miss_ratio(counts, 2) == pytest.approx(0.5)


def test_agrees_with_a_simulated_lru():
    rates = 1 / np.arange(1, 201) ** 0.8
    rates /= rates.sum()
    requests = np.random.default_rng(1).choice(200, size=60_000, p=rates).tolist()
    held: dict[int, None] = {}
    missed = 0
    for item in requests:
        if item in held:
            del held[item]
        else:
            missed += 1
            if len(held) == 60:
                del held[next(iter(held))]
        held[item] = None
    assert lru_miss_ratio(rates, 60) == pytest.approx(missed / len(requests), abs=0.01)
