"""Token sequences to a parquet file that appears only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from traces import columns
from traces.block import ABSENT, Checker, TokenBlock, block_of, narrowed
from traces.columns import AHEAD, PHASES, REQUIRED
from traces.errors import InputError, first_line
from traces.model import ModelSpec
from traces.trace import TokenSequence


def write_file(
    target: Path, where: str, model: ModelSpec, sequences: Iterable[TokenSequence], notes: str
) -> None:
    """Stream *sequences* into the parquet file *target*; messages say *where*."""
    checker = Checker(where, model)
    writer: Any = None
    shape: tuple[bool, tuple[int, ...]] | None = None
    pending: list[Any] = []
    try:
        for sequence in sequences:
            block = _stored(sequence, model, where)
            found = (block.weights is not None, tuple(a.shape[2] for a in block.ahead))
            shape = shape or found
            if found != shape:
                raise InputError(
                    f"{where}: sequence {sequence.id} has (weights, ahead widths) {found}, "
                    f"expected {shape} as in the first sequence"
                )
            checker.check(block)
            for table in _tables(narrowed(block), model):
                pending.append(table)
                if sum(map(len, pending)) >= columns.GROUP_ROWS:
                    writer = writer or _writer(target, table.schema, notes)
                    writer.write_table(pa.concat_tables(pending))
                    pending = []
        if shape is None:
            raise InputError(f"{where}: no sequences to write, expected at least one")
        if pending:
            writer = writer or _writer(target, pending[0].schema, notes)
            writer.write_table(pa.concat_tables(pending))
    finally:
        if writer is not None:
            writer.close()


def _stored(sequence: TokenSequence, model: ModelSpec, where: str) -> TokenBlock:
    """The block of *sequence* once its arrays have the shapes of *model*."""
    count = len(sequence)
    grid = (count, model.layers)
    shapes: list[tuple[str, Any, tuple[int, ...]]] = [
        ("experts", sequence.experts, (*grid, model.top_k)),
        ("positions", sequence.positions, (count,)),
        ("tokens", sequence.tokens, (count,)),
        ("weights", sequence.weights, (*grid, model.top_k)),
    ]
    for depth, ahead in enumerate(sequence.ahead, start=1):
        shapes.append((f"ahead_{depth}", ahead, (*grid, ahead.shape[-1] if ahead.ndim else 0)))
    for name, array, expected in shapes:
        if array is not None and array.shape != expected:
            raise InputError(
                f"{where}: sequence {sequence.id}: {name} has shape {array.shape}, "
                f"expected {expected}"
            )
    if not count:
        raise InputError(f"{where}: sequence {sequence.id} has no tokens, expected at least one")
    if len(sequence.ahead) > len(AHEAD):
        raise InputError(
            f"{where}: sequence {sequence.id}: {len(sequence.ahead)} ahead arrays, "
            f"expected at most {len(AHEAD)}"
        )
    block = block_of(sequence)
    if block.weights is not None:
        with np.errstate(over="ignore"):
            block.weights = block.weights.astype(np.float16, copy=False)
    return block


def _tables(block: TokenBlock, model: ModelSpec) -> Iterator[Any]:
    """Arrow tables of at most about columns.GROUP_ROWS rows."""
    step = max(columns.GROUP_ROWS // model.layers, 1)
    for start in range(0, len(block), step):
        yield _table(block.cut(start, start + step), model)


def _table(block: TokenBlock, model: ModelSpec) -> Any:
    layers = model.layers

    def spread(values: Any) -> Any:
        return pa.array(np.repeat(values, layers))

    def lists(values: Any, mask: Any = None) -> Any:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[2], mask=mask)

    tokens = np.full(len(block), ABSENT, np.int32) if block.tokens is None else block.tokens
    layer = np.tile(np.arange(layers, dtype=np.int16), len(block))
    phase = np.repeat(block.decode.astype(np.int8), layers)
    arrays = {
        "sequence": spread(block.sequence),
        "position": spread(block.position),
        "phase": pa.DictionaryArray.from_arrays(pa.array(phase), list(PHASES)),
        "token": pa.array(np.repeat(tokens, layers), mask=np.repeat(tokens == ABSENT, layers)),
        "layer": pa.array(layer),
        "experts": lists(block.experts),
    }
    if block.weights is not None:
        arrays["weights"] = lists(block.weights)
    for depth, ahead in enumerate(block.ahead, start=1):
        arrays[AHEAD[depth - 1]] = lists(ahead, pa.array(layer + depth >= layers))
    return pa.table(arrays)


def _writer(target: Path, schema: Any, notes: str) -> Any:
    schema = schema.with_metadata({columns.METADATA_KEY: notes.encode()})
    # Expert ids and row keys repeat; gate weights do not, a dictionary only slows them down.
    dictionary = [name for name in schema.names if name in REQUIRED or name == "token"]
    dictionary += [f"{name}.list.element" for name in ("experts", *AHEAD) if name in schema.names]
    return pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=dictionary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside *path* that takes its place when the block ends well, else goes."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)
