"""The forecaster ``routing-path`` while a model runs: its predictor runs beside the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.base import Context, Forecast, Reuse
from policies.forecasters.routing_path import RoutingPath
from policies.registry import FORECASTERS
from policies.routing import PREFILL, Step
from policies.sidecar import Sidecar
from runtime.predictor.data import rounded_vocabulary
from runtime.predictor.files import StoredPredictor, load_predictor
from runtime.predictor.following import BATCHES, Follower, device_bytes
from runtime.predictor.keeping import KeptForecasts
from runtime.predictor.names import forecasts_beside
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import TokenSequence


@dataclass
class LivePath(RoutingPath):
    """``routing-path`` whose *file* is a predictor, asked as tokens come.

    What it says is rounded as the file of forecasts rounds it, and may be kept and written to
    one: a replay of that says the same. It must be told of the model with :meth:`attach`.
    """

    _stored: StoredPredictor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.file:
            raise InputError("no file given, expected routing-path:FILE")
        self._stored = stored = load_predictor(self.file)
        spec = stored.spec
        if self.beyond and 1 not in spec.windows:
            raise InputError(f"{self.file}: has the windows {spec.windows}, expected 1 for beyond")
        # A file's face without its forecasts.
        self._sidecar = Sidecar(
            Path(self.file),
            {"name": spec.model, "layers": spec.layers, "experts": spec.experts,
             "top_k": spec.top_k},
            {"name": "live"}, stored.about, spec.windows, {},
        )  # fmt: skip
        self._device = torch.device("cpu")
        self._keep = False
        self._guesses: bool | None = None
        self._batches = BATCHES
        self._kept: KeptForecasts | None = None
        self._phase = PREFILL
        self._follower: Follower | None = None

    @property
    def width(self) -> int:
        """Experts that are named of each token and layer at most."""
        return min(2 * self._stored.spec.top_k, self._stored.spec.experts)

    def attach(
        self,
        model: ModelSpec,
        vocabulary: int,
        device: torch.device,
        *,
        keep: bool = False,
        guesses: bool | None = None,
        batches: int = BATCHES,
    ) -> None:
        """Say that it will run beside *model*, which knows *vocabulary* token ids, on *device*.

        With *keep* what it says is kept for :meth:`write`. *guesses*: whether :meth:`foresee`
        starts early; where the device works by itself, if not given. *batches* may take turns. A
        predictor that was trained for another model raises :class:`InputError`.
        """
        spec = self._stored.spec
        spec.check_model(model, self.file)
        most = rounded_vocabulary(vocabulary - 1)
        if not vocabulary <= spec.vocabulary <= most:
            raise InputError(
                f"{self.file}: vocabulary is {spec.vocabulary}, expected {vocabulary} as model "
                f"{model.name} has (predictor train --vocabulary {vocabulary})"
            )
        self._device, self._keep, self._guesses = device, keep, guesses
        self._batches = batches

    def expected_bytes(self, batch: int, max_tokens: int) -> int:
        """Device memory it takes to follow its batches of *batch* sequences of *max_tokens*."""
        return device_bytes(self._stored.model, self._batches * batch, max_tokens, self._device)

    def reset(self, context: Context) -> None:
        super().reset(context)
        self._kept = KeptForecasts() if self._keep else None
        # A copy: when the run is over nothing of it stays on the device.
        model = copy.deepcopy(self._stored.model).to(self._device)
        self._follower = Follower(
            model, self.width, whole=self._keep, guesses=self._guesses, batches=self._batches
        )
        self._costs = self._follower.costs

    def on_step(self, step: Step) -> Forecast:
        follower, self._phase = self._following, step.phase
        with follower.costs.measured(step.phase):
            if self._kept is not None:
                self._kept.settle()
            self._arrays = forecasts = follower.read(step)
            if self._kept is not None:
                self._kept.add(step, forecasts)
            return self._forecast(step, np.arange(step.size))

    def reuse(self) -> Reuse | None:
        with self._following.costs.measured(self._phase):
            return super().reuse()

    def foresee(self, logits: Tensor) -> None:
        """Start on the next step's tokens, which *logits* [B, V] on the device let guess."""
        self._following.foresee(logits)

    def costs(self) -> dict[str, Any]:
        """What it has cost so far; see ``docs/runtime.md``."""
        costs = self._costs
        return {
            **{phase: dataclasses.asdict(spent) for phase, spent in costs.phases.items()},
            "guessed": costs.guessed,
            "guessed_right": costs.guessed_right,
            "device_bytes": self._follower.device_bytes if self._follower is not None else 0,
        }

    def warm(self, count: int, prompt: int, decoded: int) -> None:
        """Set up what is set up lazily, for *count* sequences of so many tokens at most."""
        self._following.warm(count, prompt, decoded)

    def write(self, trace: Path, model: ModelSpec, sequences: Sequence[TokenSequence]) -> None:
        """Write what was said beside *trace*, of *model* and with *sequences*, for its replays."""
        if self._kept is not None:
            self._kept.write(trace, forecasts_beside(trace), self._stored, model, sequences)

    def close(self) -> None:
        """Let go of what it holds on the device, once that is done."""
        if self._follower is not None:
            # Whatever has gone wrong on the device has been said already.
            with contextlib.suppress(Exception):
                self._follower.close()
            self._follower = None

    @property
    def _following(self) -> Follower:
        if self._follower is None:
            raise RuntimeError("the predictor is asked before a run was begun")
        return self._follower


def live_forecaster(text: str) -> LivePath:
    """The forecaster that *text* (``routing-path:p.safetensors,floor=0.3``) asks for."""
    options = text.partition(":")[2]
    found = FORECASTERS.construct(LivePath, options, text)
    assert isinstance(found, LivePath)
    return found
