"""Exact reuse distances: how many distinct experts are used between two uses of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from traces.model import ModelSpec
from traces.statistics.pieces import Piece

Keys = npt.NDArray[np.int64]

#: Cells of the table of last uses held at once.
CELLS = 2**21

#: Quantiles that are reported.
QUANTILES = (0.5, 0.9, 0.99)


class ReuseDistances:
    """Reuse distances over the whole trace, one token per step, in the order of the file.

    The distance of an access is the number of distinct experts used more recently than its
    expert, seen before the event of the access: of all layers (``global``), or of its own
    (``layer``). Within an event ids rise. An LRU cache of C slots, one pool for all layers
    or one of C for each, hits exactly the accesses whose distance is less than C.
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        cells = model.layers * model.experts
        # Every cell has a last use; those before the first token are told by being negative.
        self._last: Keys = np.arange(-cells, 0, dtype=np.int64)
        self._tokens = 0
        self._global = np.zeros(cells + 1, np.int64)
        self._layer = np.zeros((model.layers, model.experts + 1), np.int64)

    def add(self, piece: Piece) -> None:
        """Take the distances of *piece*, in parts that fit the memory."""
        step = max(CELLS // len(self._last), 1)
        for start in range(0, len(piece), step):
            self._add(np.sort(piece.experts[start : start + step].astype(np.int64), axis=2))

    def _add(self, experts: Keys) -> None:
        """*experts* [n, layers, k], ids rising."""
        count, layers, k = experts.shape
        width = self.model.experts
        cells = experts + (np.arange(layers) * width)[None, :, None]
        flat = cells.reshape(count, -1)
        # The time of a use grows with token, layer and id, whatever the token.
        times = (self._tokens + np.arange(count))[:, None] * len(self._last) + flat
        before = np.full((count + 1, len(self._last)), np.iinfo(np.int64).min)
        before[0] = self._last
        np.put_along_axis(before[1:], flat, times, axis=1)
        for i in range(count):  # row by row: many times faster than accumulate along axis 0
            np.maximum(before[i], before[i + 1], out=before[i + 1])
        self._last = before[-1].copy()
        before = before[:-1]
        own = np.take_along_axis(before, flat, axis=1)
        self._count_layer(before, own)
        later = _later(before, own) + _moved_up(own.reshape(count, layers, k))
        seen = np.where(own < 0, len(self._last), later)
        self._global += np.bincount(seen.ravel(), minlength=len(self._global))
        self._tokens += count

    def _count_layer(self, before: Keys, own: Keys) -> None:
        layers, width = self.model.layers, self.model.experts
        grid = before.reshape(-1, layers, width)
        mine = own.reshape(len(grid), layers, -1)
        for slot in range(mine.shape[2]):
            later = np.count_nonzero(grid > mine[:, :, slot, None], axis=2)
            seen = np.where(mine[:, :, slot] < 0, width, later)
            for layer in range(layers):
                self._layer[layer] += np.bincount(seen[:, layer], minlength=width + 1)

    def result(self) -> dict[str, Any]:
        """Quantiles, first uses and the hits of LRU caches that hold a share of all experts."""
        return {
            "global": _figures(self._global),
            "layer": _figures(self._layer.sum(axis=0)),
            "layer_median_by_layer": [_quantile(row, 0.5) for row in self._layer],
        }

    @property
    def histogram(self) -> Keys:
        """Accesses by global distance; the last entry counts first uses."""
        return self._global

    @property
    def layer_histograms(self) -> Keys:
        """Accesses by distance within the layer [layers, experts + 1]; first uses last."""
        return self._layer


def _later(before: Keys, own: Keys) -> Keys:
    """For each row, how many entries of *before* exceed each of *own*."""
    rows, width = before.shape
    ordered = np.sort(before, axis=1)
    # Rows are told apart by an offset, so that one search serves them all.
    base = min(int(ordered[:, 0].min()), 0)
    span = int(ordered[:, -1].max()) - base + 1
    offset = np.arange(rows, dtype=np.int64)[:, None] * span - base
    place = np.searchsorted((ordered + offset).ravel(), (own + offset).ravel(), side="right")
    found: Keys = (np.arange(1, rows + 1) * width)[:, None] - place.reshape(own.shape)
    return found


def _moved_up(own: Keys) -> Keys:
    """Experts of a token's earlier layers that were last used before, but now no more.

    *own* [n, layers, k] holds the last uses before the token. The events of its earlier
    layers made their experts the most recent, so they too lie between.
    """
    count, layers, k = own.shape
    found = np.zeros((count, layers, k), np.int64)
    flat = own.reshape(count, 1, layers * k)
    for layer in range(1, layers):
        for slot in range(k):
            older = flat[:, 0, : layer * k] < own[:, layer, slot, None]
            found[:, layer, slot] = np.count_nonzero(older, axis=1)
    return found.reshape(count, -1)


def _figures(histogram: Keys) -> dict[str, Any]:
    total, size = int(histogram.sum()), len(histogram) - 1
    hits = histogram[:-1].cumsum() / max(total, 1)
    figures: dict[str, Any] = {f"p{q * 100:.0f}": _quantile(histogram, q) for q in QUANTILES}
    figures["first_uses"] = int(histogram[-1])
    for percent in (25, 50, 75):
        slots = size * percent // 100
        figures[f"lru_{percent}"] = float(hits[slots - 1]) if slots else 0.0
    return figures


def _quantile(histogram: Keys, q: float) -> int | None:
    """The *q* quantile among accesses that are not first uses; None if there are none."""
    again = histogram[:-1].cumsum()
    if not len(again) or not again[-1]:
        return None
    return int(np.searchsorted(again, q * again[-1]))
