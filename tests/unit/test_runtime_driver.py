"""What the CUDA driver is handed, read back from a driver that only notes it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

from runtime import driver
from runtime.driver import MOST_WRITES as MOST
from runtime.errors import OffloadError


def test_structures_are_as_long_as_the_drivers():
    assert ctypes.sizeof(driver._WriteValue) == 48
    assert ctypes.sizeof(driver._CopyAttributes) == 24


@pytest.mark.parametrize("count", [0, 1, 255, 256, 600])
def test_values_are_written_in_as_few_calls_as_can_be(monkeypatch, count):
    calls = []

    def write(stream, size, writes, flags):
        some = writes[:size]
        assert {(w.operation, w.flags) for w in some} == {(2, 0)}
        calls.append([(w.address, w.value) for w in some])
        return 0

    library = SimpleNamespace(cuStreamBatchMemOp_v2=write)
    monkeypatch.setattr(driver, "_library", lambda: library)
    values = [(3 * n, n - 1) for n in range(count)]
    driver.Writes().send(1 << 40, values, 7)
    assert [len(call) for call in calls] == [min(MOST, count - n) for n in range(0, count, MOST)]
    expected = [((1 << 40) + 4 * at, value % 2**32) for at, value in values]
    assert [pair for call in calls for pair in call] == expected


@pytest.mark.parametrize("known", [True, False])
def test_copies_are_handed_over_at_once_where_the_driver_can(monkeypatch, known):
    copies, calls = [(100, 200, 3), (110, 210, 4)], []

    def batch(targets, sources, sizes, count, attributes, first, kinds, stream):
        calls.append(list(zip(targets, sources, sizes, strict=True)))
        assert (count, kinds, stream) == (2, 1, 7)
        return 0

    monkeypatch.setattr(driver, "_batch", lambda: batch if known else None)
    monkeypatch.setattr(driver, "copy_to_device", lambda *copy: calls.append([copy[:3]]))
    driver.copy_all_to_device(copies, 7)
    assert calls == ([copies] if known else [[copy] for copy in copies])


def test_a_refusal_is_said(monkeypatch):
    library = SimpleNamespace(cuStreamBatchMemOp_v2=lambda *given: 1)
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "_batch", lambda: lambda *given: 801)
    with pytest.raises(OffloadError, match=r"expert table failed: CUDA error 1$"):
        driver.Writes().send(0, [(0, 1)], 0)
    with pytest.raises(OffloadError, match=r"^2 copies to the GPU failed: CUDA error 801$"):
        driver.copy_all_to_device([(1, 2, 3)] * 2, 0)
