"""Loose (token, layer) rows to sequences: sorted, counted and checked against their lines."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.block import repeats
from traces.errors import InputError
from traces.importers.base import Imported, checked
from traces.importers.spec import Found, SpecOptions, resolve
from traces.model import ModelSpec
from traces.trace import TokenSequence

Ints = npt.NDArray[np.int64]

#: Ids, positions and layers beyond this fit no trace.
LARGEST = 2**31 - 1


@dataclass
class Row:
    """What one line says; None for what it does not."""

    layer: int
    experts: Sequence[int]
    sequence: Any = None
    position: int | None = None
    weights: Sequence[float] | None = None
    phase: str | None = None
    token: int | None = None


class RowCollector:
    """Collects rows in any order, then yields whole sequences.

    Without positions a new token begins where the layer does not grow. Sequences are numbered
    as they first appear, layers by their rank: recordings count layers that are dense too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines, self._sequence = array("q"), array("q")
        self._position, self._layer = array("q"), array("q")
        self._experts, self._weights = array("q"), array("d")
        self._prefill, self._token = array("b"), array("q")
        self._names: dict[Any, int] = {}
        self._k = 0
        self._has: tuple[bool, ...] = ()
        self._next: dict[int, tuple[int, int]] = {}

    def error(self, line: int, text: str) -> InputError:
        """An error about line number *line*."""
        return InputError(f"{self.path}: line {line}: {text}")

    def add(self, line: int, row: Row) -> None:
        """Take in *row*, read from line number *line*."""
        has = (row.position is not None, row.weights is not None, row.token is not None)
        if not self._has:
            self._has, self._k = has, len(row.experts)
        self._check(line, row, has)
        sequence = self._names.setdefault(row.sequence, len(self._names))
        self._lines.append(line)
        self._sequence.append(sequence)
        self._position.append(
            self._counted(sequence, row) if row.position is None else row.position
        )
        self._layer.append(row.layer)
        self._experts.extend(row.experts)
        self._weights.extend(row.weights or ())
        self._prefill.append(row.phase == "prefill")
        self._token.append(-1 if row.token is None else row.token)

    def _check(self, line: int, row: Row, has: tuple[bool, ...]) -> None:
        if len(row.experts) != self._k or not self._k:
            expected = self._k or "at least one"
            raise self.error(line, f"{len(row.experts)} experts, expected {expected}")
        if row.weights is not None and len(row.weights) != self._k:
            raise self.error(line, f"{len(row.weights)} weights, expected {self._k}")
        for name, now, before in zip(("position", "weights", "token"), has, self._has, strict=True):
            if now != before:
                found, wanted = ("is given", "none") if now else ("is missing", "one")
                raise self.error(line, f"{name} {found}, expected {wanted} as in the first row")
        if row.phase not in (None, "prefill", "decode"):
            raise self.error(line, f"phase {row.phase!r}, expected prefill or decode")
        values = {"layer": row.layer, "position": row.position, "token": row.token}
        for name, value in values.items():
            if value is not None and not 0 <= value <= LARGEST:
                raise self.error(line, f"{name} {value}, expected 0 to {LARGEST}")
        for value in row.experts:
            if not 0 <= value <= LARGEST:
                raise self.error(line, f"expert {value}, expected 0 or more")

    def _counted(self, sequence: int, row: Row) -> int:
        """The position of *row* in a recording that tells none."""
        position, layer = self._next.get(sequence, (0, -1))
        if row.layer <= layer:
            position += 1
        self._next[sequence] = (position, row.layer)
        return position

    def finish(self, options: SpecOptions, source: str) -> Imported:
        """Sort the rows, derive the model and hand the sequences on."""
        if not self._lines:
            raise InputError(f"{self.path}: holds no rows, expected at least one token")
        sequence, position = _ints(self._sequence), _ints(self._position)
        kept, layer = np.unique(_ints(self._layer), return_inverse=True)
        order = np.lexsort((layer, position, sequence))
        found = Found(self.path, len(kept), self._k)
        model = resolve(options, found)
        grid = _Grid(self, model, order, sequence[order], position[order], layer[order])
        grid.check()
        extra: dict[str, Any] = {}
        if kept[-1] != len(kept) - 1:
            extra["layer_ids"] = kept.tolist()
        if any(isinstance(name, str) for name in self._names):
            extra["sequence_names"] = [str(name) for name in self._names]
        sequences = checked(self.path, model, grid.sequences())
        return Imported(model, sequences, source, extra=extra, count=len(self._names))

    def arrays(self, order: Ints) -> dict[str, npt.NDArray[Any]]:
        """The collected values in *order*."""
        values: dict[str, npt.NDArray[Any]] = {
            "lines": _ints(self._lines)[order],
            "experts": _ints(self._experts).reshape(-1, self._k)[order],
            "prefill": np.frombuffer(self._prefill, np.int8)[order],
        }
        if self._has[1]:
            weights = np.frombuffer(self._weights, np.float64).reshape(-1, self._k)
            values["weights"] = weights[order]
        if self._has[2]:
            values["token"] = _ints(self._token)[order]
        return values


class _Grid:
    """Sorted rows, which must be tokens of all layers each."""

    def __init__(
        self,
        rows: RowCollector,
        model: ModelSpec,
        order: Ints,
        sequence: Ints,
        position: Ints,
        layer: npt.NDArray[np.intp],
    ) -> None:
        self.rows, self.model = rows, model
        self.sequence, self.position, self.layer = sequence, position, layer
        self.values = rows.arrays(order)

    def check(self) -> None:
        """Raise :class:`InputError` naming a line unless the rows form a trace."""
        experts, layers = self.values["experts"], self.model.layers
        same = (np.diff(self.sequence) == 0) & (np.diff(self.position) == 0)
        twice = same & (np.diff(self.layer) == 0)
        self._refuse(np.append(False, twice), lambda r: f"{self._token(r)} has this layer twice")
        expected = np.arange(len(self.layer)) % layers
        begins = np.append(True, ~same)
        wrong = (self.layer != expected) | (begins != (expected == 0))
        self._refuse(wrong, self._incomplete)
        if len(self.layer) % layers:
            raise self.rows.error(self._line(-1), self._incomplete(len(self.layer) - 1))
        bad = (experts >= self.model.experts).any(axis=1)
        top = self.model.experts - 1
        self._refuse(bad, lambda r: f"expert {experts[r].max()}, expected 0 to {top}")
        self._refuse(
            repeats(experts),
            lambda r: f"experts {experts[r].tolist()} hold one twice, expected distinct ids",
        )
        weights = self.values.get("weights")
        if weights is not None:
            bad = ~(np.isfinite(weights) & (weights >= 0)).all(axis=1)
            self._refuse(
                bad, lambda r: f"weights {weights[r].tolist()}, expected finite numbers >= 0"
            )

    def _refuse(self, bad: Any, text: Callable[[int], str]) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise self.rows.error(self._line(row), text(row))

    def _line(self, row: int) -> int:
        return int(self.values["lines"][row])

    def _token(self, row: int) -> str:
        return f"the token at sequence {self.sequence[row]}, position {self.position[row]}"

    def _incomplete(self, row: int) -> str:
        if row and self.layer[row] == 0 and row % self.model.layers:
            row -= 1  # the token before is the one that stopped early
        same = (self.sequence == self.sequence[row]) & (self.position == self.position[row])
        found = int(np.count_nonzero(same))
        return f"{self._token(row)} has {found} of {self.model.layers} layers, expected all"

    def sequences(self) -> Iterator[TokenSequence]:
        """The sequences in the order in which they first appeared."""
        layers, values = self.model.layers, self.values
        edges = [0, *(np.flatnonzero(np.diff(self.sequence)) + 1).tolist(), len(self.sequence)]
        for i, first in enumerate(edges[:-1]):
            part = slice(first, edges[i + 1])
            once = slice(first, edges[i + 1], layers)
            decode = values["prefill"][once] == 0
            prefill = int(np.argmax(decode)) if decode.any() else len(decode)
            if not decode[prefill:].all():
                late = first + (prefill + int(np.argmin(decode[prefill:]))) * layers
                raise self.rows.error(self._line(late), "phase prefill after decode")
            yield TokenSequence(
                id=i,
                experts=_folded(values["experts"][part], layers),
                positions=self.position[once],
                prefill=prefill,
                tokens=values["token"][once] if "token" in values else None,
                weights=_folded(values["weights"][part], layers) if "weights" in values else None,
            )


def _folded(values: npt.NDArray[Any], layers: int) -> npt.NDArray[Any]:
    return values.reshape(-1, layers, values.shape[1])


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, np.int64)
