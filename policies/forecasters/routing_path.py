"""Routing path: the forecasts of a trained predictor, replayed from the file beside a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from policies.base import Context, Forecast, Forecaster, Path, Reuse, StepForecast
from policies.forecasting import MAX_TOKENS, any_of, from_layer, last_rows, predictions
from policies.registry import parameter, register_forecaster
from policies.routing import Routing, Step
from policies.sidecar import FULL, Sidecar, read_sidecar
from traces.errors import InputError
from traces.trace import FloatArray, IntArray, Trace

#: The chance that each score of a file stands for.
_CHANCES = np.arange(FULL + 1, dtype=np.float32) / np.float32(FULL)
_FALLING = _CHANCES[::-1].copy()


class _Order:
    """Experts with their scores as whole numbers, which sort by layer, falling score, rising id."""

    def __init__(self, context: Context) -> None:
        layers = np.arange(context.layers)[:, None]
        self._bits = context.total.bit_length()
        #: Of a layer's first expert with a score of 0, [L, 1]; what each score takes off.
        lowest = (layers * (FULL + 1) + FULL) << self._bits
        self._first = lowest + layers * context.experts
        self._off = np.arange(FULL + 1) << self._bits
        self._ends = np.arange(1, context.layers + 1) * (FULL + 1) << self._bits

    def keys(self, ids: IntArray, scores: IntArray) -> IntArray:
        """The numbers [L, m] of *ids* within their layers [L, m] with *scores* uint8 [L, m]."""
        made: IntArray = self._first + ids - self._off.take(scores)
        return made

    def path(self, keys: IntArray) -> Path:
        """What sorted *keys* name."""
        chances = _FALLING.take((keys >> self._bits) & FULL)
        experts = keys & ((1 << self._bits) - 1)
        ends = keys.searchsorted(self._ends).tolist()
        return Path.of_layers(experts.tolist(), chances.tolist(), ends)


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
        self._arrays: Mapping[str, Any] = self._sidecar.arrays
        self._path: Forecast = ()
        #: The step that runs, and the rows of its tokens.
        self._step: tuple[Step, IntArray] | None = None
        #: The first expert of every layer, [L, 1].
        self._first = np.arange(0, context.total, context.experts)[:, None]
        self._order = _Order(context)
        #: The least score that names an expert.
        self._least = int(np.searchsorted(_CHANCES, np.float32(self.floor)))

    def on_step(self, step: Step) -> Forecast:
        self._path, self._step = (), None
        if step.token_ids is None or step.sequence_ids is None or step.positions is None:
            return ()
        return self._forecast(
            step, self._sidecar.rows(step.sequence_ids, step.positions, step.token_ids)
        )

    def _forecast(self, step: Step, rows: IntArray) -> Forecast:
        """The forecast of *step*, of whose tokens *rows* tell."""
        self._step = step, rows
        path = Path([], [], [])
        if step.size <= MAX_TOKENS:
            path = self._named(rows)
            if self.beyond:
                path += self._next_step()
        self._path = path
        return StepForecast(path, self.reuse)

    def on_route(self, routing: Routing) -> Forecast:
        return from_layer(self._path, routing)

    def reuse(self) -> Reuse | None:
        """What the last token of each sequence of the step says of the tokens after it."""
        windows = self._sidecar.windows
        if self._step is None or not windows:
            return None
        step, rows = self._step
        last = rows[last_rows(step)[1]]
        chances = any_of(self._arrays["reuse"][last] / np.float32(FULL)).reshape(len(windows), -1)
        rising = sorted(windows)
        if rising != list(windows):
            chances = chances[[windows.index(window) for window in rising]]
        return Reuse(rising, chances)

    def _named(self, rows: IntArray) -> Path:
        """The experts that the tokens *rows* are likely to take, layer by layer."""
        if len(rows) == 1 and self._least > 0:
            return self._named_by_one(rows[0])
        return predictions(self._chances(rows), 0, self._context.experts, self.floor)

    def _named_by_one(self, row: int) -> Path:
        """The same for one token, of which only the experts that are named need to be sorted."""
        scores = self._arrays["scores"][row]
        keys = self._order.keys(self._arrays["experts"][row], scores)[scores >= self._least]
        keys.sort()
        return self._order.path(keys)

    def _chances(self, rows: IntArray) -> FloatArray:
        """Chance that any of the tokens *rows* takes each expert, [L * E]."""
        arrays, context = self._arrays, self._context
        chances = np.zeros((len(rows), context.total), np.float32)
        where = arrays["experts"][rows] + self._first
        where += np.arange(len(rows))[:, None, None] * context.total
        chances.reshape(-1)[where] = arrays["scores"][rows] / np.float32(FULL)
        return any_of(chances)

    def _next_step(self) -> Path:
        """The next step's events, as far from the present as they are."""
        reuse, layers = self.reuse(), self._context.layers
        assert reuse is not None
        chances = reuse.chances[reuse.windows.index(1)]
        return predictions(chances, 0, self._context.experts, self.floor).after(-layers)
