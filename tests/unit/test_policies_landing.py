"""How copies that arrive are cut into groups: few, none too large, and the last one small."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.landing import LEAST_BYTES, MOST_BYTES, cut, landing_groups

#: Bytes of one expert in bfloat16.
QWEN3_30B, DEEPSEEK_V2_LITE, MIXTRAL = 9_437_184, 17_301_504, 352_321_536


@pytest.mark.parametrize(
    ("size_bytes", "count", "groups"),
    [
        (MIXTRAL, 0, []),
        (MIXTRAL, 8, [1] * 8),
        (4096, 1, [1]),
        (4096, 128, [128]),
        (QWEN3_30B, 5, [5]),
        (QWEN3_30B, 8, [4, 4]),
        (QWEN3_30B, 64, [8, 29, 15, 8, 4]),
        (QWEN3_30B, 128, [14, 29, 29, 29, 15, 8, 4]),
        (DEEPSEEK_V2_LITE, 64, [2, 16, 16, 16, 8, 4, 2]),
    ],
)
def test_published_experts(size_bytes: int, count: int, groups: list[int]) -> None:
    assert landing_groups([size_bytes] * count) == groups


SIZES = st.lists(st.integers(1, 2 * MOST_BYTES), max_size=60)


@given(SIZES)
def test_every_copy_is_in_one_group_and_each_is_of_a_size_that_pays(sizes: list[int]) -> None:
    groups = cut(range(len(sizes)), sizes.__getitem__)
    assert [copy for group in groups for copy in group] == list(range(len(sizes)))
    totals = [sum(sizes[copy] for copy in group) for group in groups]
    if len(totals) > 1:
        assert min(totals) >= LEAST_BYTES
    for group, total in zip(groups[1:], totals[1:], strict=True):
        # Closed by the copy that reached what it may have, the first of the group.
        assert total - sizes[group[0]] < MOST_BYTES
    if totals[1:]:
        assert totals[-1] - sizes[groups[-1][0]] < LEAST_BYTES


@given(st.integers(1, MOST_BYTES), st.integers(1, 300))
def test_groups_are_few(size_bytes: int, count: int) -> None:
    """As many as what they carry has of the most, and those that grow up to that."""
    growing = (MOST_BYTES // LEAST_BYTES).bit_length()
    assert len(landing_groups([size_bytes] * count)) <= count * size_bytes // MOST_BYTES + growing
