"""Keys and values of the sequences that decode in groups: rows that move, or are gathered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from policies.schedule import RowMove

#: Where a layer keeps what of a cache.
_PARTS = ("keys", "values")


class KvRows:
    """One row for each sequence of a unit: keys and values of all layers of a static cache.

    What has the same shape lies in one tensor [2 * layers, rows, heads, length, dim], so that a
    sequence moves by two kernels.
    """

    def __init__(self, cache: Any, rows: int) -> None:
        """Room for *rows* sequences in the shapes of *cache*, which has been used once."""
        self.rows = rows
        self._places: list[tuple[tuple[int, ...], int]] = []
        counts: defaultdict[tuple[int, ...], int] = defaultdict(int)
        for layer in cache.layers:
            for part in _PARTS:
                shape = tuple(getattr(layer, part).shape[1:])
                self._places.append((shape, counts[shape]))
                counts[shape] += 1
        like = cache.layers[0].keys
        self._tensors = {
            shape: torch.zeros(count, rows, *shape, dtype=like.dtype, device=like.device)
            for shape, count in counts.items()
        }

    def views(self, first: int, size: int) -> list[Tensor]:
        """Rows *first* to *first* + *size* of every layer's keys, values, keys, values..."""
        return [self._tensors[shape][index, first : first + size] for shape, index in self._places]

    def seat(self, cache: Any, first: int, size: int) -> None:
        """Let *cache*, which has been used once, keep what it keeps in *size* rows from *first*."""
        views = iter(self.views(first, size))
        for layer in cache.layers:
            for part in _PARTS:
                setattr(layer, part, next(views))

    def take(self, cache: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep what *cache* [B], which has grown by prompts padded on the left, holds of them.

        The last *lengths*[i] tokens of its sequence i go to row *rows*[i]; a window keeps the
        last that it has room for, each where its position says.
        """
        parts = [getattr(layer, part) for layer in cache.layers for part in _PARTS]
        for values, (shape, index) in zip(parts, self._places, strict=True):
            kept = self._tensors[shape][index]
            room = kept.shape[2]
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                first = max(0, length - room)
                at = torch.arange(first, length, device=kept.device) % room
                tokens = values.shape[2] - length + first
                kept[row].index_copy_(1, at, values[i, :, tokens:])

    def move(self, moves: Sequence[RowMove]) -> None:
        """Make *moves*, all at once, through a buffer: a row may be source and target."""
        for tensor in self._tensors.values():
            length = tensor.shape[3]
            kept = [
                tensor[:, move.source, :, : min(move.kv_tokens, length)].clone() for move in moves
            ]
            for move, values in zip(moves, kept, strict=True):
                tensor[:, move.target, :, : values.shape[2]] = values


class GatheredLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """A layer of a static cache whose step's sequences lie in any rows of it.

    *step_rows* int64 [B] are those rows, *step_positions* int64 [B] where each writes its
    token: set in place before a step, so that a captured graph reads them. A window writes
    over its oldest token.
    """

    step_rows: Tensor
    step_positions: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values [B, heads, 1, dim]; all of the step's rows."""
        found = []
        at = self.step_positions % self.max_cache_len
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[self.step_rows, :, at] = new[:, :, 0]  # type: ignore[index]
            found.append(kept.index_select(0, self.step_rows))  # type: ignore[union-attr]
        return found[0], found[1]


class PlacedLayer(GatheredLayer):  # type: ignore[no-untyped-call]
    """A layer whose rows are those of the step, each with its own place for the next token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values [B, heads, 1, dim]; all rows."""
        at = self.step_positions % self.max_cache_len
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[self.step_rows, :, at] = new[:, :, 0]  # type: ignore[index]
        return self.keys, self.values  # type: ignore[return-value]


def make_gathered(
    cache: Any, rows: Tensor, positions: Tensor, kind: type[GatheredLayer] = GatheredLayer
) -> None:
    """Let every layer of *cache*, which has been used once, use *rows* int64 [B] of it.

    Tokens are written at *positions* int64 [B]; both are read anew at every step. *kind* says
    whether the rows are gathered, or are all there are.
    """
    for layer in cache.layers:
        layer.__class__ = kind
        layer.step_rows, layer.step_positions = rows, positions
        # Windows count on the host how full they are; these are written by position.
        vars(layer).pop("cumulative_length_int", None)
