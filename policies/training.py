"""What a training trace teaches: popularity and token tables for offline learners."""

from __future__ import annotations

import numpy as np

from policies.base import Forecaster, Policy, Training
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import IntArray, Trace


def learn(trace: Trace, model: ModelSpec) -> Training:
    """Count the uses of every expert in *trace*, in all and per token id.

    Raises :class:`InputError` when *trace* was routed by a model of another shape than
    *model*.
    """
    theirs = trace.model
    for field in ("layers", "experts", "top_k"):
        if getattr(theirs, field) != getattr(model, field):
            raise InputError(
                f"{trace.name}: {field} is {getattr(theirs, field)}, expected "
                f"{getattr(model, field)} as in the trace to run"
            )
    total = model.total_experts
    popularity = np.zeros(total, dtype=np.int64)
    tables: dict[int, IntArray] = {}
    offsets = (np.arange(model.layers, dtype=np.int64) * model.experts)[None, :, None]
    for sequence in trace.sequences(("token",)):
        keys = (sequence.experts.astype(np.int64) + offsets).reshape(len(sequence), -1)
        popularity += np.bincount(keys.reshape(-1), minlength=total)
        if sequence.tokens is None:
            continue
        for token in np.unique(sequence.tokens).tolist():
            row = tables.setdefault(token, np.zeros(total, dtype=np.int32))
            row += np.bincount(keys[sequence.tokens == token].reshape(-1), minlength=total)
    return Training(popularity, tables)


def check_taught(plugin: Policy | Forecaster, training: Training | None, where: str) -> None:
    """Raise :class:`InputError` where the trace *where* could not teach *plugin* its token ids."""
    wants = {"tokens", "training"} <= set(plugin.needs)
    if wants and training is not None and not training.token_experts:
        raise InputError(
            f"{where}: forecaster {plugin.name!r} learns from token ids, expected a training "
            "trace with tokens"
        )
