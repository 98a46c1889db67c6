"""Host and device over shared memory, in any order in which the two may come."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from tests.helpers_handshake import PretendedDriver
from tests.helpers_stress import Case, cases


def whole(case: Case) -> Case:
    """*case* with slots for all that a decode step may demand, and nothing left to the CPU."""
    most = min(case.tokens * case.top_k, case.experts)
    least = most * (case.layers if case.pool == "layer" else 1)
    return replace(case, slots=max(case.slots, least), cpu=False)


@pytest.mark.parametrize("serves", [False, True])
def test_no_expert_is_read_before_it_is_there(serves):
    late = steps = 0
    for case in cases(60, seed=7):
        driver = PretendedDriver(replace(whole(case), serves=serves))
        driver.run()
        late += driver.late
        steps += driver.whole
    assert steps > 120
    assert late > 8
