"""Where every event demands one expert, a run is a plain cache trace: libcachesim must agree."""

from __future__ import annotations

import struct
from pathlib import Path

import libcachesim
import numpy as np
import pytest
from libcachesim import ReaderInitParam, TraceReader, TraceType

from policies.examples import example_model
from tests.helpers import replay, trace_of
from traces.trace import MemoryTrace

THEIRS = {
    "lru": libcachesim.LRU,
    "fifo": libcachesim.FIFO,
    "lfu": libcachesim.LFU,
    "belady": libcachesim.Belady,
}
NEVER = 2**62


def skewed(seed: int, *, layers: int = 6, experts: int = 40, tokens: int = 1500) -> MemoryTrace:
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(1, experts + 1) ** 0.9
    route = random.choice(experts, size=(tokens, layers, 1), p=odds / odds.sum())
    repeats = random.random((tokens, layers, 1)) < 0.3
    for token in range(1, tokens):
        route[token] = np.where(repeats[token], route[token - 1], route[token])
    return trace_of(example_model(layers, experts, 1), [route])


def write_oracle_general(trace: MemoryTrace, path: Path) -> int:
    """Packed (time, id > 0, size, time of the next access) per access; returns their number."""
    offsets = np.arange(trace.model.layers)[:, None] * trace.model.experts
    keys = [int(key) for key in (next(trace.sequences()).experts + offsets).reshape(-1)]
    coming: dict[int, int] = {}
    rows = []
    for time in reversed(range(len(keys))):
        key = keys[time]
        rows.append(struct.pack("<IQIq", time, key + 1, 1, coming.get(key, NEVER)))
        coming[key] = time
    path.write_bytes(b"".join(reversed(rows)))
    return len(keys)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_misses_are_the_same(name: str, seed: int, tmp_path: Path) -> None:
    trace = skewed(seed)
    file = tmp_path / "trace.oracleGeneral"
    accesses = write_oracle_general(trace, file)
    options = ReaderInitParam(ignore_obj_size=False)
    for slots in (1, 5, 6, 7, 30, 60, 120, 200, 239):
        reader = TraceReader(str(file), TraceType.ORACLE_GENERAL_TRACE, options)
        ratio, _ = THEIRS[name](cache_size=slots).process_trace(reader)
        assert replay(name, trace, slots).counts["missed"] == round(ratio * accesses), slots
