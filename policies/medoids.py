"""Dividing tokens into groups of equal size that take few distinct experts each.

Paths are packed: uint64 [n, W], one bit for every expert of every layer. A dozen words a path
are compared in less time than it takes to call a library for products of matrices, and in the
same time whatever else the host's cores do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from traces.trace import IntArray

Words = npt.NDArray[np.uint64]

_WORD_BYTES = 8


def packed(paths: npt.NDArray[np.bool_]) -> Words:
    """*paths* [n, V] as words [n, W]; bits past V are 0."""
    bits = np.packbits(paths, axis=1)
    spare = -bits.shape[1] % _WORD_BYTES
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, spare)))).view(np.uint64)


def ones(words: Words) -> IntArray:
    """Bits set in *words* [..., W], summed over the last axis."""
    counts: IntArray = np.bitwise_count(words).sum(axis=-1, dtype=np.int64)
    return counts


def distances(paths: Words) -> IntArray:
    """The Hamming distance of every two paths, [n, n]: the less, the more they are alike."""
    return ones(paths[:, None] ^ paths[None, :])


def distinct(paths: Words, labels: IntArray, groups: int) -> int:
    """Experts that the groups take, summed over groups: what a division is to make small."""
    return sum(int(ones(_union(paths[labels == group]))) for group in range(groups))


def _union(paths: Words) -> Words:
    union: Words = np.bitwise_or.reduce(paths, axis=0)
    return union


def file_order(n: int, groups: int) -> IntArray:
    """The group of each of *n* sequences, taken as they come; sizes differ by 1 at most."""
    return np.arange(n) * groups // n


@dataclass(frozen=True)
class Search:
    """How hard a good division is looked for.

    *starts* runs of k-medoids of up to *rounds* rounds each, then up to *swaps* exchanges.
    """

    rounds: int = 30
    starts: int = 4
    swaps: int = 64


def best_division(
    paths: Words, groups: int, present: IntArray, random: np.random.Generator, search: Search
) -> IntArray:
    """The division [n] with the fewest expected experts among those tried.

    Tried are the *present* groups where they are of equal size, file order, and what k-medoids
    finds. The first of the best is improved by exchanges.
    """
    n = len(paths)
    most = -(-n // groups)
    apart = distances(paths)
    tried = [present] if _fits(present, groups, most) else []
    tried.append(file_order(n, groups))
    for _ in range(search.starts):
        medoids = random.choice(n, size=groups, replace=False)
        tried.append(k_medoids(apart, medoids, most, search.rounds))
    best = min(tried, key=lambda labels: distinct(paths, labels, groups))
    return exchanged(paths, best, groups, search.swaps)


def _fits(labels: IntArray, groups: int, most: int) -> bool:
    inside = labels.min() >= 0 and labels.max() < groups
    return bool(inside) and bool(np.bincount(labels, minlength=groups).max() <= most)


def k_medoids(apart: IntArray, medoids: IntArray, most: int, rounds: int) -> IntArray:
    """Balanced k-medoids on distances [n, n], from *medoids* on; groups of at most *most*.

    Every token goes to the nearest medoid; groups that are too large release the members
    farthest from theirs, and groups that are not full take the nearest of these. Then each
    group's medoid becomes the member that is nearest to all the others, until nothing changes
    any more or *rounds* have passed.
    """
    labels = np.full(len(apart), -1)
    for _ in range(rounds):
        found = _balanced(apart[:, medoids], most)
        if (found == labels).all():
            break
        labels = found
        for group in range(len(medoids)):
            members = np.flatnonzero(labels == group)
            if len(members):
                central = apart[np.ix_(members, members)].sum(axis=0).argmin()
                medoids[group] = members[central]
    return labels


def _balanced(to_medoids: IntArray, most: int) -> IntArray:
    """Groups of at most *most* from each token's distance to the medoids, [n, groups]."""
    labels: IntArray = to_medoids.argmin(axis=1)
    groups = to_medoids.shape[1]
    for group in np.flatnonzero(np.bincount(labels, minlength=groups) > most).tolist():
        members = np.flatnonzero(labels == group)
        order = np.argsort(to_medoids[members, group], kind="stable")
        labels[members[order[most:]]] = -1
    released = np.flatnonzero(labels < 0)
    if len(released):
        room = most - np.bincount(labels[labels >= 0], minlength=groups)
        wishes = np.argsort(to_medoids[released], axis=None, kind="stable")
        for wish in wishes.tolist():
            token, group = released[wish // groups], wish % groups
            if labels[token] < 0 and room[group] > 0:
                labels[token] = group
                room[group] -= 1
    return labels


def exchanged(paths: Words, labels: IntArray, groups: int, most: int) -> IntArray:
    """*labels* after up to *most* exchanges of two tokens, each the one that saves most experts."""
    labels = labels.copy()
    pairs = list(combinations(range(groups), 2))
    done, settled = 0, 0
    while done < most and settled < len(pairs):
        first, second = pairs.pop(0)
        pairs.append((first, second))
        settled += 1
        while done < most and _exchange(paths, labels, first, second):
            done, settled = done + 1, 0
    return labels


def _exchange(paths: Words, labels: IntArray, first: int, second: int) -> bool:
    """Exchange the two tokens of groups *first* and *second* that save most, if any do."""
    ours, theirs = np.flatnonzero(labels == first), np.flatnonzero(labels == second)
    if not len(ours) or not len(theirs):
        return False
    mine, others = paths[ours], paths[theirs]
    without_mine, without_theirs = _without_each(mine), _without_each(others)
    after = ones(without_mine[:, None] | others[None, :])
    after = after + ones(without_theirs[None, :] | mine[:, None])
    i, j = divmod(int(after.argmin()), len(theirs))
    if after[i, j] >= int(ones(_union(mine))) + int(ones(_union(others))):
        return False
    labels[ours[i]], labels[theirs[j]] = second, first
    return True


def _without_each(members: Words) -> Words:
    """What the others of a group take, for each of its *members*, [n, W]."""
    once = np.zeros_like(members[0])
    more = np.zeros_like(once)
    for path in members:
        more |= once & path
        once |= path
    kept: Words = once & ~(members & ~more)
    return kept
