"""What a predictor said while a model ran, kept until the run's trace is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.routing import PREFILL, Step
from policies.sidecar import write_sidecar
from runtime.predictor.data import Corpus
from runtime.predictor.files import StoredPredictor
from runtime.predictor.following import Forecasts
from runtime.predictor.forecasting import header_of, index_of
from traces.model import ModelSpec
from traces.trace import IntArray, TokenSequence


@dataclass(frozen=True)
class _Said:
    """What was said of one step: ids and positions of its tokens, and their forecasts."""

    sequences: IntArray
    positions: IntArray
    tokens: IntArray
    forecasts: Forecasts


class KeptForecasts:
    """The forecasts of every step of a run, in order."""

    def __init__(self) -> None:
        self._steps: list[_Said] = []

    def add(self, step: Step, forecasts: Forecasts) -> None:
        """Keep what is said of *step*."""
        assert step.sequence_ids is not None
        assert step.positions is not None
        assert step.token_ids is not None
        said = _Said(step.sequence_ids, step.positions, step.token_ids, forecasts)
        self._steps.append(said)
        if step.phase != PREFILL:
            # The memory they are in is written again by the next such step.
            forecasts.fetch()

    def settle(self) -> None:
        """Another step begins: fetch what a long prompt's own step did not wait for."""
        if self._steps:
            self._steps[-1].forecasts.fetch()

    def write(
        self,
        trace: Path,
        out: Path,
        by: StoredPredictor,
        model: ModelSpec,
        sequences: Sequence[TokenSequence],
    ) -> None:
        """Write what *by* said of all tokens of *trace* to *out*, as ``predictor forecast`` would.

        *sequences* are those of the trace, *model* is its model.
        """
        steps = self._steps
        order = zip(
            np.concatenate([s.sequences for s in steps]).tolist(),
            np.concatenate([s.positions for s in steps]).tolist(),
            strict=True,
        )
        row_of = {token: row for row, token in enumerate(order)}
        wanted = [(s.id, position) for s in sequences for position in s.positions.tolist()]
        rows = np.array([row_of[token] for token in wanted], np.int64)
        found = [step.forecasts.fetch() for step in steps]
        arrays: dict[str, Any] = {
            name: np.concatenate([part[name] for part in found])[rows]
            for name in ("experts", "scores", "reuse")
        }
        arrays["tokens"] = np.concatenate([s.tokens for s in steps]).astype(np.int32)[rows]
        corpus = Corpus(trace.name, model, tuple(sequences), ())
        header = header_of(by, corpus, by.spec.windows)
        write_sidecar(out, header, arrays | index_of(sequences))
