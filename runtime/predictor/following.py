"""Forecasts of a model's steps as they come: who is followed, what is guessed, what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.forecasting import MAX_TOKENS
from policies.routing import DECODE, PREFILL, Step
from runtime.predictor import window
from runtime.predictor.caches import cache_bytes
from runtime.predictor.live import LivePredictor
from runtime.predictor.model import Predictor
from runtime.predictor.packing import Packed, Packing
from runtime.predictor.stepping import Pending, Stepper, marked
from traces.trace import IntArray

#: Batches whose sequences are followed at once, unless more take turns.
BATCHES = 2

#: Probabilities that one call of the heads may make: bounds its memory.
HEAD_SCORES = 2**22

#: What cuBLAS keeps for every stream that it has seen.
WORKSPACE_BYTES = 32 * 2**20

#: Guesses that are made before it counts how many of them came true.
TRIALS = 16


@dataclass
class Spent:
    """What the predictor took in the passes of one phase, in seconds.

    *host_s* the host was busy for it and *wait_s* it waited: for token ids, and for the
    predictor's stream, which worked *stream_s* (0 on a CPU, where all is the host's).
    """

    passes: int = 0
    host_s: float = 0.0
    wait_s: float = 0.0
    stream_s: float = 0.0

    def add(self, pending: Pending) -> None:
        """What was waited for and is here."""
        self.wait_s += pending.wait_s
        self.stream_s += pending.stream_s


class _Measured:
    """Adds the time of a block to *spent*, without what is added to its *wait_s* inside."""

    __slots__ = ("_spent", "_start", "_waited")

    def __init__(self, spent: Spent) -> None:
        self._spent = spent

    def __enter__(self) -> None:
        self._start, self._waited = time.perf_counter(), self._spent.wait_s

    def __exit__(self, *error: object) -> None:
        spent = self._spent
        spent.host_s += time.perf_counter() - self._start - (spent.wait_s - self._waited)


@dataclass
class Costs:
    """:class:`Spent` by phase, and how many next tokens were *guessed*, how many rightly."""

    phases: dict[str, Spent] = field(default_factory=lambda: {PREFILL: Spent(), DECODE: Spent()})
    guessed: int = 0
    guessed_right: int = 0

    def measured(self, phase: str) -> _Measured:
        """What a block takes is the host's, without what is added to *wait_s* inside."""
        return _Measured(self.phases[phase])


@dataclass(frozen=True)
class _Part:
    """Rows of a step, and the forecasts of their tokens on their way."""

    rows: IntArray
    pending: Pending


@dataclass(frozen=True)
class _Guess:
    """The step after the last one, begun before anybody knows its tokens."""

    sequences: list[int]
    shape: Any
    pending: Pending


class Forecasts(Mapping[str, Any]):
    """The arrays of one step of *count* tokens, waited for when the first is asked for.

    They must be asked for, if at all, before the next step is read or foreseen, and lie in memory
    that it may write again: :meth:`fetch` copies them.
    """

    def __init__(self, packing: Packing, count: int, parts: Sequence[_Part], spent: Spent) -> None:
        self._packing, self._count, self._parts, self._spent = packing, count, parts, spent
        self._found: Packed | None = None
        self._own = False

    def __getitem__(self, name: str) -> Any:
        if self._found is None:
            self._found, self._parts = self._fetch(), ()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("experts", "scores", "reuse"))

    def __len__(self) -> int:
        return 3

    def fetch(self) -> Packed:
        """All arrays, in memory of their own."""
        if not self._own:
            self._found, self._own = {name: self[name].copy() for name in self}, True
        assert self._found is not None
        return self._found

    def settle(self) -> None:
        """Count what it cost, though nobody has asked for it, and let go of it."""
        if self._found is None:
            self._count_costs()
            self._parts = ()

    def _count_costs(self) -> None:
        for part in self._parts:
            part.pending.wait()
            self._spent.add(part.pending)

    def _fetch(self) -> Packed:
        packing, parts = self._packing, self._parts
        self._count_costs()
        if len(parts) == 1 and len(parts[0].rows) == self._count:
            return parts[0].pending.take()
        found = packing.nothing(self._count)
        for part in parts:
            for name, values in part.pending.take().items():
                found[name][part.rows] = values
        return found


def device_bytes(model: Predictor, sequences: int, max_tokens: int, device: torch.device) -> int:
    """What *model* takes on *device* to follow *sequences* of up to *max_tokens* each."""
    spec = model.spec
    weights = sum(w.numel() * w.element_size() for w in model.parameters())
    prompt = cache_bytes(spec, sequences, 1 + min(max_tokens, window.PROMPT_TOKENS))
    own = cache_bytes(spec, sequences, min(spec.tail + max_tokens, window.DECODED_TOKENS))
    return weights + prompt + own + (WORKSPACE_BYTES if device.type == "cuda" else 0)


class Follower:
    """A predictor that follows the sequences of a run, step by step.

    Sequences that are new begin with their prompt. Those of the last *batches* batches are
    followed; older ones are forgotten, and begin anew without a prompt if they come again. Of
    longer steps than forecasters use, only the last token of each sequence is forecast, unless
    *whole* asks for all. With *guesses* :meth:`foresee` may start a step ahead of time.
    """

    def __init__(
        self,
        model: Predictor,
        width: int,
        *,
        whole: bool,
        guesses: bool | None,
        batches: int = BATCHES,
    ) -> None:
        self.packing = Packing(model.spec, width)
        self._live = LivePredictor(model)
        self._cuda = self._live.stream is not None
        if self._cuda:
            # The weights came over another stream.
            torch.cuda.synchronize(self._live.device)
        self._stepper = Stepper(self._live, self.packing, graphs=True)
        self._whole, self._batches = whole, batches
        self._guesses = self._cuda if guesses is None else guesses
        self.costs = Costs()
        #: Followed sequences, those of the latest step last.
        self._recent: dict[int, None] = {}
        self._most = 1
        self._last: list[int] = []
        self._guess: _Guess | None = None
        self._latest: Forecasts | None = None

    def __len__(self) -> int:
        """Sequences that are followed."""
        return len(self._recent)

    def read(self, step: Step) -> Forecasts:
        """Start forecasting the tokens of *step*; the host waits for its token ids."""
        if self._latest is not None:
            self._latest.settle()
        spent = self.costs.phases[step.phase]
        spent.passes += 1
        start = time.perf_counter()
        tokens = step.token_ids
        spent.wait_s += time.perf_counter() - start
        assert tokens is not None
        assert step.sequence_ids is not None
        assert step.positions is not None
        if self._goes_on(step):
            pending = self._one_token(self._last, tokens.tolist())
            parts = [_Part(np.arange(step.size), pending)]
            self._latest = Forecasts(self.packing, step.size, parts, spent)
            return self._latest
        spans = _spans(step.sequence_ids)
        self._forget(spans, step.positions)
        ids = {s: tokens[rows].tolist() for s, rows in spans.items()}
        prompts = [s for s in spans if s not in self._live] if step.phase == PREFILL else []
        parts = self._begin(prompts, ids, spans, step.size)
        rest = [s for s in spans if s not in prompts]
        unknown = [s for s in rest if s not in self._live]
        if unknown:
            self._begin(unknown, {s: [] for s in unknown}, spans, 0)
        parts += self._decode(rest, ids, spans)
        self._guess = None
        self._last = list(spans)
        self._latest = Forecasts(self.packing, step.size, parts, spent)
        return self._latest

    def foresee(self, logits: Tensor) -> None:
        """Start on the tokens that *logits* [B, V] of the step that ran make most likely.

        The step after it then finds its forecasts made, if it is of these tokens; if not, they
        are made anew.
        """
        costs, last = self.costs, self._last
        worthwhile = costs.guessed < TRIALS or 2 * costs.guessed_right > costs.guessed
        if not self._guesses or not worthwhile or logits.shape[0] != len(last):
            return
        if any(s not in self._live or self._room(s) < 1 for s in last):
            return
        with costs.measured(DECODE):
            shape = self._stepper.guess(last, logits)
            self._guess = _Guess(last, shape, shape.pending)
            costs.guessed += 1

    def warm(self, count: int, prompt: int, decoded: int) -> None:
        """Set up what is set up lazily, for *count* sequences of so many tokens at most.

        Sequences that nobody else has are read and forgotten.
        """
        live, prompt = self._live, min(prompt, window.PROMPT_TOKENS)
        ids, rows = [-1 - n for n in range(count)], self._batches * count
        with live.beside():
            live.prompt.reserve(rows, 1 + prompt)
            columns = min(self.packing.spec.tail + decoded, window.DECODED_TOKENS)
            live.own.reserve(rows, columns)
            live.read_prompts(ids, [[0] * prompt] * count)
        for _ in range(2):
            self._stepper.issue(ids, [0] * count).pending.wait()
        for sequence in ids:
            live.end(sequence)

    @property
    def device_bytes(self) -> int:
        """What weights, caches and the stream's workspace take where the predictor runs."""
        live = self._live
        weights = sum(w.numel() * w.element_size() for w in live.model.parameters())
        workspace = WORKSPACE_BYTES if self._cuda else 0
        return weights + live.own.size_bytes + live.prompt.size_bytes + workspace

    def close(self) -> None:
        """Wait for what is under way."""
        if self._cuda:
            self._live.stream.synchronize()  # type: ignore[union-attr]

    def _goes_on(self, step: Step) -> bool:
        """Whether *step* has the next token of each sequence of the step before, and no other.

        Nearly all steps do, and there is little to find out about them.
        """
        last = self._last
        return (
            step.phase == DECODE
            and step.size == len(last)
            and step.sequence_ids.tolist() == last  # type: ignore[union-attr]
            and all(step.positions.tolist())  # type: ignore[union-attr]
            and all(s in self._live and self._room(s) >= 1 for s in last)
        )

    def _room(self, sequence: int) -> int:
        """Tokens that the decoder still reads of *sequence*."""
        return window.DECODED_TOKENS - self._live.length(sequence)

    def _forget(self, spans: Mapping[int, IntArray], positions: IntArray) -> None:
        """Make room for the sequences of a step; one that starts again is a new one."""
        self._most = max(self._most, len(spans))
        for sequence, rows in spans.items():
            if sequence in self._live and positions[rows[0]] == 0:
                self._live.end(sequence)
            self._recent.pop(sequence, None)
            self._recent[sequence] = None
        while len(self._recent) > self._batches * self._most:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            if oldest in self._live:
                self._live.end(oldest)

    def _begin(
        self,
        sequences: Sequence[int],
        ids: Mapping[int, list[int]],
        spans: Mapping[int, IntArray],
        size: int,
    ) -> list[_Part]:
        """Read the prompts *ids* of *sequences*, all of which are new."""
        if not sequences:
            return []
        live = self._live
        prompts = [ids[s][-window.PROMPT_TOKENS :] for s in sequences]
        with live.beside():
            begun = marked(live)
            states = live.read_prompts(sequences, prompts)
            rows, where = [], []
            for number, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
                wanted = len(prompt) if self._whole or size <= MAX_TOKENS else min(1, len(prompt))
                if wanted:
                    rows.append(spans[sequence][-wanted:])
                    end = 1 + len(prompt)
                    where.append(states[number, end - wanted : end])
            if not rows:
                return []
            return [_Part(np.concatenate(rows), self._packed(torch.cat(where), begun))]

    def _decode(
        self, sequences: Sequence[int], ids: Mapping[int, list[int]], spans: Mapping[int, IntArray]
    ) -> list[_Part]:
        """Read the tokens *ids* of *sequences*, all of which are followed."""
        lengths: dict[int, list[int]] = {}
        for sequence in sequences:
            count = min(len(ids[sequence]), self._room(sequence))
            if count:
                lengths.setdefault(count, []).append(sequence)
        parts = []
        for count, members in lengths.items():
            rows = np.concatenate([spans[s][:count] for s in members])
            tokens = [ids[s][:count] for s in members]
            if count == 1:
                pending = self._one_token(members, [row[0] for row in tokens])
            else:
                pending = self._several(members, tokens)
            parts.append(_Part(rows, pending))
        return parts

    def _one_token(self, members: list[int], tokens: list[int]) -> Pending:
        live = self._live
        guess, self._guess = self._guess, None
        live.check(tokens)
        pending = None
        if guess is not None and guess.sequences == members:
            guess.pending.wait()
            if guess.shape.tokens == tokens:
                self.costs.guessed_right += 1
                pending = guess.pending
            else:
                self.costs.phases[DECODE].add(guess.pending)
        if pending is None:
            pending = self._stepper.issue(members, tokens).pending
        live.advance(members, 1)
        return pending

    def _several(self, members: list[int], tokens: list[list[int]]) -> Pending:
        """Tokens that come together without being a prompt."""
        live = self._live
        with live.beside():
            begun = marked(live)
            return self._packed(live.read(members, tokens).flatten(0, 1), begun)

    def _packed(self, states: Tensor, begun: Any) -> Pending:
        """The forecasts of *states* [T, d_model] on their way to the host."""
        live, spec = self._live, self.packing.spec
        most = max(1, HEAD_SCORES // (spec.paths * (1 + len(spec.windows))))
        shape = len(states), self.packing.row_bytes
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
        for first in range(0, len(states), most):
            part = slice(first, first + most)
            host[part].copy_(self.packing.pack(*live.chances(states[part])), non_blocking=True)
        return Pending(self.packing.unpack(host.numpy()), begun, marked(live))


def _spans(sequences: IntArray) -> dict[int, IntArray]:
    """The rows of each of *sequences* [T], in order of appearance."""
    if len(sequences) == 1:
        return {int(sequences[0]): np.zeros(1, np.int64)}
    return {int(s): np.flatnonzero(sequences == s) for s in dict.fromkeys(sequences.tolist())}
