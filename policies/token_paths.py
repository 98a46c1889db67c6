"""The expected path of one token: what token schedulers compare.

A path is bool [L, E]: the experts that a token is expected to take. It comes from a forecaster
that knows paths of single tokens, or is the path of the token before, which everybody knows.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from policies.base import Context, Forecaster
from policies.routing import DECODE, Routing, Step
from policies.scheduling import BoolArray, TokenScheduler
from traces.errors import InputError, raised_line
from traces.trace import TokenSequence


class PathSource(Protocol):
    """Says which experts token *index* of a sequence is expected to take."""

    def path(self, sequence: TokenSequence, index: int) -> BoolArray:
        """Bool [L, E], from what is known before that token runs."""
        ...


@contextmanager
def in_one_line(plugin: TokenScheduler | Forecaster, when: str) -> Iterator[None]:
    """What *plugin* raises in the block, if it is a user's own, becomes one line saying *when*."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if type(plugin).__module__.startswith("policies."):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(raised_line(plugin.name, error, when, frame)) from error


def forecasts_single_tokens(forecaster: Forecaster | type[Forecaster] | None) -> bool:
    """Whether *forecaster* knows the path of a token without having followed its sequence.

    Those do that forecast from token ids, and those that know the future.
    """
    return forecaster is not None and (forecaster.offline or "tokens" in forecaster.needs)


def path_forecaster(
    scheduler: TokenScheduler, forecaster: Forecaster | None, option: str | None
) -> Forecaster | None:
    """*forecaster* (named by *option*) where *scheduler* is to be shown its paths, else None.

    Raises :class:`InputError` where it asks for a forecaster's paths and there are none.
    """
    able = forecasts_single_tokens(forecaster)
    if scheduler.paths == "forecaster" and not able:
        found = f"--forecaster {option}" if option else "no --forecaster"
        raise InputError(
            f"--scheduler {scheduler.name}:paths=forecaster: {found}, expected one that forecasts "
            "the path of a token, such as routing-path:FILE, token or oracle"
        )
    return forecaster if able and scheduler.paths in ("auto", "forecaster") else None


class PreviousPaths:
    """The experts that the token before took; none are expected of a sequence's first token."""

    def __init__(self, experts: int) -> None:
        self._experts = experts

    def path(self, sequence: TokenSequence, index: int) -> BoolArray:
        """Bool [L, E] of token *index* - 1."""
        layers = sequence.experts.shape[1]
        found = np.zeros((layers, self._experts), dtype=bool)
        if index > 0:
            np.put_along_axis(found, sequence.experts[index - 1].astype(np.int64), True, axis=1)
        return found


class HistoryPaths:
    """The experts that a sequence has taken most, prompt and all: twice top-k in each layer.

    For groups that stay: a sequence goes on as it has been, longer than a token tells.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts

    def path(self, sequence: TokenSequence, index: int) -> BoolArray:
        """Bool [L, E] from the tokens before *index*; among equals the lowest numbers."""
        _, layers, top_k = sequence.experts.shape
        found = np.zeros((layers, self._experts), dtype=bool)
        taken = sequence.experts[:index].astype(np.int64)
        keys = taken + np.arange(layers)[:, None] * self._experts
        uses = np.bincount(keys.reshape(-1), minlength=found.size).reshape(found.shape)
        best = np.argsort(-uses, axis=1, kind="stable")[:, : 2 * top_k]
        np.put_along_axis(found, best, True, axis=1)
        return found & (uses > 0)


class _Waiting(Iterator[Sequence[int]]):
    """Events that were asked about and are not forecast yet; empty for now is not the end."""

    def __init__(self) -> None:
        self.events: deque[Sequence[int]] = deque()

    def __next__(self) -> Sequence[int]:
        if not self.events:
            raise StopIteration
        return self.events.popleft()


class ForecastPaths:
    """What a forecaster says before layer 0 of a step that has this token alone.

    To one that knows the future, the tokens asked about are a run of their own, of one token
    each. It must be an object of its own, not that of the policy.
    """

    def __init__(self, forecaster: Forecaster, context: Context) -> None:
        self._forecaster, self._context = forecaster, context
        self._base = np.arange(context.layers)[:, None] * context.experts
        self._waiting = _Waiting()
        self._asked = 0
        forecaster.reset(context)
        if forecaster.offline:
            forecaster.reveal(self._waiting)

    def path(self, sequence: TokenSequence, index: int) -> BoolArray:
        """Bool [L, E]: the experts named for token *index*."""
        when = f"for sequence {sequence.id}, token {index}"
        with in_one_line(self._forecaster, when):
            return self._named(self._step(sequence, index))

    def _named(self, step: Step) -> BoolArray:
        """The experts that are named for *step*, bool [L, E]."""
        if self._forecaster.offline:
            self._waiting.events.extend(step.demand)
        context = self._context
        found = np.zeros(context.total, dtype=bool)
        for prediction in self._forecaster.on_step(step):
            if prediction.ahead <= context.layers:
                found[list(prediction.experts)] = True
        if self._forecaster.offline:
            self._play(step)
        self._asked += 1
        return found.reshape(context.layers, context.experts)

    def _step(self, sequence: TokenSequence, index: int) -> Step:
        """Token *index* as a step; what it demands is there for those who know the future."""
        step = Step(self._asked, DECODE, 1)
        step.sequence_ids = np.array([sequence.id])
        step.positions = sequence.positions[index : index + 1]
        step.kv_tokens = int(step.positions[0]) + 1
        if sequence.tokens is not None:
            step.token_ids = sequence.tokens[index : index + 1]
        if self._forecaster.offline:
            step.demand = np.sort(sequence.experts[index] + self._base, axis=1).tolist()
            step._experts = sequence.experts[index : index + 1]
        return step

    def _play(self, step: Step) -> None:
        """Let a forecaster that knows the future pass the events of *step*."""
        event = self._asked * self._context.layers
        for layer, experts in enumerate(step.demand):
            self._forecaster.on_route(Routing(step, layer, experts, event + layer))
