"""How copies that arrive are cut into groups, each computed in one call when all of it has landed.

Both worlds cut by the same rule. Calls have a price of their own, mostly the host's for their
launches; what has landed and waits for the rest of its group does not overlap with copying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Arriving = TypeVar("Arriving")

#: Bytes from which on the last group is closed: about as long on the link as its call takes the
#: host, so that the host keeps ahead of the link, and little is left to compute behind it.
LEAST_BYTES = 2**25

#: Bytes from which on any group is closed. Experts as large as this come one by one.
MOST_BYTES = 2**28


def landing_groups(sizes_bytes: Sequence[int]) -> list[int]:
    """How many copies each group has; *sizes_bytes* are those of all, in the order they land.

    From the last group backwards each may have twice the bytes of the one behind it, from
    :data:`LEAST_BYTES` up to :data:`MOST_BYTES`, and is closed by the copy that reaches that.
    What is left at the front joins the first group if it is less than the least.
    """
    counts: list[int] = []
    count = total = 0
    want = LEAST_BYTES
    for size in reversed(sizes_bytes):
        count += 1
        total += size
        if total >= want:
            counts.append(count)
            count = total = 0
            want = min(2 * want, MOST_BYTES)
    if count and counts and total < LEAST_BYTES:
        counts[-1] += count
    elif count:
        counts.append(count)
    return counts[::-1]


def cut(
    arriving: Sequence[Arriving], bytes_of: Callable[[Arriving], int]
) -> list[Sequence[Arriving]]:
    """*arriving*, in the order they land, as the groups that :func:`landing_groups` makes."""
    if len(arriving) < 2:
        return [arriving] if arriving else []
    groups, first = [], 0
    for count in landing_groups([bytes_of(one) for one in arriving]):
        groups.append(arriving[first : first + count])
        first += count
    return groups
