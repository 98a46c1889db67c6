"""Runs of tokens as plain arrays, and the rules every stored token must keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import FloatArray, IntArray, TokenSequence

BoolArray = npt.NDArray[np.bool_]

INT32_MAX = 2**31 - 1

#: What stands for an unknown token id, and for an expert past the last layer, in memory.
ABSENT = -1


@dataclass
class TokenBlock:
    """T consecutive tokens of one or several sequences.

    *sequence*, *position*, *decode* and *tokens* are [T]; *experts* and *weights*
    [T, layers, k]; each of *ahead* [T, layers, m].
    """

    sequence: IntArray
    position: IntArray
    decode: BoolArray
    experts: IntArray
    tokens: IntArray | None = None
    weights: FloatArray | None = None
    ahead: tuple[IntArray, ...] = ()

    def __len__(self) -> int:
        return len(self.sequence)

    def cut(self, start: int, stop: int) -> TokenBlock:
        """The tokens from *start* up to *stop*, as views."""
        part = slice(start, stop)
        return TokenBlock(
            self.sequence[part],
            self.position[part],
            self.decode[part],
            self.experts[part],
            None if self.tokens is None else self.tokens[part],
            None if self.weights is None else self.weights[part],
            tuple(array[part] for array in self.ahead),
        )

    def split(self) -> Iterator[TokenBlock]:
        """One block per run of equal sequence ids."""
        edges = np.flatnonzero(np.diff(self.sequence)) + 1
        bounds = [0, *edges.tolist(), len(self)]
        for start, stop in itertools.pairwise(bounds):
            yield self.cut(start, stop)


def block_of(sequence: TokenSequence) -> TokenBlock:
    """View *sequence* as a block."""
    count = len(sequence)
    return TokenBlock(
        np.full(count, sequence.id, np.int64),
        sequence.positions,
        np.arange(count) >= sequence.prefill,
        sequence.experts,
        sequence.tokens,
        sequence.weights,
        sequence.ahead,
    )


def sequence_of(parts: Sequence[TokenBlock]) -> TokenSequence:
    """Join the blocks of one sequence."""

    def join(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    tokens = [part.tokens for part in parts if part.tokens is not None]
    weights = [part.weights for part in parts if part.weights is not None]
    known = join(tokens) if tokens else None
    return TokenSequence(
        id=int(parts[0].sequence[0]),
        experts=join([part.experts for part in parts]),
        positions=join([part.position for part in parts]),
        prefill=sum(int(np.count_nonzero(~part.decode)) for part in parts),
        tokens=None if known is None or (known == ABSENT).all() else known,
        weights=join(weights) if weights else None,
        ahead=tuple(
            join([part.ahead[depth] for part in parts]) for depth in range(len(parts[0].ahead))
        ),
    )


class Checker:
    """Holds the rules of a trace over blocks that are fed to it in file order."""

    def __init__(self, where: str, model: ModelSpec) -> None:
        self.where = where
        self.model = model
        self.tokens = 0
        self._last: tuple[int, int, bool] | None = None

    def check(self, block: TokenBlock) -> None:
        """Raise :class:`InputError` at the first broken rule of *block*."""
        if not len(block):
            return
        self._check_numbers(block)
        self._check_order(block)
        self._check_experts(block)
        if block.weights is not None:
            bad = ~(np.isfinite(block.weights) & (block.weights >= 0))
            if bad.any():
                t, layer, slot = _first(bad)
                found = block.weights[t, layer, slot]
                self._fail(block, t, layer, f"weight {found}, expected a finite number >= 0")
        for depth, ahead in enumerate(block.ahead, start=1):
            self._check_ahead(block, depth, ahead)
        self._last = (int(block.sequence[-1]), int(block.position[-1]), bool(block.decode[-1]))
        self.tokens += len(block)

    def _check_numbers(self, block: TokenBlock) -> None:
        for name, values in (("sequence", block.sequence), ("position", block.position)):
            bad = (values < 0) | (values > INT32_MAX)
            if bad.any():
                (t,) = _first(bad)
                self._fail(block, t, 0, f"{name} {values[t]}, expected 0 to {INT32_MAX}")
        if block.tokens is not None:
            bad = (block.tokens < ABSENT) | (block.tokens > INT32_MAX)
            if bad.any():
                (t,) = _first(bad)
                self._fail(block, t, 0, f"token {block.tokens[t]}, expected 0 to {INT32_MAX}")

    def _check_order(self, block: TokenBlock) -> None:
        last = self._last or (-1, 0, False)
        sequence = np.concatenate(([last[0]], block.sequence))
        position = np.concatenate(([last[1]], block.position))
        decode = np.concatenate(([last[2]], block.decode))
        bad = sequence[1:] < sequence[:-1]
        if bad.any():
            (t,) = _first(bad)
            self._fail(block, t, 0, f"follows sequence {sequence[t]}, expected rising sequences")
        same = sequence[1:] == sequence[:-1]
        bad = same & (position[1:] != position[:-1] + 1)
        if bad.any():
            (t,) = _first(bad)
            what = "repeats" if position[t + 1] == position[t] else "follows"
            text = f"position {position[t + 1]} {what} {position[t]}, expected {position[t] + 1}"
            self._fail(block, t, 0, text)
        bad = same & decode[:-1] & ~decode[1:]
        if bad.any():
            (t,) = _first(bad)
            self._fail(block, t, 0, "phase prefill after decode, expected all prefill tokens first")

    def _check_experts(self, block: TokenBlock) -> None:
        experts, count = block.experts, self.model.experts
        if experts.min() < 0 or experts.max() >= count:
            t, layer, slot = _first((experts < 0) | (experts >= count))
            found = experts[t, layer, slot]
            self._fail(block, t, layer, f"expert {found}, expected 0 to {count - 1}")
        bad = repeats(experts)
        if bad.any():
            t, layer = _first(bad)
            found = experts[t, layer].tolist()
            self._fail(block, t, layer, f"experts {found} hold one twice, expected distinct ids")

    def _check_ahead(self, block: TokenBlock, depth: int, ahead: IntArray) -> None:
        inside = max(self.model.layers - depth, 0)
        good = (ahead[:, :inside] >= 0) & (ahead[:, :inside] < self.model.experts)
        if not good.all():
            t, layer, slot = _first(~good)
            found = ahead[t, layer, slot]
            said = "nothing" if found == ABSENT else found
            text = f"ahead_{depth} holds {said}, expected 0 to {self.model.experts - 1}"
            self._fail(block, t, layer, text)
        past = ahead[:, inside:] != ABSENT
        if past.any():
            t, layer, slot = _first(past)
            found = ahead[t, inside + layer, slot]
            text = f"ahead_{depth} holds {found}, expected nothing past the last layer"
            self._fail(block, t, inside + layer, text)
        bad = repeats(ahead[:, :inside])
        if bad.any():
            t, layer = _first(bad)
            text = f"ahead_{depth} {ahead[t, layer].tolist()} holds one expert twice"
            self._fail(block, t, layer, f"{text}, expected distinct ids")

    def _fail(self, block: TokenBlock, t: int, layer: int, text: str) -> NoReturn:
        row = (self.tokens + t) * self.model.layers + layer
        place = f"sequence {block.sequence[t]}, position {block.position[t]}, layer {layer}"
        raise InputError(f"{self.where}: row {row} ({place}): {text}")


def narrowed(block: TokenBlock) -> TokenBlock:
    """The checked *block* in the types of the format."""
    if block.weights is not None and block.weights.dtype == np.float64:
        block.weights = block.weights.astype(np.float32)
    block.sequence = block.sequence.astype(np.int32, copy=False)
    block.position = block.position.astype(np.int32, copy=False)
    block.experts = block.experts.astype(np.int16, copy=False)
    block.ahead = tuple(array.astype(np.int16, copy=False) for array in block.ahead)
    if block.tokens is not None:
        block.tokens = block.tokens.astype(np.int32, copy=False)
    return block


def repeats(ids: IntArray) -> BoolArray:
    """Where a set along the last axis holds one id twice: bool of the leading axes."""
    found = np.zeros(ids.shape[:-1], bool)
    width = ids.shape[-1]
    for i in range(width):
        for j in range(i + 1, width):
            found |= ids[..., i] == ids[..., j]
    return found


def _first(bad: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the first True of *bad*."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
