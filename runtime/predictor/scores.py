"""Measures of forecasts: recall, precision, batch recall, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]

#: Bins of equal width over which calibration is measured.
BINS = 10


def hot(experts: Ints, width: int) -> Bools:
    """Which of *width* experts are listed in [..., m]; -1 lists none."""
    found = np.zeros((*experts.shape[:-1], width + 1), bool)
    np.put_along_axis(found, experts.astype(np.intp), True, axis=-1)
    return found[..., :width]


class Recall:
    """Recall and precision of ranked experts, at several numbers of them, layer by layer."""

    def __init__(self, layers: int, experts: int, widths: Sequence[int]) -> None:
        self._experts, self._widths = experts, tuple(widths)
        self._found = np.zeros((len(self._widths), layers))
        self._named = np.zeros((len(self._widths), layers))
        self._true = np.zeros(layers)

    def add(self, ranks: Ints, truth: Ints) -> None:
        """Compare *ranks* [n, L, m] with the experts *truth* [n, L, k] that were taken."""
        right = np.take_along_axis(
            np.pad(hot(truth, self._experts), [(0, 0), (0, 0), (0, 1)]),
            np.where(ranks < 0, self._experts, ranks).astype(np.intp),
            axis=-1,
        )
        for i, width in enumerate(self._widths):
            self._found[i] += np.count_nonzero(right[..., :width], axis=(0, 2))
            self._named[i] += np.count_nonzero(ranks[..., :width] >= 0, axis=(0, 2))
        self._true += len(truth) * truth.shape[-1]

    def result(self) -> dict[str, Any]:
        """Means over the layers for which anything was named, and each layer's."""
        if not self._true.any():
            return {}
        shares = self._found / self._true
        asked = self._named[0] > 0
        if not asked.any():
            return {}
        figures = {
            f"{width}": {
                "recall": float(shares[i][asked].mean()),
                "precision": float(self._found[i].sum() / max(self._named[i].sum(), 1)),
            }
            for i, width in enumerate(self._widths)
        }
        return {
            "at": figures,
            "recall_by_layer": _by_layer(shares[0], asked),
            "layers_named": int(asked.sum()),
        }


class BatchRecall:
    """ExpertFlow's measure: the mean over layers of |true and named| / |true|.

    Both sets are of a batch's tokens together: token j of each of *batch* sequences that follow
    one another. Only where all of them have a token j does a batch count.
    """

    def __init__(self, layers: int, experts: int, batch: int) -> None:
        self._experts, self._batch = experts, batch
        self._sum = np.zeros(layers)
        self._named = np.zeros(layers)
        self._count = 0

    def add(self, ranks: Sequence[Ints], truth: Sequence[Ints]) -> None:
        """Take sequences in order: *ranks* [n, L, m] and *truth* [n, L, k] of each."""
        for first in range(0, len(truth) - self._batch + 1, self._batch):
            group = slice(first, first + self._batch)
            self._add(ranks[group], truth[group])

    def _add(self, ranks: Sequence[Ints], truth: Sequence[Ints]) -> None:
        least = min(map(len, truth))
        if not least:
            return
        true = np.logical_or.reduce([hot(t[:least], self._experts) for t in truth])
        named = np.logical_or.reduce([hot(r[:least], self._experts) for r in ranks])
        share = (true & named).sum(axis=-1) / true.sum(axis=-1)
        self._sum += share.sum(axis=0)
        self._named += named.any(axis=-1).sum(axis=0)
        self._count += least

    def result(self) -> dict[str, Any]:
        """The mean over layers and batches, and each layer's."""
        asked = self._named > 0
        if not self._count or not asked.any():
            return {}
        shares = self._sum / self._count
        return {
            "recall": float(shares[asked].mean()),
            "recall_by_layer": _by_layer(shares, asked),
            "batches": self._count,
        }


class Calibration:
    """Whether probabilities are what they say, over bins of equal width."""

    def __init__(self) -> None:
        self._count = np.zeros(BINS)
        self._said = np.zeros(BINS)
        self._true = np.zeros(BINS)

    def add(self, chances: Floats, true: Bools) -> None:
        """Take *chances* and what came *true*, of one shape."""
        flat = chances.ravel().astype(np.float64)
        bins = np.minimum((flat * BINS).astype(np.intp), BINS - 1)
        self._count += np.bincount(bins, minlength=BINS)
        self._said += np.bincount(bins, weights=flat, minlength=BINS)
        self._true += np.bincount(bins, weights=true.ravel(), minlength=BINS)

    def result(self) -> dict[str, Any]:
        """The expected calibration error, and of each bin what was said and what came true."""
        total = self._count.sum()
        if not total:
            return {}
        filled = np.maximum(self._count, 1)
        said, true = self._said / filled, self._true / filled
        return {
            "error": float((np.abs(said - true) * self._count).sum() / total),
            "bins": [
                {"share": float(n / total), "said": float(s), "true": float(t)}
                for n, s, t in zip(self._count, said, true, strict=True)
            ],
        }


class WindowRecall:
    """Of the experts used in the next w tokens, the share among as many that were named first."""

    def __init__(self) -> None:
        self._found = 0
        self._true = 0

    def add(self, chances: Floats, used: Bools) -> None:
        """Take *chances* [n, L, E] and what was *used*."""
        sizes = used.sum(axis=-1)
        order = np.argsort(-chances, axis=-1, kind="stable")
        right = np.take_along_axis(used, order, axis=-1).cumsum(axis=-1)
        at = np.maximum(sizes - 1, 0)[..., None]
        self._found += int(np.take_along_axis(right, at, axis=-1).sum())
        self._true += int(sizes.sum())

    def result(self) -> float | None:
        """The share; None where nothing was used."""
        return self._found / self._true if self._true else None


def used_within(true: Bools, window: int) -> Bools:
    """Which experts the next *window* tokens use, of *true* [n, L, E]: [n - window, L, E]."""
    count = len(true) - window
    if count <= 0:
        return true[:0]
    spans = (true[1 + i : 1 + i + count] for i in range(window))
    made: Bools = np.logical_or.reduce(list(spans))
    return made


def groups(labels: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Each domain with the numbers of its sequences; nothing where all are of one."""
    names = sorted(set(labels))
    for name in names if len(names) > 1 else ():
        yield name, [i for i, label in enumerate(labels) if label == name]


def _by_layer(shares: Floats, asked: Bools) -> list[float | None]:
    """Each layer's share, None where nothing was named."""
    return [round(float(x), 4) if known else None for x, known in zip(shares, asked, strict=True)]
