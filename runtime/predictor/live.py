"""A predictor beside a running model: it keeps what it has read and takes one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.predictor.blocks import KeysValues
from runtime.predictor.caches import Cache
from runtime.predictor.model import Predictor
from traces.errors import InputError


@dataclass(frozen=True)
class LiveScores:
    """Probabilities on the predictor's device: *now* [T, L, E], *again* [T, windows, L, E].

    *done* is recorded on the predictor's stream when they are complete, None on a CPU.
    """

    now: Tensor
    again: Tensor
    done: torch.cuda.Event | None = None

    def wait(self) -> LiveScores:
        """Let the current stream wait until they are complete; the host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.now.device)
            stream.wait_event(self.done)
            self.now.record_stream(stream)
            self.again.record_stream(stream)
        return self


class Place(NamedTuple):
    """Where B sequences go on: cache *rows*, the decoder's next column *at* and the *lengths* of
    what cross-attention sees, all int64 [B] on the predictor's device.
    """

    rows: Tensor
    at: Tensor
    lengths: Tensor


class LivePredictor:
    """Sequences that a predictor follows while a model decodes them.

    :meth:`begin` reads a prompt, :meth:`step` one more token of any of the sequences, :meth:`end`
    forgets one. Scores equal those of one pass over the whole sequence, up to rounding. On a GPU
    all work is issued to *stream*, one of its own if none is given, so that it runs beside the
    model's: a call returns as soon as the work is issued.
    """

    def __init__(self, model: Predictor, stream: torch.cuda.Stream | None = None) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        if self.device.type == "cuda" and stream is None:
            # Its kernels are small and somebody waits for them: they go first.
            cuda: Any = torch.cuda
            stream = cuda.Stream(self.device, priority=-1)
        self.stream = stream
        with self.beside():
            self.own, self.prompt = Cache(model), Cache(model)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._read: list[int] = []
        self._prompts: list[int] = []

    def __len__(self) -> int:
        """Sequences that are followed."""
        return len(self._row_of)

    def __contains__(self, sequence: int) -> bool:
        """Whether *sequence* is followed."""
        return sequence in self._row_of

    def begin(self, sequence: int, prompt: Sequence[int]) -> LiveScores:
        """Follow *sequence*, whose *prompt* is all known: the scores of its tokens."""
        return self._scores(lambda: self.read_prompts([sequence], [prompt])[0, 1:])

    def step(self, sequences: Sequence[int], tokens: Sequence[int]) -> LiveScores:
        """Read the next of *tokens* of each of *sequences*: their scores, in that order."""
        return self._scores(lambda: self.read(sequences, [[token] for token in tokens])[:, 0])

    def end(self, sequence: int) -> None:
        """Forget *sequence*; its room is used again."""
        self._free.append(self._row_of.pop(sequence))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside is issued to the predictor's stream, without gradients.

        Nothing of the model's stream is waited for.
        """
        with torch.inference_mode(), self.on_stream():
            yield

    def on_stream(self) -> AbstractContextManager[Any]:
        """The same for what knows no gradients anyway, such as a graph."""
        cuda: Any = torch.cuda
        found: AbstractContextManager[Any] = (
            nullcontext() if self.stream is None else cuda.stream(self.stream)
        )
        return found

    def check(self, tokens: Sequence[int]) -> None:
        """Raise :class:`InputError` unless all *tokens* are of the predictor's vocabulary."""
        limit = self.model.spec.vocabulary
        for token in tokens:
            if not 0 <= token < limit:
                raise InputError(
                    f"token id {token}, expected below {limit}, the predictor's vocabulary"
                )

    def read_prompts(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Follow *sequences* from their *prompts* on: states [B, 1 + S, d_model], inside
        :meth:`beside`. Column 0 is the start's, shorter prompts end before the last column.
        """
        for sequence, prompt in zip(sequences, prompts, strict=True):
            self.check(prompt)
            if sequence in self._row_of:
                raise ValueError(f"sequence {sequence} is followed already")
        rows = [self._row(sequence) for sequence in sequences]
        tails = [min(self.model.spec.tail, len(prompt)) for prompt in prompts]
        for row, prompt, tail in zip(rows, prompts, tails, strict=True):
            self._prompts[row], self._read[row] = 1 + len(prompt), tail
        return self._read_prompts(rows, prompts, tails)

    def read(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """The next S of *tokens* of each of *sequences*: states [B, S, d_model], inside
        :meth:`beside`.
        """
        for row in tokens:
            self.check(row)
        count = len(tokens[0])
        where = self.where(sequences, count)
        width, columns = self._reach(sequences, count)
        self.advance(sequences, count)
        place = Place(*(self._tensor(values) for values in where))
        return self.decode(place, self._tensor([list(row) for row in tokens]), width, columns)

    def where(self, sequences: Sequence[int], count: int) -> list[list[int]]:
        """The values of a :class:`Place` for the next *count* tokens, for which it makes room."""
        rows = [self._row_of[sequence] for sequence in sequences]
        read = [self._read[row] for row in rows]
        needed = 1 + max(rows), count + max(read)
        if needed[0] > self.own.rows or needed[1] > self.own.columns:
            with self.beside():
                self.own.reserve(*needed)
        return [rows, read, [self._prompts[row] for row in rows]]

    def advance(self, sequences: Sequence[int], count: int) -> None:
        """*count* tokens of each of *sequences* have been read for good."""
        for sequence in sequences:
            self._read[self._row_of[sequence]] += count

    def length(self, sequence: int) -> int:
        """Columns that the decoder has read of *sequence*."""
        return self._read[self._row_of[sequence]]

    def decode(self, place: Place, tokens: Tensor, width: int, columns: int) -> Tensor:
        """The states [B, S, d_model] of *tokens* [B, S] at *place*, inside :meth:`beside`.

        *width* and *columns* are how much of the two caches is looked at: at least what the
        sequences have read. Only the device is used, so that it can be captured.
        """
        decoder = self.model.decoder
        ahead = torch.arange(tokens.shape[1], device=self.device)
        at = place.at[:, None] + ahead
        bias = decoder.positions(at, torch.arange(width, device=self.device))
        memory = [self.prompt.get(b, place.rows, columns) for b in range(self.model.spec.blocks)]
        unseen = self.model.unseen(place.lengths, columns)

        def remember(block: int, fresh: KeysValues) -> KeysValues:
            self.own.put(block, place.rows, at, fresh)
            return self.own.get(block, place.rows, width)

        states: Tensor = decoder(self.model.embedding(tokens), bias, memory, unseen, remember)
        return states

    def chances(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [..., L, E] and [..., windows, L, E] of *states* [..., d_model]."""
        now, again = self.model.heads(states)
        return torch.sigmoid(now), torch.sigmoid(again)

    def _scores(self, work: Callable[[], Tensor]) -> LiveScores:
        with self.beside():
            now, again = self.chances(work())
            if self.stream is None:
                return LiveScores(now, again)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self.stream)
        return LiveScores(now, again, done)

    def _row(self, sequence: int) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._read)
            self._read.append(0)
            self._prompts.append(0)
        self._row_of[sequence] = row
        return row

    def _reach(self, sequences: Sequence[int], count: int) -> tuple[int, int]:
        """Columns of the two caches that *count* more tokens of *sequences* look at."""
        rows = [self._row_of[sequence] for sequence in sequences]
        return count + max(self._read[r] for r in rows), max(self._prompts[r] for r in rows)

    def _tensor(self, values: object) -> Tensor:
        made = torch.tensor(values, dtype=torch.int64)
        if self.device.type != "cuda":
            return made
        return made.pin_memory().to(self.device, non_blocking=True)

    def _read_prompts(
        self, rows: list[int], prompts: Sequence[Sequence[int]], tails: list[int]
    ) -> Tensor:
        """Fills both caches; the states of the prompts."""
        model, width = self.model, 1 + max(map(len, prompts))
        start = model.spec.start
        padded = [[start, *prompt] + [start] * (width - 1 - len(prompt)) for prompt in prompts]
        lengths, where = self._tensor([1 + len(p) for p in prompts]), self._tensor(rows)
        states = model.encode(self._tensor(padded), lengths)
        columns = torch.arange(width, device=self.device).expand(len(rows), -1)
        self.prompt.reserve(1 + max(rows), width)
        for block, fresh in enumerate(model.decoder.memory(states)):
            self.prompt.put(block, where, columns, fresh)
        longest = max(tails)
        self.own.reserve(1 + max(rows), max(longest, 1))
        if longest:
            # Beyond a shorter tail lies what the sequence's own tokens overwrite.
            ends = [list(p[len(p) - t :]) for p, t in zip(prompts, tails, strict=True)]
            tokens = self._tensor([end + [start] * (longest - len(end)) for end in ends])
            place = Place(where, torch.zeros_like(where), lengths)
            self.decode(place, tokens, longest, width)
        return states
