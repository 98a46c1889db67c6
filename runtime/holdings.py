"""What an offloaded model has taken beside its own weights, and the way to give it back."""

from __future__ import annotations

import contextlib

import torch

from runtime.engine import Engine


class Holdings:
    """Slots, table and host store of an engine, without the engine.

    Whoever waits for a model's end holds on to this. It leads neither to the model nor to the
    policy: a policy that keeps the error it raised keeps the traceback, whose frames keep the
    model, which would then never end.
    """

    def __init__(self, engine: Engine) -> None:
        self._lanes = engine.lanes
        self._bank, self._table, self._store = engine.bank, engine.table, engine.store
        self._pieces = engine.copier.pieces

    def finish(self) -> None:
        """Wait until the device reads and writes none of it, even if the device is broken."""
        with contextlib.suppress(Exception):
            self._lanes.finish()

    def free(self) -> None:
        """Give all of it back."""
        self.finish()
        self._bank.free()
        self._table.free()
        self._pieces.clear()
        self._store.close()
        if self._lanes.device.type == "cuda":
            torch.cuda.empty_cache()
