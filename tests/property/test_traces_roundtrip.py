"""Any trace comes back as it was written, wherever row groups and batches end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import columns
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import open_trace, write_trace
from traces.trace import MemoryTrace, TokenSequence


@st.composite
def traces_of(draw: st.DrawFn) -> MemoryTrace:
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    width = draw(st.integers(1, experts))
    has_tokens, has_weights = draw(st.booleans()), draw(st.booleans())
    depth = draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def chosen(count: int, size: int) -> Any:
        ids = np.tile(np.arange(experts, dtype=np.int16), (count * layers, 1))
        return rng.permuted(ids, axis=1)[:, :size].reshape(count, layers, size)

    items = []
    for id in sorted(draw(st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=4))):
        count = draw(st.integers(1, 9))
        ahead = [chosen(count, width) for _ in range(depth)]
        for distance, array in enumerate(ahead, start=1):
            array[:, max(layers - distance, 0) :] = -1
        first = draw(st.integers(0, 100))
        items.append(
            TokenSequence(
                id,
                chosen(count, k),
                np.arange(first, first + count, dtype=np.int32),
                draw(st.integers(0, count)),
                rng.integers(0, 50000, count, dtype=np.int32) if has_tokens else None,
                rng.random((count, layers, k)).astype(np.float16) if has_weights else None,
                tuple(ahead),
            )
        )
    return MemoryTrace(ModelSpec("any", layers, experts, k, 1, 1, 1, 0, 0), items)


def assert_same(one: TokenSequence, other: TokenSequence) -> None:
    assert (one.id, one.prefill, len(one.ahead)) == (other.id, other.prefill, len(other.ahead))
    for a, b in (
        (one.experts, other.experts),
        (one.positions, other.positions),
        (one.tokens, other.tokens),
        (one.weights, other.weights),
        *zip(one.ahead, other.ahead, strict=True),
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@settings(max_examples=150, deadline=None)
@given(trace=traces_of(), written=st.integers(1, 40), read=st.integers(1, 40))
def test_a_trace_comes_back(trace: MemoryTrace, written: int, read: int) -> None:
    usual = columns.GROUP_ROWS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        try:
            columns.GROUP_ROWS = written
            write_trace(path, trace.model, trace.items, source="s", license="l")
            columns.GROUP_ROWS = read
            stored = open_trace(path)
            found = list(stored.sequences())
        finally:
            columns.GROUP_ROWS = usual
        assert list(Path(folder).iterdir()) == [path]
    assert stored.model == trace.model
    assert stored.tokens == sum(map(len, trace.items))
    assert len(found) == len(trace.items)
    for one, other in zip(found, trace.items, strict=True):
        assert_same(one, other)


@settings(max_examples=60, deadline=None)
@given(trace=traces_of(), data=st.data())
def test_one_bad_expert_is_found_wherever_it_is(trace: MemoryTrace, data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(trace.items) - 1))
    bad = trace.items[which]
    t = data.draw(st.integers(0, len(bad) - 1))
    layer = data.draw(st.integers(0, trace.model.layers - 1))
    bad.experts[t, layer, 0] = trace.model.experts
    row = (sum(map(len, trace.items[:which])) + t) * trace.model.layers + layer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        with pytest.raises(InputError) as caught:
            write_trace(path, trace.model, trace.items, source="", license="")
        place = f"row {row} (sequence {bad.id}, position {bad.positions[t]}, layer {layer})"
        assert place in str(caught.value)
        assert not list(Path(folder).iterdir())
