"""The best experts by score, where there is no GPU: what a sort begins with."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")

from runtime.kernels.rank import best_experts  # noqa: E402


@pytest.mark.parametrize("bias", [False, True])
def test_they_come_by_falling_score(bias):
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 12, generator=draw), torch.randn(9, 12, generator=draw)
    more = torch.randn(9, generator=draw) if bias else None
    scores = hidden @ weight.T + (0 if more is None else more)
    expected = scores.argsort(dim=1, descending=True)[:, :4]
    assert torch.equal(best_experts(hidden, weight, more, 4), expected)
