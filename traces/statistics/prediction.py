"""How well simple tables and recorded gates foretell experts: fitted first, judged after.

Tables are fitted on the first half of the trace's tokens and judged on the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from traces.gates import best
from traces.model import ModelSpec
from traces.statistics.pieces import Piece
from traces.trace import IntArray

Floats = npt.NDArray[np.float64]

#: Cells of the table of token ids; ids met once it is full are taken for unknown.
TOKEN_CELLS = 2**25


def recall(guess: IntArray, hot: npt.NDArray[np.bool_]) -> int:
    """How many of the *guess* [..., m] are among the experts *hot* [..., E]."""
    return int(np.count_nonzero(np.take_along_axis(hot, guess.astype(np.intp), axis=-1)))


class NextLayer:
    """Tables from the experts of a layer to those of the next.

    A table counts, for every expert of layer l, how often each expert of layer l + 1 follows;
    it predicts the k highest sums of conditional frequency over the token's k experts (one
    sequence of the correlation table of Klotski, arXiv 2502.06888: 42 % on Mixtral).
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        shape = (2, max(model.layers - 1, 0), model.experts, model.experts)
        self.together = np.zeros(shape)
        self._counts = np.zeros((model.layers, model.experts))
        self._table: npt.NDArray[np.float32] | None = None
        self._popular: IntArray | None = None
        self._found = np.zeros(max(model.layers - 1, 0))
        self._found_popular = 0
        self._judged = 0

    def add(self, piece: Piece) -> None:
        """Fit on *piece* in the first half, judge it in the second."""
        if self.model.layers < 2:
            return
        # Counting pairs beats products of one-hot matrices: k^2 steps a token, not E^2.
        width, experts = self.model.experts, piece.experts.astype(np.intp)
        for layer in range(self.model.layers - 1):
            pairs = experts[:, layer, :, None] * width + experts[:, layer + 1, None, :]
            found = np.bincount(pairs.ravel(), minlength=width * width)
            self.together[piece.half, layer] += found.reshape(width, width)
        if piece.half == 0:
            self._counts += np.count_nonzero(piece.hot, axis=0)
        else:
            self._judge(piece, experts)

    def _judge(self, piece: Piece, experts: npt.NDArray[np.intp]) -> None:
        k = self.model.top_k
        if self._table is None:
            uses = np.maximum(self._counts[:-1, :, None], 1)
            self._table = (self.together[0] / uses).astype(np.float32)
            self._popular = best(self._counts[1:].astype(np.float32), k)[0]
        assert self._popular is not None
        for layer in range(self.model.layers - 1):
            scores = self._table[layer][experts[:, layer]].sum(axis=1)
            actual = piece.hot[:, layer + 1]
            self._found[layer] += recall(best(scores, k)[0], actual)
            popular = np.broadcast_to(self._popular[layer], (len(piece), k))
            self._found_popular += recall(popular, actual)
        self._judged += len(piece)

    def result(self) -> dict[str, Any]:
        """Recall at k of the tables, and of always naming the k most popular experts."""
        if not self._judged:
            return {}
        each = self._judged * self.model.top_k
        return {
            "next_layer_recall": float(self._found.mean() / each),
            "next_layer_recall_by_layer": [round(float(x / each), 4) for x in self._found],
            "popularity_recall": self._found_popular / (each * len(self._found)),
        }


class Ahead:
    """The recorded predictions of later layers (recall of a gate applied early)."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self._found: dict[int, npt.NDArray[np.int64]] = {}
        self._accesses: dict[int, int] = {}

    def add(self, piece: Piece) -> None:
        """Compare the predictions in *piece* with what the later layers took."""
        for depth, ahead in enumerate(piece.ahead, start=1):
            if depth >= self.model.layers:
                continue
            guess = ahead[:, :-depth].astype(np.intp)
            right = np.take_along_axis(piece.hot[:, depth:], guess, axis=2)
            found = np.count_nonzero(right, axis=(0, 1))
            self._found[depth] = self._found.get(depth, np.zeros_like(found)) + found
            size = len(piece) * (self.model.layers - depth) * self.model.top_k
            self._accesses[depth] = self._accesses.get(depth, 0) + size

    def result(self) -> dict[str, Any]:
        """By depth: recall among the best k, and among all m that are listed."""
        figures = {}
        for depth, found in self._found.items():
            accesses = self._accesses[depth]
            figures[str(depth)] = {
                "recall_k": float(found[: self.model.top_k].sum() / accesses),
                "recall_m": float(found.sum() / accesses),
                "m": len(found),
            }
        return {"ahead": figures} if figures else {}


class TokenTable:
    """A table from token ids to the experts of every layer."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self.most = max(TOKEN_CELLS // (model.layers * model.experts), 1)
        self._rows: dict[int, int] = {}
        self._table = np.zeros((0, model.layers, model.experts), np.float32)
        self._guess: IntArray | None = None
        self._found = 0
        self._known = 0
        self._judged = 0

    def add(self, piece: Piece) -> None:
        """Fit on *piece* in the first half, judge it in the second."""
        if piece.tokens is None:
            return
        if piece.half == 0:
            rows = self._rows_of(piece.tokens, grow=True)
            np.add.at(self._table, rows[rows >= 0], piece.hot[rows >= 0])
        elif self._rows:
            self._judge(piece)

    def _judge(self, piece: Piece) -> None:
        assert piece.tokens is not None
        if self._guess is None:
            self._guess = self._predictions()
        rows = self._rows_of(piece.tokens, grow=False)
        # The last row of the guesses, at index -1, is popularity's: for ids never met.
        self._found += recall(self._guess[rows], piece.hot)
        self._known += int(np.count_nonzero(rows >= 0))
        self._judged += len(piece)

    def _predictions(self) -> IntArray:
        table = self._table[: len(self._rows)]
        popular = table.sum(axis=0)
        # Popularity decides between experts that an id has met equally often.
        weak = popular / (2 * max(float(popular.max()), 1))
        parts = [best(part + weak, self.model.top_k)[0] for part in np.array_split(table, 64)]
        return np.concatenate([*parts, best(popular, self.model.top_k)[0][None]])

    def _rows_of(self, tokens: IntArray, grow: bool) -> npt.NDArray[np.intp]:
        ids, inverse = np.unique(tokens, return_inverse=True)
        if grow:
            for token in ids.tolist():
                if token >= 0 and len(self._rows) < self.most:
                    self._rows.setdefault(token, len(self._rows))
            if len(self._rows) > len(self._table):
                size = min(self.most, 2 * len(self._rows))
                bigger = np.zeros((size, *self._table.shape[1:]), np.float32)
                bigger[: len(self._table)] = self._table
                self._table = bigger
        rows = np.array([self._rows.get(token, -1) for token in ids.tolist()], np.intp)
        return rows[inverse]

    def result(self) -> dict[str, Any]:
        """Recall at k over all layers, and the share of tokens whose id the table knew."""
        if not self._judged:
            return {}
        accesses = self._judged * self.model.layers * self.model.top_k
        return {
            "token_table_recall": self._found / accesses,
            "token_table_known": self._known / self._judged,
        }
