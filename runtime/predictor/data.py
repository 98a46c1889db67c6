"""Traces as what a predictor learns from: token ids, and the experts they took."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from policies.sidecar import trace_fingerprint
from runtime.predictor.model import Inputs
from runtime.predictor.spec import PredictorSpec
from traces.errors import InputError
from traces.model import ModelSpec
from traces.statistics.pieces import domains_of
from traces.store import StoredTrace, open_trace
from traces.trace import TokenSequence

#: A vocabulary that is not given is the largest id of the traces, rounded up to this.
VOCABULARY_STEP = 256

#: Batches among which sequences are sorted by length, so that little is padded.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Corpus:
    """Sequences of one model with a token id for every token, and the *domains* of each.

    *vocabulary* is how many ids the model knows, None where nobody has said so.
    """

    name: str
    model: ModelSpec
    sequences: tuple[TokenSequence, ...]
    domains: tuple[str, ...]
    vocabulary: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    @property
    def highest(self) -> int:
        """The largest token id."""
        return max(int(ids_of(sequence).max()) for sequence in self.sequences)

    def fingerprint(self) -> str:
        """Of everything that a training depends on: token ids and the experts they took."""
        digest = hashlib.sha256(trace_fingerprint(self.model, self.sequences).encode())
        for sequence in self.sequences:
            digest.update(np.ascontiguousarray(sequence.experts, np.int16).tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise :class:`InputError` where a token id is not below *vocabulary*."""
        for sequence in self.sequences:
            ids = ids_of(sequence)
            if int(ids.max()) >= vocabulary:
                at = int(np.argmax(ids >= vocabulary))
                raise InputError(
                    f"{self.name}: sequence {sequence.id}, position {sequence.positions[at]}: "
                    f"token id {ids[at]}, expected below {vocabulary}, the predictor's vocabulary"
                )


def ids_of(sequence: TokenSequence) -> npt.NDArray[np.integer[Any]]:
    """The token ids of a sequence that is known to have them."""
    assert sequence.tokens is not None
    return sequence.tokens


def read_corpus(path: str | Path, columns: Sequence[str] = ("token",)) -> Corpus:
    """The trace *path* in memory with the optional *columns* it has, token ids among them.

    A trace without token ids, or with a token whose id is unknown, raises :class:`InputError`.
    """
    stored = open_trace(path)
    if not stored.has_tokens:
        raise InputError(f"{path}: has no token ids, expected a trace with the column 'token'")
    sequences = tuple(stored.sequences(tuple(columns)))
    for sequence in sequences:
        if sequence.tokens is None or (sequence.tokens < 0).any():
            at = 0 if sequence.tokens is None else int(np.argmax(sequence.tokens < 0))
            raise InputError(
                f"{path}: sequence {sequence.id}, position {sequence.positions[at]}: "
                "token id unknown, expected one for every token"
            )
    domains = tuple(label or "all" for label in domains_of(stored, len(sequences)))
    return Corpus(str(path), stored.model, sequences, domains, _stated(stored))


def _stated(stored: StoredTrace) -> int | None:
    """The vocabulary that a capture wrote down; None if this is none, or older than that."""
    notes = stored.extra.get("capture")
    found = notes.get("vocabulary") if isinstance(notes, dict) else None
    return found if type(found) is int and found > 0 else None


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several traces of one model as one; another model's is an :class:`InputError`."""
    first = corpora[0]
    stated = [corpus for corpus in corpora if corpus.vocabulary is not None]
    for other in stated[1:]:
        if other.vocabulary != stated[0].vocabulary:
            raise InputError(
                f"{other.name}: model has a vocabulary of {other.vocabulary}, expected "
                f"{stated[0].vocabulary} as in {stated[0].name}"
            )
    for other in corpora[1:]:
        for field in ("name", "layers", "experts", "top_k"):
            found, expected = getattr(other.model, field), getattr(first.model, field)
            if found != expected:
                raise InputError(
                    f"{other.name}: model has {field} = {found}, expected {expected} as in "
                    f"{first.name}"
                )
    return Corpus(
        ", ".join(corpus.name for corpus in corpora),
        first.model,
        tuple(sequence for corpus in corpora for sequence in corpus.sequences),
        tuple(domain for corpus in corpora for domain in corpus.domains),
        stated[0].vocabulary if stated else None,
    )


def rounded_vocabulary(highest: int) -> int:
    """A vocabulary that has token id *highest*, where nobody says how many the model knows."""
    return -(-(highest + 1) // VOCABULARY_STEP) * VOCABULARY_STEP


def shortened(sequence: TokenSequence, most: int) -> TokenSequence:
    """The first *most* tokens of *sequence*, without what training does not read."""
    part = slice(0, most)
    return TokenSequence(
        sequence.id,
        sequence.experts[part],
        sequence.positions[part],
        min(sequence.prefill, most),
        ids_of(sequence)[part],
    )


def inputs_of(sequences: Sequence[TokenSequence], spec: PredictorSpec) -> Inputs:
    """*sequences* as one padded batch, on the host."""
    tails = [min(spec.tail, sequence.prefill) for sequence in sequences]
    columns = 1 + max(sequence.prefill for sequence in sequences)
    width = max(1, *(len(s) - s.prefill + t for s, t in zip(sequences, tails, strict=True)))
    longest = max(map(len, sequences))
    prompt = np.full((len(sequences), columns), spec.start, np.int64)
    decoded = np.full((len(sequences), width), spec.start, np.int64)
    place = np.zeros((len(sequences), longest), np.int64)
    for row, (sequence, tail) in enumerate(zip(sequences, tails, strict=True)):
        ids, cut = ids_of(sequence), sequence.prefill
        prompt[row, 1 : 1 + cut] = ids[:cut]
        decoded[row, : len(ids) - cut + tail] = ids[cut - tail :]
        place[row, :cut] = np.arange(1, 1 + cut)
        place[row, cut : len(ids)] = columns + tail + np.arange(len(ids) - cut)
    lengths = np.array([1 + sequence.prefill for sequence in sequences])
    return Inputs(*map(torch.from_numpy, (prompt, lengths, decoded, place)))


def experts_of(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """The experts int16 [B, N, L, k], 0 after a sequence's end, and the lengths int64 [B]."""
    lengths = [len(sequence) for sequence in sequences]
    shape = (len(sequences), max(lengths), *sequences[0].experts.shape[1:])
    experts = np.zeros(shape, np.int16)
    for row, sequence in enumerate(sequences):
        experts[row, : len(sequence)] = sequence.experts
    return torch.from_numpy(experts), torch.tensor(lengths)


def batches_of(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """The sequences of each batch of one epoch: drawn, then sorted by length within a stretch."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    groups: list[list[int]] = []
    for first in range(0, len(order), batch * SORTED_BATCHES):
        stretch = sorted(
            order[first : first + batch * SORTED_BATCHES].tolist(), key=lambda i: lengths[i]
        )
        groups += [stretch[i : i + batch] for i in range(0, len(stretch), batch)]
    return (groups[i] for i in rng.permutation(len(groups)).tolist())
