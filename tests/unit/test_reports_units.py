"""Figures as text."""

import pytest

from reports.units import count, data, duration, percent, significant


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (39.2097, "39.2 s"),
        (1.0, "1.00 s"),
        (0.99999, "1.00 s"),
        (0.0109, "10.9 ms"),
        (172.4e-6, "172 us"),
        (0.5e-6, "0.50 us"),
        (4321.0, "4,321 s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (92160, "90.0 KiB"),
        (1.5 * 2**30, "1.50 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_bytes(size, text):
    assert data(size) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.00"), (4.826, "4.83"), (23.57, "23.6"), (99.99, "100"), (-12.34, "-12.3")],
)
def test_three_digits(number, text):
    assert significant(number) == text


def test_shares_and_counts():
    assert percent(0.7109) == "71.1 %"
    assert percent(-0.26, 0) == "-26 %"
    assert count(1234567) == "1,234,567"
