"""Keys and values that a predictor's decoder keeps of the sequences it follows."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.predictor.blocks import KeysValues
from runtime.predictor.model import Predictor
from runtime.predictor.spec import PredictorSpec

#: Rows and columns that a cache has at first; each doubles when it is full. A cache that grows
#: costs new graphs.
FIRST_ROWS, FIRST_COLUMNS = 4, 256


def _grown(size: int, needed: int) -> int:
    """*size* doubled until *needed* fit."""
    while size < needed:
        size *= 2
    return size


def cache_bytes(spec: PredictorSpec, rows: int, columns: int) -> int:
    """What a :class:`Cache` takes once it has made room for so many *rows* and *columns*."""
    whole = _grown(FIRST_ROWS, rows) * _grown(FIRST_COLUMNS, columns)
    return 4 * spec.blocks * 2 * spec.heads * spec.d_kv * whole


class Cache:
    """Keys and values of one attention of every decoder block: [blocks, 2, rows, heads, S, d_kv].

    What is beyond a row's own length is never looked at.
    """

    def __init__(self, model: Predictor) -> None:
        spec = model.spec
        store = torch.zeros(
            spec.blocks, 2, FIRST_ROWS, spec.heads, FIRST_COLUMNS, spec.d_kv,
            device=next(model.parameters()).device,
        )  # fmt: skip
        self._keep(store)

    def _keep(self, store: Tensor) -> None:
        """Use *store*. Its sizes and address are asked at every step, a tensor answers slowly."""
        self._store = store
        #: Rows and columns there is room for.
        self.rows, self.columns = store.shape[2], store.shape[4]
        #: Where it lies: another one after it has grown.
        self.address = store.data_ptr()

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return self._store.numel() * self._store.element_size()

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many *rows* and *columns*."""
        if rows <= self.rows and columns <= self.columns:
            return
        old = self._store
        shape = list(old.shape)
        for axis, needed in ((2, rows), (4, columns)):
            shape[axis] = _grown(shape[axis], needed)
        store = old.new_zeros(shape)
        store[:, :, : old.shape[2], :, : old.shape[4]] = old
        self._keep(store)

    def put(self, block: int, rows: Tensor, columns: Tensor, fresh: KeysValues) -> None:
        """Keep *fresh* keys and values [B, heads, S, d_kv] at *rows* [B], *columns* [B, S]."""
        for kind, values in enumerate(fresh):
            self._store[block, kind][rows[:, None], :, columns] = values.transpose(1, 2)

    def get(self, block: int, rows: Tensor, columns: int) -> KeysValues:
        """The first *columns* of *rows*."""
        kept = self._store[block, :, :, :, :columns]
        return kept[0][rows], kept[1][rows]
