"""Routing path: the forecasts of a trained predictor, replayed from the file beside a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from policies.base import Context, Forecast, Forecaster, Prediction, Reuse, StepForecast
from policies.forecasting import MAX_TOKENS, any_of, from_layer, last_rows, predictions
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from policies.sidecar import FULL, Sidecar, read_sidecar
from traces.errors import InputError
from traces.trace import FloatArray, IntArray, Trace


@register_forecaster("routing-path")
@dataclass
class RoutingPath(Forecaster):
    """The path of a token, all layers of it, is known before layer 0 (ExpertFlow's predictor).

    *file* is what ``simctl predictor forecast`` wrote for the trace that is run. With *beyond*
    the next step is named as well, from the chance that the next token uses an expert again.
    :meth:`reuse` has the chances over longer spans, after steps of any size.
    """

    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    #: The parameter that may be given without its name: ``routing-path:x.forecast.npz``.
    leading: ClassVar[str] = "file"

    file: str = parameter("", "forecasts of this trace, by simctl predictor forecast")
    floor: float = parameter(0.35, "least chance at which an expert is named", low=0, high=1)
    beyond: bool = parameter(False, "forecast the next step, too")

    _sidecar: Sidecar = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.file:
            raise InputError("no file given, expected routing-path:FILE")
        self._sidecar = read_sidecar(self.file)
        if self.beyond and 1 not in self._sidecar.windows:
            raise InputError(
                f"{self.file}: holds the windows {self._sidecar.windows}, expected 1 for beyond"
            )

    def check_trace(self, trace: Trace) -> None:
        """Raise :class:`InputError` unless the file was made of *trace*."""
        self._sidecar.check_trace(trace)

    def reset(self, context: Context) -> None:
        self._sidecar.check_model(context)
        self._context = context
        self._path: Forecast = ()
        self._last_rows: IntArray | None = None

    def on_step(self, step: Step) -> Forecast:
        self._path, self._last_rows = (), None
        if step.token_ids is None or step.sequence_ids is None or step.positions is None:
            return ()
        rows = self._sidecar.rows(step.sequence_ids, step.positions, step.token_ids)
        self._last_rows = rows[last_rows(step)[1]]
        path: list[Prediction] = []
        if step.size <= MAX_TOKENS:
            path += predictions(self._chances(rows), 0, self._context.experts, self.floor)
            if self.beyond:
                path += self._next_step()
        self._path = path
        return StepForecast(path, self.reuse)

    def on_route(self, routing: Routing) -> Forecast:
        return from_layer(self._path, routing)

    def reuse(self) -> Reuse | None:
        """What the last token of each sequence of the step says of the tokens after it."""
        rows, windows = self._last_rows, self._sidecar.windows
        if rows is None or not windows:
            return None
        rising = sorted(range(len(windows)), key=windows.__getitem__)
        chances = any_of(self._sidecar.arrays["reuse"][rows] / np.float32(FULL))
        return Reuse([windows[i] for i in rising], chances.reshape(len(windows), -1)[rising])

    def _chances(self, rows: IntArray) -> FloatArray:
        """Chance that any of the tokens *rows* takes each expert, [L * E]."""
        arrays, context = self._sidecar.arrays, self._context
        named = arrays["experts"][rows].astype(np.int64)
        chances = np.zeros((len(rows), context.layers, context.experts), np.float32)
        np.put_along_axis(chances, named, arrays["scores"][rows] / np.float32(FULL), axis=2)
        return any_of(chances.reshape(len(rows), -1))

    def _next_step(self) -> list[Prediction]:
        """The next step's events, as far from the present as they are."""
        reuse, layers = self.reuse(), self._context.layers
        assert reuse is not None
        chances = reuse.chances[reuse.windows.index(1)]
        found = predictions(chances, 0, self._context.experts, self.floor)
        return [p._replace(ahead=p.ahead + layers) for p in found]
