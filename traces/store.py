"""The trace file: parquet, one row per (token, layer), read and written by row groups.

Neither reading nor writing ever holds more than a row group and one sequence, so that a
trace may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from traces import columns
from traces.block import Checker, TokenBlock, narrowed, sequence_of
from traces.columns import (
    AHEAD,
    OPTIONAL,
    REQUIRED,
    Place,
    Rows,
    check_schema,
    rows_of,
    tokens_of,
)
from traces.errors import InputError, first_line
from traces.model import ModelSpec
from traces.trace import TokenSequence
from traces.writing import replacing, write_file

VERSION = 1


@dataclass(frozen=True)
class StoredTrace:
    """A trace in a parquet file; only its footer has been read.

    *tokens* counts the tokens, *ahead_depth* the ``ahead`` columns; *extra* is whatever
    else its writer noted about it.
    """

    path: Path
    model: ModelSpec
    source: str
    license: str
    tokens: int
    has_tokens: bool
    has_weights: bool
    ahead_depth: int
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    @property
    def layers(self) -> int:
        """MoE layers of its model."""
        return self.model.layers

    @property
    def k(self) -> int:
        """Experts that a token takes in each layer."""
        return self.model.top_k

    def sequences(self, columns: Collection[str] | None = None) -> Iterator[TokenSequence]:
        """Every sequence in file order, streamed and checked.

        *columns* limits the optional columns that are read: any of ``token``, ``weights``,
        ``ahead_1``, ``ahead_2``, ``ahead_3``; by default all there are. Raises
        :class:`InputError` at the first row that breaks a rule of the format.
        """
        wanted = OPTIONAL if columns is None else tuple(columns)
        unknown = set(wanted) - set(OPTIONAL)
        if unknown:
            raise ValueError(f"unknown column {unknown.pop()!r}, expected any of {OPTIONAL}")
        parts: list[TokenBlock] = []
        for block in self._blocks(wanted):
            for part in block.split():
                if parts and part.sequence[0] != parts[0].sequence[0]:
                    yield sequence_of(parts)
                    parts = []
                parts.append(part)
        yield sequence_of(parts)

    def _blocks(self, wanted: Collection[str]) -> Iterator[TokenBlock]:
        """Checked blocks of whole tokens; a token cut by a batch's end waits for the next."""
        checker = Checker(self.name, self.model)
        layers = self.model.layers
        rest: Rows | None = None
        widths: dict[str, int] = {}
        row = 0
        for batch in self._batches(wanted):
            rows = rows_of(batch, self.model, Place(self.name, row), widths)
            row += len(rows)
            if rest is not None:
                rows = rest.join(rows)
            whole = len(rows) // layers * layers
            place = Place(self.name, row - len(rows))
            rest = rows.cut(whole, len(rows))
            if whole:
                block = tokens_of(rows.cut(0, whole), self.model, place)
                checker.check(block)
                yield narrowed(block)
        if rest is None:
            raise InputError(f"{self.path}: holds no rows, expected at least one token")
        if len(rest):
            raise InputError(
                f"{self.path}: ends after row {row - 1} inside a token, "
                f"with {len(rest)} of its {layers} layers"
            )

    def _batches(self, wanted: Collection[str]) -> Iterator[Any]:
        with _open(self.path) as file:
            names = file.schema_arrow.names
            read = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
            read = [name for name in read if name in REQUIRED or name in wanted]
            batches = file.iter_batches(columns.GROUP_ROWS, columns=read)
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise InputError(
                        f"{self.path}: damaged parquet data: {first_line(error)}"
                    ) from None
                if batch is None:
                    return
                if len(batch):
                    yield batch


def open_trace(path: str | Path) -> StoredTrace:
    """Open a trace file: read its footer, check its columns and its metadata.

    Rows are read and checked by :meth:`StoredTrace.sequences`.
    """
    path = Path(path)
    with _open(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        notes = _notes(path, schema.metadata or {})
        model = ModelSpec.from_dict(notes["model"], f"{path}: metadata 'simctl'")
        check_schema(str(path), schema, model)
        if not metadata.num_rows:
            raise InputError(f"{path}: holds no rows, expected at least one token")
        return StoredTrace(
            path,
            model,
            source=notes["source"],
            license=notes["license"],
            tokens=metadata.num_rows // model.layers,
            has_tokens=_any_values(file, "token"),
            has_weights="weights" in schema.names,
            ahead_depth=sum(name in schema.names for name in AHEAD),
            extra=notes["extra"],
        )


def write_trace(
    path: str | Path,
    model: ModelSpec,
    sequences: Iterable[TokenSequence],
    *,
    source: str,
    license: str,
    extra: Mapping[str, Any] | None = None,
) -> StoredTrace:
    """Write *sequences* to the trace file *path* and open it.

    Token ids, weights and ahead columns are written when the first sequence has them; the
    others must then agree. Weights become float16. The file appears when it is whole: an error
    or an interrupt on the way leaves nothing behind. Raises :class:`InputError` when a
    sequence breaks a rule of the format.
    """
    path = Path(path)
    notes = {
        "version": VERSION,
        "model": model.to_dict(),
        "source": source,
        "license": license,
        **({"extra": dict(extra)} if extra else {}),
    }
    with replacing(path) as unfinished:
        write_file(unfinished, str(path), model, sequences, json.dumps(notes))
    return open_trace(path)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The parquet file *path*; whatever is wrong with it becomes an :class:`InputError`."""
    if not path.exists():
        raise InputError(f"{path}: no such file, expected a trace")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a parquet file")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file: {first_line(error)}") from None
    with file:
        yield file


def _notes(path: Path, metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The trace's own metadata, with every field of it present."""
    where = f"{path}: metadata 'simctl'"
    if columns.METADATA_KEY not in metadata:
        raise InputError(f"{where} is missing, expected a file written as a trace (JSON, version)")
    try:
        notes = json.loads(metadata[columns.METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {first_line(error)}") from None
    if not isinstance(notes, dict):
        raise InputError(f"{where} is {notes!r:.40}, expected an object")
    if notes.get("version") != VERSION:
        raise InputError(f"{where}: version {notes.get('version')!r}, expected {VERSION}")
    fields: list[tuple[str, type, Any]] = [
        ("model", dict, None),
        ("source", str, ""),
        ("license", str, ""),
        ("extra", dict, {}),
    ]
    for name, kind, default in fields:
        value = notes.setdefault(name, default)
        if not isinstance(value, kind):
            found = "missing" if value is None else repr(value)
            raise InputError(f"{where}: {name} is {found:.60}, expected a {kind.__name__}")
    return notes


def _any_values(file: Any, name: str) -> bool:
    """Whether a flat column holds anything but nulls, by the footer's statistics."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema == name:
                statistics = column.statistics
                if statistics is None or not statistics.has_null_count:
                    return True
                if statistics.null_count < column.num_values:
                    return True
    return False
