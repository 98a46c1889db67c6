"""Between parquet columns and token blocks: types, nulls and the row grid.

Row numbers in messages count from 0 over the whole file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from traces.block import ABSENT, INT32_MAX, BoolArray, TokenBlock
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import IntArray

REQUIRED = ("sequence", "position", "phase", "layer", "experts")
AHEAD = ("ahead_1", "ahead_2", "ahead_3")
OPTIONAL = ("token", "weights", *AHEAD)
PHASES = ("prefill", "decode")

METADATA_KEY = b"simctl"

#: Rows of one row group, and of one batch when reading.
GROUP_ROWS = 131072


@dataclass(frozen=True)
class Place:
    """Where a batch of rows lies, for error messages."""

    path: str
    first_row: int

    def error(self, row: int, text: str) -> InputError:
        """An error about the batch's row *row*."""
        return InputError(f"{self.path}: row {self.first_row + row}: {text}")


def check_schema(path: str, schema: Any, model: ModelSpec) -> None:
    """Raise :class:`InputError` unless *schema* has the columns of a trace of *model*."""
    for name in REQUIRED:
        if name not in schema.names:
            raise InputError(
                f"{path}: column {name!r} is missing, found {', '.join(schema.names) or 'none'}"
            )
    for name in (*REQUIRED, *OPTIONAL):
        if name in schema.names:
            _check_type(path, name, schema.field(name).type, model)
    depths = [name in schema.names for name in AHEAD]
    if depths != sorted(depths, reverse=True):
        absent = AHEAD[depths.index(False)]
        raise InputError(f"{path}: column {absent!r} is missing, expected it before deeper ones")


def _check_type(path: str, name: str, kind: Any, model: ModelSpec) -> None:
    if name == "phase":
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        fits = pa.types.is_string(text) or pa.types.is_large_string(text)
        expected = "strings"
    elif name in ("experts", "weights", *AHEAD):
        fits = _is_list(kind) and _holds(name, kind.value_type)
        expected = f"lists of {'floats' if name == 'weights' else 'integers'}"
    else:
        fits = _holds(name, kind) or (name == "token" and pa.types.is_null(kind))
        expected = "integers"
    if not fits:
        raise InputError(f"{path}: column {name!r} holds {kind}, expected {expected}")
    fixed = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    if name in ("experts", "weights") and fixed not in (None, model.top_k):
        raise InputError(
            f"{path}: column {name!r} holds {fixed} per row, "
            f"expected the model's top_k = {model.top_k}"
        )


def _holds(name: str, kind: Any) -> bool:
    """Whether values of *kind* suit the column; pandas makes floats of integers with gaps."""
    floats = pa.types.is_floating(kind) and name in ("weights", "token", *AHEAD)
    return bool(floats or (pa.types.is_integer(kind) and name != "weights"))


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )


@dataclass
class Rows:
    """Rows of a trace before they are known to form whole tokens; arrays by column name."""

    columns: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["layer"])

    def join(self, later: Rows) -> Rows:
        """These rows and *later* after them."""
        if not len(self):
            return later
        return Rows(
            {
                name: np.concatenate((values, later.columns[name]))
                for name, values in self.columns.items()
            }
        )

    def cut(self, start: int, stop: int) -> Rows:
        """The rows from *start* up to *stop*, as views."""
        return Rows({name: values[start:stop] for name, values in self.columns.items()})


def rows_of(batch: Any, model: ModelSpec, place: Place, widths: dict[str, int]) -> Rows:
    """Decode a record batch into arrays; *widths* remembers the m of each ahead column."""
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in batch.schema.names:
        column = batch.column(name)
        if name == "phase":
            columns[name] = _phases(column, place)
        elif name == "token":
            columns[name] = _tokens(column, place)
        elif name in ("experts", "weights"):
            columns[name] = _lists(column, name, model.top_k, place)
        elif name in AHEAD:
            widths[name] = widths.get(name) or _width(column)
            columns[name] = _lists(column, name, widths[name], place, nullable=True)
        else:
            columns[name] = _integers(column, name, place)
    return Rows(columns)


def tokens_of(rows: Rows, model: ModelSpec, place: Place) -> TokenBlock:
    """Fold whole tokens out of *rows*: layers 0 to L - 1 in order, all of one token."""
    layers = model.layers
    found = rows.columns["layer"]
    expected = np.tile(np.arange(layers), len(rows) // layers)
    bad = found != expected
    if bad.any():
        row = int(np.argmax(bad))
        raise place.error(row, _layer_text(rows, row, layers))
    per_token = {}
    for name in ("sequence", "position", "phase", "token"):
        if name not in rows.columns:
            continue
        grid = rows.columns[name].reshape(-1, layers)
        odd = grid != grid[:, :1]
        if odd.any():
            row = int(np.argmax(odd))
            text = f"{name} {grid.ravel()[row]}, expected {grid[row // layers, 0]}"
            raise place.error(row, f"{text} as in the token's layer 0")
        per_token[name] = grid[:, 0]

    def fold(name: str) -> npt.NDArray[Any]:
        values = rows.columns[name]
        return values.reshape(-1, layers, values.shape[1])

    return TokenBlock(
        per_token["sequence"],
        per_token["position"],
        per_token["phase"],
        fold("experts"),
        per_token.get("token"),
        fold("weights") if "weights" in rows.columns else None,
        tuple(fold(name) for name in AHEAD if name in rows.columns),
    )


def _layer_text(rows: Rows, row: int, layers: int) -> str:
    found, expected = int(rows.columns["layer"][row]), row % layers
    if not 0 <= found < layers:
        return f"layer {found}, expected 0 to {layers - 1} of the model's {layers} layers"
    token = row - 1 if found == 0 and row else row
    sequence = rows.columns["sequence"][token]
    position = rows.columns["position"][token]
    return (
        f"layer {found}, expected {expected}: the token at sequence {sequence}, "
        f"position {position} needs layers 0 to {layers - 1} once each, in order"
    )


def _integers(column: Any, name: str, place: Place) -> npt.NDArray[Any]:
    if column.null_count:
        raise place.error(_first_null(column), f"{name} is null, expected a whole number")
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _tokens(column: Any, place: Place) -> IntArray:
    if pa.types.is_null(column.type):
        return np.full(len(column), ABSENT, np.int32)
    known: BoolArray = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f":
        known &= ~np.isnan(values)
        values = _whole(np.where(known, values, 0), "token", place)
    bad = known & ((values < 0) | (values > INT32_MAX))
    if bad.any():
        row = int(np.argmax(bad))
        raise place.error(row, f"token {values[row]}, expected 0 to {INT32_MAX} or null")
    return np.where(known, values, ABSENT).astype(np.int32, copy=False)


def _whole(values: npt.NDArray[Any], what: str, place: Place) -> IntArray:
    """Floats that must be whole numbers, as integers."""
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    bad = whole != values
    if bad.any():
        row = int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
        raise place.error(row, f"{what} {values[bad][0]:g}, expected a whole number")
    return whole


def _phases(column: Any, place: Place) -> BoolArray:
    """Which rows are decode."""
    if column.null_count:
        raise place.error(_first_null(column), "phase is null, expected prefill or decode")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    words = column.dictionary.to_pylist()
    indices = column.indices.to_numpy(zero_copy_only=False)
    known = np.array([word in PHASES for word in words], bool)
    bad = ~known[indices]
    if bad.any():
        row = int(np.argmax(bad))
        raise place.error(row, f"phase {words[indices[row]]!r}, expected prefill or decode")
    decode: BoolArray = np.array([word == "decode" for word in words], bool)[indices]
    return decode


def _width(column: Any) -> int:
    """Elements per row of a list column, by its first row that is not null."""
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = pc.list_value_length(column).drop_null()
    return int(lengths[0].as_py()) if len(lengths) else 0


def _lists(
    column: Any, name: str, size: int, place: Place, nullable: bool = False
) -> npt.NDArray[Any]:
    """A list column as [rows, size]; null rows, where allowed, become -1."""
    if column.null_count and not nullable:
        raise place.error(_first_null(column), f"{name} is null, expected {size} values")
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).fill_null(size).to_numpy(zero_copy_only=False)
        if (lengths != size).any():
            row = int(np.argmax(lengths != size))
            raise place.error(row, f"{name} has {lengths[row]} values, expected {size}")
    flat = column.flatten()
    valid: BoolArray = column.is_valid().to_numpy(zero_copy_only=False)
    if flat.null_count:
        row = int(np.flatnonzero(valid)[_first_null(flat) // size])
        raise place.error(row, f"{name} holds a null, expected {size} values")
    values: npt.NDArray[Any] = flat.to_numpy(zero_copy_only=False).reshape(-1, size)
    if column.null_count:
        full = np.full((len(column), size), ABSENT, values.dtype)
        full[valid] = values
        values = full
    if name != "weights" and values.dtype.kind == "f":
        return _whole(values, f"{name} holds", place)
    return values


def _first_null(column: Any) -> int:
    return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
