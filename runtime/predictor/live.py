"""A predictor beside a running model: it keeps what it has read and takes one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.predictor.blocks import KeysValues
from runtime.predictor.model import Predictor
from traces.errors import InputError

#: Rows and columns that a cache has at first; it doubles when it is full.
FIRST_ROWS, FIRST_COLUMNS = 4, 64


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


class _Cache:
    """Keys and values of one attention of every decoder block: [blocks, 2, rows, heads, S, d_kv].

    It grows by doubling; what is beyond a row's own length is never looked at.
    """

    def __init__(self, model: Predictor) -> None:
        spec = model.spec
        self._store = torch.zeros(
            spec.blocks, 2, FIRST_ROWS, spec.heads, FIRST_COLUMNS, spec.d_kv,
            device=next(model.parameters()).device,
        )  # fmt: skip

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many *rows* and *columns*."""
        old = self._store
        shape = list(old.shape)
        for axis, needed in ((2, rows), (4, columns)):
            while shape[axis] < needed:
                shape[axis] *= 2
        if shape != list(old.shape):
            self._store = old.new_zeros(shape)
            self._store[:, :, : old.shape[2], :, : old.shape[4]] = old

    def put(self, block: int, rows: Tensor, columns: Tensor, fresh: KeysValues) -> None:
        """Keep *fresh* keys and values [B, heads, S, d_kv] at *rows* [B], *columns* [B, S]."""
        for kind, values in enumerate(fresh):
            self._store[block, kind][rows[:, None], :, columns] = values.transpose(1, 2)

    def get(self, block: int, rows: Tensor, columns: int) -> KeysValues:
        """The first *columns* of *rows*."""
        kept = self._store[block, :, :, :, :columns]
        return kept[0][rows], kept[1][rows]


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
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.stream = stream
        self._own, self._prompt = _Cache(model), _Cache(model)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._read: list[int] = []
        self._prompts: list[int] = []

    def __len__(self) -> int:
        """Sequences that are followed."""
        return len(self._row_of)

    def begin(self, sequence: int, prompt: Sequence[int]) -> LiveScores:
        """Follow *sequence*, whose *prompt* is all known: the scores of its tokens."""
        self._check(prompt)
        if sequence in self._row_of:
            raise ValueError(f"sequence {sequence} is followed already")
        row = self._row(sequence)
        tail = min(self.model.spec.tail, len(prompt))
        self._prompts[row], self._read[row] = 1 + len(prompt), tail
        return self._beside(lambda: self._begin(row, list(prompt), tail))

    def step(self, sequences: Sequence[int], tokens: Sequence[int]) -> LiveScores:
        """Read the next of *tokens* of each of *sequences*: their scores, in that order."""
        self._check(tokens)
        rows = [self._row_of[sequence] for sequence in sequences]
        at = [self._read[row] for row in rows]
        for row in rows:
            self._read[row] += 1
        return self._beside(lambda: self._step(rows, at, list(tokens)))

    def end(self, sequence: int) -> None:
        """Forget *sequence*; its room is used again."""
        self._free.append(self._row_of.pop(sequence))

    def _check(self, tokens: Sequence[int]) -> None:
        limit = self.model.spec.vocabulary
        for token in tokens:
            if not 0 <= token < limit:
                raise InputError(
                    f"token id {token}, expected below {limit}, the predictor's vocabulary"
                )

    def _row(self, sequence: int) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._read)
            self._read.append(0)
            self._prompts.append(0)
        self._row_of[sequence] = row
        return row

    def _beside(self, work: Callable[[], Tensor]) -> LiveScores:
        """Issue *work* to the predictor's stream."""
        with torch.inference_mode():
            if self.stream is None:
                return LiveScores(*self._chances(work()))
            # What is read is made on the host; nothing of the model's stream is waited for.
            with torch.cuda.stream(self.stream):
                now, again = self._chances(work())
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self.stream)
        return LiveScores(now, again, done)

    def _chances(self, states: Tensor) -> tuple[Tensor, Tensor]:
        now, again = self.model.heads(states)
        return torch.sigmoid(now), torch.sigmoid(again)

    def _tensor(self, values: object) -> Tensor:
        made = torch.tensor(values, dtype=torch.int64)
        if self.device.type != "cuda":
            return made
        return made.pin_memory().to(self.device, non_blocking=True)

    def _begin(self, row: int, prompt: list[int], tail: int) -> Tensor:
        """The states [n, d_model] of a prompt; fills both caches."""
        model, length = self.model, 1 + len(prompt)
        ids = self._tensor([[model.spec.start, *prompt]])
        states = model.encode(ids, self._tensor([length]))
        rows, columns = self._tensor([row]), self._tensor([range(length)])
        self._prompt.reserve(row + 1, length)
        for block, fresh in enumerate(model.decoder.memory(states)):
            self._prompt.put(block, rows, columns, fresh)
        if tail:
            at = [list(range(tail))]
            self._decode([row], at, [prompt[len(prompt) - tail :]])
        return states[0, 1:]

    def _step(self, rows: list[int], at: list[int], tokens: list[int]) -> Tensor:
        """The states [B, d_model] of one token of each row."""
        return self._decode(rows, [[place] for place in at], [[token] for token in tokens])[:, 0]

    def _decode(self, rows: list[int], at: list[list[int]], tokens: list[list[int]]) -> Tensor:
        """The states [B, S, d_model] of *tokens* [B, S], the decoder's columns *at* [B, S]."""
        decoder, width = self.model.decoder, 1 + max(map(max, at))
        self._own.reserve(max(rows) + 1, width)
        lengths = [self._prompts[row] for row in rows]
        where, columns = self._tensor(rows), self._tensor(at)
        bias = decoder.positions(columns, torch.arange(width, device=self.device))
        memory = [self._prompt.get(b, where, max(lengths)) for b in range(self.model.spec.blocks)]
        unseen = self.model.unseen(self._tensor(lengths), max(lengths))

        def remember(block: int, fresh: KeysValues) -> KeysValues:
            self._own.put(block, where, columns, fresh)
            return self._own.get(block, where, width)

        embedded = self.model.embedding(self._tensor(tokens))
        states: Tensor = decoder(embedded, bias, memory, unseen, remember)
        return states
