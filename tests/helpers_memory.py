"""Counts the bytes of tensors that are alive, as a GPU's allocator would."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Alive(TorchDispatchMode):
    """Inside its ``with`` block: bytes of the storages made there that are alive, and their peak.

    Tensors that were there before count for nothing, nor do those on ``meta``.
    """

    def __init__(self):
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known.add(key)
                self.now_bytes += size
                weakref.finalize(storage, self._gone, key, size)
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        return out

    def _gone(self, key, size):
        self._known.discard(key)
        self.now_bytes -= size


def _tensors(values):
    return [
        value
        for value in tree_iter(values)
        if isinstance(value, torch.Tensor) and value.device.type != "meta"
    ]
